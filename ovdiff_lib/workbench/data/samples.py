"""What a data set gives the protocol: annotated images in a fixed order, read and checked.

Labels: 0 = background where the data set has one, i + 1 = ``vocabulary.categories[i]``, 255 = ignored. In a data set without background
no label is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import read_image

ORIENTATION = 0x0112
"""EXIF tag of an image's rotation."""


@dataclass(frozen=True)
class Sample:
    """One annotated image: ``image`` u8 (H, W, 3), ``labels`` u8 (H, W)."""

    id: str
    image: np.ndarray
    labels: np.ndarray


class Dataset(Protocol):
    """What :func:`~ovdiff_lib.workbench.evaluation.measure.evaluate` needs: a name, a vocabulary and samples in a fixed order.

    ``has_background`` says whether background counts as a class; without it (Table A.7) every pixel that counts shows a category.
    ``ids`` are the samples' ids in order.
    """

    name: str
    vocabulary: Vocabulary
    has_background: bool
    ids: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...


def read_labels(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """A label map u8 (H, W) from a grey or palette PNG; ``InputError`` if it is missing, broken or not of ``shape``."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise InputError(f"The label map {path} is a {image.mode} image; it must be 8-bit grey or palette, holding class ids.")
            labels = np.array(image)
    except FileNotFoundError:
        raise InputError(f"The label map {path} does not exist; check the folder.") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"The label map {path} cannot be read ({error}); copy or download it again.") from None
    if shape is not None and labels.shape != tuple(shape):
        raise InputError(f"The label map {path} has the shape {labels.shape} but its image {tuple(shape)}; they must be equal.")
    return labels


def read_stored(path: Path) -> np.ndarray:
    """An image u8 RGB (H, W, 3) with its pixels as stored: label maps are drawn on those, whatever rotation EXIF asks for."""
    image = read_image(path)
    with Image.open(path) as opened:
        exif = opened.getexif()
        if exif.get(ORIENTATION, 1) == 1:
            return image
        del exif[ORIENTATION]
        return read_image(opened)
