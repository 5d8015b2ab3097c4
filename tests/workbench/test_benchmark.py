"""The benchmark: its arithmetic by hand, the alternatives against OVDiff's own results, scenarios and command. No times."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_overrides

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import OVDiffError
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.networks.clip_text import TextEncoder
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost import benchmark, instruments, plain, scenarios
from ovdiff_lib.workbench.cost.benchmark import Check, Ratio, Session, alternate, difference, in_new_process
from ovdiff_lib.workbench.cost.cells import DIGITS, ratio_cells
from ovdiff_lib.workbench.cost.instruments import Measured
from ovdiff_lib.workbench.cost.scenarios import SCENARIOS, run
from ovdiff_lib.workbench.tables.tables import read_table, write_table

SHAPE, CPU = (52, 88), torch.device("cpu")


def ratio(ours=(1.0,), theirs=(2.0,), limit=None, checks=(), added=(10, 20), name="a", **more):
    sides = [Measured(tuple(seconds), None, 100, 100 + plus) for seconds, plus in zip((ours, theirs), added, strict=True)]
    return Ratio(name, "what", "other", *sides, limit, tuple(checks), **more)


@pytest.fixture(scope="module")
def small(tiny_profile, tmp_path_factory):
    return Session(tiny_profile, tmp_path_factory.mktemp("library"), repeats=1)


@pytest.fixture
def image():
    return np.random.default_rng(5).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


# ---- arithmetic

def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    found = ratio((3.0, 1.0, 2.2), (2.0, 4.0, 2.0))
    assert found.value == 2.2 / 2.0 and found.spread == (1 / 4, 3 / 2) and found.met is None
    assert ratio().spread is None
    turned = ratio((1.0, 2.0), (30.0, 40.0), 10, faster=True)  # OVDiff is to be faster
    assert turned.value == 35 / 1.5 and turned.spread == (20, 30)
    memory = ratio((9.0, 1.0), (1.0, 1.0), 0.6, memory=True)  # what was added
    assert memory.value == 0.5 and memory.met and memory.spread is None
    assert ratio(memory=True, added=(1, 0)).value == math.inf and ratio(memory=True, added=(0, 0)).value == 1


@pytest.mark.parametrize("limit, faster, differences, met", [
    (1.15, False, [], True), (0.5, False, [], True), (0.49, False, [], False), (2, True, [], True), (2.1, True, [], False),
    (1, False, [1e-6], True), (1, False, [1e-6, 2e-5], False), (0.1, False, [0], False), (None, False, [math.nan], False),
    (None, False, [1e-5], True)])
def test_limits_have_a_direction_and_checks_count_beside_them(limit, faster, differences, met):
    checks = [Check("difference", value, 1e-5) for value in differences]
    assert ratio((1.0,), (2.0,), limit, checks, faster=faster).met is met


def test_all_ways_take_turns_after_a_warm_up(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: now[0])

    def way(name, seconds):
        def call(number):
            calls.append((name, number))
            now[0] += seconds * max(number, 1)
            return name * number
        return call

    ways = way("a", 1.0), way("b", 2.0), way("c", 3.0)
    ours, theirs, third = alternate(ways, 3, CPU)
    assert calls == [(name, number) for number in range(4) for name in "abc"]
    assert (ours.seconds, theirs.seconds, third.seconds) == ((1, 2, 3), (2, 4, 6), (3, 6, 9)) and theirs.result == "bbb"
    calls.clear()
    _, theirs = alternate(ways[:2], 3, CPU, budget=9)
    assert calls[2:] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] and theirs.seconds == (2, 4)  # 9 seconds were spent


def added(size: int) -> list[int]:
    """Bytes that nothing, and an array of ``size`` bytes, add to this process."""
    return [side.added for side in alternate((lambda _: None, lambda _: int(np.ones(size, np.uint8).sum())), 2, CPU)]


@pytest.mark.skipif(not instruments.reset_peak(), reason="this system cannot set the peak of memory back")
def test_the_peak_of_a_side_is_its_own():
    """In a process of its own: memory that tests before this one gave back would be taken first, and nothing added."""
    size = 150 * 2**20
    ours, theirs = in_new_process(added, size)
    assert ours < size / 2 and 0.9 * size < theirs < 1.5 * size
    with pytest.raises(ValueError):
        in_new_process(int, "three")


def test_differences_see_where_infinite_values_stand():
    inf = math.inf
    assert difference(np.array([-inf, 1.0]), np.array([-inf, 1.5])) == 0.5
    assert difference(np.array([-inf, 1.0]), np.array([0.0, 1.0])) == inf
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    with pytest.raises(ValueError):
        difference(np.zeros(2), np.zeros(3))


# ---- made-up classes and points

def test_made_up_classes_are_noisy_copies(small):
    bank, five = small.bank, small.made_up(5)
    assert five.vocabulary.names == ("w0001", "w0002", "w0003", "w0004", "w0005")
    prompts = [category.prompt for category in benchmark.made_up_vocabulary(5000)]
    assert len(set(prompts)) == 5000 and [c.prompt for c in five.vocabulary] == prompts[:5]
    for i, made in enumerate(five.prototypes["sd"]):
        source = bank.prototypes["sd"][i % 2]
        assert np.array_equal(made.region, source.region) and made.vectors.dtype == np.float32
        noise = (made.vectors - source.vectors) / source.vectors.std(0).clip(1e-6)
        assert 0.07 < noise.std() < 0.13 and abs(noise.mean()) < 0.02
    first, third = five.prototypes["sd"][0].vectors, five.prototypes["sd"][2].vectors
    assert not np.array_equal(first, third)
    again = small.made_up(3).prototypes["sd"]
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(again, five.prototypes["sd"], strict=False))


def test_clustered_points_have_few_directions():
    points = scenarios.clustered_points(3000, 150)
    flat = torch.randn(3000, 150, generator=torch.Generator().manual_seed(0))
    spectrum, level = (torch.linalg.svdvals(values - values.mean(0)) ** 2 for values in (points, flat))
    assert points.shape == (3000, 150) and spectrum[:64].sum() / spectrum.sum() > 0.9 > 0.6 > level[:64].sum() / level.sum()


# ---- alternatives give what OVDiff gives

def test_the_bare_pipeline_draws_the_same_images(tiny_profile):
    pipe, profile = load_diffusion(tiny_profile), tiny_profile.override({"support.batch_size": 2})
    processors = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    support = sample_support(pipe, Category("dog"), profile, 3, progress=False)
    drawn = plain.draw(pipe, Category("dog"), profile, 3)
    assert drawn.shape == support.images.shape and difference(drawn, support.images) <= 2
    other = plain.draw(pipe, Category("cat"), profile, 3)
    assert difference(other, support.images) > 20
    stored = plain.stored_attribution(pipe, Category("dog"), profile, 3)
    assert difference(stored, support.attribution) < 1e-5 and stored.std() > 0.05
    assert {name: id(p) for name, p in pipe.unet.attn_processors.items()} == processors


def test_the_mid_block_counts_where_the_profile_says_so(tiny_profile):
    pipe = load_diffusion(tiny_profile)
    found = {}
    for mid in (False, True):
        profile = tiny_profile.override({"support.mid_block": mid, "support.guidance_scale": 1.0})
        found[mid] = plain.stored_attribution(pipe, Category("dog"), profile, 2)
        assert difference(found[mid], sample_support(pipe, Category("dog"), profile, 2, progress=False).attribution) < 1e-5
    assert difference(found[False], found[True]) > 1e-3


def test_bare_features_are_one_pass_of_the_networks(tiny_profile, image):
    pipe = load_diffusion(tiny_profile)
    seen, encoded = [], []
    hooks = [pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape))),
             pipe.vae.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(tuple(inputs[0].shape)))]
    crops = plain.window_crops(image, tiny_profile)
    try:
        bare = plain.bare_features(pipe, tiny_profile.features, crops, 4)
        assert not seen
        bare()
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
    padded = plain.padded_texts(clip, tokenizer, texts, batch=3)
    assert difference(padded, TextEncoder(clip, tokenizer)(texts)) < 1e-5
    assert float((padded[0] - padded[3]).norm()) > 0.01


def test_all_prototypes_at_once_give_the_same_scores(small, image):
    ovdiff = small.ovdiff.replaced({"filters.category": False})
    bank = small.made_up(4)
    at_once = plain.scores_at_once(ovdiff.extractors["sd"], small.profile, image, bank)
    assert at_once.shape == (5, *SHAPE) and at_once.std() > 0
    assert difference(ovdiff.segment(image, bank).kept_scores, at_once) < 1e-4


def test_pamr_unfolded_is_pamr(image):
    scores = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = plain.pamr_unfolded(image, scores, 3, (1, 4))
    assert difference(found, pamr(image, scores, 3, (1, 4))) < 1e-5 and difference(found, scores) > 0.1


# ---- scenarios

def test_inertia_is_compared_with_scikit_learns(small, monkeypatch):
    from sklearn.cluster import KMeans

    points = scenarios.clustered_points(600, 40)
    monkeypatch.setattr(scenarios, "PAPER_POINTS", points.shape)
    monkeypatch.setattr(small, "repeats", 2)
    found, = scenarios.clusters(small, full=True)
    k = small.profile.prototypes.clusters
    theirs = [KMeans(k, n_init="auto", random_state=seed).fit(points.numpy()).inertia_ for seed in (1, 2)]
    made = [kmeans(points, k, seed=seed) for seed in (1, 2)]
    ours = [float(((points - centroids[assignment]).double() ** 2).sum()) for centroids, assignment in made]
    assert found.checks[0].value == pytest.approx(np.mean(ours) / np.mean(theirs) - 1, abs=1e-6)
    assert found.checks[0].limit == 0.01 and found.ours.n == found.theirs.n == 2 and found.limit == 10 and found.faster


LEVELS, SCORE = "levels of 255 between the drawings", "largest difference of a score"


@pytest.mark.parametrize("name, checked", [
    ("sampling", [[LEVELS]]), ("building", [[]]), ("kmeans", [["share of mean inertia above the alternative's"]]),
    ("texts", [[SCORE]]), ("segmenting", [[], [], [SCORE]]), ("vocabulary-2000", [[], []])])
def test_scenarios_run_with_tiny_networks(small, monkeypatch, name, checked):
    """``checked``: by row, which results are compared; memory added depends on the machine and is not asked for here."""
    for constant, value in {"TOGETHER": 2, "FEW": 3, "MANY": 5, "NAMES": ("cat", "dog", "boat")}.items():
        monkeypatch.setattr(scenarios, constant, value)
    found = SCENARIOS[name](small)
    assert all(min(one.ours.seconds + one.theirs.seconds) > 0 for one in found)
    results = [{check.what: check for check in one.checks if "bytes" not in check.what} for one in found]
    assert [list(one) for one in results] == checked
    assert name == "kmeans" or all(check.value <= check.limit for one in results for check in one.values())
    assert name != "segmenting" or "2 images against 3 classes" in found[2].measures


@pytest.mark.parametrize("name", ["attribution-memory", "matching-memory", "pamr"])
def test_memory_of_the_same_results(small, monkeypatch, name):
    """In this process, which is quicker; that a process of its own tells its own memory is tested above."""
    for constant, value in {"in_new_process": lambda call, *args: call(*args), "FEW": 3, "SOME": 6, "PIXELS": (96, 128)}.items():
        monkeypatch.setattr(scenarios, constant, value)
    found, = SCENARIOS[name](small)
    assert found.memory and found.checks[0].value <= found.checks[0].limit and found.theirs.peak > 50e6
    assert found.ours.result.std() > 0


def test_a_vocabulary_of_the_library_in_a_new_process(small, monkeypatch):
    monkeypatch.setattr(scenarios, "STORED", 3)
    monkeypatch.setattr(scenarios, "FEW", 2)
    row, = scenarios.stored_vocabulary(small)
    assert row.ours.n == 3 and row.checks[0].value > 0 and row.checks[1].value > 100e6
    made = small.made_up(3)
    built = OVDiff(small.profile, library=small.library, progress=False).build(made.vocabulary)
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(built.prototypes["sd"], made.prototypes["sd"], strict=True))


# ---- running them

@pytest.fixture
def made_scenarios(monkeypatch):
    def fails(_):
        raise RuntimeError("out of\nmemory")

    made = {"bad": fails, "good": lambda _: [ratio(limit=1)], "missed": lambda _: [ratio(limit=0)], "large": fails}
    monkeypatch.setattr(scenarios, "SCENARIOS", made)
    monkeypatch.setattr(scenarios, "BY_NAME", ("large",))
    return made


def test_a_failing_scenario_is_one_sentence_and_the_others_go_on(tiny_profile, made_scenarios):
    found = list(run(tiny_profile, repeats=1))
    assert [(name, error) for name, _, error in found] == [("bad", "RuntimeError: out of"), ("good", ""), ("missed", "")]
    assert [row.met for _, rows, _ in found for row in rows] == [True, False]
    assert [name for name, _, _ in run(tiny_profile, ["large"])] == ["large"]
    with pytest.raises(OVDiffError, match="bad"):
        scenarios.ratios(tiny_profile)
    assert [r.value for r in scenarios.ratios(tiny_profile, ["good", "missed"])] == [0.5, 0.5]


@pytest.fixture
def tiny(tiny_models):
    return [o for key, value in tiny_overrides(tiny_models).items() for o in ("--set", f"{key}={json.dumps(value)}")]


def test_the_command(tiny, made_scenarios, capsys):
    assert main(["benchmark", "--only", "good", *tiny]) == 0
    shown = capsys.readouterr().out
    assert "profile mini" in shown and "a: 0.5x the time, at most 1: met" in shown and "against other" in shown
    assert main(["benchmark", "--only", "good,missed", *tiny]) == 1 and "MISSED" in capsys.readouterr().out
    assert main(["benchmark", "--only", "bad", *tiny]) == 1 and "bad: FAILED: RuntimeError: out of" in capsys.readouterr().out

    def interrupted(_):
        raise KeyboardInterrupt

    made_scenarios["bad"] = interrupted
    assert main(["benchmark", *tiny]) == 130 and "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("options, word", [
    (["--only", "kmean"], "kmeans"), (["--only", "zzzz"], "sampling, building"), (["--only", ""], "choose from"),
    (["--repeats", "0"], "at least 1"), (["--library", "x"], "leave out --library")])
def test_mistakes_are_one_sentence(options, word, tiny, capsys):
    assert main(["benchmark", *options, *tiny]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and "\n" not in error


# ---- what is shown

def test_a_ratio_as_text():
    row = ratio((0.5, 0.25), (1.0, 1.0), 2, [Check("difference", 1e-6, 1e-5)], faster=True, added=(3_000_000, 0))
    assert [line.strip() for line in str(row).splitlines()] == [
        "a: 2.67x faster (2-4), at least 2: met", "what", "against other", "0.375 s and 3.00 MB against 1 s and 0 B added",
        "difference: 1e-06, at most 1e-05: met"]
    assert str(ratio(memory=True)).startswith("a: 0.5x the memory: no bound")


def test_cells_of_a_notebook(tiny_profile, tmp_path):
    made = ratio_cells([ratio((1.0, 2.0), (2.0, 2.0), 1.15, name="one"), ratio(name="two"),
                        ratio(memory=True, added=(1, 0), name="three")])
    by_place = {(cell.row, cell.column): cell.measured for cell in made}
    assert by_place["one, against other", "ratio"] == 0.75 and by_place["one, against other", "met (1) or missed (0)"] == 1
    assert [by_place["one, against other", column] for column in ("lowest", "highest", "bound")] == [0.5, 1, 1.15]
    assert by_place["two, against other", "ovdiff, peak MB"] == 110 / 1e6 and ("two, against other", "bound") not in by_place
    assert by_place["two, against other", "alternative, added MB"] == 20 / 1e6
    assert ("three, against other", "ratio") not in by_place
    write_table(tmp_path / "t.csv", "t", made, tiny_profile, "Caption.", DIGITS)
    back = {(cell.row, cell.column): cell for cell in read_table(tmp_path / "t.csv")}
    assert back["one, against other", "ovdiff, s"].values == (1, 2)
