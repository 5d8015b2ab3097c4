"""Pictures of what happens inside a step: proposals, their choice by Eq. 1, features as colours; methods compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ovdiff_lib.masks.select import mean_attribution, upsample
from ovdiff_lib.overlay import colours_of, paint
from ovdiff_lib.types import ForegroundBackground, SupportSet
from ovdiff_lib.workbench.figures import base


def selection_figure(supports: Sequence[SupportSet], masks: Sequence[ForegroundBackground], segmenter: Any,
                     proposals: int = 4) -> Figure:
    """Eq. 1 on the first image of each support set: image, attribution, some of the ``proposals`` and their complement,
    each with its mean attribution and what it was chosen as, and the masks that result."""
    rows, texts, shown = [], [], proposals + 1
    for support, mask in zip(supports, masks, strict=True):
        image, attribution = support.images[0], upsample(support.attribution[:1], support.images.shape[1:3])[0]
        found = np.asarray(segmenter.propose(image, support.category.prompt), bool)
        found = np.concatenate([found, ~found.any(0, keepdims=True)])
        found = found[found.any((1, 2))]
        mean = mean_attribution(found, attribution)
        # The best and the worst are always shown; of the others, the largest.
        said = {int(mean.argmin()): " = min: background", int(mean.argmax()): " = max: foreground"}
        others = [i for i in np.argsort(-found.sum((1, 2)), kind="stable") if i not in said]
        chosen = [*reversed(said), *others][:shown]
        empty, pale = shown - len(chosen), 255 - (255 - image) // 5  # pale: outside a proposal
        pictures = [np.where(found[i][..., None], image, pale).astype(np.uint8) for i in chosen]
        pictures += [np.full_like(image, 255)] * empty
        rows.append([image, base.heat(image, support.attribution[0]), *pictures, base.mask_picture(mask, 0)])
        texts += ["", "", *(f"{mean[i]:.2f}{said.get(i, '')}" for i in chosen), *[""] * empty, ""]
    columns = ["support image", "attribution", *["proposal"] * shown, "result"]
    figure = base.image_grid(rows, [s.category.name for s in supports], columns, cell=1.3)
    for text, axis in zip(texts, figure.axes, strict=True):
        axis.text(0.5, 0.02, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=6.5, color="white",
                  bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.5, "linewidth": 0} if text else None)
    return figure


def divided(support: SupportSet, masks: ForegroundBackground, index: int) -> np.ndarray:
    """Support image ``index`` u8 (H, W, 3) with its foreground tinted orange and its background blue."""
    image = support.images[index].astype(np.float32)
    for mask, colour in ((masks.foreground[index], base.ORANGE), (masks.background[index], base.BLUE)):
        image[mask] = (image[mask] + np.array(colour, np.float32)) / 2
    return image.round().astype(np.uint8)


def divided_figure(supports: Sequence[SupportSet], ways: Mapping[str, Sequence[ForegroundBackground]]) -> Figure:
    """The first four images of each support set, :func:`divided` by the masks that each of ``ways`` has of it."""
    counts = [min(4, len(support)) for support in supports]
    rows = [[divided(s, m, i) for s, m, count in zip(supports, masks, counts, strict=True) for i in range(count)]
            for masks in ways.values()]
    figure = base.image_grid(rows, list(ways), [" "], cell=0.8)  # a blank name leaves the room for ours
    for support, count, end in zip(supports, counts, np.cumsum(counts), strict=True):
        left, right = (figure.axes[i].get_position() for i in (end - count, end - 1))
        figure.text((left.x0 + right.x1) / 2, left.y1 + 0.05 / figure.get_figheight(), support.category.name,
                    ha="center", va="bottom", fontsize=12)
    return figure


def feature_colours(features: torch.Tensor | np.ndarray) -> np.ndarray:
    """Feature maps (n, h, w, D) as colours u8 (n, h, w, 3): the three directions of most variance of the unit vectors,
    over all n maps, cut at the 1st and 99th percentile. Alike features have alike colours, which mean nothing else."""
    maps = torch.as_tensor(features).float().cpu().numpy()
    flat = normalize(maps.reshape(-1, maps.shape[-1]))
    scores = PCA(min(3, flat.shape[1]), svd_solver="covariance_eigh").fit_transform(flat)
    low, high = np.percentile(scores, [1, 99], axis=0)
    span = high - low
    span[span < 1e-4 * span.max()] = np.inf  # a direction without variance is rounding, and no colour
    unit = np.clip((scores - low) / np.maximum(span, 1e-12), 0, 1)
    unit = np.pad(unit, ((0, 0), (0, 3 - unit.shape[1])))
    return (255 * unit).round().astype(np.uint8).reshape(*maps.shape[:3], 3)


def comparison_figure(images: Sequence[np.ndarray], labels: Mapping[str, Sequence[np.ndarray]],
                      truth: Sequence[np.ndarray], class_names: Sequence[str], cell: float = 1.3) -> Figure:
    """Images over the labels int (H, W) of several methods and the truth (255 as 0), with one legend of class_names."""
    rows = {**labels, "truth": [np.where(t == 255, 0, t) for t in truth]}
    painted = [[paint(i, m, class_names) for i, m in zip(images, maps, strict=True)] for maps in rows.values()]
    figure = base.image_grid([list(images), *painted], ["image", *rows], cell=cell)
    base.class_legend(figure, class_names, _found(m for maps in rows.values() for m in maps))
    return figure


def _found(maps: Any, named: Sequence[int] = ()) -> list[int]:
    """The labels of label maps but background and those ``named``, ascending."""
    return sorted({int(label) for labels in maps for label in np.unique(labels)} - {0, *named})


@dataclass(frozen=True)
class Column:
    """One picture of a gallery: ``image`` u8 (H, W, 3), a label map int (H, W) a row; above, title and words asked."""

    title: str
    image: np.ndarray
    maps: Sequence[np.ndarray]
    asked: Sequence[int] = ()


def gallery(columns: Sequence[Column], class_names: Sequence[str], row_names: Sequence[str], height: float = 1.0,
            legend_maps: Sequence[int] | None = None) -> Figure:
    """Pictures of any shapes and, below, their label maps, ``height`` inches each and as wide as they are (Fig. 6).

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
    tops = [head + r * (height + gap) for r in range(len(row_names))]
    figure = base.Sheet((left + sum(rooms) + gap * len(columns), head + len(row_names) * (height + gap)), 120)
    colours, x = colours_of(class_names) / 255, left
    for column, texts, width, room in zip(columns, heads, widths, rooms, strict=True):
        pictures = [column.image, *(paint(column.image, labels, class_names) for labels in column.maps)]
        for picture, top in zip(pictures, tops, strict=False):
            figure.put(picture, x + (room - width) / 2, top, width, height, aspect="auto")
        for i, text in enumerate(texts):
            colour = "black" if i == 0 else colours[column.asked[i - 1]] * 0.85
            figure.write(x + room / 2, head - 0.06 - line * (len(texts) - 1 - i), text, va="bottom", fontsize=11,
                         color=colour, weight="bold" if i else "normal")
        x += room + gap
    for name, top in zip(row_names, tops, strict=True):
        figure.write(left - 0.07, top + height / 2, name, ha="right", fontsize=11)
    maps = [m for column in columns for i, m in enumerate(column.maps) if legend_maps is None or i in legend_maps]
    if left_over := _found(maps, [label for column in columns for label in column.asked]):
        most = max(1, int(figure.get_figwidth() / (0.55 + 0.1 * max(len(class_names[i]) for i in left_over))))
        base.class_legend(figure, class_names, left_over, most, fontsize=11, handlelength=1.2, columnspacing=1.2)
    return figure
