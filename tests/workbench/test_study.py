"""Many methods on the same images: the same numbers as one by one, kept, resumed, never another's."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from ovdiff_lib import InputError, OVDiff, ProfileError, keys
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.registry import Part
from ovdiff_lib.workbench.data.classes import synonyms
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.evaluation import measure as measuring
from ovdiff_lib.workbench.evaluation import shared
from ovdiff_lib.workbench.evaluation.banks import of_kinds, of_labels, rows_of_sizes, with_words
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.measure import Method, Sweep, best_of, evaluate, measure, search_threshold
from ovdiff_lib.workbench.evaluation.results import Counts, ResultStore, code_digest
from ovdiff_lib.workbench.evaluation.rows import THRESHOLDS, Rival, Row, Searched
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks


class Few:
    """Two classes, five non-square images."""

    name, has_background, vocabulary, folder = "few", True, Vocabulary.of("dog, boat"), "here"

    def __init__(self):
        rng = np.random.default_rng(0)
        self.ids = tuple("abcde")
        self.samples = [Sample(i, rng.integers(0, 255, (6, 9, 3), np.uint8), rng.choice([0, 1, 2, 255], (6, 9)).astype(np.uint8))
                        for i in self.ids]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Shift(Method):
    """A method of T label maps, by the pixels' values; counts its images."""

    def __init__(self, shift, variants=1, stop=None):
        super().__init__({"shift": shift, "variants": variants}, lambda dataset: self.predict, variants)
        self.__dict__.update(shift=shift, stop=stop, seen=0)

    def predict(self, sample):
        if self.stop is not None and self.seen == self.stop:
            raise KeyboardInterrupt
        self.__dict__["seen"] += 1
        return np.stack([(sample.image[..., 0].astype(int) + self.shift + t) % 3 for t in range(self.variants)])


def expected(shift):
    few = Few()
    true = np.concatenate([s.labels[s.labels != 255] for s in few.samples])
    made = np.concatenate([((s.image[..., 0].astype(int) + shift) % 3)[s.labels != 255] for s in few.samples])
    return confusion_matrix(true, made, labels=[0, 1, 2])


def test_counts_are_those_of_sklearn(tmp_path):
    found = measure({"one": Shift(0), "two": Shift(1, 2)}, Few(), folder=tmp_path, progress=False)
    assert [len(found[name]) for name in ("one", "two")] == [1, 2]
    for result, shift in zip([*found["one"], *found["two"]], (0, 1, 2), strict=True):
        assert (result.confusion == expected(shift)).all() and result.images == 5 and result.class_names == ("background", "dog", "boat")
    few = Few()
    alone = [confusion_matrix(t.labels[t.labels != 255], ((t.image[..., 0].astype(int) + 2) % 3)[t.labels != 255], labels=[0, 1, 2])
             for t in few.samples]
    again = measure({"two": Shift(1, 2)}, few, folder=tmp_path, progress=False)["two"]  # as they were stored
    assert (found["two"][1].by_image() == alone).all() and (again[1].by_image() == alone).all()
    with pytest.raises(InputError, match="limit"):
        measure({"one": Shift(0)}, Few(), limit=0, progress=False)
    with pytest.raises(InputError, match=r"shape \(1, 6, 9\)"):
        measure({"bad": Method({}, lambda dataset: lambda sample: np.zeros((1, 6, 9), int), 2)}, Few(), progress=False)


def test_what_was_measured_is_not_measured_again(tmp_path):
    measure({"one": Shift(0)}, Few(), folder=tmp_path, progress=False)
    again, new = Shift(0), Shift(2)
    found = measure({"again": again, "new": new}, Few(), folder=tmp_path, progress=False)
    assert (again.seen, new.seen) == (0, 5) and (found["again"][0].confusion == expected(0)).all()
    # Fewer images, another class name and other code are other results.
    fewer = Shift(0)
    measure({"one": fewer}, Few(), folder=tmp_path, limit=3, progress=False)
    assert fewer.seen == 3
    other, renamed = Shift(0), Few()
    renamed.vocabulary = Vocabulary.of("cat, boat")
    measure({"one": other}, renamed, folder=tmp_path, progress=False)
    assert other.seen == 5


def test_other_code_is_another_result(tmp_path, monkeypatch):
    measure({"one": Shift(0)}, Few(), folder=tmp_path, progress=False)
    monkeypatch.setattr(measuring, "code_digest", lambda: "other")
    again = Shift(0)
    measure({"one": again}, Few(), folder=tmp_path, progress=False)
    assert again.seen == 5
    assert code_digest() == code_digest() and len(code_digest()) == 16


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_study_goes_on(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        measure({"ready": Shift(0), "cut": Shift(1, stop=stop)}, Few(), folder=tmp_path, progress=False)
    ready, cut = Shift(0), Shift(1)
    found = measure({"ready": ready, "cut": cut}, Few(), folder=tmp_path, progress=False)
    assert (ready.seen, cut.seen) == (5 - stop - 1, 5 - stop)
    assert (found["ready"][0].confusion == expected(0)).all() and (found["cut"][0].confusion == expected(1)).all()


def test_damaged_results_are_measured_again(tmp_path, caplog):
    measure({"one": Shift(0)}, Few(), folder=tmp_path, progress=False)
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:60] + b"\xff" * 8 + whole[68:], b"not a zip"):
        path.write_bytes(data)
        again = Shift(0)
        found = measure({"one": again}, Few(), folder=tmp_path, progress=False)
        assert again.seen == 5 and (found["one"][0].confusion == expected(0)).all() and path.name in caplog.text
        caplog.clear()
    # A file of another evaluation under this name.
    store = ResultStore(tmp_path / "other")
    ones = Counts((1, 3, 3))
    ones.add(np.ones((1, 3, 3), np.int64))
    store.save("few", {"a": 1}, ones)
    (foreign,) = (tmp_path / "other").glob("*.npz")
    foreign.rename(path)
    again = Shift(0)
    measure({"one": again}, Few(), folder=tmp_path, progress=False)
    assert again.seen == 5
    with pytest.raises(InputError, match="plain"):
        store.load("few", {"a": {1, 2}}, (1, 3, 3), 5)


# ---- the bench

@pytest.fixture(scope="module")
def bench(tiny_profile, tmp_path_factory):
    return Bench(tiny_profile, library=tmp_path_factory.mktemp("bench"), seeds=[3, 4], images=2, progress=False)


SMALL = {"filters.category_top": 2}


def test_rows_equal_what_evaluate_says(bench, tiny_profile, tmp_path):
    rows = [Row("full", SMALL), Row("no filter", {"filters.category": False}), Row("parts", {**SMALL, "prototypes.kinds": ["part"]}),
            Searched("search", SMALL)]
    found = bench.measure(rows, "mini-voc")
    data = load_dataset("mini-voc")
    for row in rows[:3]:
        assert len(found[row.label]) == 2
        for seed, result in zip((3, 4), found[row.label], strict=True):
            ovdiff = OVDiff(tiny_profile, {**row.settings, "support.seed": seed, "prototypes.seed": seed}, library=tmp_path, progress=False)
            bank = ovdiff.build(data.vocabulary)
            alone = evaluate(lambda image: ovdiff.segment(image, bank).labels, data, 2, progress=False)  # noqa: B023
            assert (alone.confusion == result.confusion).all(), (row.label, seed)
    plain = OVDiff(tiny_profile, {**SMALL, "support.seed": 3, "prototypes.seed": 3, "matching.background_threshold": 0.0}, library=tmp_path,
                   progress=False)
    bare = plain.build(data.vocabulary).without_background()
    search = search_threshold(lambda image: plain.segment(image, bare).scores, data, THRESHOLDS, 2, progress=False)
    assert best_of(search)[1].miou == found["search"][0].miou


def test_cells_carry_seeds_and_the_papers_place(bench):
    rows = [Row("everything", SMALL, paper="Full"), Row("own row", {**SMALL, "prototypes.clusters": 2})]
    first, second = bench.cells(rows, {"VOC": "mini-voc"}, "3")
    assert (first.row, first.column, first.n, len(first.values), first.paper.value) == ("everything", "mini-voc", 2, 2, 64.4)
    assert (second.paper.table, second.paper.row, second.paper.column, second.paper.value) == ("3", "own row", "VOC", None)
    results = bench.measure([Row("everything", SMALL)], "mini-voc")["everything"]
    assert first.values == pytest.approx([100 * r.miou for r in results]) and first.measured == pytest.approx(np.mean(first.values))
    with pytest.raises(InputError, match="same label"):
        bench.measure([Row("a"), Row("a", SMALL)], "mini-voc")


def test_without_background_every_pixel_has_a_class(bench):
    result = bench.measure([Row("full", SMALL)], "mini-voc20")["full"][0]
    assert result.class_names == bench.dataset("mini-voc20").vocabulary.names and result.confusion.sum() > 0


def test_sizes_pool_the_seeds(bench):
    """Up to support.size a size is a prefix; above, the seeds' sets joined; prototypes as from the joined features by hand."""
    size = bench.profile.support.size
    rows = rows_of_sizes(bench, [1, size, 2 * size], SMALL)
    assert [r.seeds for r in rows] == [None, None, 1] and rows[0].settings["support.size"] == 1
    bank = rows[2].build(bench, 3, Vocabulary.of("dog"))
    supports = [bench.ovdiff(SMALL, seed).support("dog") for seed in (3, 4)]
    ovdiff = bench.ovdiff(SMALL, 3)
    joined = supports[0].joined(supports[1])
    assert len(joined) == 2 * size and np.array_equal(joined.take([size]).images, supports[1].images[:1])
    by_hand = ovdiff.prototypes(joined, ovdiff.masks(joined))["sd"]
    assert np.array_equal(bank.prototypes["sd"][0].vectors, by_hand.vectors)
    for wrong in (0, 2 * size + 1, 3 * size):
        with pytest.raises(InputError, match="cannot be made"):
            rows_of_sizes(bench, [wrong])


def test_kinds_are_chosen_from_the_full_bank(bench):
    """The same vectors as from building with these kinds alone."""
    for kinds in (["part"], ["class", "instance"]):
        built = bench.ovdiff({"prototypes.kinds": kinds}, 3).build("dog, boat")
        chosen = of_kinds(kinds)(bench, 3, Vocabulary.of("dog, boat"))
        for one, other in zip(chosen.prototypes["sd"], built.prototypes["sd"], strict=True):
            assert np.array_equal(one.vectors, other.vectors) and one.kind.tolist() == other.kind.tolist()


def test_things_and_stuff_by_another_table(bench):
    bank = of_labels("c8")(bench, 3, Vocabulary.of("dog, grass"))
    assert [c.kind for c in bank.vocabulary] == ["thing", "stuff"]
    assert np.array_equal(bank.prototypes["sd"][1].vectors, bench.ovdiff(seed=3).build("grass").prototypes["sd"][0].vectors)


def test_words_share_the_images(bench):
    build = with_words({"dog": ["dog", "puppy"], "cat": ["cat"]}, SMALL)
    bank = build(bench, 3, Vocabulary.of("dog, boat"))
    size = bench.profile.support.size
    first, second = -(-size // 2), size // 2
    joined = bench.ovdiff({"support.size": first}, 3).support("dog").joined(bench.ovdiff({"support.size": second}, 3).support("puppy"))
    ovdiff = bench.ovdiff(SMALL, 3)
    assert np.array_equal(bank.prototypes["sd"][0].vectors, ovdiff.prototypes(joined, ovdiff.masks(joined))["sd"].vectors)
    assert np.array_equal(bank.prototypes["sd"][1].vectors, ovdiff.build("boat").prototypes["sd"][0].vectors)
    table = synonyms()
    assert all(words and len(set(words)) == len(words) for words in table.values())
    assert {c.name for c in load_dataset("mini-voc").vocabulary} <= set(table)


def test_the_key_holds_what_changes_labels(bench):
    """Every field of the method's sections, and none of speed or of the data sets'."""
    profile = bench.profile
    base = keys.of_labels(profile)
    assert keys.of_labels(profile.override({"support.batch_size": 99, "evaluation.images": 7, "evaluation.voc": "x"})) == base
    for change in ({"matching.stride": 16}, {"filters.stuff": False}, {"prototypes.kinds": ["part"]}, {"models.dtype": "bfloat16"},
                   {"masks.erosion": 1}, {"support.seed": 9}, {"features.sd_timestep": 100}, {"features.extractors": ["clip-keys"]}):
        assert keys.of_labels(profile.override(change)) != base, change
    unknown = keys.of_labels(profile.override({"models.sam": "nobody/nothing", "masks.segmenter": "sam"}))
    assert "nobody/nothing" in str(unknown["models"])


def test_splits_do_not_share_counts():
    """Images of every split of the mini world begin with the same numbers."""
    method = Method({"method": "any"}, lambda dataset: None)
    table = [measuring._key(method, load_dataset("mini-object", split), 8) for split in ("val", "wild")]
    assert table[0]["ids"] == table[1]["ids"] and table[0] != table[1]


def test_thresholds_by_hand():
    scores = np.array([[[9, 9]], [[0.2, 0.5]], [[0.1, 0.7]]], np.float32)  # (C + 1, 1, 2)
    maps = Sweep.of(scores, THRESHOLDS).maps()
    assert maps.shape == (len(THRESHOLDS), 1, 2)
    assert maps[THRESHOLDS.index(0.1)].tolist() == [[1, 2]] and maps[THRESHOLDS.index(0.3)].tolist() == [[0, 2]]
    assert maps[THRESHOLDS.index(0.9)].tolist() == [[0, 0]]


@pytest.mark.parametrize("background", [True, False])
def test_a_sweep_counts_as_its_maps_do(background):
    """One histogram against a confusion matrix of sklearn for each map; scores on thresholds, above all and below all are among them."""
    few, rng = Few(), np.random.default_rng(3)
    few.has_background = background
    thresholds = (0.0, 0.25, 0.5, 0.75)
    sample = few[0]
    if not background:
        sample = Sample("a", sample.image, np.where(sample.labels == 0, 255, sample.labels))
    sweep = Sweep(rng.choice([-0.1, 0.0, 0.25, 0.3, 0.5, 0.9], (6, 9)).astype(np.float32), rng.integers(1, 3, (6, 9)), thresholds)
    counts, seen = sweep.counts(few, sample), sample.labels != 255
    assert counts.shape == (4, 2 + background, 2 + background) and sweep.maps().shape == (4, 6, 9)
    for matrix, made in zip(counts, sweep.maps(), strict=True):
        made = made if background else sweep.category
        labels = [0, 1, 2] if background else [1, 2]
        assert (matrix == confusion_matrix(sample.labels[seen], made[seen], labels=labels)).all()


# ---- shared parts

def test_parts_are_shared_and_remember(tiny_profile, tmp_path):
    parts = SharedNetworks()
    first, second = (OVDiff(tiny_profile, o, library=tmp_path, progress=False, networks=parts) for o in ({}, {"prototypes.clusters": 2}))
    assert first.extractors["sd"] is second.extractors["sd"] and first.segmenter is second.segmenter
    assert first.category_filter is second.category_filter
    other = OVDiff(tiny_profile, {"features.sd_timestep": 100, "filters.category_top": 2}, library=tmp_path, progress=False, networks=parts)
    assert other.extractors["sd"] is not first.extractors["sd"] and other.category_filter is not first.category_filter
    images, seeds = np.random.default_rng(0).integers(0, 255, (2, 48, 64, 3), np.uint8), np.array([1, 2])
    features = first.extractors["sd"](images, seeds)
    assert first.extractors["sd"](images.copy(), seeds) is features
    assert first.extractors["sd"](images, seeds + 1) is not features
    plain = OVDiff(tiny_profile, library=tmp_path, progress=False)
    assert (plain.extractors["sd"](images, seeds) == features).all()
    vocabulary = Vocabulary.of("dog, boat")
    kept = first.category_filter(images[0], vocabulary)
    assert first.category_filter(images[0], vocabulary) is kept and kept[0] == plain.category_filter(images[0], vocabulary)[0]
    assert first.category_filter(images[0], Vocabulary.of("dog")) is not kept


def test_rows_of_one_baseline_share_it_and_its_scores(tiny_profile, tmp_path, monkeypatch):
    from ovdiff_lib.workbench.baselines import BASELINES

    calls = []

    class Counting:
        def __init__(self, profile):
            calls.append("built")

        def scores(self, image, vocabulary):
            calls.append("scored")
            return np.random.default_rng(int(image.sum())).random((len(vocabulary) + 1, *image.shape[:2]), np.float32)

    monkeypatch.setitem(BASELINES, "counting", Part(Counting))
    bench = Bench(tiny_profile, library=tmp_path, seeds=[0], images=2, progress=False)
    rows = [Rival("alone", baseline="counting"), Rival("filtered", baseline="counting", filtered=True),
            Rival("voted", baseline="counting", voted=True)]
    assert bench.missing(rows) == {}
    found = bench.measure(rows, "mini-voc")
    assert calls == ["built", "scored", "scored"]
    separate = [Bench(tiny_profile, library=tmp_path / row.label, seeds=[0], images=2, progress=False).measure([row], "mini-voc")
                for row in rows]
    for row, alone in zip(rows, separate, strict=True):
        assert found[row.label][0].miou == alone[row.label][0].miou  # a filter or a vote changed nothing for the others


@pytest.fixture
def room(monkeypatch):
    def of(size):
        monkeypatch.setattr(shared, "_remembered", shared.LRUCache(size, getsizeof=shared._bytes))

    return of


def test_memory_is_bounded(room):
    room(100)
    made = []
    for key, size in ((1, 40), (2, 40), (3, 40), (1, 40), (4, 40), (2, 40), (2, 40), (9, 1000), (9, 1000), (2, 40)):
        assert len(shared.remember(key, lambda size=size: made.append(1) or np.zeros(size, np.uint8))) == size
    # 1 and 2 fit; 3 pushes 1 out, 1 comes again and pushes 2 out, 4 pushes 3, 2 comes again and stays; what never fits is made each time.
    assert len(made) == 8


def test_classes_are_built_one_after_the_other_for_all_methods():
    """So that what methods share of a class is remembered no longer than for that class."""
    order = []

    def method(name):
        predict = lambda sample: np.zeros((1, 6, 9), int)  # noqa: E731
        return Method({"name": name}, lambda dataset: order.append(name) or predict,
                      build=lambda dataset, category: order.append(f"{name} {category.name}"))

    measure({"a": method("a"), "b": method("b")}, Few(), progress=False)
    assert order == ["a dog", "b dog", "a boat", "b boat", "a", "b"]


@pytest.mark.parametrize("size", [2**20, 700])
@pytest.mark.parametrize("together", [True, False])
def test_a_remembering_segmenter_asks_for_several_images_at_a_time_and_for_none_twice(size, together, room):
    """Also where results (of 6 x 8 x 5 bytes) make room for each other; and of one that knows single images alone."""
    room(size)
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
    if size == 2**20:
        assert asked == ([4, 7] if together else [1] * 11)
        assert segmenter.propose(images[3], "cat").any() and sum(asked) == 11
        segmenter.propose(images[3], "dog")
        assert sum(asked) == 12


def test_a_setting_that_cannot_be_is_refused_before_anything_is_measured(tiny_profile, tmp_path):
    for wrong in ({"features.extractors": ["nosuch"]}, {"matching.stride": 0}, {"masks.segmenter": "nosuch"}):
        with pytest.raises(ProfileError, match=next(iter(wrong)).replace(".", r"\.")):
            Bench(tiny_profile, wrong, library=tmp_path)
