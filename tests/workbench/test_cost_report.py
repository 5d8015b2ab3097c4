"""Tables and figures of costs: every number in its place, with the paper's beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import linregress

from ovdiff_lib.categories import Category
from ovdiff_lib.library.store import Library
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import Prototypes, SupportSet
from ovdiff_lib.workbench.cost import cells as cost_cells
from ovdiff_lib.workbench.cost.instruments import Measured
from ovdiff_lib.workbench.figures.charts import Panel, breakdown_figure, growth_figure
from ovdiff_lib.workbench.tables.paper import paper_cell

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
    panels = [Panel("Drawing", "N", {"median": points}, fit), Panel("W", "w", {"a": points, "b": points})]
    left, right = growth_figure(panels, "seconds").axes
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
