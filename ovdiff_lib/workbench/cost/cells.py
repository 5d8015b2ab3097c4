"""Cells of notebook tables: the benchmark's ratios and growth."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ovdiff_lib.workbench.cost.growth import Growth
from ovdiff_lib.workbench.cost.ratio import Ratio
from ovdiff_lib.workbench.tables.paper import PaperCell
from ovdiff_lib.workbench.tables.tables import Cell

DIGITS = {"ovdiff, s": 4, "alternative, s": 4, "ovdiff, added MB": 1, "alternative, added MB": 1, "ovdiff, peak MB": 0,
          "alternative, peak MB": 0, "ratio": 2, "lowest": 2, "highest": 2, "bound": 2, "met (1) or missed (0)": 0, "seconds": 4,
          "seconds for one more": 5, "added, MB": 1, "inputs, MB": 1, "R2": 3}
"""Decimals of each column, for :func:`~ovdiff_lib.workbench.tables.tables.write_table`."""


def ratio_cells(ratios: Iterable[Ratio]) -> list[Cell]:
    """A row a ratio: seconds, added memory and the process's peak of both sides, the ratio with its lowest and highest round, the bound,
    and 1 where it and all checks are met, 0 where not. What a row has no value for is left out."""
    cells = []
    for ratio in ratios:
        row = f"{ratio.name}, against {ratio.alternative}"
        sides = (("ovdiff", ratio.ours), ("alternative", ratio.theirs))
        cells += [Cell(row, f"{who}, s", side.median, n=len(side.seconds), values=side.seconds) for who, side in sides]
        cells += [Cell(row, f"{who}, added MB", side.memory / 1e6) for who, side in sides if side.memory is not None]
        cells += [Cell(row, f"{who}, peak MB", side.whole / 1e6) for who, side in sides if side.whole is not None]
        if math.isfinite(ratio.value):
            own = PaperCell.own("benchmark", ratio.name, "ratio")
            cells.append(Cell(row, "ratio", ratio.value, n=len(ratio.ours.seconds), paper=own))
        further = {"lowest": ratio.spread and ratio.spread[0], "highest": ratio.spread and ratio.spread[1],
                   "bound": ratio.bound and ratio.bound.limit, "met (1) or missed (0)": ratio.met}
        cells += [Cell(row, column, float(value)) for column, value in further.items() if value is not None]
    return cells


def growth_cells(growth: Iterable[Growth]) -> list[Cell]:
    """A row a point: seconds, added memory and what the inputs hold; and a row a line with its slope, intercept and R^2."""
    cells = []
    for one in growth:
        held = one.bytes or (None,) * len(one.points)
        for (size, step), of in zip(one.points, held, strict=True):
            row = f"{one.size}: {size}"
            cells += [Cell(row, "seconds", step.median, step.std, step.n, values=step.seconds),
                      Cell(row, "added, MB", (step.peak - step.held) / 1e6, n=step.n)]
            cells += [Cell(row, "inputs, MB", of / 1e6)] if of is not None else []
        line = {"seconds": one.fit.intercept, "seconds for one more": one.fit.slope, "R2": one.fit.r2}
        cells += [Cell(f"{one.size}: line, at 0", column, value, n=len(one.points)) for column, value in line.items()]
    return cells
