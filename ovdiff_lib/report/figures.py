"""Figures: label colours, overlays with a legend, support grids, the steps side by side.

Every figure function returns a matplotlib ``Figure`` (or a PIL image for overlays); :func:`save_figure` writes it with its caption.
"""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ovdiff_lib.images import write_atomic
from ovdiff_lib.report.colours import colours_of
from ovdiff_lib.types import ForegroundBackground, Prototypes, Segmentation, SupportSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOREGROUND, BACKGROUND, UNUSED = (228, 87, 46), (46, 134, 193), (225, 225, 225)
"""Colours (RGB) of foreground, background and unused support pixels in every figure."""


COLOURS = 256
"""Colours of a saved figure."""

FLAT, FLAT_AREA = 64, 60
"""Colours of flat areas at most that a saved figure keeps as they are, and the pixels that make an area."""


FADED = 0.65
"""How far the colours of an image fade to grey under the colour of a class, which they would change."""


def paint(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], alpha: float = 0.6) -> np.ndarray:
    """The image u8 (H, W, 3) with labels (H, W) painted over it; background (0) is only dimmed. ``class_names``, background first."""
    colours = colours_of(class_names)[labels].astype(np.float32)
    weight = np.where(labels == 0, 0.45, alpha)[..., None]
    faded = np.where(labels == 0, 0, FADED)[..., None]
    below = image.astype(np.float32) * (1 - faded) + image.mean(-1, keepdims=True, dtype=np.float32) * faded
    mixed = below * (1 - weight) + colours * weight
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    mixed[edge] = 255
    return mixed.round().astype(np.uint8)


def draw_overlay(result: Segmentation, alpha: float = 0.6) -> Image.Image:
    """Overlay with a legend of the classes found and the share of pixels of each; small images are enlarged to be readable."""
    from PIL import ImageDraw, ImageFont

    height, width = result.labels.shape
    factor = max(1, round(512 / max(height, width)))
    picture = Image.fromarray(result.image).resize((width * factor, height * factor), Image.BICUBIC)
    labels = np.kron(result.labels, np.ones((factor, factor), result.labels.dtype))
    picture = Image.fromarray(paint(np.asarray(picture), labels, result.class_names, alpha))
    found, counts = np.unique(result.labels, return_counts=True)
    order = [int(i) for i in found[np.argsort(-counts)] if i > 0]
    size = max(13, picture.width // 28)
    font = ImageFont.load_default(size)
    share = dict(zip(found.tolist(), counts / labels.size * factor**2, strict=True))
    entries = [(i, f"{result.class_names[i]}  {100 * share[i]:.0f} %") for i in order] or [(0, "no class found: background")]
    # The legend wraps into rows below the picture.
    x, y, pad, places = size // 2, size // 2, size // 2, []
    for index, text in entries:
        length = int(font.getlength(text)) + size + 2 * pad
        if x + length > picture.width and x > size // 2:
            x, y = size // 2, y + size + pad
        places.append((x, y, index, text))
        x += length
    # A long name under a narrow picture widens the sheet rather than being cut.
    widest = max(x + size + pad // 2 + int(font.getlength(text)) + pad for x, _, _, text in places)
    sheet = Image.new("RGB", (max(picture.width, widest), picture.height + y + size + pad), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    colours = colours_of(result.class_names)
    for x, y, index, text in places:
        top = picture.height + y
        draw.rectangle([x, top + 1, x + size - 2, top + size - 1], fill=tuple(colours[index].tolist()))
        draw.text((x + size + pad // 2, top), text, fill="black", font=font, anchor="la")
    return sheet


def square(image: np.ndarray, side: int) -> np.ndarray:
    """The image u8 (H, W, 3) squashed to (side, side, 3), bilinear."""
    return np.array(Image.fromarray(image).resize((side, side), Image.BILINEAR))


def heat(image: np.ndarray, attribution: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """The image u8 (H, W, 3) under its attribution (h, w) in [0, 1] as a heat map, u8 (H, W, 3)."""
    import matplotlib

    resized = Image.fromarray(attribution.astype(np.float32)).resize(image.shape[1::-1], Image.BICUBIC)
    colours = matplotlib.colormaps["inferno"](np.clip(np.asarray(resized), 0, 1))[..., :3] * 255
    return (image * (1 - alpha) + colours * alpha).round().astype(np.uint8)


def mask_picture(masks: ForegroundBackground, index: int) -> np.ndarray:
    """Foreground, background and unused pixels of support image ``index`` in their colours, u8 (H, W, 3)."""
    picture = np.empty((*masks.foreground.shape[1:], 3), np.uint8)
    picture[:] = UNUSED
    picture[masks.background[index]] = BACKGROUND
    picture[masks.foreground[index]] = FOREGROUND
    return picture


def part_picture(prototypes: Prototypes, index: int = 0) -> np.ndarray:
    """Part clusters of support image ``index`` on the feature grid: warm foreground, cool background, grey unused; u8 (h, w, 3)."""
    picture = np.empty((*prototypes.assignment.shape[1:], 3), np.uint8)
    picture[:] = UNUSED
    for region, first_hue in (("foreground", 0.93), ("background", 0.45)):
        parts = prototypes.part_assignment(region)[index]
        for part in np.unique(parts[parts >= 0]):
            hue = (first_hue + 0.25 * ((part * 0.618034) % 1)) % 1
            colour = colorsys.hls_to_rgb(hue, 0.40 + 0.3 * ((part * 0.377) % 1), 0.75)
            picture[parts == part] = np.round(255 * np.array(colour))
    return picture


def image_grid(rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str] = (), column_names: Sequence[str] = (),
               cell: float = 1.25, title: str = "") -> Figure:
    """A grid of images (each u8 (H, W, 3)) with names at the left and the top."""
    from matplotlib import rcParams

    from ovdiff_lib.report.canvas import new_figure

    count, width = len(rows), max(len(r) for r in rows)
    aspect = np.median([i.shape[0] / i.shape[1] for row in rows for i in row])
    left = 0.12 + 0.085 * max((len(max(n.split("\n"), key=len)) for n in row_names), default=0)
    top = (0.34 if any(column_names) else 0.08) + (0.36 if title else 0)
    size = (left + width * cell, top + count * cell * aspect + 0.06)
    figure = new_figure(size, 110)
    gap = 0.04
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            x, y = left + c * cell, size[1] - top - (r + 1) * cell * aspect
            axis = figure.add_axes([x / size[0], y / size[1], (cell - gap) / size[0], (cell * aspect - gap) / size[1]])
            axis.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 40 else "antialiased")
            axis.set_axis_off()
            if r == 0 and c < len(column_names):
                axis.set_title(column_names[c], fontsize=8.5, pad=3)
        if r < len(row_names):
            middle = size[1] - top - (r + 0.5) * cell * aspect
            figure.text((left - 0.08) / size[0], middle / size[1], row_names[r], ha="right", va="center", fontsize=9)
    if title:
        figure.text(0.5, 1 - 0.1 / size[1], title, ha="center", va="top", fontsize=11, fontfamily=rcParams["font.family"])
    return figure


def support_grid(support: SupportSet, count: int = 8, masks: ForegroundBackground | None = None) -> Figure:
    """Support images of one category over their attribution and, when given, their masks."""
    shown = range(min(count, len(support)))
    rows = [[support.images[i] for i in shown], [heat(support.images[i], support.attribution[i]) for i in shown]]
    names = ["support images", f"attribution of\n“{support.category.name}”"]
    if masks is not None:
        rows.append([mask_picture(masks, i) for i in shown])
        names.append("foreground /\nbackground")
    return image_grid(rows, names)


def class_legend(figure: Figure, class_names: Sequence[str], labels: Sequence[int]) -> None:
    """A legend below a figure of the colours of ``labels``; ``class_names`` are those of all labels, background first."""
    from matplotlib.patches import Patch

    colours = colours_of(class_names) / 255
    handles = [Patch(color=colours[i], label=class_names[i]) for i in labels]
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=min(len(handles), 7), frameon=False, fontsize=9)


def reduced(picture: Image.Image) -> Image.Image:
    """An RGB picture in :data:`COLOURS` colours; the colours of flat areas, a legend's among them, stay exactly what they are.

    Not dithered: its noise would take more bytes than the picture.
    """
    pixels = np.asarray(picture).astype(np.int32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    values, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    flat = np.argsort(-counts, kind="stable")[: min(FLAT, int((counts >= FLAT_AREA).sum()))]
    found = picture.quantize(COLOURS - len(flat), Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    palette = np.array(found.getpalette(), np.uint8).reshape(-1, 3)[: COLOURS - len(flat)]
    own = np.full(len(values), -1)
    own[flat] = len(palette) + np.arange(len(flat))
    own = own[inverse].reshape(pixels.shape[:2])
    made = Image.fromarray(np.where(own >= 0, own, np.asarray(found)).astype(np.uint8), mode="P")
    exact = np.stack([values[flat] >> 16, values[flat] >> 8 & 255, values[flat] & 255], -1).astype(np.uint8)
    made.putpalette(np.concatenate([palette, exact]).tobytes())
    return made


def save_figure(figure: Figure | Image.Image, path: str | Path, caption: str) -> Path:
    """Write a figure as PNG of :data:`COLOURS` colours with its caption beside it (``.json``); both appear whole or not at all.

    The colours are chosen for the picture: a grid of images then takes a fifth of the bytes, and figures are committed.
    """
    path = Path(path)
    if not isinstance(figure, Image.Image):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", bbox_inches="tight", pad_inches=0.06, facecolor="white", metadata={"Software": None})
        figure = Image.open(drawn)
    buffer = io.BytesIO()
    reduced(figure.convert("RGB")).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
    write_atomic(path.with_suffix(".json"), (json.dumps({"caption": caption}, ensure_ascii=False, indent=1) + "\n").encode())
    return path
