"""Figures: pictures of images, attribution and masks, grids of them, legends, and how a figure is saved."""

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ovdiff_lib.files import written_whole
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.types import ForegroundBackground, Prototypes
from ovdiff_lib.workbench.console import write_json

ORANGE, BLUE, LIGHT_GREY = (228, 87, 46), (46, 134, 193), (225, 225, 225)
"""Colours (RGB) of foreground, background and unused support pixels in every figure."""


def square(image: np.ndarray, side: int) -> np.ndarray:
    """The image u8 (H, W, 3) squashed to (side, side, 3), bilinear."""
    return np.array(Image.fromarray(image).resize((side, side), Image.BILINEAR))


def heat(image: np.ndarray, attribution: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """The image u8 (H, W, 3) under its attribution (h, w) in [0, 1] as a heat map, u8 (H, W, 3)."""
    resized = Image.fromarray(attribution.astype(np.float32)).resize(image.shape[1::-1], Image.BICUBIC)
    colours = matplotlib.colormaps["inferno"](np.clip(np.asarray(resized), 0, 1))[..., :3] * 255
    return (image * (1 - alpha) + colours * alpha).round().astype(np.uint8)


def mask_picture(masks: ForegroundBackground, index: int) -> np.ndarray:
    """Foreground, background and unused pixels of support image ``index`` in their colours, u8 (H, W, 3)."""
    picture = np.full((*masks.foreground.shape[1:], 3), LIGHT_GREY, np.uint8)
    picture[masks.background[index]] = BLUE
    picture[masks.foreground[index]] = ORANGE
    return picture


def part_picture(prototypes: Prototypes) -> np.ndarray:
    """Part clusters of the first support image, u8 (h, w, 3): warm foreground, cool background, grey unused."""
    picture = np.full((*prototypes.assignment.shape[1:], 3), LIGHT_GREY, np.uint8)
    codes, count = prototypes.assignment[0].astype(int), int(prototypes.assignment.max())
    for code in np.unique(codes[codes != 0]):
        # Parts of the background are numbered on from those of the foreground.
        first_hue, part = (0.93, code - 1) if code > 0 else (0.45, count - code - 1)
        hue = (first_hue + 0.25 * ((part * 0.618034) % 1)) % 1
        colour = colorsys.hls_to_rgb(hue, 0.40 + 0.3 * ((part * 0.377) % 1), 0.75)
        picture[codes == code] = np.round(255 * np.array(colour))
    return picture


class Sheet(Figure):
    """A figure of ``size`` (width, height) in inches, drawn without pyplot, so that a notebook's state stays untouched,
    and still shown by it; things can be put on it by inches from its left and top."""

    def __init__(self, size: tuple[float, float], dpi: int, **options: Any) -> None:
        super().__init__(size, dpi, **options)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06, facecolor="white",
                     metadata={"Software": None})
        return buffer.getvalue()

    def room(self, left: float, top: float, width: float, height: float) -> Axes:
        """New axes at a place."""
        wide, high = self.get_size_inches()
        return self.add_axes([left / wide, 1 - (top + height) / high, width / wide, height / high])

    def put(self, picture: np.ndarray, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
        """An image u8 (H, W, 3) at a place."""
        axis = self.room(left, top, width, height)
        axis.imshow(picture, **options)
        axis.set_axis_off()
        return axis

    def write(self, left: float, top: float, text: str, **options: Any) -> None:
        """Text at a place: centred on it unless ``ha`` and ``va`` say otherwise."""
        wide, high = self.get_size_inches()
        self.text(left / wide, 1 - top / high, text, **{"ha": "center", "va": "center", **options})


def image_grid(rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str] = (), column_names: Sequence[str] = (),
               cell: float = 1.25) -> Sheet:
    """A grid of images (each u8 (H, W, 3)) with names at the left and the top; ``cell``: inches a column."""
    height = cell * np.median([image.shape[0] / image.shape[1] for row in rows for image in row])
    left = 0.12 + 0.085 * max((len(part) for name in row_names for part in name.split("\n")), default=0)
    top, gap = 0.34 if any(column_names) else 0.08, 0.04
    figure = Sheet((left + max(map(len, rows)) * cell, top + len(rows) * height + 0.06), 110)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            smooth = "nearest" if max(image.shape[:2]) < 40 else "antialiased"
            axis = figure.put(image, left + c * cell, top + r * height + gap, cell - gap, height - gap,
                              interpolation=smooth)
            if r == 0 and c < len(column_names):
                axis.set_title(column_names[c], fontsize=8.5, pad=3)
    for r, name in enumerate(row_names):
        figure.write(left - 0.08, top + (r + 0.5) * height, name, ha="right", fontsize=9)
    return figure


def class_legend(figure: Figure, class_names: Sequence[str], labels: Sequence[int], most: int = 7,
                 **options: Any) -> None:
    """A legend below a figure of the colours of ``labels``, at most ``most`` a row, with matplotlib's ``options``."""
    colours = colours_of(class_names) / 255
    if handles := [Patch(color=colours[i], label=class_names[i]) for i in labels]:
        options = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "frameon": False, "fontsize": 9, **options}
        figure.legend(handles=handles, ncol=min(len(handles), most), **options)


def save_figure(figure: Sheet, path: Path, caption: str) -> None:
    """Write a figure as PNG with its caption beside it (``.json``); both appear whole or not at all.

    It has 256 colours, a fifth of the bytes, as figures are committed; this way of choosing them keeps those of the few
    pixels of a legend. Dithered, skies stay smooth; areas of one colour are left alone.
    """
    picture = Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")
    plain = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    reduced, pixels = picture.quantize(palette=plain, dither=Image.Dither.FLOYDSTEINBERG), np.asarray(picture)
    same = np.any([(pixels == np.roll(pixels, *side)).all(-1) for side in ((1, 0), (-1, 0), (1, 1), (-1, 1))], axis=0)
    reduced.paste(plain, mask=Image.fromarray(same))
    with written_whole(path) as file:
        reduced.save(file, "PNG", optimize=True)
    write_json(path.with_suffix(".json"), {"caption": caption})
