"""Figures of the vocabulary doctor: tables of shares between classes, side by side, such as what was foreseen and what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 0.005
"""Share below which a cell bears no number."""


def share_tables(tables: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], ylabel: str = "",
                 cell: float = 0.36) -> Figure:
    """Tables of shares in [0, 1], f (len(rows), len(columns)) each, side by side as squares of ``cell`` inches under their titles: the
    darker the larger, in percent, and grey where there is none (nan). ``ylabel`` says what the rows are."""
    from ovdiff_lib.report.canvas import new_figure

    left = 0.35 + 0.085 * max(map(len, rows))
    foot, head, gap = 0.15 + 0.075 * max(map(len, columns)), 0.34, 0.3
    width, height = cell * len(columns), cell * len(rows)
    size = (left + len(tables) * (width + gap), head + height + foot)
    figure = new_figure(size, 110)
    for number, (title, table) in enumerate(tables.items()):
        x = (left + number * (width + gap)) / size[0]
        axis = figure.add_axes([x, foot / size[1], width / size[0], height / size[1]])
        axis.set_facecolor("#dfe3e8")
        axis.imshow(np.ma.masked_invalid(table), cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        axis.set_title(title, fontsize=9.5, pad=6)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axis.set_yticks(range(len(rows)), rows if number == 0 else [], fontsize=8)
        axis.tick_params(length=0)
        axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.2)
        axis.tick_params(which="minor", length=0)
        axis.spines[:].set_visible(False)
        for r, c in np.argwhere(np.nan_to_num(table) >= LEAST):
            axis.text(c, r, f"{100 * table[r, c]:.0f}", ha="center", va="center", fontsize=7.5,
                      color="white" if table[r, c] > 0.6 else "#1f3b57")
        if number == 0 and ylabel:
            axis.set_ylabel(ylabel, fontsize=8.5)
    return figure
