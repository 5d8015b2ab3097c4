"""Charts of measured numbers: growth with error bars, and what switching one setting does. Each returns a matplotlib
``Figure``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ovdiff_lib.workbench.figures.base import new_figure

if TYPE_CHECKING:
    from ovdiff_lib.workbench.cost.instruments import LinearFit, Measured

INK, GREY, RISE, FALL = "#1f3b57", "#9aa5b1", "#2e86c1", "#e4572e"
LINES = ("#1f3b57", "#e4572e", "#2e9d6a", "#b07aa1", "#c99a2e")


def growth_chart(x: Sequence[float], series: Mapping[str, Sequence[Sequence[float]]], xlabel: str, ylabel: str, *,
                 logarithmic: bool = True, mark: float | None = None) -> Figure:
    """Mean and standard deviation of each series over ``x``; ``series[name][i]`` holds the values measured at ``x[i]``,
    whose number n stands at the point: a spread of two says less than one of four, and one value has none.

    ``logarithmic``: the x axis counts doublings. ``mark`` draws a vertical line, for a setting in use.
    """
    figure, axis = _panel(5.2, 3.2)
    for (name, values), colour in zip(series.items(), LINES, strict=False):
        mean = [float(np.mean(v)) for v in values]
        spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(x, mean, spread, marker="o", markersize=4, capsize=3, linewidth=1.6, color=colour, label=name)
        for place, middle, half, measured in zip(x, mean, spread, values, strict=True):
            axis.annotate(f"n = {len(measured)}", (place, middle - half), xytext=(0, -5), textcoords="offset points",
                          ha="center", va="top",
                          fontsize=8, color=colour)
    axis.margins(x=0.07, y=0.16)  # room for n below the lowest point
    if mark is not None:
        axis.axvline(mark, color=GREY, linewidth=1, linestyle="--", zorder=0)
    if logarithmic:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(x), [f"{v:g}" for v in x])
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=9)
    return figure


def difference_chart(names: Sequence[str], differences: Sequence[float | None], xlabel: str,
                     noise: float | None = None) -> Figure:
    """Horizontal bars of differences, in the order given from the top; ``noise`` shades what a change of seed alone
    does (+-).

    None is a switch that was not exercised: a hollow marker and words, no bar.
    """
    figure, axis = _panel(6.4, 0.9 + 0.25 * len(names))
    places = np.arange(len(names))[::-1]
    if noise:
        axis.axvspan(-noise, noise, color="#edf0f3", zorder=0)
    acting = [(place, d) for place, d in zip(places, differences, strict=True) if d is not None]
    axis.barh([place for place, _ in acting], [d for _, d in acting], height=0.62,
              color=[RISE if d >= 0 else FALL for _, d in acting])
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(places, names)
    axis.set(xlabel=xlabel, ylim=(-0.7, len(names) - 0.3))
    low, high = axis.get_xlim()
    axis.set_xlim(low - 0.09 * (high - low), high + 0.09 * (high - low))
    for place, value in zip(places, differences, strict=True):
        if value is None:
            axis.plot(0, place, "o", markersize=5, markerfacecolor="white", markeredgecolor=GREY, zorder=3)
            axis.annotate("not exercised here", (0, place), xytext=(7, 0), textcoords="offset points", va="center",
                          fontsize=8, color=GREY)
            continue
        axis.annotate(f"{value:+.1f}", (value, place), xytext=(3 if value >= 0 else -3, 0), textcoords="offset points",
                      va="center",
                      ha="left" if value >= 0 else "right", fontsize=8)
    return figure


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure, (axis,) = _axes(1, width, height)
    _style(axis)
    axis.tick_params(labelsize=9)
    axis.grid(False, axis="x" if width < 6 else "y")
    return figure, axis


def _axes(count: int, width: float = 3.6, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    figure = new_figure((count * width, height), 130, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _style(axis: Axes, **texts: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(color="#e6e9ed", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set(**texts)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set_fontsize(9)


# ---------------------------------------------------------------------- what a class and an image cost

COLOURS = ("#2e86c1", "#e4572e", "#3a9d5d", "#8e5ea2", "#c79a00", "#555555")
"""Colours of lines and of parts of a bar, in order; the first two are those of background and foreground in the other
figures."""

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Panel:
    """One set of axes: ``lines`` maps a name to points (x, Measured); ``fit`` is drawn as a dashed line with its
    R^2."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, Measured]]]
    fit: LinearFit | None = None


def growth_figure(panels: Sequence[Panel], unit: str) -> Figure:
    """Seconds against what they grow with, one panel beside the other; a bar at a point spans the fastest and the
    slowest run."""
    figure, axes = _axes(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        right = max(x for points in panel.lines.values() for x, _ in points)
        for number, (name, points) in enumerate(panel.lines.items()):
            points = sorted(points, key=lambda point: point[0])
            x, middle = np.array([p[0] for p in points], float), np.array([p[1].median for p in points])
            spread = np.abs(np.array([[min(p[1].seconds), max(p[1].seconds)] for p in points]).T - middle)
            # so that bars of several lines can be told apart
            aside = (number - (len(panel.lines) - 1) / 2) * 0.008 * right
            axis.errorbar(x + aside, middle, spread, color=COLOURS[number], marker=MARKERS[number], markersize=4.5,
                          capsize=2.5,
                          elinewidth=0.9, linewidth=0 if panel.fit else 1.5, label=name)
        if panel.fit:
            ends = np.array([0, right])
            axis.plot(ends, panel.fit(ends), "--", color="#555555", linewidth=1.2, zorder=1, label=_formula(panel.fit))
        axis.set_xlim(0, right * 1.06)
        # room for the legend
        axis.set_ylim(0, axis.get_ylim()[1] * (1 + 0.09 * len(axis.get_legend_handles_labels()[1])))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
        _style(axis, title=panel.title, xlabel=panel.x, ylabel=unit)
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
    _style(axis, title=title, xlabel="seconds")
    axis.grid(False, axis="y")
    axis.legend(fontsize=7.5, frameon=False, ncol=len(steps), loc="upper center",
                bbox_to_anchor=(0.5, -0.9 / (0.55 + 0.34 * len(rows))))
    return figure


def _formula(fit: LinearFit) -> str:
    sign = "+" if fit.intercept >= 0 else "−"
    return f"{fit.slope:.3g} x {sign} {abs(fit.intercept):.2g}, R² = {fit.r2:.4f}"


# ---------------------------------------------------------------------- tables of shares between classes, side by side

LEAST = 0.005
"""Share below which a cell bears no number."""


def share_tables(tables: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], ylabel: str = "",
                 cell: float = 0.36) -> Figure:
    """Tables of shares in [0, 1], f (len(rows), len(columns)) each, side by side as squares of ``cell`` inches under
    their titles: the darker the larger, in percent, and grey where there is none (nan). ``ylabel`` says what the rows
    are."""
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
