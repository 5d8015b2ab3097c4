"""Figures of what a class and an image cost: where the time of a class goes, and how times grow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ovdiff_lib.measuring import LinearFit, Measured

COLOURS = ("#2e86c1", "#e4572e", "#3a9d5d", "#8e5ea2", "#c79a00", "#555555")
"""Colours of lines and of parts of a bar, in order; the first two are those of background and foreground in the other figures."""

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Panel:
    """One set of axes: ``lines`` maps a name to points (x, Measured); ``fit`` is drawn as a dashed line with its R^2."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, Measured]]]
    fit: LinearFit | None = None


def growth_figure(panels: Sequence[Panel], unit: str) -> Figure:
    """Seconds against what they grow with, one panel beside the other; a bar at a point spans the fastest and the slowest run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        right = max(x for points in panel.lines.values() for x, _ in points)
        for number, (name, points) in enumerate(panel.lines.items()):
            points = sorted(points, key=lambda point: point[0])
            x, middle = np.array([p[0] for p in points], float), np.array([p[1].median for p in points])
            spread = np.abs(np.array([[min(p[1].seconds), max(p[1].seconds)] for p in points]).T - middle)
            aside = (number - (len(panel.lines) - 1) / 2) * 0.008 * right  # so that bars of several lines can be told apart
            axis.errorbar(x + aside, middle, spread, color=COLOURS[number], marker=MARKERS[number], markersize=4.5, capsize=2.5,
                          elinewidth=0.9, linewidth=0 if panel.fit else 1.5, label=name)
        if panel.fit:
            ends = np.array([0, right])
            axis.plot(ends, panel.fit(ends), "--", color="#555555", linewidth=1.2, zorder=1, label=_formula(panel.fit))
        axis.set_xlim(0, right * 1.06)
        axis.set_ylim(0, axis.get_ylim()[1] * (1 + 0.09 * len(axis.get_legend_handles_labels()[1])))  # room for the legend
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
        _label(axis, panel.title, panel.x, unit)
        axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    return figure


def breakdown_figure(rows: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Stacked bars: for each row the seconds of its steps, and their sum at the end."""
    figure, (axis,) = _axes(1, width=6.4, height=0.55 + 0.34 * len(rows))
    steps = list(dict.fromkeys(step for parts in rows.values() for step in parts))
    totals = [sum(parts.values()) for parts in rows.values()]
    places = max(0, 2 - math.floor(math.log10(max(totals))))
    left = np.zeros(len(rows))
    for number, step in enumerate(steps):
        width = np.array([parts.get(step, 0.0) for parts in rows.values()])
        axis.barh(range(len(rows)), width, left=left, height=0.66, color=COLOURS[number], label=step)
        left += width
    for y, total in enumerate(totals):
        axis.text(total + 0.01 * max(totals), y, f"{total:.{places}f} s", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.14 * max(totals))
    _label(axis, title, "seconds", "")
    axis.grid(False, axis="y")
    axis.legend(fontsize=7.5, frameon=False, ncol=len(steps), loc="upper center", bbox_to_anchor=(0.5, -0.9 / (0.55 + 0.34 * len(rows))))
    return figure


def _axes(count: int, width: float = 3.6, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    from ovdiff_lib.report.canvas import new_figure

    figure = new_figure((count * width, height), 130, layout="constrained")
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8.5)
    axis.set_ylabel(y, fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def _formula(fit: LinearFit) -> str:
    sign = "+" if fit.intercept >= 0 else "−"
    return f"{fit.slope:.3g} x {sign} {abs(fit.intercept):.2g}, R² = {fit.r2:.4f}"
