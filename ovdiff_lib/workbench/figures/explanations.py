"""Figures that explain a segmentation: from its regions to support images (Fig. 4), margins, why classes are absent."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from scipy.ndimage import distance_transform_edt, minimum_filter

from ovdiff_lib.explain import BELOW, NOT_AMONG_TOP, NOT_BEST, Activated, absent_classes
from ovdiff_lib.overlay import colours_of, paint
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import SupportSet
from ovdiff_lib.workbench.analysis.margins import BIN, MarginStatistics
from ovdiff_lib.workbench.figures.base import Sheet

COLOURS = ((255, 127, 14), (0, 190, 225), (222, 60, 178), (248, 214, 40), (80, 200, 90), (150, 110, 240))
"""RGB of the prototypes in a figure, in order; after the last the first comes again."""

REASON_COLOURS = {"kept": "#2a9d5c", BELOW: "#b9bcc4", NOT_AMONG_TOP: "#e0a03a", NOT_BEST: "#d1495b"}
SHARP = 256  # smaller images are enlarged to about this long side, so that outlines drawn into them stay thin
LINE, CROSS = "#31435e", np.array([[0, 0, 1, 0, 0], [0] * 5, [1, 0, 1, 0, 1], [0] * 5, [0, 0, 1, 0, 0]], bool)

LEAST, SHOWN, HATCH = 1e-4, "shown, dropped", "////"
"""In :func:`absent_figure`: the probability below which all bars are alike; how dropped classes that are shown look."""


def highlight(image: np.ndarray, regions: Sequence[np.ndarray], colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The image u8 (H, W, 3), paler and darker, with each region bool (h, w) tinted and outlined in its colour: u8 (k
    H, k W, 3). Regions lie on any grid over the whole image; later ones cover earlier ones."""
    picture = _enlarged(image)[0].astype(np.float32)
    drawn = 0.3 * picture + 0.35 * picture.mean(2, keepdims=True) + np.float32(25)
    for region, colour in zip(regions, colours, strict=True):
        mask = np.asarray(Image.fromarray(region).resize(picture.shape[1::-1], Image.Resampling.NEAREST))
        drawn[mask] = 0.5 * picture[mask] + 0.5 * np.array(colour, np.float32)
        inside = minimum_filter(mask, footprint=CROSS, mode="nearest")  # nor is the image's border an outline
        drawn[mask & ~inside] = colour
    return drawn.clip(0, 255).round().astype(np.uint8)


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The image k times as large, and k."""
    factor = max(1, round(SHARP / max(image.shape[:2])))
    size = image.shape[1] * factor, image.shape[0] * factor
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)), factor


@dataclass(frozen=True)
class Trace:
    """A row of :func:`prototype_figure`; ``supports`` by category, ``pixel`` (row, column) to be marked."""

    name: str
    segmentation: Segmentation
    prototypes: tuple[Activated, ...]
    supports: Mapping[str, SupportSet]
    pixel: tuple[int, int] | None = None

    colours = property(lambda self: [COLOURS[i % len(COLOURS)] for i in range(len(self.prototypes))])


def innermost(region: np.ndarray) -> tuple[int, int]:
    """The pixel (row, column) of a region bool (H, W) farthest from its border and the image's; the first of equals."""
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    return tuple(int(place) for place in np.unravel_index(depth.argmax(), depth.shape))


def source_images(prototypes: Sequence[Activated], count: int) -> list[tuple[str, int]]:
    """Support images, (category, number) each, at most ``count``, that show where the prototypes come from: first the
    image with most pixels of each prototype in turn, then those with most pixels of all of them."""
    total: Counter[tuple[str, int]] = Counter()
    for p in prototypes:
        total.update({(p.category, n): int(mask.sum()) for n, mask in zip(p.images, p.masks, strict=True)})
    chosen = list(dict.fromkeys((p.category, p.images[0]) for p in prototypes if p.images))
    return [*chosen, *sorted(set(total) - set(chosen), key=lambda key: (-total[key], key))][:count]


def prototype_figure(traces: Sequence[Trace], shown: int = 4) -> Figure:
    """Fig. 4: each segmentation, the regions that its prototypes decided, each in its colour, and ``shown`` support
    images with the regions that these prototypes were made from in the same colours."""
    left, gap, head, cell, row = 2.1, 0.14, 0.36, 1.3, 1.34  # inches
    places = [left, left + cell + gap, *(left + (2 + i) * cell + 2 * gap for i in range(shown))]
    figure = Sheet((places[-1] + cell, head + len(traces) * row), 110)
    for trace, top in zip(traces, head + row * np.arange(len(traces)), strict=True):
        for x, picture in zip(places, _pictures(trace, shown), strict=False):
            figure.put(picture, x, top + 0.04, cell - 0.04, cell - 0.04)
        _row_names(figure, trace, top + 0.06)
    for x, text in ((places[0] + cell / 2, "segmentation"), (places[1] + cell / 2, "decided (enlarged)"),
                    (places[2] + shown * cell / 2, "where these prototypes come from in the support images")):
        figure.write(x, head - 0.06, text, va="bottom", fontsize=11)
    return figure


def _pictures(trace: Trace, shown: int) -> list[np.ndarray]:
    image, labels, names = trace.segmentation.image, trace.segmentation.labels, trace.segmentation.class_names
    large, factor = _enlarged(image)
    whole = paint(large, np.kron(labels, np.ones((factor, factor), labels.dtype)), names)
    decided = highlight(image, [p.pixels for p in trace.prototypes], trace.colours)
    top, bottom, left, right = (factor * side for side in _around(trace))
    pictures = [whole, decided[top:bottom, left:right]]
    if trace.pixel is not None:
        row, column = (factor * place + factor // 2 for place in trace.pixel)
        _mark(pictures[0], row, column)
        _mark(pictures[1], row - top, column - left)
    for category, number in source_images(trace.prototypes, shown):
        here = [(p.masks[p.images.index(number)], colour)
                for p, colour in zip(trace.prototypes, trace.colours, strict=True)
                if p.category == category and number in p.images]
        pictures.append(highlight(trace.supports[category].images[number], *zip(*here, strict=True)))
    return pictures


def _around(trace: Trace) -> tuple[int, int, int, int]:
    """A square (top, bottom, left, right), as far as the image has room for one, around the prototypes' classes."""
    labels = trace.segmentation.labels
    own = [labels[p.pixels][0] for p in trace.prototypes]
    found = np.nonzero(np.isin(labels, own) if own else np.ones_like(labels))
    side, spans = 1.15 * max(*map(np.ptp, found), 8) + 1, []
    for places, length in zip(found, labels.shape, strict=True):
        size = min(length, round(side))
        start = int(np.clip((places.min() + places.max() + 1 - size) // 2, 0, length - size))
        spans += [start, start + size]
    return tuple(spans)


def _mark(picture: np.ndarray, row: int, column: int) -> None:
    """A black and white ring around a pixel, drawn into ``picture``."""
    y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
    radius = np.hypot(y - row, x - column) * SHARP / max(picture.shape[:2])
    picture[(radius > 6) & (radius < 13)] = 0
    picture[(radius > 8) & (radius < 11)] = 255


def _row_names(figure: Sheet, trace: Trace, top: float) -> None:
    figure.write(0.08, top, trace.name, ha="left", va="top", fontsize=13, weight="bold")
    labels, below = trace.segmentation.labels, top + 0.22 * len(trace.name.split("\n")) + 0.12
    for i, (one, colour) in enumerate(zip(trace.prototypes, trace.colours, strict=True)):
        share = 100 * one.pixels.sum() / (labels == labels[one.pixels][0]).sum()
        which = f"{one.kind} {one.index}" if one.kind != "class" else "class"
        figure.write(0.1, below + 0.25 * i, "■", ha="left", fontsize=13, color=np.array(colour) / 255)
        figure.write(0.31, below + 0.25 * i, f"{which}: {share:.0f} %", ha="left", fontsize=12)


def margin_figure(statistics: MarginStatistics) -> Figure:
    """Left: how margins of right and of wrong pixels are distributed; right: the share of wrong ones, by tenths."""
    figure = Sheet((7.4, 2.6), 110, layout="constrained")
    left, right = figure.subplots(1, 2)
    both = statistics.right + statistics.wrong
    last = int(np.searchsorted(np.cumsum(both), 0.99 * both.sum())) + 1
    edges = np.arange(0, last + max(1, last // 40), max(1, last // 40))  # about 40 bars
    for counts, name, colour in ((statistics.right, "right", "#2a9d5c"), (statistics.wrong, "wrong", "#d1495b")):
        if counts.any():
            share = 100 * np.diff(np.append(0, np.cumsum(counts))[edges.clip(max=len(counts))]) / counts.sum()
            left.stairs(share, edges * BIN, label=f"{name} pixels", color=colour, fill=True, alpha=0.55)
    left.set(xlabel="margin: winner minus runner-up (cosine)", ylabel="% of these pixels", xlim=(0, edges[-1] * BIN))
    left.legend(frameon=False, fontsize=9)
    rates = [100 * rate for _, rate in statistics.error_rates()]
    right.plot(range(1, len(rates) + 1), rates, "o-", color=LINE)
    right.set(xlabel=f"pixels by margin, in {len(rates)} equal parts (smallest first)",
              ylabel="% of pixels that are wrong", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def absent_figure(segmentations: Sequence[Segmentation], filters: Filters, names: Sequence[str],
                  shown: Sequence[Collection[str]], bars: int = 7) -> Figure:
    """For each image CLIP's ``bars`` most probable classes, with the threshold 1/C and why the pre-filter dropped some.

    ``shown``, the classes that each image really shows, have a dot, hatched if dropped; segmented ones coloured names.
    """
    count = len(segmentations)
    figure = Sheet((3.1 * count, 3.7), 110, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, height_ratios=[1, 1.25])
    used: dict[str, bool] = {"kept": True, SHOWN: False}
    for (top, bottom), result, name, there in zip(axes.T, segmentations, names, shown, strict=True):
        top.imshow(paint(result.image, result.labels, result.class_names))
        top.set_axis_off()
        top.set_title(name, fontsize=12)
        used |= dict.fromkeys(_bars(bottom, result, filters, there, bars), True)
    handles = [Patch(color=colour, label="kept" if reason == "kept" else f"dropped: {reason}")
               for reason in used if (colour := REASON_COLOURS.get(reason))]
    if used[SHOWN]:
        handles.append(Patch(facecolor="white", edgecolor="black", hatch=HATCH, label=SHOWN))
    figure.legend(handles=handles, loc="outside lower center", ncol=max(1, min(len(handles), count)), frameon=False,
                  fontsize=11)
    return figure


def _bars(axis: Axes, result: Segmentation, filters: Filters, shown: Collection[str], bars: int) -> list[str]:
    """Bars of one image; returns the reasons that occur."""
    absent, words = {a.name: a for a in absent_classes(result, filters)}, result.vocabulary.names
    ranked = np.argsort(-result.filter_scores, kind="stable").tolist()
    lost = [i for i in ranked if words[i] in shown and i not in result.kept]
    others = [i for i in ranked if i not in lost][: max(1, bars - len(lost))]
    order = np.array([i for i in ranked if i in lost or i in others])
    names = [words[i] for i in order]
    reasons = [absent[n].reason if n in absent else "kept" for n in names]
    drawn = axis.barh(range(len(names)), np.maximum(result.filter_scores[order], LEAST),
                      color=[REASON_COLOURS[r] for r in reasons])
    for bar, i in zip(drawn, order, strict=True):
        if i in lost:
            bar.set(hatch=HATCH, edgecolor="black")
    threshold = next((a.threshold for a in absent.values()), 1 / len(result.vocabulary))
    axis.axvline(threshold, color=LINE, linestyle="--", linewidth=1)
    axis.text(threshold, -0.75, " 1/C", fontsize=10, color=LINE, va="bottom")
    axis.set_yticks(range(len(names)), [f"● {n}" if n in shown else n for n in names], fontsize=10.5)
    for label, i in zip(axis.get_yticklabels(), order, strict=True):
        if (result.labels == i + 1).any():
            label.set_color(colours_of(result.class_names)[i + 1] / 255 * 0.8)
            label.set_weight("bold")
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(LEAST / 3, 1)  # the shortest bar is still one
    axis.set_xticks([LEAST, 0.01, 1], [f"≤ {LEAST:g}", "0.01", "1"], fontsize=10)
    axis.set_xlabel("CLIP probability", fontsize=10.5)
    axis.spines[["top", "right"]].set_visible(False)
    return [*reasons, *([SHOWN] if lost else ())]
