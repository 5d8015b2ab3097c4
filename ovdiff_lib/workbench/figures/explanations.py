"""Figures that explain a segmentation: from its regions to the support images (Fig. 4), margins, and why classes are
absent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ovdiff_lib.explain import BELOW, NOT_AMONG_TOP, NOT_BEST, NOT_TOLD, Activated, absent_classes
from ovdiff_lib.overlay import colours_of, paint
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import SupportSet
from ovdiff_lib.workbench.analysis.margins import BIN, MarginStatistics
from ovdiff_lib.workbench.figures.base import new_figure

COLOURS = ((255, 127, 14), (0, 190, 225), (222, 60, 178), (248, 214, 40), (80, 200, 90), (150, 110, 240))
"""RGB of the prototypes in a figure, in the order of :func:`~ovdiff_lib.explain.activated`; after the last the first
comes again."""

REASON_COLOURS = {"kept": "#2a9d5c", BELOW: "#b9bcc4", NOT_AMONG_TOP: "#e0a03a", NOT_BEST: "#d1495b",
                  NOT_TOLD: "#d1495b"}

LEAST, SHOWN, HATCH = 1e-4, "shown, dropped", "////"
"""Of the figure of absent classes: the probability below which all bars are alike, and how classes are marked that an
image shows although the pre-filter dropped them."""

SHARP = 256
"""Smaller images are enlarged to about this long side before regions are drawn into them, so that outlines stay
thin."""


def highlight(image: np.ndarray, regions: Sequence[np.ndarray], colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The image u8 (H, W, 3), paler and darker, with each region bool (h, w) tinted and outlined in its colour: u8 (k
    H, k W, 3).

    Regions lie on any grid over the whole image; later ones cover earlier ones. k is 1 for images of :data:`SHARP`
    pixels and more.
    """
    factor = max(1, round(SHARP / max(image.shape[:2])))
    width, height = image.shape[1] * factor, image.shape[0] * factor
    picture = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    drawn = 0.3 * picture + 0.35 * picture.mean(2, keepdims=True) + np.float32(25)
    for region, colour in zip(regions, colours, strict=True):
        mask = np.asarray(Image.fromarray(region).resize((width, height), Image.Resampling.NEAREST))
        drawn[mask] = 0.5 * picture[mask] + 0.5 * np.array(colour, np.float32)
        drawn[mask & ~_eroded(mask)] = colour
    return drawn.clip(0, 255).round().astype(np.uint8)


def _eroded(mask: np.ndarray, pixels: int = 2) -> np.ndarray:
    padded = np.pad(mask, pixels, mode="edge")  # a region that runs off the image has no outline there
    height, width = mask.shape
    shifts = [(pixels, 0), (pixels, 2 * pixels), (0, pixels), (2 * pixels, pixels)]
    return mask & np.all([padded[y : y + height, x : x + width] for y, x in shifts], axis=0)


@dataclass(frozen=True)
class Trace:
    """A row of :func:`prototype_figure`: a segmentation, the prototypes to be followed, and the support sets they come
    from by category.

    ``pixel`` (row, column) is marked in the image where it is given.
    """

    name: str
    segmentation: Segmentation
    prototypes: tuple[Activated, ...]
    supports: Mapping[str, SupportSet]
    pixel: tuple[int, int] | None = None


def innermost(region: np.ndarray) -> tuple[int, int]:
    """The pixel (row, column) of a region bool (H, W) that is farthest from its border, the image's included; the first
    of equals."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    return tuple(int(place) for place in np.unravel_index(depth.argmax(), depth.shape))


def chosen_images(prototypes: Sequence[Activated], count: int) -> list[tuple[str, int]]:
    """Support images, (category, number) each, at most ``count``, that show where the prototypes come from.

    First the image with most pixels of each prototype in turn, then those in which the most pixels of any of them are
    left.
    """
    pixels = [{(p.category, n): int(mask.sum()) for n, mask in zip(p.images, p.masks, strict=True)} for p in prototypes]
    chosen = list(dict.fromkeys(next(iter(p)) for p in pixels if p))
    total: dict[tuple[str, int], int] = {}
    for one in pixels:
        for key, number in one.items():
            total[key] = total.get(key, 0) + number
    chosen += sorted(set(total) - set(chosen), key=lambda key: (-total[key], key))
    return chosen[:count]


def prototype_figure(traces: Sequence[Trace], shown: int = 4, cell: float = 1.3, title: str = "") -> Figure:
    """Fig. 4: at the left each segmentation, in the middle the regions that its prototypes decided, each in its own
    colour, at the right ``shown`` support images with the regions that these prototypes were made from in the same
    colours.
    """
    left, gap, head = 2.1, 0.14, 0.36 + (0.34 if title else 0)
    places = [left, left + cell + gap, *(left + (2 + i) * cell + 2 * gap for i in range(shown))]
    size = (places[-1] + cell, head + len(traces) * (cell + 0.04))
    figure = new_figure(size, 110)
    for r, trace in enumerate(traces):
        top = size[1] - head - r * (cell + 0.04)
        for x, picture in zip(places, _pictures(trace, shown), strict=False):
            place = x / size[0], (top - cell) / size[1], (cell - 0.04) / size[0], (cell - 0.04) / size[1]
            axis = figure.add_axes(place)
            axis.imshow(picture)
            axis.set_axis_off()
        _row_names(figure, trace, size, top - 0.06)
    middle = places[2] + shown * cell / 2
    for x, text in ((places[0] + cell / 2, "segmentation"), (places[1] + cell / 2, "decided (enlarged)"),
                    (middle, "where these prototypes come from in the support images")):
        figure.text(x / size[0], 1 - (head - 0.06) / size[1], text, ha="center", va="bottom", fontsize=11)
    if title:
        figure.text(0.5, 1 - 0.04 / size[1], title, ha="center", va="top", fontsize=13)
    return figure


def _pictures(trace: Trace, shown: int) -> list[np.ndarray]:
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(trace.prototypes))]
    image, labels = trace.segmentation.image, trace.segmentation.labels
    factor = max(1, round(SHARP / max(image.shape[:2])))
    large = Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.BICUBIC)
    painted = paint(np.asarray(large), np.kron(labels, np.ones((factor, factor), labels.dtype)),
                    trace.segmentation.class_names)
    activated = highlight(image, [p.pixels for p in trace.prototypes], colours)
    top, bottom, left, right = (factor * side for side in _around(trace))
    pictures = [painted, activated[top:bottom, left:right]]
    if trace.pixel is not None:
        row, column = (factor * place + factor // 2 for place in trace.pixel)
        _mark(pictures[0], row, column)
        _mark(pictures[1], row - top, column - left)
    for category, number in chosen_images(trace.prototypes, shown):
        here = [(p.masks[p.images.index(number)], colour) for p, colour in zip(trace.prototypes, colours, strict=True)
                if p.category == category and number in p.images]
        pictures.append(highlight(trace.supports[category].images[number], *zip(*here, strict=True)))
    return pictures


def _around(trace: Trace) -> tuple[int, int, int, int]:
    """A square (top, bottom, left, right), as far as the image has room for one, around what the prototypes decided and
    their classes."""
    height, width = trace.segmentation.labels.shape
    labels = [_label(trace, p) for p in trace.prototypes]
    rows, columns = np.nonzero(np.isin(trace.segmentation.labels, labels) if labels else np.ones((height, width), bool))
    side = 1.15 * max(np.ptp(rows), np.ptp(columns), 8) + 1
    spans = []
    for places, length in ((rows, height), (columns, width)):
        size = min(length, round(side))
        start = int(np.clip((places.min() + places.max() + 1 - size) // 2, 0, length - size))
        spans += [start, start + size]
    return tuple(spans)


def _mark(picture: np.ndarray, row: int, column: int) -> None:
    """A black and white ring around a pixel, drawn into ``picture``."""
    y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
    radius, unit = np.hypot(y - row, x - column), max(picture.shape[:2]) / SHARP
    picture[(radius > 6 * unit) & (radius < 13 * unit)] = 0
    picture[(radius > 8 * unit) & (radius < 11 * unit)] = 255


def _row_names(figure: Figure, trace: Trace, size: tuple[float, float], top: float) -> None:
    figure.text(0.08 / size[0], top / size[1], trace.name, fontsize=13, va="top", weight="bold")
    lines = trace.name.count("\n") + 1
    for i, prototype in enumerate(trace.prototypes):
        y = top - 0.22 * lines - 0.12 - 0.25 * i
        share = 100 * prototype.pixels.sum() / max(1, (trace.segmentation.labels == _label(trace, prototype)).sum())
        which = f"{prototype.kind} {prototype.index}" if prototype.kind != "class" else "class"
        figure.text(0.1 / size[0], y / size[1], "■", fontsize=13, va="center",
                    color=np.array(COLOURS[i % len(COLOURS)]) / 255)
        figure.text(0.31 / size[0], y / size[1], f"{which}: {share:.0f} %", fontsize=12, va="center")


def _label(trace: Trace, prototype: Activated) -> int:
    return trace.segmentation.class_names.index(prototype.category) if prototype.region == "foreground" else 0


def margin_figure(statistics: MarginStatistics, parts: int = 10) -> Figure:
    """Left: how the margins of right and of wrong pixels are distributed; right: the share of wrong pixels, by tenths
    of the margin."""
    figure = new_figure((7.4, 2.6), 110, layout="constrained")
    left, right = figure.subplots(1, 2)
    both = statistics.right + statistics.wrong
    last = int(np.searchsorted(np.cumsum(both), 0.99 * both.sum())) + 1
    group = max(1, last // 40)
    edges = np.arange(0, -(-last // group) + 1) * group * BIN
    for counts, name, colour in ((statistics.right, "right", "#2a9d5c"), (statistics.wrong, "wrong", "#d1495b")):
        summed = np.add.reduceat(counts[: (len(edges) - 1) * group], np.arange(0, (len(edges) - 1) * group, group))
        if counts.any():
            left.stairs(100 * summed / counts.sum(), edges, label=f"{name} pixels", color=colour, fill=True, alpha=0.55)
    left.set(xlabel="margin: winner minus runner-up (cosine)", ylabel="% of these pixels", xlim=(0, edges[-1]))
    if left.patches:
        left.legend(frameon=False, fontsize=9)
    rates = statistics.error_rates(parts)
    right.plot([i + 1 for i in range(len(rates))], [100 * rate for _, rate in rates], "o-", color="#31435e")
    right.set(xlabel=f"pixels by margin, in {len(rates)} equal parts (smallest first)",
              ylabel="% of pixels that are wrong", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def absent_figure(segmentations: Sequence[Segmentation], filters: Filters, names: Sequence[str],
                  shown: Sequence[Collection[str]] = (),
                  bars: int = 7) -> Figure:
    """For each image CLIP's ``bars`` most probable classes, with the threshold 1/C and why the pre-filter dropped those
    it dropped.

    ``shown`` are the classes that each image really shows; their names are marked with a dot. Those of them that were
    dropped are always among the bars, hatched, and take the place of the least probable others; a bar is at least
    :data:`LEAST` long. A class that was segmented has its name in the colour of its pixels.
    """
    count = len(segmentations)
    figure = new_figure((3.1 * count, 3.7), 110, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, height_ratios=[1, 1.25])
    used: dict[str, None] = {"kept": None}
    for i, (result, name) in enumerate(zip(segmentations, names, strict=True)):
        axes[0, i].imshow(paint(result.image, result.labels, result.class_names))
        axes[0, i].set_axis_off()
        axes[0, i].set_title(name, fontsize=12)
        used |= dict.fromkeys(_bars(axes[1, i], result, filters, shown[i] if shown else (), bars))
    handles = [Patch(color=REASON_COLOURS[reason], label=reason if reason == "kept" else f"dropped: {reason}")
               for reason in used if reason != SHOWN]
    if SHOWN in used:
        handles.append(Patch(facecolor="white", edgecolor="black", hatch=HATCH, label=SHOWN))
    figure.legend(handles=handles, loc="outside lower center", ncol=max(1, min(len(handles), count)), frameon=False,
                  fontsize=11)
    return figure


def _bars(axis: Axes, result: Segmentation, filters: Filters, shown: Collection[str], bars: int) -> list[str]:
    """Bars of one image; returns the reasons that occur."""
    absent = {a.name: a for a in absent_classes(result, filters)}
    ranked = np.argsort(-result.filter_scores, kind="stable").tolist()
    lost = [i for i in ranked if result.vocabulary.names[i] in shown and i not in result.kept]
    others = [i for i in ranked if i not in lost][: max(1, bars - len(lost))]
    order = np.array(sorted([*others, *lost], key=ranked.index))
    names = [result.vocabulary.names[i] for i in order]
    reasons = [absent[n].reason if n in absent else "kept" for n in names]
    drawn = axis.barh(range(len(names)), np.maximum(result.filter_scores[order], LEAST),
                      color=[REASON_COLOURS[r] for r in reasons])
    for bar, i in zip(drawn, order, strict=True):
        if i in lost:
            bar.set(hatch=HATCH, edgecolor="black")
    threshold = next((a.threshold for a in absent.values()), 1 / len(result.vocabulary))
    axis.axvline(threshold, color="#31435e", linestyle="--", linewidth=1)
    axis.text(threshold, -0.75, " 1/C", fontsize=10, color="#31435e", va="bottom")
    axis.set_yticks(range(len(names)), [f"● {n}" if n in shown else n for n in names], fontsize=10.5)
    for label, i in zip(axis.get_yticklabels(), order, strict=True):
        if (result.labels == i + 1).any():
            label.set_color(colours_of(result.class_names)[i + 1] / 255 * 0.8)
            label.set_weight("bold")
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(LEAST / 3, 1)  # the shortest bar is still one
    axis.set_xticks([LEAST, 0.01, 1], [f"≤ {LEAST:g}", "0.01", "1"])
    axis.tick_params(axis="x", labelsize=10)
    axis.set_xlabel("CLIP probability", fontsize=10.5)
    axis.spines[["top", "right"]].set_visible(False)
    return [*reasons, *([SHOWN] if lost else ())]
