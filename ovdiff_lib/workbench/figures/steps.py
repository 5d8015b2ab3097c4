"""Pictures of what happens inside a step: proposals and their choice by Eq. 1, features as colours, methods side by
side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ovdiff_lib.masks.select import mean_attribution, upsample
from ovdiff_lib.overlay import colours_of, paint
from ovdiff_lib.types import ForegroundBackground, SupportSet
from ovdiff_lib.workbench.figures.base import (
    BACKGROUND,
    FOREGROUND,
    class_legend,
    heat,
    image_grid,
    mask_picture,
    new_figure,
)


def selection_figure(supports: Sequence[SupportSet], masks: Sequence[ForegroundBackground], segmenter: Any,
                     proposals: int = 4) -> Figure:
    """Eq. 1 on the first image of each support set: image, attribution, the first ``proposals`` proposals and their
    complement, each with its mean attribution and framed if chosen, and the masks that result."""
    rows, titles = [], []
    for support, mask in zip(supports, masks, strict=True):
        image, attribution = support.images[0], upsample(support.attribution[:1], support.images.shape[1:3])[0]
        found = np.asarray(segmenter.propose(image, support.category.prompt), bool)
        found = np.concatenate([found, ~found.any(0, keepdims=True)]) if found.any() else found[:0]
        found = found[found.any((1, 2))]
        mean = mean_attribution(found, attribution) if len(found) else np.zeros(0)
        # The best and the worst are always shown; of the others, the largest.
        chosen = [int(mean.argmax()), int(mean.argmin())] if len(found) else []
        others = [i for i in np.argsort(-found.sum((1, 2)), kind="stable") if i not in chosen]
        shown = [*dict.fromkeys(chosen), *others][: proposals + 1]
        pictures = [_lit(image, found[i]) for i in shown]
        said = {i: text for i, text in zip(chosen[::-1], (" = min: background", " = max: foreground"), strict=False)}
        names = [f"{mean[i]:.2f}{said.get(i, '')}" for i in shown]
        blank = np.full_like(image, 255)
        rows.append([image, heat(image, support.attribution[0]), *pictures, *[blank] * (proposals + 1 - len(shown)),
                     mask_picture(mask, 0)])
        titles.append(["", "", *names, *[""] * (proposals + 1 - len(shown)), ""])
    columns = ["support image", "attribution", *["proposal"] * (proposals + 1), "result"]
    figure = image_grid(rows, [s.category.name for s in supports], columns, cell=1.3)
    axes = iter(figure.axes)
    for row in titles:
        for text, axis in zip(row, axes, strict=False):
            axis.text(0.5, 0.02, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=6.5, color="white",
                      bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.5, "linewidth": 0} if text else None)
    return figure


def _lit(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image u8 (H, W, 3) within a mask bool (H, W), pale outside it."""
    return np.where(mask[..., None], image, 255 - (255 - image) // 5).astype(np.uint8)


def divided(support: SupportSet, masks: ForegroundBackground, index: int, alpha: float = 0.5) -> np.ndarray:
    """Support image ``index`` u8 (H, W, 3) with its foreground tinted orange and its background blue."""
    image = support.images[index].astype(np.float32)
    for mask, colour in ((masks.foreground[index], FOREGROUND), (masks.background[index], BACKGROUND)):
        image[mask] = image[mask] * (1 - alpha) + np.array(colour, np.float32) * alpha
    return image.round().astype(np.uint8)


def divided_figure(supports: Sequence[SupportSet], ways: Mapping[str, Sequence[ForegroundBackground]], shown: int = 4,
                   cell: float = 0.8) -> Figure:
    """The first ``shown`` images of each support set, :func:`divided` by the masks of each way of making them;
    ``ways[name]`` holds those of every set. The name of a category stands over the middle of its images."""
    rows = [[divided(s, m, i) for s, m in zip(supports, masks, strict=True) for i in range(min(shown, len(s)))]
            for masks in ways.values()]
    figure = image_grid(rows, list(ways), [" "], cell=cell)  # a blank name leaves the room for ours
    first = 0
    for support in supports:
        last = first + min(shown, len(support)) - 1
        left, right = (figure.axes[i].get_position() for i in (first, last))
        figure.text((left.x0 + right.x1) / 2, left.y1 + 0.05 / figure.get_figheight(), support.category.name,
                    ha="center", va="bottom",
                    fontsize=12)
        first = last + 1
    return figure


def feature_colours(features: torch.Tensor | np.ndarray) -> np.ndarray:
    """Feature maps (n, h, w, D) as colours u8 (n, h, w, 3): the three directions of most variance of the unit vectors,
    over all n maps.

    Alike features have alike colours; the colours themselves mean nothing. Values are cut at the 1st and 99th
    percentile.
    """
    flat = np.asarray(features, np.float32)
    shape = flat.shape[:3]
    flat = flat.reshape(-1, flat.shape[-1])
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-12)
    flat = flat - flat.mean(0)
    _, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
    axes = vectors[:, ::-1][:, :3]
    # a sign that does not depend on the solver
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
    scores = flat @ axes
    low, high = np.percentile(scores, [1, 99], axis=0)
    span = high - low
    span[span < 1e-4 * span.max()] = np.inf  # a direction without variance is rounding, and no colour
    unit = np.clip((scores - low) / np.maximum(span, 1e-12), 0, 1)
    if unit.shape[1] < 3:
        unit = np.pad(unit, ((0, 0), (0, 3 - unit.shape[1])))
    return (255 * unit).round().astype(np.uint8).reshape(*shape, 3)


def comparison_figure(images: Sequence[np.ndarray], labels: Mapping[str, Sequence[np.ndarray]],
                      truth: Sequence[np.ndarray],
                      class_names: Sequence[str], cell: float = 1.3) -> Figure:
    """Images over the labels of several methods and the truth, with one legend; labels int (H, W), 255 in ``truth``
    counts as 0.

    ``class_names`` by label id, background first. A colour stands for the same class in every figure.
    """
    truth = [np.where(t == 255, 0, t) for t in truth]
    rows = [list(images), *([paint(i, m, class_names) for i, m in zip(images, maps, strict=True)]
                            for maps in [*labels.values(), truth])]
    figure = image_grid(rows, ["image", *labels, "truth"], cell=cell)
    found = sorted({int(v) for maps in [*labels.values(), truth] for m in maps for v in np.unique(m)} - {0})
    class_legend(figure, class_names, found)
    return figure


# ------------------------------------------------------------------- galleries of pictures of any shapes (Fig. 6, A.1)


@dataclass(frozen=True)
class Column:
    """One picture of a gallery: ``image`` u8 (H, W, 3), a label map int (H, W) for each further row, and above it the
    ``title`` and the words of the labels ``asked``, each in its colour."""

    title: str
    image: np.ndarray
    maps: Sequence[np.ndarray]
    asked: Sequence[int] = ()


def gallery(columns: Sequence[Column], class_names: Sequence[str], row_names: Sequence[str], height: float = 1.0,
            legend_maps: Sequence[int] | None = None) -> Figure:
    """The pictures and, below, their label maps, ``height`` inches each and as wide as they are.

    ``class_names`` are those of the labels, background first; ``row_names`` belong to the image and to each map. A
    legend below names the labels of the maps numbered ``legend_maps`` (default: all) that are named above no picture.
    """
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
        for r, picture in enumerate([column.image,
                                     *(paint(column.image, labels, class_names) for labels in column.maps)]):
            top = head + r * (height + gap)
            axis = figure.add_axes([(x + (room - width) / 2) / size[0], 1 - (top + height) / size[1], width / size[0],
                                    height / size[1]])
            axis.imshow(picture, aspect="auto")
            axis.set_axis_off()
        for i, text in enumerate(texts):
            colour = "black" if i == 0 else colours[column.asked[i - 1]] * 0.85
            figure.text((x + room / 2) / size[0], 1 - (head - 0.06 - line * (len(texts) - 1 - i)) / size[1], text,
                        ha="center", va="bottom",
                        fontsize=11, color=colour, weight="bold" if i else "normal")
        x += room + gap
    for r, name in enumerate(row_names):
        middle = head + r * (height + gap) + height / 2
        figure.text((left - 0.07) / size[0], 1 - middle / size[1], name, ha="right", va="center", fontsize=11)
    named = {label for column in columns for label in column.asked}
    maps = [m for column in columns for i, m in enumerate(column.maps) if legend_maps is None or i in legend_maps]
    left_over = sorted({int(label) for m in maps for label in np.unique(m)} - named - {0})
    if left_over:
        most = max(1, int(figure.get_figwidth() / (0.55 + 0.1 * max(len(class_names[i]) for i in left_over))))
        class_legend(figure, class_names, left_over, most, fontsize=11, handlelength=1.2, columnspacing=1.2)
    return figure
