"""Reading and resizing images: any file a user may have becomes u8 RGB (H, W, 3), or one clear sentence."""

import textwrap
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import shown

MAX_PIXELS = 100_000_000
"""Largest image that is read, in pixels."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files that :func:`list_images` finds in a folder; one named by itself may have any suffix."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "PCX", "TGA")
"""Formats that are read, told from a file's content; the last has no mark. Of Pillow's others EPS is a program."""


def read_image(source: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """An image as u8 RGB (H, W, 3), upright.

    ``source`` is the path of a file (:data:`FORMATS`), a PIL image, or a u8 array (H, W), (H, W, 3) or (H, W, 4). EXIF
    rotation is applied, grey, palette, CMYK and 16-bit images are converted, transparency is composited on white, and
    of an animation the first frame is taken. Raises ``InputError`` for a missing, broken or empty image, one above
    :data:`MAX_PIXELS`, and pixels whose range is not known (floats, 32-bit).
    """
    name = "The image" if isinstance(source, (Image.Image, np.ndarray)) else f"The image {shown(source)}"
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim < 2 or source.shape[2:] not in ((), (3,), (4,)):
                raise ValueError(f"it is an array of {source.dtype} {source.shape}, not of uint8 and (H, W, 3)")
            source = Image.fromarray(source)
        if isinstance(source, Image.Image):
            return _rgb(source)
        Image.init()  # else Image.OPEN is empty; Pillow fails at the name of a format that it was built without
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _rgb has a limit of its own
            with Image.open(source, formats=[one for one in FORMATS if one in Image.OPEN]) as image:
                return _rgb(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{name} cannot be opened ({error.strerror}); check the path.") from None
    except Exception as error:  # what Pillow raises of damaged files and strange arrays has no common class
        reason = textwrap.shorten(str(error), 120, placeholder="").rstrip(".") or type(error).__name__
        raise InputError(f"{name} cannot be read ({reason}); give an undamaged one of 8 or 16 bits a channel and at "
                         f"most {MAX_PIXELS // 10**6} million pixels, as PNG or JPEG.") from None


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image; ``ValueError`` says what it is that has none."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # by its full range: Pillow's own conversion clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its range of 32-bit pixels is not known")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("F", "LAB", "La"):  # of unknown range, or which Pillow converts to neither RGB nor RGBA
        raise ValueError(f"its pixels are of the kind {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def list_images(path: str | Path) -> list[Path]:
    """A file itself, or a folder's images by name (:data:`SUFFIXES`); ``InputError`` if there is none."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{shown(path)} does not exist; name an image file or a folder of images.")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"The folder {shown(path)} holds no image ({', '.join(SUFFIXES)}); name a folder that does.")
    return found


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of RGB in [0, 1] that CLIP, and DINO and MAE, were trained with."""


def resize_short_side(image: np.ndarray, short: int, resample: str = "bilinear",
                      long_side: int | None = None) -> np.ndarray:
    """u8 (H, W, 3) scaled to a short side of ``short`` pixels, by an antialiasing filter ("bilinear", "lanczos").

    With ``long_side`` the long side is at most that, and the short side then smaller. Sizes are rounded as int(x *
    scale + 0.5), as the evaluation protocol of the paper's baselines does.
    """
    height, width = image.shape[:2]
    scale = min(short / min(height, width), (long_side or np.inf) / max(height, width))
    if scale == 1:
        return image
    new_height, new_width = (max(1, int(side * scale + 0.5)) for side in (height, width))
    return np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling[resample.upper()]))
