"""Many methods on the same images: the same numbers as one by one, kept, resumed, never another's."""

import itertools
import shutil
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cachetools import LRUCache, cached
from oracles import Toy
from sklearn.metrics import confusion_matrix

from ovdiff_lib import InputError, OVDiff, ProfileError
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.registry import Part
from ovdiff_lib.workbench.baselines import BASELINES, OWN_BACKGROUND
from ovdiff_lib.workbench.console import FEATURES
from ovdiff_lib.workbench.data.classes import synonyms
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.evaluation import layered, shared
from ovdiff_lib.workbench.evaluation import measure as measuring
from ovdiff_lib.workbench.evaluation.banks import of_kinds, of_labels, rows_of_sizes, with_words
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.layered import Layered, factors_of
from ovdiff_lib.workbench.evaluation.measure import Method, above, evaluate, measure, measure_all
from ovdiff_lib.workbench.evaluation.results import code_digest
from ovdiff_lib.workbench.evaluation.rows import LEVELS, SAMPLED, Rival, Row, Searched, both_readings
from ovdiff_lib.workbench.tables.relations import Measured
from ovdiff_lib.workbench.tables.tables import write_table


class Shift(Method):
    """A method of T label maps, by the pixels' values; counts its images."""

    def __init__(self, shift, variants=1, stop=None):
        super().__init__({"shift": shift, "variants": variants}, lambda dataset: self.predict, variants)
        self.__dict__.update(shift=shift, stop=stop, seen=0)

    def predict(self, sample):
        if self.stop is not None and self.seen == self.stop:
            raise KeyboardInterrupt
        self.__dict__["seen"] += 1
        return np.stack([shifted(sample, self.shift + t) for t in range(self.variants)])


def shifted(sample, shift):
    return (sample.image.astype(int).sum(-1) + shift) % 3


def expected(shift, samples=None):
    pairs = [(s.labels[s.labels != 255], shifted(s, shift)[s.labels != 255]) for s in samples or Toy(5)]
    return confusion_matrix(*map(np.concatenate, zip(*pairs, strict=True)), labels=[0, 1, 2])


def run(folder, dataset=None, limit=None, **methods):
    found = measure(methods, dataset or Toy(5), folder=folder, limit=limit, progress=False)
    return {name: results[0].confusion for name, results in found.items()}


def test_counts_are_those_of_sklearn(tmp_path):
    found = measure({"one": Shift(0), "two": Shift(1, 2)}, Toy(5), folder=tmp_path, progress=False)
    assert [len(found[name]) for name in ("one", "two")] == [1, 2]
    for result, shift in zip([*found["one"], *found["two"]], (0, 1, 2), strict=True):
        assert (result.confusion == expected(shift)).all() and result.images == 5
    again = measure({"two": Shift(1, 2)}, Toy(5), folder=tmp_path, progress=False)["two"]  # as they were stored
    alone = [expected(2, [sample]) for sample in Toy(5)]
    assert (found["two"][1].by_image() == alone).all() and (again[1].by_image() == alone).all()
    with pytest.raises(InputError, match="limit"):
        run(None, limit=0, one=Shift(0))


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    """But fewer images, another data set, class name, split and other code are other results."""
    run(tmp_path, one=Shift(0))
    again, new = Shift(0), Shift(2)
    assert (run(tmp_path, again=again, new=new)["again"] == expected(0)).all() and (again.seen, new.seen) == (0, 5)
    fewer, other, named, edited = Shift(0), Shift(0), Shift(0), Shift(0)
    run(tmp_path, limit=3, one=fewer)
    run(tmp_path, Toy(5, vocabulary=Vocabulary.of("cat, boat")), one=other)
    run(tmp_path, Toy(5, name="other"), one=named)
    monkeypatch.setattr(measuring, "code_digest", lambda: "other")
    run(tmp_path, one=edited)
    assert (fewer.seen, other.seen, named.seen, edited.seen) == (3, 5, 5, 5)
    assert code_digest() == code_digest() and len(code_digest()) == 16
    # Images of every split of the mini world begin with the same numbers.
    val, wild = (measuring._key(fewer, load_dataset("mini-object", split), 8) for split in ("val", "wild"))
    assert val["ids"] == wild["ids"] and val != wild


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_study_goes_on(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ready=Shift(0), cut=Shift(1, stop=stop))
    ready, cut = Shift(0), Shift(1)
    found = run(tmp_path, ready=ready, cut=cut)
    assert (ready.seen, cut.seen) == (5 - stop - 1, 5 - stop)
    assert (found["ready"] == expected(0)).all() and (found["cut"] == expected(1)).all()


def test_a_killed_study_loses_only_what_was_not_written(tmp_path, monkeypatch):
    """The counts as they lie on disk while the run is at the fourth image, as after kill -9."""
    monkeypatch.setattr(measuring, "SAVE_EVERY", 0.0)

    class Copying(Shift):
        def predict(self, sample):
            if self.seen == 3:
                shutil.copytree(tmp_path / "deep" / "state", tmp_path / "copy")
            return super().predict(sample)

    run(tmp_path / "deep" / "state", one=Copying(0))
    again = Shift(0)
    assert (run(tmp_path / "copy", one=again)["one"] == expected(0)).all() and again.seen == 2


@pytest.mark.parametrize("damage", ["empty", "torn", "byte", "garbage", "places", "cut", "negative", "more", "wider"])
def test_counts_that_cannot_be_used_are_reported_and_not_used(tmp_path, caplog, damage):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, one=Shift(0, stop=3))
    (state,) = tmp_path.iterdir()
    content = state.read_bytes()
    with np.load(state) as stored:
        fields = dict(stored)
    broken = {"empty": b"", "torn": content[:len(content) // 2], "garbage": b"x" * 100, "byte": content[:60] + b"\xff" * 8 + content[68:]}
    forged = {"places": {"indices": fields["indices"] + 9}, "cut": {"data": fields["data"][1:]}, "negative": {"data": -fields["data"]},
              "more": {"indptr": np.append(fields["indptr"], fields["indptr"][[-1] * 5]), "shape": fields["shape"] + [5, 0]},
              "wider": {"shape": fields["shape"] + [0, 1]}}
    if damage in broken:
        state.write_bytes(broken[damage])
    else:
        np.savez(state, **{**fields, **forged[damage]})
    again = Shift(0)
    assert (run(tmp_path, one=again)["one"] == expected(0)).all() and again.seen == 5
    assert len(caplog.records) == 1 and str(state) in caplog.text


def test_classes_are_built_one_after_the_other_for_all_methods():
    """So that what methods share of a class is remembered no longer than for that class."""
    order = []

    def method(name):
        return Method({}, lambda dataset: order.append(name) or (lambda sample: np.zeros((1, *sample.labels.shape), int)),
                      build=lambda dataset, category: order.append(f"{name} {category.name}"))

    run(None, a=method("a"), b=method("b"))
    assert order == ["a cat", "b cat", "a dog", "b dog", "a", "b"]


def test_maps_at_thresholds_are_the_best_class_where_it_exceeds_them():
    """Scores on, above and below the thresholds, and dropped classes (-inf); row 0 is nonsense that must not be used."""
    rng, thresholds = np.random.default_rng(3), (-1e9, 0.0, 0.25, 0.5)
    scores = rng.choice([-np.inf, -0.1, 0.0, 0.25, 0.3, 0.9], (3, 5, 9)).astype(np.float32)
    scores[0] = 9
    for threshold, labels in zip(thresholds, above(scores, thresholds), strict=True):
        scores[0] = threshold  # the first of equals, so background, has the pixel
        assert (labels == scores.argmax(0)).all()


def test_data_sets_that_share_images_are_measured_side_by_side(tmp_path):
    """With the numbers of each alone, also where one of them was cut short and the other is finished."""
    class Seen(Shift):
        def predict(self, sample):
            seen.append((self.shift, sample.id))
            return super().predict(sample)

    def together(first, second):
        found = measure_all([({"one": first}, Toy(5)), ({"two": second}, Toy(3, "other"))], folder=tmp_path, progress=False)
        return [[result.confusion.tolist() for results in study.values() for result in results] for study in found]

    seen = []
    with pytest.raises(KeyboardInterrupt):
        together(Seen(0, stop=4), Seen(1, 2))
    assert seen == [(shift, str(i)) for i in range(3) for shift in (0, 1)] + [(0, "3"), (0, "4")]
    assert together(Seen(0), Seen(1, 2)) == [[expected(0).tolist()], [expected(s, Toy(3)).tolist() for s in (1, 2)]]
    assert seen[8:] == [(0, "4")]


# ---- the bench

SMALL = {"filters.category_top": 2}


@pytest.fixture(scope="module")
def bench(tiny_profile, tmp_path_factory):
    """Its data sets have their first four classes alone, to save the time of drawing all."""
    bench = Bench(tiny_profile, library=tmp_path_factory.mktemp("bench"), seeds=[3, 4], images=2, progress=False)
    for dataset in map(bench.dataset, ("mini-voc", "mini-voc20", "mini-voc/tune")):
        dataset.vocabulary = Vocabulary(dataset.vocabulary.categories[:4])
        dataset.table[(dataset.table > 4) & (dataset.table < 255)] = 0 if dataset.has_background else 255
    return bench


def test_rows_equal_what_evaluate_says(bench, monkeypatch):
    monkeypatch.setattr(layered, "FACTORS", ())  # on coarser grids scores are equal up to rounding
    rows = [Row("full", SMALL), Row("no filter", {"filters.category": False}), Searched("search", SMALL),
            Row("parts", {**SMALL, "prototypes.kinds": ["part"]}), Searched("tuned", SMALL, tuned=True)]
    found, data = bench.measure(rows, "mini-voc"), bench.dataset("mini-voc")
    for row in (rows[0], rows[1], rows[3]):
        for seed, result in zip((3, 4), found[row.label], strict=True):
            profile = bench.ovdiff(row.settings, seed).profile
            ovdiff = OVDiff(profile, library=bench.library, progress=False)  # with networks of its own
            bank = ovdiff.build(data.vocabulary)
            alone = evaluate(lambda i: ovdiff.segment(i, bank).labels, data, 2, progress=False)  # noqa: B023
            assert (alone.confusion == result.confusion).all(), (row.label, seed)
    ovdiff = bench.ovdiff({**SMALL, "matching.background_threshold": 0.0}, 3)
    bare = ovdiff.build(data.vocabulary).without_background()
    scored, tune = {}, load_dataset("mini-voc/tune")
    for split, some in {"val": data, "tune": bench.dataset("mini-voc/tune")}.items():
        scored[split] = [(some[i].labels, ovdiff.segment(some[i].image, bare).scores[1:]) for i in range(2)]
    best = np.sort(np.concatenate([ovdiff.segment(tune[i].image, bare).scores[1:].max(0).ravel() for i in range(SAMPLED)]))
    tried = [-np.inf, *(best[-(-len(best) * i // LEVELS) - 1] for i in range(1, LEVELS))]
    miou = {split: [] for split in scored}
    for split, threshold in itertools.product(scored, tried):
        matrix = ConfusionMatrix(5)
        for labels, scores in scored[split]:
            matrix.update(np.concatenate([np.full((1, *labels.shape), threshold, np.float32), scores]).argmax(0), labels)
        miou[split].append(matrix.miou())
    assert found["search"][0].miou == max(miou["val"]) > min(miou["val"])
    assert found["tuned"][0].miou == miou["val"][int(np.argmax(miou["tune"]))] and len(set(miou["val"])) > LEVELS / 4
    for row in (rows[0], rows[2], rows[4]):  # what pictures show is what was counted
        shown = evaluate(bench.predictor(row, "mini-voc"), data, 2, progress=False)
        assert (shown.confusion == found[row.label][0].confusion).all()


def test_a_bank_without_background_is_a_footnote_of_its_row(tiny_profile, tmp_path):
    """Also where the counts are read again; and no other row's."""
    bench = Bench(tiny_profile, library=tmp_path, seeds=[3], images=1, progress=False)
    data = bench.dataset("mini-context")
    data.vocabulary = Vocabulary(data.vocabulary.categories[:2] + data.vocabulary.categories[-1:])
    data.table[data.table > 2] = 255
    rows = [Row("all", {"filters.stuff_threshold": 1.0}), Row("none", {"filters.stuff_threshold": -1.0})]
    for _ in range(2):
        whole, bare = bench.cells(rows, {"Context": "mini-context"})
        assert whole.note == "" and bare.note.startswith('Seed 3: The "stuff" filter left none of the ')
        assert Measured("none", 1.0, note=bare.note).bare  # as claims read it
    text = write_table(tmp_path / "t.csv", "t", [whole, bare], tiny_profile, "Rows.")
    assert text.endswith(f"|\n\nmini-context, none: {bare.note}\n")


def test_both_readings_are_there_where_the_profile_has_a_split(tiny_profile, tmp_path):
    rows = [Row("full"), Searched("search", paper="x"), Rival("own", baseline="clip-diy"), Rival("other", baseline="maskclip")]
    labels = [row.label for row in both_readings(rows, tiny_profile)]
    assert labels == ["full", "search", "search, constant from tune", "own", "other", "other, constant from tune"]
    bare = tiny_profile.override({"evaluation.tune": ""})
    assert both_readings(rows, bare) == rows
    bench = Bench(bare, library=tmp_path, seeds=[0], images=1, progress=False)
    with pytest.raises(InputError, match=r"evaluation\.tune"):
        bench.measure([Rival("other", baseline="maskclip", tuned=True)], "mini-voc")
    assert [bench.tune(source) for source in ("mini-voc", "voc/train:/data")] == ["", ""]
    bench.profile = tiny_profile
    assert [bench.tune(source) for source in ("mini-voc", "voc/train:/data")] == ["mini-voc/tune", "voc/tune:/data"]


def test_a_search_tries_quantiles_of_its_own_scores_on_both_splits_alike(tiny_profile, tmp_path, monkeypatch):
    """Whatever scale they have; a baseline without background words here searches, and says so."""
    class Large:
        def __init__(self, profile):
            pass

        def scores(self, image, vocabulary):
            grey = image.mean(-1, dtype=np.float32)
            return np.stack([grey * 0 - np.inf, *(1000 + grey + k for k in range(len(vocabulary)))])

    monkeypatch.setitem(BASELINES, "large", Part(Large))
    monkeypatch.setitem(OWN_BACKGROUND, "large", lambda settings, vocabulary: len(vocabulary) == 20)
    bench = Bench(tiny_profile, library=tmp_path, seeds=[0], images=2, progress=False)
    row = Rival("large", baseline="large")
    on = {source: row.method(bench, 0, source) for source in ("mini-object", "mini-object/tune", "mini-voc", "mini-object42")}
    assert [method.variants for method in on.values()] == [LEVELS, LEVELS, 1, 1]
    assert on["mini-object"].key == on["mini-object/tune"].key and "constants" not in on["mini-voc"].key
    sample = bench.dataset("mini-object")[0]
    maps = [on[source].prepare(bench.dataset(source))(sample) for source in list(on)[:2]]
    assert np.array_equal(*maps) and (maps[0][0] == 42).all()
    shares = (maps[0] == 0).mean((1, 2))
    assert (np.diff(shares) >= 0).all() and shares[-1] > 0.9 and len(np.unique(shares)) > LEVELS / 2
    (cell,) = bench.cells([row], {"Object": "mini-object"})
    assert "a constant stands for it" in cell.note and not bench.cells([row], {"VOC": "mini-voc"})[0].note
    monkeypatch.setitem(BASELINES, "groupvit", Part(Large))  # a published constant takes the place of the search
    row = Rival("published", {"baselines.constants": {"groupvit": {"mini-object": 1200, "mini-object42": 1200}}}, baseline="groupvit")
    with_background, without = (row.method(bench, 0, source) for source in ("mini-object", "mini-object42"))
    labels, = with_background.prepare(bench.dataset("mini-object"))(sample)
    best = Large(None).scores(sample.image, bench.dataset("mini-object").vocabulary)[1:].max(0)
    assert np.array_equal(labels, np.where(best > 1200, 42, 0)) and 0 < (labels == 0).mean() < 1
    assert "published constant 1200 stands" in with_background.notes[0] and with_background.variants == 1 and not without.notes


def test_cells_carry_seeds_and_the_papers_place(bench):
    rows = [Row("everything", SMALL, paper="Full"), Row("own row", {**SMALL, "prototypes.clusters": 2})]
    first, second = bench.cells(rows, {"VOC": "mini-voc"}, "3")
    assert (first.row, first.column, first.n, first.paper.value) == ("everything", "mini-voc", 2, 64.4)
    place = second.paper
    assert (place.table, place.row, place.column, place.value) == ("3", "own row", "VOC", None)
    results = bench.measure([Row("everything", SMALL)], "mini-voc")["everything"]
    assert first.values == pytest.approx([100 * r.miou for r in results])
    assert first.measured == pytest.approx(np.mean(first.values))
    with pytest.raises(InputError, match="same label"):
        bench.measure([Row("a"), Row("a", SMALL)], "mini-voc")
    bare = bench.measure(rows[:1], "mini-voc20")["everything"][0]
    assert bare.class_names == bench.dataset("mini-voc20").vocabulary.names and bare.confusion.sum() > 0


def vectors(bank, index=0):
    return bank.prototypes["sd"][index].vectors


def test_sizes_pool_the_seeds(bench, tiny_profile):
    """Up to support.size a size is a prefix; above, the seeds' sets joined: prototypes of the joined set by hand."""
    size = bench.profile.support.size
    rows = rows_of_sizes(bench, [1, size, 2 * size])
    assert [r.seeds for r in rows] == [2, 2, 1] and rows[0].settings["support.size"] == 1
    bank = rows[2].build(bench, 3, Vocabulary.of("dog"))
    one, two = (bench.ovdiff(SMALL, seed).support("dog") for seed in (3, 4))
    joined, ovdiff = one.joined(two), bench.ovdiff(SMALL, 3)
    assert len(joined) == 2 * size and np.array_equal(joined.take([size]).images, two.images[:1])
    by_hand = ovdiff.prototypes(joined, ovdiff.masks(joined))["sd"]
    assert np.array_equal(vectors(bank), by_hand.vectors)
    for wrong in (0, 2 * size + 1, 3 * size):
        with pytest.raises(InputError):
            rows_of_sizes(bench, [wrong])
    other = Bench(tiny_profile, library=bench.library, seeds=[3, 5], progress=False)  # other sets are pooled
    assert rows[2].method(other, 3, "mini-voc").key != rows[2].method(bench, 3, "mini-voc").key
    assert rows[1].method(other, 3, "mini-voc").key == rows[1].method(bench, 3, "mini-voc").key


def test_banks_that_no_profile_describes(bench):
    """Kinds chosen from the full bank, things and stuff by another table, several words a class."""
    for kinds in (["part"], ["class", "instance"]):
        built = bench.ovdiff({"prototypes.kinds": kinds}, 3).build("dog, boat")
        chosen = of_kinds(kinds)(bench, 3, Vocabulary.of("dog, boat"))
        for one, other in zip(chosen.prototypes["sd"], built.prototypes["sd"], strict=True):
            assert np.array_equal(one.vectors, other.vectors) and one.kind.tolist() == other.kind.tolist()

    bank = of_labels("c8")(bench, 3, Vocabulary.of("dog, grass"))
    assert [c.kind for c in bank.vocabulary] == ["thing", "stuff"]
    assert np.array_equal(vectors(bank, 1), vectors(bench.ovdiff(seed=3).build("grass")))

    bank = with_words({"dog": ["dog", "puppy"], "cat": ["cat"]}, SMALL)(bench, 3, Vocabulary.of("dog, boat"))
    ovdiff, size = bench.ovdiff(SMALL, 3), bench.profile.support.size
    first, second = (bench.ovdiff({"support.size": part}, 3) for part in (-(-size // 2), size // 2))
    joined = first.support("dog").joined(second.support("puppy"))
    assert np.array_equal(vectors(bank), ovdiff.prototypes(joined, ovdiff.masks(joined))["sd"].vectors)
    assert np.array_equal(vectors(bank, 1), vectors(ovdiff.build("boat")))
    table = synonyms()
    assert all(words and len(set(words)) == len(words) for words in table.values())
    assert {c.name for c in load_dataset("mini-voc").vocabulary} <= set(table)


def test_a_setting_that_cannot_be_is_refused_before_anything_is_measured(tiny_profile, tmp_path):
    with pytest.raises(ProfileError, match=r"masks\.segmenter"):
        Bench(tiny_profile, {"masks.segmenter": "nosuch"}, library=tmp_path)


# ---- shared parts

def test_prototypes_are_in_memory_once_and_no_longer_than_somebody_holds_them(bench):
    bench.ovdiff().build("dog")
    first, second = (bench.ovdiff(settings).build("dog") for settings in ({}, {"filters.category": False}))
    assert first.prototypes["sd"][0] is second.prototypes["sd"][0]
    other = bench.ovdiff({"prototypes.clusters": 2}).build("dog")
    assert other.prototypes["sd"][0] is not first.prototypes["sd"][0]
    vectors, held = first.prototypes["sd"][0].vectors.copy(), len(bench.shelf._held)
    del first, second, other
    assert len(bench.shelf._held) < held and np.array_equal(bench.ovdiff().build("dog").prototypes["sd"][0].vectors, vectors)


def test_parts_are_shared_and_remember(bench):
    first, second = (bench.ovdiff(o) for o in ({}, {"prototypes.clusters": 2}))
    assert first.extractors["sd"] is second.extractors["sd"] and first.segmenter is second.segmenter
    assert first.category_filter is second.category_filter
    other = bench.ovdiff({"features.sd_timestep": 100, "filters.category_top": 2})
    assert other.extractors["sd"] is not first.extractors["sd"] and other.category_filter is not first.category_filter
    images, seeds = np.random.default_rng(0).integers(0, 255, (2, 48, 64, 3), np.uint8), np.array([1, 2])
    features = first.extractors["sd"](images, seeds)
    assert first.extractors["sd"](images.copy(), seeds) is features
    assert first.extractors["sd"](images, seeds + 1) is not features
    plain = OVDiff(first.profile, library=bench.library, progress=False)
    assert (plain.extractors["sd"](images, seeds) == features).all()
    fewer = {"features.sd_layers": first.profile.features.sd_layers[::-2]}
    ours, alone = bench.ovdiff(fewer), plain.replaced(fewer).extractors["sd"](images, seeds)
    assert ours.extractors["sd"](images, seeds).equal(alone) and ours.matcher.extractors["sd"](images, seeds).equal(alone)
    assert ours.extractors["sd"].channels == alone.shape[-1] < features.shape[-1]
    vocabulary = Vocabulary.of("dog, boat")
    kept = first.category_filter(images[0], vocabulary)
    assert first.category_filter(images[0], vocabulary) is kept
    assert kept[0] == plain.category_filter(images[0], vocabulary)[0]
    assert first.category_filter(images[0], Vocabulary.of("dog")) is not kept


def test_features_of_windows_are_found_again_by_other_processes(tiny_profile, tmp_path, monkeypatch):
    images, seeds = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), np.uint8), np.arange(3)
    windows = [images[0], images[1, 8:40, 8:40]]  # the diffusion model takes several sizes at a time
    plain = OVDiff(tiny_profile).extractors["sd"](windows, seeds[:2])

    def found(settings=()):
        ovdiff = OVDiff(tiny_profile.override(dict(settings)), networks=shared.SharedNetworks())
        shared.remember.cache.clear()
        return ovdiff.matcher.extractors["sd"](windows, seeds[:2]), ovdiff

    monkeypatch.setenv(FEATURES, str(tmp_path))
    first, ovdiff = found()
    kept, = tmp_path.glob("*.pt")
    assert ovdiff.matcher.extractors["sd"](windows, seeds[:2]) is first and first.equal(plain)
    ovdiff.extractors["sd"](images, seeds)  # drawings are kept as prototypes
    with monkeypatch.context() as patch:
        patch.setattr(type(ovdiff.extractors["sd"]._part), "_extract", None)
        assert found({"matching.refine": "pamr"})[0].equal(plain) and [*tmp_path.glob("*.pt")] == [kept]
    assert not found({"features.sd_timestep": 100})[0].equal(plain) and len([*tmp_path.glob("*.pt")]) == 2
    kept.write_bytes(kept.read_bytes()[:-1])  # of a torn file nothing is believed
    assert found()[0].equal(plain) and found()[0].equal(plain)
    monkeypatch.setattr(shared, "DISK", 0)
    shared._room.cache.clear()
    assert not found({"features.sd_timestep": 300})[0].equal(plain) and len([*tmp_path.glob("*.pt")]) == 2


def test_rows_look_at_an_image_once_for_each_prototypes(bench, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (48, 70, 3), np.uint8)
    plain, asked = OVDiff(bench.profile, {"filters.category": False}, library=bench.library, progress=False), []
    bank, nearest = plain.build("dog, boat, cat"), Matcher._nearest
    monkeypatch.setattr(Matcher, "_nearest", lambda *given: asked.append(len(given[-1])) or nearest(*given))

    def same(kept, settings=(), bank=bank):
        found = []
        for ovdiff in (plain, bench.ovdiff({"filters.category": False})):
            asked.clear()
            [scored] = ovdiff.replaced(dict(settings)).matcher.scores([(image, bank.restrict(kept))])
            found.append((*scored, sum(asked)))
        (scores, winner, all_of_them), (ours, decided, new) = found
        np.testing.assert_allclose(ours, scores, atol=1e-5)
        assert (decided == winner).mean() > 0.99
        return new / all_of_them

    shared.remember.cache.clear()
    assert same([0, 2]) == 1
    assert same([2]) == 0 and same([0, 2], {"matching.refine": "pamr"}) == 0 and same([0, 1]) == 0.5
    assert same([0, 2], bank=bank.without_background()) < 0.6  # regions are told apart; an empty one is looked at


def test_layers_are_matched_on_their_own_grids():
    layers, generator = {1: 3, 2: 5, 4: 4}, torch.Generator().manual_seed(0)
    coarse = [torch.randn(2, width, 8 // factor, 12 // factor, generator=generator) for factor, width in layers.items()]
    features = torch.cat([F.interpolate(one, (8, 12), mode="bilinear") for one in coarse], 1).permute(0, 2, 3, 1)
    assert (factors := factors_of(features, [3, 5, 4])).tolist() == [1] * 3 + [2] * 5 + [4] * 4
    vectors = F.normalize(torch.randn(7, 12, generator=generator), dim=1)
    found, expected = Layered(features, factors).cosines(vectors), F.normalize(features, dim=3).flatten(0, 2) @ vectors.T
    assert torch.allclose(found, expected, atol=1e-6)
    assert factors_of(features + 1e-3 * torch.randn(features.shape, generator=generator), [3, 5, 4]).tolist() == [1] * 12


def test_rows_of_one_baseline_share_it_and_its_scores(tiny_profile, tmp_path, monkeypatch):
    calls = []

    class Counting:
        def __init__(self, profile):
            calls.append("built")

        def scores(self, image, vocabulary):
            calls.append("scored")
            rng = np.random.default_rng(int(image.sum()))
            return rng.random((len(vocabulary) + 1, *image.shape[:2]), np.float32)

    monkeypatch.setitem(BASELINES, "counting", Part(Counting))

    def measured(folder, rows):
        bench = Bench(tiny_profile, library=tmp_path / folder, seeds=[0], images=2, progress=False)
        assert bench.missing(rows) == {}
        return {label: results[0].miou for label, results in bench.measure(rows, "mini-voc").items()}

    rows = [Rival("alone", baseline="counting"), Rival("filtered", baseline="counting", filtered=True),
            Rival("voted", baseline="counting", voted=True)]
    found = measured("all", rows)
    assert calls == ["built"] + ["scored"] * (SAMPLED + 2)  # quantiles, then counts
    for row in rows:  # a filter or a vote changed nothing for the others
        assert measured(row.label, [row]) == {row.label: found[row.label]}


@pytest.mark.parametrize("size", [2**20, 700])
@pytest.mark.parametrize("together", [True, False])
def test_a_remembering_segmenter_asks_for_several_images_at_a_time_and_for_none_twice(size, together, monkeypatch):
    """Also where results (of 6 x 8 x 5 bytes) make room for each other; and of one that knows single images alone."""
    memory = cached(LRUCache(size, getsizeof=shared._bytes), key=lambda key, make: key, lock=threading.RLock())
    monkeypatch.setattr(shared, "remember", memory(lambda key, make: make()))
    asked = []

    class Alone:
        name = "alone"

        def propose(self, image, words):
            asked.append(1)
            return np.repeat((image[..., 0] > 100)[None], 5, 0)

    class Many(Alone):
        def propose_many(self, images, words):
            asked.append(len(images))
            return [np.repeat((image[..., 0] > 100)[None], 5, 0) for image in images]

    segmenter = shared.RememberingSegmenter(Many() if together else Alone())
    images = np.random.default_rng(0).integers(0, 255, (11, 6, 8, 3), np.uint8)
    for chosen in (images[:4], images[2:], images):
        for image, masks in zip(chosen, segmenter.propose_many(chosen, "cat"), strict=True):
            assert masks.shape == (5, 6, 8) and (masks == (image[..., 0] > 100)).all()
    assert segmenter.name == "alone"
    if size == 2**20:
        assert asked == ([4, 7] if together else [1] * 11)
        assert segmenter.propose(images[3], "cat").any() and sum(asked) == 11
        segmenter.propose(images[3], "dog")
        assert sum(asked) == 12


def test_a_column_whose_data_set_has_no_folder_has_published_numbers_alone(tiny_profile, tmp_path, capsys):
    bench = Bench(tiny_profile, library=tmp_path, seeds=[0])
    cells = bench.published(bench.cells([Row("OVDiff")], {"VOC-20": "voc20"}, "A.7"), "A.7")
    assert {cell.source for cell in cells} == {"published"} and "VOC-20: no folder is named" in capsys.readouterr().out
    write_table(tmp_path / "a.csv", "a", cells, bench.profile, "None is measured.")
    with pytest.raises(InputError, match="does not hold"):
        bench.cells([Row("OVDiff")], {"VOC-20": f"voc20:{tmp_path}"}, "A.7")
