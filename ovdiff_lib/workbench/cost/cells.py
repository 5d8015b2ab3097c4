"""Cells of the tables of costs (Sec. 4.2, App. C.5): what was measured, each with its place in the paper."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ovdiff_lib.library.store import Library
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.cost.benchmark import Ratio, prototype_rows
from ovdiff_lib.workbench.cost.instruments import Measured
from ovdiff_lib.workbench.cost.steps import ClassTimes, seconds
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell, paper_table
from ovdiff_lib.workbench.tables.tables import Cell

CLASS_ROWS = {
    ("sd", True): "prototypes for one class (SD; N=32)",
    ("sd", False): "prototypes for one class (SD; N=32; without clustering)",
    ("clip-keys", True): "prototypes for one class (CLIP; with clustering)",
    ("clip-keys", False): "prototypes for one class (CLIP; without clustering)",
}
"""(extractor, clustering) -> the row of App. C.5, all of 32 drawings."""

DIGITS = {"ovdiff, s": 4, "alternative, s": 4, "ovdiff, added MB": 1, "alternative, added MB": 1, "ovdiff, peak MB": 0,
          "alternative, peak MB": 0, "ratio": 2, "lowest": 2, "highest": 2, "bound": 2, "met (1) or missed (0)": 0}
"""Decimals of the columns of :func:`ratio_cells`."""


def cells_of(rows: Mapping[str, Mapping[str, Measured | float | None]],
             papers: Mapping[tuple[str, str], PaperCell] | None = None) -> list[Cell]:
    """Numbers by row and column as cells, beside those of ``papers``. A step that was measured is the median of its
    runs in seconds, with their standard deviation and all of them; None is left out."""
    cells = []
    for row, values in rows.items():
        for column, value in values.items():
            paper = (papers or {}).get((row, column))
            if isinstance(value, Measured):
                cells.append(Cell(row, column, value.median, value.std, value.n, paper, value.seconds))
            elif value is not None:
                cells.append(Cell(row, column, float(value), paper=paper))
    return cells


def building_cells(building: ClassTimes) -> list[Cell]:
    """Seconds of one class by extractor, with and without clustering: each step, and the sum of their medians beside
    the paper's, which is of 32 drawings whatever was built here."""
    rows, papers = {}, {}
    for (extractor, clustering), steps in building.items():
        row = f"{extractor}, {'with' if clustering else 'without'} clustering"
        rows[row] = {**steps, "seconds": seconds(steps)}
        if (extractor, clustering) in CLASS_ROWS:
            papers[row, "seconds"] = paper_cell("timing", CLASS_ROWS[extractor, clustering], "seconds")
    return cells_of(rows, papers)


def drawing_cells(drawing: Mapping[int, Measured], fit: Any) -> list[Cell]:
    """Seconds to draw N images beside the paper's where it has that N, and the line (of ``scipy.stats.linregress``)
    fitted to them."""
    rows, papers, printed = {}, {}, {cell.key: cell for cell in paper_table("timing")}
    for size, step in drawing.items():
        row, column = f"sampling time N={size}", "seconds per class"
        rows[row] = {column: step, "seconds an image": step.median / size}
        papers[row, column] = printed.get(("timing", row, column), PaperCell.own("timing", row, column))
    rows["linear fit"] = {"seconds an image": fit.slope, "seconds at N = 0": fit.intercept, "R2": fit.rvalue**2}
    return cells_of(rows, papers)


def storage_cells(building: ClassTimes, profile: Profile, paper: Profile,
                  widths: Mapping[str, tuple[int, PaperCell]]) -> list[Cell]:
    """Bytes of one class, in 10^6: by the formula of C.5 (2 (1 + N + K) D x 4 with the paper's kinds), of the vectors
    themselves, and of the library's files.

    ``widths`` adds rows of the sizes of ``paper``, which nothing is measured for: row -> (channels D, the paper's
    cell).
    """
    formula, on_disk, rows = "by the formula, MB", "on disk, MB", {}
    for (name, clustering), steps in building.items():
        made = steps["prototypes"].result
        if clustering:
            width = made.vectors.shape[1]
            rows[f"prototypes per class ({name})"] = {
                "channels D": width, "vectors": len(made), formula: 4 * width * prototype_rows(profile) / 1e6,
                "vectors, MB": made.vectors.nbytes / 1e6, on_disk: bytes_on_disk("prototypes", made) / 1e6}
    for row, (width, _) in widths.items():
        vectors = prototype_rows(paper)
        rows[row] = {"channels D": width, "vectors": vectors, formula: 4 * width * vectors / 1e6}
    support = steps["drawing"].result
    arrays = support.images.nbytes + support.attribution.nbytes + support.seeds.nbytes
    rows["support set"] = {formula: arrays / 1e6, on_disk: bytes_on_disk("support", support) / 1e6}
    return cells_of(rows, {(row, formula): cell for row, (_, cell) in widths.items()})


def bytes_on_disk(kind: str, entry: Any) -> int:
    """What the library's files of one entry take."""
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder)
        library.put(kind, "0" * 8, entry)
        return sum(one.bytes for one in library.entries())


def growth_cells(growth: Mapping[str, Sequence[tuple[int, Measured]]], paper_classes: int) -> list[Cell]:
    """Seconds to segment an image by method and number of classes; the paper's times stand at ``paper_classes``."""
    rows = {name: {f"{classes} classes": step for classes, step in points} for name, points in growth.items()}
    beside = f"{paper_classes} classes"
    papers = {(name, beside): paper_cell("timing", f"inference {name}", "seconds per image")
              for name in ("OVDiff", "TCL", "OVSegmentor")}
    return cells_of(rows, papers) + [Cell(name, beside, paper=papers[name, beside], source="published")
                                     for name in ("TCL", "OVSegmentor")]


def memory_cells(steps: Mapping[str, Measured]) -> list[Cell]:
    """Resident memory of the process by step, in 10^6 bytes, and the GPU's where there is one."""
    return cells_of({row: {"held before, MB": step.held / 1e6, "peak, MB": step.peak / 1e6,
                           "added, MB": (step.peak - step.held) / 1e6,
                           "peak on the GPU, MB": None if step.device is None else step.device / 1e6}
                     for row, step in steps.items()})


def ratio_cells(ratios: Iterable[Ratio]) -> list[Cell]:
    """A row a ratio: seconds, added memory and the process's peak of both sides, the ratio with its lowest and highest
    round, the bound, and 1 where it and the check are met, 0 where not. What a row has no value for is left out."""
    rows = {}
    for ratio in ratios:
        ours, theirs, spread = ratio.ours, ratio.theirs, ratio.spread or (None, None)
        rows[f"{ratio.name}, against {ratio.alternative}"] = {
            "ovdiff, s": ours, "alternative, s": theirs, "ovdiff, added MB": ours.added / 1e6,
            "alternative, added MB": theirs.added / 1e6, "ovdiff, peak MB": ours.peak / 1e6,
            "alternative, peak MB": theirs.peak / 1e6, "ratio": ratio.value,
            "lowest": spread[0], "highest": spread[1], "bound": ratio.limit, "met (1) or missed (0)": ratio.met}
    return cells_of(rows)
