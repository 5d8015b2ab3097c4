"""Measuring: instruments against known clocks and sizes, steps against the method; tables of costs by hand; the benchmark. No times."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import linregress
from sentences import assigned
from tiny import noise, tiny_overrides

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import InputError
from ovdiff_lib.library.store import Library
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import Prototypes, SupportSet
from ovdiff_lib.workbench.cost import cells as cost_cells
from ovdiff_lib.workbench.cost import instruments, plain, scenarios, steps
from ovdiff_lib.workbench.cost.cells import DIGITS, Check, Ratio, prototype_rows, ratio_cells
from ovdiff_lib.workbench.cost.instruments import Measured, alternate, measured
from ovdiff_lib.workbench.cost.scenarios import SCENARIOS, Session, difference
from ovdiff_lib.workbench.figures.charts import breakdown_figure, growth_figure
from ovdiff_lib.workbench.tables.paper import paper_cell

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances where a test sets ``clock[0]``."""
    now = [0.0]
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: now[0])
    return now


# ---- instruments

def test_median_spread_and_result(clock):
    def square(x, seconds):
        clock[0] += seconds
        return x * x

    found = measured(square, [(2, 3.0), (3, 1.0), (4, 2.5)])
    assert found.seconds == (3.0, 1.0, 2.5) and found.median == 2.5 and found.n == 3 and found.result == 16
    assert found.std == pytest.approx(np.std([3, 1, 2.5], ddof=1)) and measured(lambda: None).std is None
    for nothing in (lambda: measured(square, []), lambda: alternate([square], 0, CPU)):
        with pytest.raises(InputError):
            nothing()


def test_all_ways_take_turns_after_a_warm_up(clock):
    calls = []

    def way(name, seconds):
        def call(number):
            calls.append((name, number))
            clock[0] += seconds * max(number, 1)
            return name * number
        return call

    ways = way("a", 1.0), way("b", 2.0), way("c", 3.0)
    ours, theirs, third = alternate(ways, 3, CPU)
    assert calls == [(name, number) for number in range(4) for name in "abc"]
    assert (ours.seconds, theirs.seconds, third.seconds) == ((1, 2, 3), (2, 4, 6), (3, 6, 9)) and theirs.result == "bbb"
    ours, theirs, third = alternate(ways, 3, CPU, budget=6)
    assert (ours.n, theirs.seconds, third.seconds) == (3, (2, 4), (3, 6))  # six seconds were spent


@pytest.mark.skipif(not instruments.reset_peak(), reason="this system cannot set the peak of memory back")
def test_peak_memory_is_that_of_each_way():
    size = 200 * 2**20
    large, small = alternate((lambda _: int(np.ones(size, np.uint8).sum()), lambda _: None), 2, CPU)
    assert 0.95 * size < large.added < 1.5 * size and large.device is None
    assert small.added < size / 4 and small.peak < large.peak - size / 2  # the array is gone, and with it the peak


@pytest.mark.skipif(not instruments.reset_peak(), reason="this system cannot set the peak of memory back")
def test_memory_that_an_earlier_step_left_free_does_not_hide_what_a_step_takes():
    """Pieces too small for a mapping of their own stay with the process when they are gone."""
    def pieces(_):
        return sum(len(one) for one in [b"x" * 2**16 for _ in range(2**11)])

    found, = alternate((pieces,), 3, CPU)
    assert found.added > 100 * 2**20


def test_without_the_systems_files_memory_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(instruments, "STATUS", tmp_path / "status")
    monkeypatch.setattr(instruments, "CLEAR", tmp_path / "none" / "clear_refs")
    found = measured(lambda: None)
    assert not instruments.reset_peak() and found.peak >= found.held > 50 * 2**20


# ---- steps

@pytest.fixture(scope="module")
def drawing(tiny_profile):
    return steps.measure_drawing(tiny_profile, Category("dog"), [3, 1, 3], repeats=2)


@pytest.fixture(scope="module")
def bank(tiny_profile, tmp_path_factory):
    profile = tiny_profile.override({"features.extractors": ["sd", "dino"]})
    return OVDiff(profile, library=tmp_path_factory.mktemp("library"), progress=False).build(["dog", "cat", "sofa"])


def test_drawings_are_those_of_the_method(tiny_profile, drawing):
    assert list(drawing) == [1, 3] and all(step.n == 2 and min(step.seconds) > 0 for step in drawing.values())
    expected = sample_support(load_diffusion(tiny_profile), Category("dog"), tiny_profile, progress=False)
    np.testing.assert_array_equal(drawing[3].result.images, expected.images)
    np.testing.assert_allclose(drawing[1].result.images.astype(int), expected.images[:1], atol=1)  # a smaller batch rounds otherwise


def test_steps_and_prototypes_of_a_class_are_those_of_the_method(tiny_profile, drawing, bank):
    building = steps.measure_building(tiny_profile, drawing[3], ["sd", "dino"], repeats=2)
    assert list(building) == [(name, clustering) for name in ("sd", "dino") for clustering in (True, False)]
    for (name, clustering), took in building.items():
        assert list(took) == ["drawing", "masks", "features", "prototypes"] and all(step.n == 2 for step in took.values())
        assert took["drawing"] is drawing[3]
        made = took["prototypes"].result
        assert set(made.kind) == {"class", "instance"} | ({"part"} if clustering else set())
        if clustering:
            np.testing.assert_allclose(made.vectors, bank.prototypes[name][0].vectors, rtol=1e-4, atol=1e-5)


def test_kinds_of_parts_alone_still_leave_something_to_average(tiny_profile, drawing):
    found = steps.measure_building(tiny_profile.override({"prototypes.kinds": ["part"]}), drawing[1], ["dino"])
    assert [set(found["dino", part]["prototypes"].result.kind) for part in (True, False)] == [{"part"}, {"class"}]


def test_every_image_is_segmented_once_after_the_first(tiny_profile, bank):
    images, seen = [noise(*shape) for shape in ((64, 96), (80, 64), (64, 70))], []
    methods = {"one": lambda image, part: seen.append((image.shape[:2], len(part.vocabulary))), "other": lambda image, part: None}
    found = steps.measure_segmenting(methods, bank, [1, 3], images, tiny_profile)
    assert [(count, step.n) for count, step in found["one"]] == [(1, 2), (3, 2)] and list(found) == ["one", "other"]
    assert seen == [(image.shape[:2], count) for count in (1, 3) for image in images]


# ---------------------------------------------------------------------- tables and figures

N, K, D, GRID = 3, 4, 10, 8


def step(*seconds, result=None, held=100, peak=130):
    return Measured(seconds, result, held, peak)


def prototypes(vectors):
    half = vectors // 2
    return Prototypes(np.zeros((vectors, D), np.float32), np.full(vectors, "part"), np.repeat(["foreground", "background"], half),
                      np.full(vectors, -1, np.int32), np.arange(vectors, dtype=np.int32), np.zeros((N, GRID, GRID), np.int16))


@pytest.fixture
def building():
    support = SupportSet(Category("dog"), np.zeros((N, 16, 16, 3), np.uint8), np.zeros((N, GRID, GRID), np.float32), np.arange(N))
    shared = {"drawing": step(20.0, result=support), "masks": step(0.5, 0.7), "features": step(4.0)}
    last = {True: step(1.0, 3.0, 2.0, result=prototypes(16)), False: step(0.25, result=prototypes(8))}
    return {(name, part): {**shared, "prototypes": last[part]} for name in ("sd", "clip-keys", "dino") for part in (True, False)}


def by_place(cells):
    return {(cell.row, cell.column): cell for cell in cells}


def test_a_class_and_its_drawing_beside_the_papers(building):
    cells = by_place(cost_cells.building_cells(building))
    assert cells["sd, with clustering", "seconds"].measured == pytest.approx(20 + 0.6 + 4 + 2)
    assert cells["sd, without clustering", "seconds"].measured == pytest.approx(20 + 0.6 + 4 + 0.25)
    assert [cells[f"{name}, {how} clustering", "seconds"].paper.value for name in ("sd", "clip-keys")
            for how in ("with", "without")] == [110, 50.2, 49.2, 47.7] and cells["dino, with clustering", "seconds"].paper is None
    made = cells["sd, with clustering", "prototypes"]
    assert (made.measured, made.n, made.values, made.std) == (2.0, 3, (1.0, 3.0, 2.0), 1.0) and made.paper is None
    drawing = {16: step(4.0, 6.0), 20: step(6.0), 32: step(10.0)}
    cells = by_place(cost_cells.drawing_cells(drawing, linregress([16, 20, 32], [5, 6, 10])))
    keys = {(cell.paper.key, cell.paper.value) for cell in cells.values() if cell.column == "seconds per class"}
    assert keys == {(("timing", f"sampling time N={n}", "seconds per class"), value) for n, value in ((16, 55), (20, None), (32, 110))}
    assert cells["sampling time N=16", "seconds an image"].measured == 5 / 16
    assert cells["linear fit", "R2"].measured == pytest.approx(np.corrcoef([16, 20, 32], [5, 6, 10])[0, 1] ** 2)


def test_the_formula_of_storage_and_the_bytes_of_the_files(building, tmp_path):
    profile = load_profile("mini", {"support.size": N, "support.image_size": 16, "prototypes.clusters": K})
    widths = {"theirs": (768, paper_cell("storage", "prototypes per class (CLIP/DINO)", "MB"))}
    cells = by_place(cost_cells.storage_cells(building, profile, load_profile("paper"), widths))
    row = "prototypes per class (dino)"
    assert cells[row, "by the formula, MB"].measured == cells[row, "vectors, MB"].measured == 2 * (1 + N + K) * D * 4 / 1e6
    assert cells[row, "vectors"].measured == 16 and cells[row, "channels D"].measured == D

    library = Library(tmp_path)
    library.put("prototypes", "a" * 8, building["dino", True]["prototypes"].result)
    library.put("support", "b" * 8, building["dino", True]["drawing"].result)
    for name, kind in ((row, "prototypes"), ("support set", "support")):
        size = sum(f.stat().st_size for f in (tmp_path / kind).rglob("*") if f.is_file())
        assert cells[name, "on disk, MB"].measured == size / 1e6
    assert cells["support set", "by the formula, MB"].measured == N * (16 * 16 * 3 + GRID * GRID * 4 + 8) / 1e6
    theirs = cells["theirs", "by the formula, MB"]
    assert (theirs.measured, theirs.paper.value, cells["theirs", "vectors"].measured) == (0.39936, 0.39, 130)


def test_segmenting_beside_the_papers():
    growth = {"OVDiff": [(5, step(1.0, 2.0)), (20, step(3.0))], "MaskCLIP": [(5, step(0.1)), (20, step(0.2))]}
    cells = by_place(cost_cells.growth_cells(growth, 20))
    assert cells["OVDiff", "20 classes"].paper.value == 0.6 and cells["OVDiff", "5 classes"].paper is None
    assert [(c.row, c.paper.value) for c in cells.values() if c.source == "published"] == [("TCL", 0.2), ("OVSegmentor", 0.08)]


def test_memory():
    cells = by_place(cost_cells.memory_cells({"masks": Measured((1.0,), None, 200_000_000, 260_000_000),
                                              "on a GPU": Measured((1.0,), None, 1, 2, 5_000_000)}))
    assert [cells["masks", c].measured for c in ("held before, MB", "peak, MB", "added, MB")] == [200, 260, 60]
    assert cells["on a GPU", "peak on the GPU, MB"].measured == 5 and ("masks", "peak on the GPU, MB") not in cells


def test_growth_figure():
    points = [(8, step(3.0)), (4, step(1.0, 5.0, 2.0))]
    fit = SimpleNamespace(slope=0.5, intercept=-1.0, rvalue=0.9)
    left, = growth_figure({"median": points}, "Drawing", "N", "seconds", fit).axes
    right, = growth_figure({"a": points, "b": points}, "W", "w", "seconds").axes
    lines = [(line.get_label(), line.get_xydata().tolist()) for line in left.get_lines()]
    assert [[4, 2], [8, 3]] in [xy for _, xy in lines] and ("0.5 x − 1, R² = 0.8100", [[0, -1], [8, 3]]) in lines
    assert {text.get_text() for text in right.get_legend().get_texts()} == {"a", "b"} and left.get_ylim()[0] == 0
    bars = [path for collection in left.collections for path in collection.get_segments()]
    assert any(np.allclose(sorted(bar[:, 1]), [1, 5]) for bar in bars)  # fastest to slowest of three runs


def test_breakdown_figure():
    figure = breakdown_figure({"sd": {"drawing": 10.0, "masks": 2.0}, "dino": {"drawing": 10.0, "features": 0.5}}, "One class")
    axis, = figure.axes
    assert {text.get_text() for text in axis.texts} == {"12.0 s", "10.5 s"}
    ends = sorted({(round(p.get_x(), 3), round(p.get_x() + p.get_width(), 3)) for p in axis.patches if p.get_width()})
    assert ends == [(0, 10), (10, 10.5), (10, 12)]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["sd", "dino"]


# ---------------------------------------------------------------------- the benchmark, whose alternatives give what OVDiff gives

SHAPE = (52, 88)


def ratio(ours=(1.0,), theirs=(2.0,), limit=None, check=None, added=(10, 20), name="a", **more):
    sides = [Measured(tuple(seconds), None, 100, 100 + plus) for seconds, plus in zip((ours, theirs), added, strict=True)]
    return Ratio(name, "other", *sides, limit, check, **more)


@pytest.fixture(scope="module")
def small(tiny_profile):
    return Session(tiny_profile, repeats=1)


@pytest.fixture
def image():
    return np.random.default_rng(5).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    found = ratio((3.0, 1.0, 2.2), (2.0, 4.0, 2.0))
    assert found.value == 2.2 / 2.0 and found.spread == (1 / 4, 3 / 2) and found.met is None
    assert ratio().spread is None


@pytest.mark.parametrize("limit, difference, met", [
    (1.15, None, True), (0.5, None, True), (0.49, None, False), (1, 1e-6, True), (1, 2e-5, False), (0.1, 0, False),
    (None, math.nan, False), (None, 1e-5, True)])
def test_a_limit_and_a_check_beside_it(limit, difference, met):
    assert ratio((1.0,), (2.0,), limit, None if difference is None else Check("difference", difference, 1e-5)).met is met


def test_differences_see_where_infinite_values_stand():
    inf = math.inf
    assert difference(np.array([-inf, 1.0]), torch.tensor([-inf, 1.5])) == 0.5
    assert difference(np.array([-inf, 1.0]), np.array([0.0, 1.0])) > 1e300
    assert math.isnan(difference(np.array([math.nan]), np.array([math.nan])))


def test_made_up_classes_have_prompts_of_their_own_and_all_prototypes_of_a_class(small):
    bank = small.made_up(2000)
    assert bank.vocabulary.names[:2] == ("w0001", "w0002") and len({category.prompt for category in bank.vocabulary}) == 2000
    support, clusters = small.profile.support.size, small.profile.prototypes.clusters
    for made in bank.prototypes["sd"][:3]:
        assert made.vectors.dtype == np.float32 and np.sum(made.region == "foreground") == 1 + support + clusters == len(made) / 2
    assert not np.array_equal(bank.prototypes["sd"][0].vectors, bank.prototypes["sd"][1].vectors)
    assert prototype_rows(small.profile.override({"prototypes.background": False, "prototypes.kinds": ["class", "part"]})) == 1 + clusters


def test_the_bare_pipeline_draws_the_same_images(tiny_profile):
    pipe, profile = load_diffusion(tiny_profile), tiny_profile.override({"support.batch_size": 2})
    processors = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    support = sample_support(pipe, Category("dog"), profile, 3, progress=False)
    drawn = plain.draw(pipe, Category("dog"), profile, 3)
    assert drawn.shape == support.images.shape and difference(drawn, support.images) <= 2
    assert difference(plain.draw(pipe, Category("cat"), profile, 3), support.images) > 20
    assert {name: id(p) for name, p in pipe.unet.attn_processors.items()} == processors


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


def test_inertia_is_compared_with_scikit_learns(small, monkeypatch):
    from sklearn.cluster import KMeans

    points = scenarios.spread_points(600, 40)
    monkeypatch.setattr(scenarios, "PAPER_POINTS", points.shape)
    monkeypatch.setattr(small, "repeats", 2)
    found, = scenarios.clusters(small, full=True)
    k = small.profile.prototypes.clusters
    theirs = [KMeans(k, n_init="auto", random_state=seed).fit(points).inertia_ for seed in (1, 2)]
    made = [kmeans(points, k, seed=seed) for seed in (1, 2)]
    ours = [float(((points - centroids.numpy()[assignment]).astype(float) ** 2).sum()) for centroids, assignment in made]
    assert found.check.value == pytest.approx(np.mean(ours) / np.mean(theirs) - 1, abs=1e-6)
    assert found.check.limit == 0.01 and found.ours.n == found.theirs.n == 2 and found.limit == 0.1


@pytest.mark.parametrize("name, checked", [
    ("sampling", ["the drawings, of 255 levels"]), ("building", [None]), ("kmeans", ["share of mean inertia above the alternative's"]),
    ("texts", ["the embeddings"]), ("segmenting", [None, None, "a score"]), ("vocabulary-2000", [None, None])])
def test_scenarios_run_with_tiny_networks(small, monkeypatch, name, checked):
    """``checked``: by row, which results are compared; times depend on the machine and are not asked for here."""
    for constant, value in {"TOGETHER": 2, "FEW": 3, "MANY": 5, "NAMES": ("cat", "dog", "boat")}.items():
        monkeypatch.setattr(scenarios, constant, value)
    found = SCENARIOS[name](small)
    assert all(min(one.ours.seconds + one.theirs.seconds) > 0 for one in found)
    assert [one.check and one.check.what.removeprefix("largest difference of ") for one in found] == checked
    assert name == "kmeans" or all(one.check.value <= one.check.limit for one in found if one.check)


@pytest.fixture
def made_scenarios(monkeypatch):
    def fails(problem, _):
        raise problem

    made = {"good": lambda _: [ratio(limit=1)], "missed": lambda _: [ratio(limit=0)],
            "bad": functools.partial(fails, RuntimeError("out of\nmemory")), "stopped": functools.partial(fails, KeyboardInterrupt)}
    monkeypatch.setattr(scenarios, "SCENARIOS", made)
    monkeypatch.setattr(scenarios, "BY_NAME", ("bad", "stopped"))


def test_the_command(tiny_models, made_scenarios, capsys):
    def benchmark(*options):
        return main(["benchmark", *options, *assigned(tiny_overrides(tiny_models))]), *capsys.readouterr()

    code, shown, _ = benchmark("--only", "good")
    assert code == 0 and "profile mini" in shown and "a: 0.5x the time, at most 1: met" in shown and "against other" in shown
    code, shown, _ = benchmark()
    assert code == 1 and shown.count("met\n") == shown.count("MISSED\n") == 1
    code, shown, error = benchmark("--only", "good,bad")
    assert code == 2 and "met\n" in shown and "The scenario bad failed: RuntimeError('out of" in error and "Traceback" not in error
    assert benchmark("--only", "stopped")[0] == 130
    for options, word in ((["--only", "god"], "good"), (["--only", "zzzz"], "good, missed"), (["--only", ""], "good, missed")):
        code, _, error = benchmark(*options)
        assert code == 2 and word in error and "\n" not in error.strip()


def test_cells_of_a_notebook():
    made = ratio_cells([ratio((1.0, 2.0), (2.0, 2.0), 1.15, name="one"), ratio(name="two")])
    by_place = {(cell.row, cell.column): cell.measured for cell in made}
    assert by_place["one, against other", "ratio"] == 0.75 and by_place["one, against other", "met (1) or missed (0)"] == 1
    assert [by_place["one, against other", column] for column in ("lowest", "highest", "bound")] == [0.5, 1, 1.15]
    assert by_place["two, against other", "ovdiff, peak MB"] == 110 / 1e6 and ("two, against other", "bound") not in by_place
    assert by_place["two, against other", "alternative, added MB"] == 20 / 1e6
    assert {column for _, column in by_place} == set(DIGITS)
