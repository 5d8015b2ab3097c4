"""Reading, resizing and writing images: any file a user may have becomes u8 RGB (H, W, 3), or one clear sentence."""

from __future__ import annotations

import functools
import io
import struct
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import shown, write_atomic

MAX_PIXELS = 100_000_000
"""Largest image that is read or made by resizing, in pixels."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files that :func:`list_images` finds in a folder; a file named by itself may be of any of :data:`FORMATS`, whatever its suffix."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "PCX", "TGA")
"""Formats that are read, told from a file's content; the last has no mark to be told by. Pillow has others that nobody keeps pictures
in, one of them (EPS) a program that it has Ghostscript run."""

_BROKEN = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, EOFError,
           MemoryError, RuntimeError, struct.error, zlib.error)
"""What Pillow's decoders raise on damaged files; they have no one error for it."""


def read_image(source: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """An image as u8 RGB (H, W, 3), upright.

    ``source`` is the path of a file (:data:`FORMATS`), a PIL image, or a u8 array (H, W), (H, W, 3) or (H, W, 4). EXIF rotation is
    applied, grey, palette, CMYK and 16-bit images are converted, transparency is composited on white, and of an animation the first frame
    is taken. Raises ``InputError`` for a missing, broken or empty image, one above :data:`MAX_PIXELS`, and pixels whose range is not
    known (floats, 32-bit).
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _convert(source, "The image")
    path, name = Path(source), shown(source)
    if path.is_dir():
        raise InputError(f"{name} is a folder, not an image; name an image file in it.")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"The image {name} is empty (0 bytes); copy or download it again.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _convert applies this module's own, stated limit
            with Image.open(path, formats=_formats()) as image:
                return _convert(image, f"The image {name}")
    except FileNotFoundError:
        raise InputError(f"The image {name} does not exist; check the path.") from None
    except PermissionError:
        raise InputError(f"The image {name} may not be read; check its permissions.") from None
    except Image.DecompressionBombError:
        raise InputError(_too_large(f"The image {name}")) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"The file {name} is not an image that can be read; convert it to PNG or JPEG.") from None
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"The image {name} cannot be opened ({_reason(error)}); copy or download it again.") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this build of Pillow has; it fails at the name of another."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _too_large(what: str) -> str:
    return f"{what} has more than {MAX_PIXELS // 10**6} million pixels; scale it down first."


def _reason(error: Exception) -> str:
    """What an error says, on one line of moderate length; its kind if it says nothing."""
    return textwrap.shorten(str(error), 120, placeholder="").rstrip(".") or type(error).__name__


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError("An image array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4),"
                         f" not {array.dtype} {array.shape}; convert it.")
    if array.size == 0:
        raise InputError(f"The image array of shape {array.shape} has no pixels; pass one with at least one row and one column.")
    return _convert(Image.fromarray(array), "The image array")


def _convert(image: Image.Image, what: str) -> np.ndarray:
    width, height = image.size
    if width == 0 or height == 0:
        raise InputError(f"{what} has no pixels; pass one with at least one row and one column.")
    if width * height > MAX_PIXELS:
        raise InputError(f"{what} has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million; scale it down first.")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _grey16(image, what)
        if image.mode == "F":
            raise InputError(f"{what} holds floating-point pixels of unknown range; convert it to 8 bits a channel.")
        if image.mode in ("LAB", "La"):  # which Pillow converts to neither RGB nor RGBA
            raise InputError(f"{what} holds pixels of the kind {image.mode}; convert it to RGB first.")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except InputError:
        raise
    except Image.DecompressionBombError:  # the header said less than the decoder found
        raise InputError(_too_large(what)) from None
    except _BROKEN as error:
        raise InputError(f"{what} is damaged ({_reason(error)}); copy or download it again.") from None


def _grey16(image: Image.Image, what: str) -> Image.Image:
    """16-bit grey to 8 bits by its full range: Pillow's own conversion clips at 255 instead."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{what} holds 32-bit pixels of unknown range; convert it to 8 bits a channel.")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def list_images(path: str | Path) -> list[Path]:
    """The file itself, or the images directly in a folder (:data:`SUFFIXES`, any case), sorted by name; ``InputError`` if there is none."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{shown(path)} does not exist; name an image file or a folder of images.")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"The folder {shown(path)} holds no image ({', '.join(s[1:] for s in SUFFIXES)}); name a folder that does.")
    return found


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of RGB in [0, 1] that CLIP, and DINO and MAE, were trained with."""

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}
"""Filters of :func:`resize_short_side` by name; both antialias."""


def resize_short_side(image: np.ndarray, short: int, resample: str = "bilinear", long_side: int | None = None) -> np.ndarray:
    """u8 (H, W, 3) scaled, with its aspect ratio, so that its short side is ``short`` pixels, by a filter of :data:`RESAMPLING`.

    With ``long_side`` the long side is at most that, and the short side then smaller. Sizes are rounded as int(x * scale + 0.5), as the
    evaluation protocol of the paper's baselines does. Raises ``InputError`` where the result would exceed :data:`MAX_PIXELS` (a strip).
    """
    height, width = image.shape[:2]
    scale = min(short / min(height, width), (long_side or np.inf) / max(height, width))
    if scale == 1:
        return image
    new_height, new_width = (max(1, int(side * scale + 0.5)) for side in (height, width))
    if new_height * new_width > MAX_PIXELS:
        raise InputError(f"An image of {width} x {height} pixels is too narrow: with its short side at {short} it would have"
                         f" {new_width} x {new_height}; crop it first.")
    return np.array(Image.fromarray(image).resize((new_width, new_height), RESAMPLING[resample]))


def save_label_png(path: str | Path, labels: np.ndarray, colours: np.ndarray) -> None:
    """Write labels (H, W) in [0, n) as a PNG whose pixel values are the labels, shown in their ``colours`` u8 (n, 3): as a palette up to
    256 classes, else 16-bit grey.

    The file is complete or absent, never half written. Raises ``InputError`` if it cannot be written or a label is out of range.
    """
    if labels.ndim != 2 or labels.size == 0:
        raise InputError(f"A label map must have the shape (H, W) with at least one pixel, not {labels.shape}.")
    n = len(colours)
    if labels.min() < 0 or labels.max() >= n or n > 65536:
        raise InputError(f"Labels from {labels.min()} to {labels.max()} do not fit {n} classes;"
                         f" here a PNG holds labels 0 to {min(n, 65536) - 1}.")
    if n > 256:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        image = Image.fromarray(labels.astype(np.uint8), mode="L")
        image.putpalette(np.ascontiguousarray(colours, np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
