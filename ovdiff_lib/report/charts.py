"""Charts of measured numbers: growth with error bars, and what switching one setting does. Each returns a matplotlib ``Figure``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, RISE, FALL = "#1f3b57", "#9aa5b1", "#2e86c1", "#e4572e"
LINES = ("#1f3b57", "#e4572e", "#2e9d6a", "#b07aa1", "#c99a2e")


def growth_chart(x: Sequence[float], series: Mapping[str, Sequence[Sequence[float]]], xlabel: str, ylabel: str, *,
                 logarithmic: bool = True, mark: float | None = None) -> Figure:
    """Mean and standard deviation of each series over ``x``; ``series[name][i]`` holds the values measured at ``x[i]``, whose number n
    stands at the point: a spread of two says less than one of four, and one value has none.

    ``logarithmic``: the x axis counts doublings. ``mark`` draws a vertical line, for a setting in use.
    """
    figure, axis = _panel(5.2, 3.2)
    for (name, values), colour in zip(series.items(), LINES, strict=False):
        mean = [float(np.mean(v)) for v in values]
        spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(x, mean, spread, marker="o", markersize=4, capsize=3, linewidth=1.6, color=colour, label=name)
        for place, middle, half, measured in zip(x, mean, spread, values, strict=True):
            axis.annotate(f"n = {len(measured)}", (place, middle - half), xytext=(0, -5), textcoords="offset points", ha="center", va="top",
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


def difference_chart(names: Sequence[str], differences: Sequence[float | None], xlabel: str, noise: float | None = None) -> Figure:
    """Horizontal bars of differences, in the order given from the top; ``noise`` shades what a change of seed alone does (+-).

    None is a switch that was not exercised: a hollow marker and words, no bar.
    """
    figure, axis = _panel(6.4, 0.9 + 0.25 * len(names))
    places = np.arange(len(names))[::-1]
    if noise:
        axis.axvspan(-noise, noise, color="#edf0f3", zorder=0)
    acting = [(place, d) for place, d in zip(places, differences, strict=True) if d is not None]
    axis.barh([place for place, _ in acting], [d for _, d in acting], height=0.62, color=[RISE if d >= 0 else FALL for _, d in acting])
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(places, names)
    axis.set(xlabel=xlabel, ylim=(-0.7, len(names) - 0.3))
    low, high = axis.get_xlim()
    axis.set_xlim(low - 0.09 * (high - low), high + 0.09 * (high - low))
    for place, value in zip(places, differences, strict=True):
        if value is None:
            axis.plot(0, place, "o", markersize=5, markerfacecolor="white", markeredgecolor=GREY, zorder=3)
            axis.annotate("not exercised here", (0, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=GREY)
            continue
        axis.annotate(f"{value:+.1f}", (value, place), xytext=(3 if value >= 0 else -3, 0), textcoords="offset points", va="center",
                      ha="left" if value >= 0 else "right", fontsize=8)
    return figure


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    from ovdiff_lib.report.canvas import new_figure

    figure = new_figure((width, height), 130, layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.grid(axis="y" if width < 6 else "x", color="#e6e9ed", linewidth=0.8)
    axis.set_axisbelow(True)
    return figure, axis
