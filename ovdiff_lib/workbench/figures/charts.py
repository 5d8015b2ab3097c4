"""Charts of measured numbers: growth with error bars, what switching one setting does, what steps cost, shares."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ovdiff_lib.workbench.cost.instruments import Measured
from ovdiff_lib.workbench.figures.base import Sheet
from ovdiff_lib.workbench.tables.tables import Cell

INK, GREY, RISE, FALL = "#1f3b57", "#9aa5b1", "#2e86c1", "#e4572e"
COLOURS, MARKERS = ("#2e86c1", "#e4572e", "#3a9d5d", "#8e5ea2", "#c79a00", "#555555"), "osD^vP"
"""Of lines and of parts of a bar, in order; the first two are those of background and foreground in other figures."""


def growth_chart(x: Sequence[float], cells: Sequence[Cell], xlabel: str, ylabel: str, mark: float) -> Figure:
    """The numbers of ``cells`` with intervals and runs n over ``x``, in doublings; a line marks the setting in use."""
    figure, axis = _axes(5.2, 3.2, labelsize=9)
    axis.grid(False, axis="x")
    mean, spread = [cell.measured for cell in cells], _bars(cells)
    axis.errorbar(x, mean, spread, marker="o", markersize=4, capsize=3, linewidth=1.6, color=INK)
    for place, low, cell in zip(x, mean - spread[0], cells, strict=True):
        axis.annotate(f"n = {cell.n}", (place, low), xytext=(0, -5), textcoords="offset points", ha="center",
                      va="top", fontsize=8, color=INK)
    axis.margins(x=0.07, y=0.16)  # room for n below the lowest point
    axis.axvline(mark, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(x), [f"{v:g}" for v in x])
    axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def difference_chart(names: Sequence[str], cells: Sequence[Cell], xlabel: str) -> Figure:
    """Bars of differences (:meth:`Cell.against`) with intervals, from the top; hollow where one was not exercised."""
    figure, axis = _axes(6.4, 0.9 + 0.25 * len(names), labelsize=9)
    axis.grid(False, axis="y")
    axis.axvline(0, color=INK, linewidth=0.8)
    places, style = np.arange(len(names))[::-1], {"textcoords": "offset points", "va": "center", "fontsize": 8}
    for place, cell in zip(places, cells, strict=True):
        value = cell.measured
        if value is None:
            axis.plot(0, place, "o", markersize=5, markerfacecolor="white", markeredgecolor=GREY, zorder=3)
            axis.annotate("not exercised here", (0, place), xytext=(7, 0), color=GREY, **style)
        else:
            spread, side = _bars([cell]), 1 if value >= 0 else -1
            end = float(value + side * spread[int(side > 0), 0])
            axis.barh(place, value, height=0.62, color=RISE if side > 0 else FALL)
            axis.errorbar(value, place, xerr=spread, color=INK, capsize=2, elinewidth=0.9)
            axis.annotate(f"{value:+.1f}", (end, place), (3 * side, 0), ha="left" if side > 0 else "right", **style)
    axis.set_yticks(places, names)
    axis.set(xlabel=xlabel, ylim=(-0.7, len(names) - 0.3))
    low, high = axis.get_xlim()
    axis.set_xlim(low - 0.09 * (high - low), high + 0.09 * (high - low))
    return figure


def _bars(cells: Sequence[Cell]) -> np.ndarray:
    """How far intervals reach below and above the numbers, f (2, len(cells)); 0 where there is none."""
    return np.array([(0, 0) if c.low is None else (c.measured - c.low, c.high - c.measured) for c in cells]).T.clip(0)


def _axes(width: float, height: float, labelsize: float = 8) -> tuple[Figure, Axes]:
    """A frame of ``width`` x ``height`` inches."""
    figure = Sheet((width, height), 130, layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=labelsize)
    axis.grid(color="#e6e9ed", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    return figure, axis


def growth_figure(lines: Mapping[str, Sequence[tuple[float, Measured]]], title: str, xlabel: str, ylabel: str,
                  fit: Any = None) -> Figure:
    """Seconds by what they grow with, points (x, Measured) by name, bars over all runs, a ``fit`` by ``linregress``."""
    figure, axis = _axes(3.6, 2.7)
    right = max(x for points in lines.values() for x, _ in points)
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[0])
        x, middle = np.array([(x, m.median) for x, m in points], float).T
        spread = np.abs(np.array([(min(m.seconds), max(m.seconds)) for _, m in points]).T - middle)
        aside = (number - (len(lines) - 1) / 2) * 0.008 * right  # bars of several lines can be told apart
        axis.errorbar(x + aside, middle, spread, color=COLOURS[number], marker=MARKERS[number], markersize=4.5,
                      capsize=2.5, elinewidth=0.9, linewidth=0 if fit else 1.5, label=name)
    if fit:
        ends, sign = np.array([0, right]), "+" if fit.intercept >= 0 else "−"
        formula = f"{fit.slope:.3g} x {sign} {abs(fit.intercept):.2g}, R² = {fit.rvalue**2:.4f}"
        axis.plot(ends, fit.slope * ends + fit.intercept, "--", color="#555555", linewidth=1.2, zorder=1, label=formula)
    room = 1 + 0.09 * len(axis.get_legend_handles_labels()[1])  # for the legend
    axis.set(xlim=(0, right * 1.06), ylim=(0, axis.get_ylim()[1] * room), xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    return figure


def breakdown_figure(rows: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Stacked bars: for each row the seconds of its steps, and their sum at the end."""
    height = 0.55 + 0.34 * len(rows)
    figure, axis = _axes(6.4, height)
    axis.grid(False, axis="y")
    left = np.zeros(len(rows))
    steps = list(dict.fromkeys(step for parts in rows.values() for step in parts))
    for colour, step in zip(COLOURS, steps, strict=False):
        width = np.array([parts.get(step, 0.0) for parts in rows.values()])
        axis.barh(range(len(rows)), width, left=left, height=0.66, color=colour, label=step)
        left += width
    places = max(0, 2 - math.floor(math.log10(left.max())))
    for y, total in enumerate(left):
        axis.text(total + 0.01 * left.max(), y, f"{total:.{places}f} s", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.14 * left.max()), xlabel="seconds")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7.5, frameon=False, ncol=len(steps), loc="upper center", bbox_to_anchor=(0.5, -0.9 / height))
    return figure


def share_tables(tables: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], ylabel: str) -> Figure:
    """Tables of shares in [0, 1], f (len(rows), len(columns)) each, side by side as squares under their titles: the
    darker the larger, in percent, and grey where there is none (nan). ``ylabel`` says what the rows are."""
    cell = 0.36  # inches
    left, head, gap = 0.35 + 0.085 * max(map(len, rows)), 0.34, 0.3
    width, height = cell * len(columns), cell * len(rows)
    foot = 0.15 + 0.075 * max(map(len, columns))
    figure = Sheet((left + len(tables) * (width + gap), head + height + foot), 110)
    for number, (title, table) in enumerate(tables.items()):
        axis = figure.room(left + number * (width + gap), head, width, height)
        axis.set_facecolor("#dfe3e8")
        axis.imshow(np.ma.masked_invalid(table), cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        axis.set_title(title, fontsize=9.5, pad=6)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axis.set_yticks(range(len(rows)), rows if number == 0 else [], fontsize=8)
        axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.2)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set_visible(False)
        for r, c in np.argwhere(np.nan_to_num(table) >= 0.005):  # below, there is no number
            axis.text(c, r, f"{100 * table[r, c]:.0f}", ha="center", va="center", fontsize=7.5,
                      color="white" if table[r, c] > 0.6 else INK)
        if number == 0:
            axis.set_ylabel(ylabel, fontsize=8.5)
    return figure
