"""Where the windows of an image lie (Sec. 3.4)."""

import hashlib

import numpy as np
from PIL import Image

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.schema import Matching

MAX_ASPECT = 64
"""Longest side over shortest; beyond it the resized image would outgrow memory."""

Box = tuple[int, int, int, int]  # top, left, height, width in the resized image


def scales(shape: tuple[int, int], settings: Matching) -> list[tuple[int, list[Box]]]:
    """The windows of a resized image of ``shape`` (H, W): of each scale the side at which they are looked at and where
    they lie. With ``whole_image`` the image as a whole, squashed, is one more scale."""
    sizes = [min(size, *shape) for size in settings.windows]  # only a long strip is smaller, through long_side
    found = [(size, windows(shape, size, min(size, settings.stride))) for size in sizes]
    if settings.whole_image:
        found.append((max(settings.windows, default=settings.short_side), [(0, 0, *shape)]))
    return found


def windows(shape: tuple[int, int], size: int, stride: int) -> list[Box]:
    """Square windows, 0 < ``stride`` <= ``size`` <= L, row by row over an image of ``shape`` (H, W): on a side of
    length L ceil((L - size) / stride) + 1, the last shifted back to end at the border, as mmsegmentation slides."""
    tops, lefts = ([*range(0, length - size, stride), length - size] for length in shape)
    return [(top, left, size, size) for top in tops for left in lefts]


def crop(resized: np.ndarray, box: Box, side: int) -> np.ndarray:
    """The pixels of a window as a square u8 (side, side, 3)."""
    top, left, height, width = box
    inside = resized[top : top + height, left : left + width]
    if inside.shape[:2] == (side, side):
        return inside
    return np.array(Image.fromarray(inside).resize((side, side), Image.Resampling.BILINEAR))


def window_seeds(seed: int, image: np.ndarray, count: int) -> np.ndarray:
    """Noise seeds i64 (count,) of an image's windows: from its pixels u8 (H, W, 3) and the window's number alone."""
    digest = hashlib.sha256(f"{seed}:{image.shape}:".encode() + np.ascontiguousarray(image).tobytes()).digest()
    # 63 bits: torch, NumPy and int64 arrays all take them.
    drawn = [int.from_bytes(hashlib.sha256(digest + str(i).encode()).digest()[:8], "big") >> 1 for i in range(count)]
    return np.array(drawn, dtype=np.int64)


def check_image(image: np.ndarray) -> None:
    """``InputError`` for an image (H, W, 3) that is too elongated."""
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"The image is {height} x {width} pixels: its long side is more than {MAX_ASPECT} times its "
                         "short side; cut it into pieces.")
