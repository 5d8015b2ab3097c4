"""Galleries of segmented pictures of any shapes, each with the words that were asked of it (Fig. 6 and A.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ovdiff_lib.report.colours import colours_of
from ovdiff_lib.report.figures import paint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Column:
    """One picture of a gallery: ``image`` u8 (H, W, 3), a label map int (H, W) for each further row, and above it the ``title`` and the
    words of the labels ``asked``, each in its colour."""

    title: str
    image: np.ndarray
    maps: Sequence[np.ndarray]
    asked: Sequence[int] = ()


def gallery(columns: Sequence[Column], class_names: Sequence[str], row_names: Sequence[str], height: float = 1.0,
            legend_maps: Sequence[int] | None = None) -> Figure:
    """The pictures and, below, their label maps, ``height`` inches each and as wide as they are.

    ``class_names`` are those of the labels, background first; ``row_names`` belong to the image and to each map. A legend below names the
    labels of the maps numbered ``legend_maps`` (default: all) that are named above no picture.
    """
    from ovdiff_lib.report.canvas import new_figure

    gap, line, letter = 0.05, 0.2, 0.1
    left = 0.15 + letter * max(len(part) for name in row_names for part in name.split("\n"))
    widths = [height * column.image.shape[1] / column.image.shape[0] for column in columns]
    heads = [[column.title, *(class_names[label] for label in column.asked)] for column in columns]
    # A long word needs a column as wide as it is.
    rooms = [max(width, letter * max(map(len, texts))) for texts, width in zip(heads, widths, strict=True)]
    head = line * max(map(len, heads)) + 0.08
    size = (left + sum(rooms) + gap * len(columns), head + len(row_names) * (height + gap))
    figure, colours = new_figure(size, 120), colours_of(class_names) / 255
    x = left
    for column, texts, width, room in zip(columns, heads, widths, rooms, strict=True):
        for r, picture in enumerate([column.image, *(paint(column.image, labels, class_names) for labels in column.maps)]):
            top = head + r * (height + gap)
            axis = figure.add_axes([(x + (room - width) / 2) / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1]])
            axis.imshow(picture, aspect="auto")
            axis.set_axis_off()
        for i, text in enumerate(texts):
            colour = "black" if i == 0 else colours[column.asked[i - 1]] * 0.85
            figure.text((x + room / 2) / size[0], 1 - (head - 0.06 - line * (len(texts) - 1 - i)) / size[1], text, ha="center", va="bottom",
                        fontsize=11, color=colour, weight="bold" if i else "normal")
        x += room + gap
    for r, name in enumerate(row_names):
        middle = head + r * (height + gap) + height / 2
        figure.text((left - 0.07) / size[0], 1 - middle / size[1], name, ha="right", va="center", fontsize=11)
    named = {label for column in columns for label in column.asked}
    maps = [m for column in columns for i, m in enumerate(column.maps) if legend_maps is None or i in legend_maps]
    _legend(figure, sorted({int(label) for m in maps for label in np.unique(m)} - named - {0}), class_names)
    return figure


def _legend(figure: Figure, labels: Sequence[int], class_names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    if labels:
        colours = colours_of(class_names) / 255
        handles = [Patch(color=colours[i], label=class_names[i]) for i in labels]
        columns = max(1, int(figure.get_figwidth() / (0.55 + 0.1 * max(len(class_names[i]) for i in labels))))
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=min(len(handles), columns), frameon=False,
                      fontsize=11, handlelength=1.2, columnspacing=1.2)
