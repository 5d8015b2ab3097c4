"""Ratios, and the tables of costs (Sec. 4.2, App. C.5): what was measured, each with its place in the paper."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ovdiff_lib.library.codec import encode
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.console import size_text
from ovdiff_lib.workbench.cost.instruments import Measured
from ovdiff_lib.workbench.cost.steps import ClassTimes
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell, paper_table
from ovdiff_lib.workbench.tables.tables import Cell

CLASS_ROWS = {
    ("sd", True): "prototypes for one class (SD; N=32)",
    ("sd", False): "prototypes for one class (SD; N=32; without clustering)",
    ("clip-keys", True): "prototypes for one class (CLIP; with clustering)",
    ("clip-keys", False): "prototypes for one class (CLIP; without clustering)"}
"""(extractor, clustering) -> the row of App. C.5, all of 32 drawings."""

DIGITS = {"ovdiff, s": 4, "alternative, s": 4, "ovdiff, added MB": 1, "alternative, added MB": 1, "ovdiff, peak MB": 0,
          "alternative, peak MB": 0, "ratio": 2, "lowest": 2, "highest": 2, "bound": 2, "met (1) or missed (0)": 0}
"""Decimals of the columns of :func:`ratio_cells`."""


class Check(NamedTuple):
    """Beside the ratio: ``value`` of ``what``, by which the results differ, is at most ``limit``."""

    what: str
    value: float
    limit: float


@dataclass(frozen=True)
class Ratio:
    """Seconds of OVDiff's way against a named alternative's, taken in turns: it says the same on a slow and on a fast
    machine. ``limit``: at most so many times the alternative's time; None: the row reports only."""

    name: str
    alternative: str  # what was done in its place, in words
    ours: Measured
    theirs: Measured
    limit: float | None = None
    check: Check | None = None

    value = property(lambda self: self.ours.median / self.theirs.median)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest ratio of one round of both; None for a single round."""
        rounds = [ours / theirs for ours, theirs in zip(self.ours.seconds, self.theirs.seconds, strict=False)]
        return None if len(rounds) < 2 else (min(rounds), max(rounds))

    @property
    def met(self) -> bool | None:
        """Whether limit and check hold; None for a row that has neither."""
        bounds = [] if self.limit is None else [(self.value, self.limit)]
        bounds += [self.check[1:]] if self.check else []
        return all(value <= limit for value, limit in bounds) if bounds else None  # NaN is not met

    def __str__(self) -> str:
        """Lines for a person: the ratio, the time and memory of both sides, and by what the results differ."""
        spread = f" ({self.spread[0]:.3g}-{self.spread[1]:.3g})" if self.spread else ""
        bound = "" if self.limit is None else f", at most {self.limit:g}"
        result = {True: "met", False: "MISSED", None: "no bound"}[self.met]
        lines = [f"{self.name}: {self.value:.3g}x the time{spread}{bound}: {result}"]
        lines += [f"{what}: {side.median:.3g} s, {size_text(side.added)} added"
                  for what, side in (("ovdiff", self.ours), (f"against {self.alternative}", self.theirs))]
        if self.check:
            lines.append(f"{self.check.what}: {self.check.value:.3g}, at most {self.check.limit:g}")
        return "\n    ".join(lines)


def cells_of(rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Numbers by row and column as cells; a number may be a pair with the paper's cell that it stands beside. A step
    that was measured is the median of its runs in seconds, with their deviation and all of them; None is left out."""
    cells = []
    for row, values in rows.items():
        for column, value in values.items():
            value, paper = value if isinstance(value, tuple) else (value, None)
            if isinstance(value, Measured):
                cells.append(Cell(row, column, value.median, value.std, value.n, paper, value.seconds))
            elif value is not None:
                cells.append(Cell(row, column, float(value), paper=paper))
    return cells


def building_cells(building: ClassTimes) -> list[Cell]:
    """Seconds of a class by extractor and clustering: each step, the sum of medians beside the paper's (N = 32)."""
    rows = {}
    for way, steps in building.items():
        paper = paper_cell("timing", CLASS_ROWS[way], "seconds") if way in CLASS_ROWS else None
        total = sum(step.median for step in steps.values())
        rows[f"{way[0]}, {'with' if way[1] else 'without'} clustering"] = {**steps, "seconds": (total, paper)}
    return cells_of(rows)


def drawing_cells(drawing: Mapping[int, Measured], fit: Any) -> list[Cell]:
    """Seconds to draw N images beside the paper's if it has that N, and the line ``fit`` to them (``linregress``)."""
    rows, printed = {}, {cell.key: cell for cell in paper_table("timing")}
    for size, step in drawing.items():
        key = "timing", f"sampling time N={size}", "seconds per class"
        rows[key[1]] = {key[2]: (step, printed.get(key, PaperCell(*key))), "seconds an image": step.median / size}
    rows["linear fit"] = {"seconds an image": fit.slope, "seconds at N = 0": fit.intercept, "R2": fit.rvalue**2}
    return cells_of(rows)


def storage_cells(building: ClassTimes, profile: Profile, paper: Profile,
                  widths: Mapping[str, tuple[int, PaperCell]]) -> list[Cell]:
    """Bytes of one class, in 10^6: by the formula of C.5 (2 (1 + N + K) D x 4 with the paper's kinds), of the vectors
    themselves, of the library's files. ``widths``, row -> (channels D, paper's cell), adds formulas of ``paper``."""
    formula, on_disk, rows = "by the formula, MB", "on disk, MB", {}
    for (name, clustering), steps in building.items():
        made = steps["prototypes"].result
        if clustering:
            width = made.vectors.shape[1]
            rows[f"prototypes per class ({name})"] = {
                "channels D": width, "vectors": len(made), formula: 4 * width * prototype_rows(profile) / 1e6,
                "vectors, MB": made.vectors.nbytes / 1e6, on_disk: bytes_on_disk("prototypes", made) / 1e6}
    for row, (width, cell) in widths.items():
        vectors = prototype_rows(paper)
        rows[row] = {"channels D": width, "vectors": vectors, formula: (4 * width * vectors / 1e6, cell)}
    support = steps["drawing"].result
    arrays = support.images.nbytes + support.attribution.nbytes + support.seeds.nbytes
    rows["support set"] = {formula: arrays / 1e6, on_disk: bytes_on_disk("support", support) / 1e6}
    return cells_of(rows)


def prototype_rows(profile: Profile) -> int:
    """Most prototypes of one class (Eq. 2, 3): of each region one of the class, N of the drawings, K of the parts."""
    settings = profile.prototypes
    count = {"class": 1, "instance": profile.support.size, "part": settings.clusters}
    return (1 + settings.background) * sum(count[kind] for kind in settings.kinds)


def bytes_on_disk(kind: str, entry: Any) -> int:
    """What the library's files of one entry take."""
    return sum(map(len, encode(kind, "0" * 8, entry).values()))


def growth_cells(growth: Mapping[str, Sequence[tuple[int, Measured]]], paper_classes: int) -> list[Cell]:
    """Seconds to segment an image by method and number of classes; the paper's times stand at ``paper_classes``."""
    papers = {name: paper_cell("timing", f"inference {name}", "seconds per image")
              for name in ("OVDiff", "TCL", "OVSegmentor")}
    rows = {name: {f"{classes} classes": (step, papers.get(name) if classes == paper_classes else None)
                   for classes, step in points} for name, points in growth.items()}
    return cells_of(rows) + [Cell(name, f"{paper_classes} classes", paper=papers[name], source="published")
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
        sides = {"ovdiff": ratio.ours, "alternative": ratio.theirs}
        lowest, highest = ratio.spread or (None, None)
        rows[f"{ratio.name}, against {ratio.alternative}"] = {
            **{f"{name}, s": side for name, side in sides.items()},
            **{f"{name}, added MB": side.added / 1e6 for name, side in sides.items()},
            **{f"{name}, peak MB": side.peak / 1e6 for name, side in sides.items()},
            "ratio": ratio.value, "lowest": lowest, "highest": highest, "bound": ratio.limit,
            "met (1) or missed (0)": ratio.met}
    return cells_of(rows)
