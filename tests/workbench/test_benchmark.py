"""The benchmark: its arithmetic by hand, the alternatives against OVDiff's own results, scenarios and command end to end. No times."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_overrides

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.networks.clip_text import TextEncoder
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost import catalogue, clusters, growth, scene, segmenting, vocabulary
from ovdiff_lib.workbench.cost import instruments as measuring
from ovdiff_lib.workbench.cost import plain as alternatives
from ovdiff_lib.workbench.cost.catalogue import SCENARIOS, Outcome, Scenario, outcomes, select
from ovdiff_lib.workbench.cost.cells import DIGITS, growth_cells, ratio_cells
from ovdiff_lib.workbench.cost.estimates import Estimate, estimates
from ovdiff_lib.workbench.cost.fresh import run_fresh
from ovdiff_lib.workbench.cost.instruments import LinearFit, Measured
from ovdiff_lib.workbench.cost.ratio import AT_LEAST, Bound, Check, Ratio, Side, alternate
from ovdiff_lib.workbench.cost.render import ratio_text, record, render, seconds_text
from ovdiff_lib.workbench.cost.scene import Scene, difference, made_up
from ovdiff_lib.workbench.tables.tables import read_table, write_table

SHAPE = (52, 88)


def ratio(ours=(1.0,), theirs=(2.0,), bound=None, checks=(), by="seconds", peaks=(10, 20), name="a", whole=(None, None)):
    sides = [Side(tuple(seconds), peak, None, most) for seconds, peak, most in zip((ours, theirs), peaks, whole, strict=True)]
    return Ratio(name, "what", "other", *sides, bound, tuple(checks), by)


@pytest.fixture(scope="module")
def small(tiny_profile):
    with Scene(tiny_profile, repeats=1) as made:
        yield made


@pytest.fixture
def image():
    return np.random.default_rng(5).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


# ---- arithmetic

def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    found = ratio((3.0, 1.0, 2.2), (2.0, 4.0, 2.0))
    assert found.value == 2.2 / 2.0 and found.spread == (1 / 4, 3 / 2) and found.met is None
    assert ratio().spread is None


@pytest.mark.parametrize("bound, value, met", [
    (Bound(1.15), 0.5, True), (Bound(0.5), 0.5, True), (Bound(0.49), 0.5, False), (Bound(2, AT_LEAST), 2.0, True),
    (Bound(2.1, AT_LEAST), 2.0, False)])
def test_bounds_have_a_direction(bound, value, met):
    found = ratio((1.0,), (2.0,), bound)
    assert found.value == value and found.met is met


def test_under_at_least_the_alternative_is_divided_by_ours():
    found = ratio((1.0, 2.0), (30.0, 40.0), Bound(10, AT_LEAST))
    assert found.value == 35 / 1.5 and found.spread == (20, 30)


def test_checks_count_beside_the_bound():
    assert ratio(bound=Bound(1), checks=[Check("difference", 1e-6, 1e-5)]).met is True
    assert ratio(bound=Bound(1), checks=[Check("difference", 1e-6, 1e-5), Check("difference", 2e-5, 1e-5)]).met is False
    assert ratio(bound=Bound(0.1), checks=[Check("difference", 0, 1)]).met is False
    assert ratio(checks=[Check("difference", math.nan, 1)]).met is False and ratio(checks=[Check("d", 1, 1)]).met is True


def test_memory_is_compared_by_peaks():
    found = ratio((9.0, 1.0), (1.0, 1.0), Bound(0.6), by="memory", peaks=(10, 20))
    assert found.value == 0.5 and found.met and found.spread is None
    assert ratio(by="memory", peaks=(1, 0)).value == math.inf and ratio(by="memory", peaks=(0, 0)).value == 1
    with pytest.raises(InputError, match="not measured"):
        ratio(by="memory", peaks=(None, 20))


@pytest.mark.parametrize("wrong, word", [(lambda: Bound(1, "below"), "at most"), (lambda: ratio(by="bytes"), "seconds"),
                                         (lambda: alternate(print, print, 0), "at least 1"),
                                         (lambda: difference(np.zeros(2), np.zeros(3)), "compared")])
def test_wrong_arguments_are_one_sentence(wrong, word):
    with pytest.raises(InputError, match=word) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_both_ways_take_turns_after_a_warm_up(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def way(name, seconds):
        def call(number):
            calls.append((name, number))
            now[0] += seconds * max(number, 1)
            return name * number
        return call

    pair = alternate(way("a", 1.0), way("b", 2.0), 3)
    assert calls == [(name, number) for number in range(4) for name in "ab"]
    assert pair.ours.seconds == (1, 2, 3) and pair.theirs.seconds == (2, 4, 6) and (pair.our_result, pair.their_result) == ("aaa", "bbb")
    calls.clear()
    short = alternate(way("a", 1.0), way("b", 2.0), 3, budget=9, warm_up=(lambda: calls.append("w"), lambda: calls.append("v")))
    assert calls == ["w", "v", ("a", 1), ("b", 1), ("a", 2), ("b", 2)]  # 9 seconds were spent
    assert short.theirs.seconds == (2, 4)


@pytest.mark.skipif(not measuring.reset_peak(), reason="this system cannot set the peak of memory back")
def test_the_peak_of_a_side_is_its_own():
    size = 150 * 2**20
    pair = alternate(lambda _: None, lambda _: int(np.ones(size, np.uint8).sum()), 2)
    assert pair.ours.peak < size / 2 and 0.9 * size < pair.theirs.peak < 1.5 * size


# ---- made-up classes

def test_made_up_classes_are_noisy_copies(small):
    bank, five = small.bank, small.made_up(5)
    assert five.vocabulary.names == ("w0001", "w0002", "w0003", "w0004", "w0005")
    prompts = [category.prompt for category in scene.made_up_vocabulary(5000)]
    assert len(set(prompts)) == 5000 and [c.prompt for c in five.vocabulary] == prompts[:5]
    for i, made in enumerate(five.prototypes["sd"]):
        source = bank.prototypes["sd"][i % 2]
        assert np.array_equal(made.region, source.region) and made.vectors.dtype == np.float32
        noise = (made.vectors - source.vectors) / source.vectors.std(0).clip(1e-6)
        assert 0.07 < noise.std() < 0.13 and abs(noise.mean()) < 0.02
    first, third = five.prototypes["sd"][0].vectors, five.prototypes["sd"][2].vectors
    assert not np.array_equal(first, third)
    again = made_up(bank, 3)
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(again.prototypes["sd"], five.prototypes["sd"], strict=False))


def test_differences_see_where_infinite_values_stand():
    inf = math.inf
    assert difference(np.array([-inf, 1.0]), np.array([-inf, 1.5])) == 0.5
    assert difference(np.array([-inf, 1.0]), np.array([0.0, 1.0])) == inf
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))) == 0


# ---- alternatives give what OVDiff gives

def test_the_bare_pipeline_draws_the_same_images(tiny_profile):
    pipe, profile = load_diffusion(tiny_profile), tiny_profile.override({"support.batch_size": 2})
    processors = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    support = sample_support(pipe, Category("dog"), profile, 3, progress=False)
    drawn = alternatives.draw(pipe, Category("dog"), profile, 3)
    assert drawn.shape == support.images.shape and difference(drawn, support.images) <= 2
    other = alternatives.draw(pipe, Category("cat"), profile, 3)
    assert difference(other, support.images) > 20
    stored = alternatives.stored_attribution(pipe, Category("dog"), profile, 3)
    assert difference(stored, support.attribution) < 1e-5 and stored.std() > 0.05
    assert {name: id(p) for name, p in pipe.unet.attn_processors.items()} == processors


def test_the_mid_block_counts_where_the_profile_says_so(tiny_profile):
    pipe = load_diffusion(tiny_profile)
    found = {}
    for mid in (False, True):
        profile = tiny_profile.override({"support.mid_block": mid, "support.guidance_scale": 1.0})
        found[mid] = alternatives.stored_attribution(pipe, Category("dog"), profile, 2)
        assert difference(found[mid], sample_support(pipe, Category("dog"), profile, 2, progress=False).attribution) < 1e-5
    assert difference(found[False], found[True]) > 1e-3


def test_bare_features_are_one_pass_of_the_networks(tiny_profile, image):
    pipe = load_diffusion(tiny_profile)
    seen, encoded = [], []
    hooks = [pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape))),
             pipe.vae.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(tuple(inputs[0].shape)))]
    crops = [crop for crop, _ in alternatives.window_crops(image, tiny_profile)]
    try:
        run = alternatives.bare_features(pipe, tiny_profile.features, crops, 4)
        assert not seen
        run()
    finally:
        for hook in hooks:
            hook.remove()
    expected = len(windows((64, 108), 64, 32)) + len(windows((64, 108), 48, 32))  # 52 x 88 with a short side of 64
    assert len(crops) == expected and sum(shape[0] for shape in seen) == sum(shape[0] for shape in encoded) == expected
    assert {shape[1:] for shape in encoded} == {(3, 64, 64)} and {shape[1:] for shape in seen} == {(4, 16, 16)}
    assert max(shape[0] for shape in seen) == 4


def test_padded_texts_are_those_of_the_filter(tiny_profile):
    clip, tokenizer = load_clip(tiny_profile)
    texts = ["cat", "cat and dog", "cat and dog and sofa", "boat"]
    padded = alternatives.padded_texts(clip, tokenizer, texts, batch=3)
    assert difference(padded, TextEncoder(clip, tokenizer)(texts)) < 1e-5
    assert float((padded[0] - padded[3]).norm()) > 0.01


def test_all_prototypes_at_once_give_the_same_scores(small, image):
    ovdiff = small.method({"filters.category": False})
    bank = small.made_up(4)
    at_once = alternatives.scores_at_once(ovdiff.extractors["sd"], small.profile, image, bank)
    assert at_once.shape == (5, *SHAPE) and at_once.std() > 0
    assert difference(ovdiff.segment(image, bank).kept_scores, at_once) < 1e-4


def test_pamr_unfolded_is_pamr(image):
    scores = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = alternatives.pamr_unfolded(image, scores, 3, (1, 4))
    assert difference(found, pamr(image, scores, 3, (1, 4))) < 1e-5 and difference(found, scores) > 0.1


# ---- k-means

def test_clustered_points_have_few_directions_and_groups():
    points = clusters.clustered_points(3000, 150)
    values = torch.linalg.svdvals(points - points.mean(0)) ** 2
    assert points.shape == (3000, 150) and values[:64].sum() / values.sum() > 0.9
    assert torch.equal(points, clusters.clustered_points(3000, 150)) and not torch.equal(points, clusters.clustered_points(3000, 150, 1))
    flat = torch.linalg.svdvals(clusters.noise_points(3000, 150)) ** 2
    assert flat[:64].sum() / flat.sum() < 0.6


def test_inertia_is_compared_with_scikit_learns(small):
    points = clusters.clustered_points(600, 40)
    found = clusters.compare(small, points, "k-means", None, rounds=2)
    from sklearn.cluster import KMeans

    from ovdiff_lib.prototypes.kmeans import kmeans

    k = small.profile.prototypes.clusters
    theirs = [KMeans(k, n_init="auto", random_state=seed).fit(points.numpy()).inertia_ for seed in (1, 2)]
    made = [kmeans(points, k, seed=seed) for seed in (1, 2)]
    ours = [float(((points - centroids[assignment]).double() ** 2).sum()) for centroids, assignment in made]
    assert found.checks[0].value == pytest.approx(np.mean(ours) / np.mean(theirs) - 1, abs=1e-6) and found.checks[0].limit == 0.01
    assert len(found.ours.seconds) == len(found.theirs.seconds) == 2


# ---- scenarios

def test_a_class_is_built_and_its_steps_are_timed(small):
    row, = SCENARIOS["building"].run(small)
    assert row.bound == Bound(1.15) and len(row.ours.seconds) == len(row.theirs.seconds) == 1 and min(row.theirs.seconds) > 0
    steps = dict(part.strip().split(" ")[:2] for part in row.note.removeprefix("medians: ").split(","))
    assert list(steps) == ["drawing", "masks", "features", "prototypes"]
    assert sum(map(float, steps.values())) == pytest.approx(row.ours.median, rel=0.2)


def test_images_together_and_growth(small, monkeypatch):
    monkeypatch.setattr(segmenting, "TOGETHER", 2)
    monkeypatch.setattr(segmenting, "FEW", 3)
    row, = SCENARIOS["images-together"].run(small)
    assert row.met and row.checks[0].value < 1e-4 and "4 images against 3 classes" in row.measures
    found, = growth.classes(small, (2, 5, 3))
    assert [size for size, _ in found.points] == [2, 3, 5] and [row["size"] for row in found.rows] == [2, 3, 5]
    one = sum(p.vectors.nbytes for p in small.made_up(1).prototypes["sd"])
    other = small.bank.prototypes["sd"][1].vectors.nbytes
    assert found.bytes == (one + other, 2 * one + other, 3 * one + 2 * other)
    kept, = growth.clusters(small, (1, 2))
    parts = [int((step.result.kind == "part").sum()) for _, step in kept.points]
    assert parts == [2, 4]  # foreground and background


def test_a_vocabulary_of_the_library_in_a_new_process(small, monkeypatch):
    monkeypatch.setattr(vocabulary, "STORED", 3)
    monkeypatch.setattr(vocabulary, "FEW", 2)
    row, = vocabulary.stored(small)
    assert len(row.ours.seconds) == 3 and row.checks[0].value > 0 and row.checks[1].value > 100e6
    made = small.made_up(3)
    built = OVDiff(small.profile, library=small.library, progress=False).build(made.vocabulary)
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(built.prototypes["sd"], made.prototypes["sd"], strict=True))


def test_estimates_count_both_sizes(small):
    rows = {row.name: row for row in estimates(small)}
    weights = rows["class: weights of Stable Diffusion in float32"]
    assert weights.paper == pytest.approx(4 * (859_520_964 + 83_653_863 + 123_060_480))  # parameters of the published files
    assert rows["class: prototypes"].paper == 2 * 65 * 7680 * 4 and rows["class: features of the support set"].paper == 32 * 4096 * 7680 * 4
    # Of a guided image at 512 pixels: both halves, 64 x 64 positions; GEGLU's first layer has 8 x 320 channels.
    assert rows["class: largest output of a UNet layer, an image with guidance"].paper == 2 * 64 * 64 * 8 * 320 * 4
    drawing = rows["class: drawing"]
    assert drawing.paper > 1000 * drawing.profile > 0 and drawing.rate == drawing.profile / drawing.seconds
    assert drawing.paper_seconds == pytest.approx(drawing.seconds * drawing.paper / drawing.profile)


def test_memory_in_a_process_of_its_own(small):
    found = run_fresh(small, "pamr", unfolded=True, shape=[120, 200], classes=20)
    assert found["added"] > 20 * 48 * 120 * 200 * 4 * 0.8 and found["whole"] > found["added"] + 50e6
    with pytest.raises(OVDiffError, match="nothing") as caught:
        run_fresh(small, "nothing")
    assert "\n" not in str(caught.value)


# ---- running them

def test_a_failing_scenario_is_one_sentence_and_the_others_go_on(tiny_profile, monkeypatch):
    def fails(_):
        raise RuntimeError("out of\nmemory")

    made = {"bad": Scenario(fails), "good": Scenario(lambda _: [ratio(bound=Bound(1))]),
            "missed": Scenario(lambda _: [ratio(bound=Bound(0))]), "large": Scenario(fails, full_size=True)}
    monkeypatch.setattr(catalogue, "SCENARIOS", made)
    found = list(outcomes(tiny_profile, repeats=1))
    assert [o.name for o in found] == ["bad", "good", "missed"] and [o.passed for o in found] == [False, True, False]
    assert [o.error for o in found] == ["RuntimeError: out of", "", ""]
    assert select(None, True) == list(made) and select(["large"], False) == ["large"]
    with pytest.raises(OVDiffError, match="bad failed"):
        ratios_of(tiny_profile)
    assert [r.value for r in ratios_of(tiny_profile, ["good", "missed"])] == [0.5, 0.5]
    for text, word in (("god", "did you mean good"), ("zzzz", "bad, good, missed, large")):
        with pytest.raises(InputError, match=word):
            select([text], False)


def ratios_of(profile, only=None):
    from ovdiff_lib.workbench import cost as benchmark

    return benchmark.ratios(profile, only, repeats=1)


@pytest.fixture
def tiny(tiny_models):
    return [o for key, value in tiny_overrides(tiny_models).items() for o in ("--set", f"{key}={json.dumps(value)}")]


def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    def scenarios(row):
        monkeypatch.setattr(catalogue, "SCENARIOS", {"growth-K": SCENARIOS["growth-K"], "kmeans": Scenario(row)})

    scenarios(lambda s: [dataclasses.replace(ratio(bound=Bound(1)), name="k-means")])
    target = tmp_path / "new" / "rows.json"
    assert main(["benchmark", "--only", "kmeans, growth-K", "--repeats", "1", "--json", str(target), *tiny]) == 0
    shown = capsys.readouterr().out
    assert "profile mini" in shown and "k-means" in shown and "0.5x" in shown and "met" in shown and "clusters K" in shown
    table = json.loads(target.read_text(encoding="utf-8"))
    assert [s["scenario"] for s in table["scenarios"]] == ["growth-K", "kmeans"] and table["machine"]["threads"] == 1
    assert [p["size"] for p in table["scenarios"][0]["growth"]] == list(growth.CLUSTERS)
    assert table["scenarios"][1]["ratios"][0]["bound"] == {"limit": 1, "sense": "at most"}

    scenarios(lambda s: [ratio(bound=Bound(0.4))])
    assert main(["benchmark", "--only", "kmeans", *tiny]) == 1 and "MISSED" in capsys.readouterr().out

    def interrupted(_):
        raise KeyboardInterrupt

    scenarios(interrupted)
    assert main(["benchmark", "--only", "kmeans,growth-K", "--repeats", "1", "--json", str(target), *tiny]) == 130
    assert "interrupted after 1 scenarios" in capsys.readouterr().err
    assert [s["scenario"] for s in json.loads(target.read_text(encoding="utf-8"))["scenarios"]] == ["growth-K"]


@pytest.mark.parametrize("options, word", [(["--only", "kmean"], "kmeans"), (["--only", "growth-k"], "did you mean growth-K"),
                                           (["--json", "."], "is a folder"),
                                           (["--only", ""], "names no scenario"),
                                           (["--repeats", "0"], "at least 1"), (["--library", "somewhere"], "leave out --library")])
def test_mistakes_are_one_sentence(options, word, tiny, capsys):
    assert main(["benchmark", *options, *tiny]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error


# ---- what is shown

def test_rows_as_text():
    row = ratio((0.5, 0.25), (1.0, 1.0), Bound(2, AT_LEAST), [Check("difference", 1e-6, 1e-5)], peaks=(3_000_000, None),
                whole=(2_000_000_000, None))
    text = render(Outcome("x", (row,)))
    first, *rest = text.splitlines()
    assert first.split() == ["a", "375", "ms", "1.00", "s", "3.00", "MB", "?", "2.00", "GB", "?",
                             "2.67x", "faster", "(2-4)", ">=", "2", "met"]
    assert [line.strip() for line in rest] == ["what", "against other", "difference: 1e-06, at most 1e-05: met"]
    assert ratio_text(ratio(by="memory")) == "0.5x the memory"
    assert render(Outcome("x", (), "No.")) == "x: FAILED: No."
    assert [seconds_text(s) for s in (123.4, 12.34, 1.234, 0.01234, 12e-6)] == ["123 s", "12.3 s", "1.23 s", "12.3 ms", "12 us"]


def points(*medians):
    return tuple((2 ** i, Measured((m - 0.5, m + 0.5), None, 100, 100 + 10**6 * i)) for i, m in enumerate(medians))


def test_rows_as_data():
    grown = growth.Growth("K", "prototypes", "clusters K", points(1.0, 2.0, 4.0), LinearFit(1.0, 0.0, 1.0), (10, 20, 40))
    table = record(Outcome("x", (ratio(by="memory", peaks=(1, 0)), grown, Estimate("e", "FLOP", 2e9, 8e9, 0.5)), seconds=3))
    assert json.loads(json.dumps(table, allow_nan=False)) is not None and table["ratios"][0]["ratio"] is None and table["passed"]
    assert table["growth"][2] == {"growth": "K", "size": 4, "seconds": 4.0, "fastest": 3.5, "slowest": 4.5, "rounds": 2, "added": 2_000_000,
                                  "bytes": 40, "line": 4.0}
    assert table["estimates"][0]["published"] == 8e9 and table["fits"]["K"]["slope"] == 1
    assert "2.0 GFLOP" in render(Outcome("x", (Estimate("e", "FLOP", 2e9, 8e9, 0.5),))) and Estimate("b", "bytes", 1, 2, 3).rate is None
    assert "4 " in render(Outcome("x", (grown,)))


def test_cells_of_a_notebook(tiny_profile, tmp_path):
    grown = growth.Growth("K", "prototypes", "clusters K", points(1.0, 2.0), LinearFit(1.0, 0.0, 1.0))
    rows = [ratio((1.0, 2.0), (2.0, 2.0), Bound(1.15), name="one"), ratio(peaks=(None, None), name="two", whole=(3_000_000, None)),
            ratio(by="memory", peaks=(1, 0), name="three")]
    made = ratio_cells(rows)
    by_place = {(cell.row, cell.column): cell.measured for cell in made}
    assert by_place["one, against other", "ratio"] == 0.75 and by_place["one, against other", "met (1) or missed (0)"] == 1
    assert [by_place["one, against other", column] for column in ("lowest", "highest", "bound")] == [0.5, 1, 1.15]
    assert by_place["two, against other", "ovdiff, peak MB"] == 3 and ("two, against other", "alternative, peak MB") not in by_place
    assert ("two, against other", "bound") not in by_place and ("two, against other", "ovdiff, added MB") not in by_place
    assert ("three, against other", "ratio") not in by_place
    write_table(tmp_path / "t.csv", "t", [*made, *growth_cells([grown])], tiny_profile, "Caption.", DIGITS)
    back = {(cell.row, cell.column): cell for cell in read_table(tmp_path / "t.csv")}
    assert back["clusters K: 2", "seconds"].values == (1.5, 2.5) and back["clusters K: line, at 0", "seconds for one more"].measured == 1


def test_the_package_names_what_it_gives():
    from ovdiff_lib.workbench import cost as benchmark

    assert benchmark.ratios is catalogue.ratios
    with pytest.raises(AttributeError, match="no attribute"):
        _ = benchmark.nothing
    assert scene.CLASSES == ("dog", "boat")
    assert set(catalogue.QUICK) < set(SCENARIOS) and not any(SCENARIOS[name].full_size for name in catalogue.QUICK)
