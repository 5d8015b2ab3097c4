"""Cells of the tables of costs (Sec. 4.2, App. C.5): what was measured or counted, each with its place in the paper."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ovdiff_lib.library.store import Library
from ovdiff_lib.workbench.cost.flops import prototype_bytes, prototype_rows, support_bytes
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell, paper_table
from ovdiff_lib.workbench.tables.tables import Cell

if TYPE_CHECKING:
    from ovdiff_lib.profiles.schema import Profile
    from ovdiff_lib.workbench.cost.benchmark import Ratio
    from ovdiff_lib.workbench.cost.instruments import LinearFit, Measured
    from ovdiff_lib.workbench.cost.steps import ClassTimes

CLASS_ROWS = {
    ("sd", True): "prototypes for one class (SD; N=32)",
    ("sd", False): "prototypes for one class (SD; N=32; without clustering)",
    ("clip-keys", True): "prototypes for one class (CLIP; with clustering)",
    ("clip-keys", False): "prototypes for one class (CLIP; without clustering)",
}
"""(extractor, clustering) -> the row of App. C.5, all of 32 drawings."""

TRAINED = ("TCL training", "GroupViT training", "OVSegmentor training")
CLASS, COMPUTE = "prototype compute per class", "TFLOP/s-hours"
"""Rows of Sec. 4.2's comparison with training, and their column in the paper's data."""

DIGITS = {"ovdiff, s": 4, "alternative, s": 4, "ovdiff, added MB": 1, "alternative, added MB": 1, "ovdiff, peak MB": 0,
          "alternative, peak MB": 0, "ratio": 2, "lowest": 2, "highest": 2, "bound": 2, "met (1) or missed (0)": 0}
"""Decimals of the columns of :func:`ratio_cells`."""


def published_or_own(table: str, row: str, column: str) -> PaperCell:
    """The paper's cell of that key, or the key alone where the paper has none."""
    key = table, row, column
    return next((cell for cell in paper_table(table) if cell.key == key), PaperCell.own(*key))


def time_cell(row: str, column: str, step: Measured, paper: PaperCell | None = None) -> Cell:
    """The median of a step's runs in seconds, their standard deviation, and all of them."""
    return Cell(row, column, step.median, step.std, step.n, paper, step.seconds)


def building_cells(building: ClassTimes) -> list[Cell]:
    """Seconds of one class by extractor, with and without clustering: each step, and the sum of their medians beside
    the paper's, which is of 32 drawings whatever was built here."""
    cells = []
    for extractor, clustering in [(name, part) for name in building.features for part in (True, False)]:
        steps = building.steps(extractor, clustering)
        row = f"{extractor}, {'with' if clustering else 'without'} clustering"
        key = CLASS_ROWS.get((extractor, clustering), f"prototypes for one class ({row})")
        cells += [time_cell(row, name, step) for name, step in steps.items()]
        cells.append(Cell(row, "seconds", building.seconds(extractor, clustering),
                          n=min(step.n for step in steps.values()), paper=published_or_own("timing", key, "seconds")))
    return cells


def drawing_cells(drawing: Mapping[int, Measured], fit: LinearFit) -> list[Cell]:
    """Seconds to draw N images beside the paper's where it has that N, and the line fitted to them."""
    cells = []
    for size, step in drawing.items():
        row, column = f"sampling time N={size}", "seconds per class"
        cells += [time_cell(row, column, step, published_or_own("timing", row, column)),
                  Cell(row, "seconds an image", step.median / size, n=step.n)]
    line = {"seconds an image": fit.slope, "seconds at N = 0": fit.intercept, "R2": fit.r2}
    return cells + [Cell("linear fit", column, value, n=len(drawing),
                         paper=PaperCell.own("timing", "sampling time, linear fit", column))
                    for column, value in line.items()]


def storage_cells(building: ClassTimes, profile: Profile, paper: Profile,
                  widths: Mapping[str, tuple[int, PaperCell]]) -> list[Cell]:
    """Bytes of one class, in 10^6: by the formula of C.5, of the vectors themselves, and of the library's files.

    ``widths`` adds rows of the sizes of ``paper``, which nothing is measured for: row -> (channels D, the paper's
    cell).
    """
    formula, channels, support, cells = "by the formula, MB", "channels D", building.drawing.result, []
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder)
        library.put("support", "0" * 8, support)
        for number, step in enumerate(building.clustered.values()):
            library.put("prototypes", f"{number:08x}", step.result)
        stored = {(entry.kind, entry.key): entry.bytes for entry in library.entries()}
    for number, (name, step) in enumerate(building.clustered.items()):
        row, width = f"prototypes per class ({name})", step.result.vectors.shape[1]
        cells += [Cell(row, channels, width), Cell(row, "vectors", len(step.result))]
        values = {formula: prototype_bytes(profile, width), "vectors, MB": step.result.vectors.nbytes,
                  "on disk, MB": stored["prototypes", f"{number:08x}"]}
        cells += [Cell(row, column, value / 1e6, paper=PaperCell.own("storage", row, column))
                  for column, value in values.items()]
    for row, (width, cell) in widths.items():
        cells += [Cell(row, channels, width), Cell(row, "vectors", prototype_rows(paper)),
                  Cell(row, formula, prototype_bytes(paper, width) / 1e6, paper=cell)]
    return [*cells, Cell("support set", formula, support_bytes(profile, support.attribution.shape[1]) / 1e6),
            Cell("support set", "on disk, MB", stored["support", "0" * 8] / 1e6)]


def growth_cells(growth: Mapping[str, Sequence[tuple[int, Measured]]], paper_classes: int) -> list[Cell]:
    """Seconds to segment an image by method and number of classes; the paper's times stand at ``paper_classes``."""
    cells, column = [], "seconds per image"
    for name, points in growth.items():
        for classes, step in points:
            own = PaperCell.own("timing", f"inference {name}", f"{column}, {classes} classes")
            paper = published_or_own("timing", f"inference {name}", column) if classes == paper_classes else own
            cells.append(time_cell(name, f"{classes} classes", step, paper))
    return cells + [Cell(name, f"{paper_classes} classes", paper=paper_cell("timing", f"inference {name}", column),
                         source="published") for name in ("TCL", "OVSegmentor")]


def window_cells(windows: Mapping[str, tuple[float, Measured]]) -> list[Cell]:
    """Windows an image, seconds an image and seconds a window, by what was set."""
    return [cell for row, (mean, step) in windows.items() for cell in (
        Cell(row, "windows an image", mean, n=step.n), time_cell(row, "seconds an image", step),
        Cell(row, "seconds a window", step.median / mean, n=step.n))]


def operation_cells(what: str, column: str, table: Mapping[str, int], unit: float) -> list[Cell]:
    """FLOP in ``unit`` by step of ``what`` ("class" or "image")."""
    return [Cell(row, column, flop / unit, paper=PaperCell.own("operations", row, column))
            for row, flop in ((f"{what}: {step}", flop) for step, flop in table.items())]


def training_cells(measured: float, counted: float) -> list[Cell]:
    """Compute in TFLOP/s-hours (footnote 1 of the paper), and how many classes cost as much as training another method.

    ``measured`` is that of a class built here, ``counted`` the operations of a class of the paper's networks over
    3.6e15: what it would take at the peak rate all the time.
    """
    published, at_peak = paper_cell("timing", CLASS, COMPUTE), f"{CLASS}: operations of the paper's networks"
    cells = [Cell(CLASS, f"{COMPUTE}, one class", measured, paper=published),
             Cell(at_peak, f"{COMPUTE}, one class", counted, paper=PaperCell.own("timing", at_peak, COMPUTE))]
    costs = {"the paper's time": published.value, "operations of the paper's networks": counted,
             "the class built here": measured}
    for row in TRAINED:
        training = paper_cell("timing", row, COMPUTE)
        cells.append(Cell(row, f"{COMPUTE}, training", paper=training, source="published"))
        for how, cost in costs.items():
            column = f"classes for the same, by {how}"
            cells.append(Cell(row, column, training.value / cost, paper=PaperCell.own("timing", row, column)))
    return cells


def memory_cells(steps: Mapping[str, Measured]) -> list[Cell]:
    """Resident memory of the process by step, in 10^6 bytes, and the GPU's where there is one."""
    cells = []
    for row, step in steps.items():
        values = {"held before, MB": step.held, "peak, MB": step.peak, "added, MB": step.peak - step.held,
                  "peak on the GPU, MB": step.device}
        cells += [Cell(row, column, value / 1e6, n=step.n) for column, value in values.items() if value is not None]
    return cells


def ratio_cells(ratios: Iterable[Ratio]) -> list[Cell]:
    """A row a ratio: seconds, added memory and the process's peak of both sides, the ratio with its lowest and highest
    round, the bound, and 1 where it and all checks are met, 0 where not. What a row has no value for is left out."""
    cells = []
    for ratio in ratios:
        row, (lowest, highest) = f"{ratio.name}, against {ratio.alternative}", ratio.spread or (None, None)
        sides = {"ovdiff": ratio.ours, "alternative": ratio.theirs}
        cells += [Cell(row, f"{who}, s", side.median, n=side.n, values=side.seconds) for who, side in sides.items()]
        cells += [Cell(row, f"{who}, added MB", side.added / 1e6) for who, side in sides.items()]
        cells += [Cell(row, f"{who}, peak MB", side.peak / 1e6) for who, side in sides.items()]
        if math.isfinite(ratio.value):
            own = PaperCell.own("benchmark", ratio.name, "ratio")
            cells.append(Cell(row, "ratio", ratio.value, n=ratio.ours.n, paper=own))
        further = {"lowest": lowest, "highest": highest, "bound": ratio.limit, "met (1) or missed (0)": ratio.met}
        cells += [Cell(row, column, float(value)) for column, value in further.items() if value is not None]
    return cells
