"""What the protocol reads: annotated images in a fixed order, and predictions that any method saved as label maps.

Labels: 0 = background where the data set has one (else no label is 0), i + 1 = ``vocabulary.categories[i]``, 255 =
ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import read_image


@dataclass(frozen=True)
class Sample:
    """One annotated image: ``image`` u8 (H, W, 3), ``labels`` u8 (H, W)."""

    id: str
    image: np.ndarray
    labels: np.ndarray


class Dataset(Protocol):
    """Samples in a fixed order, and their ids; ``has_background``: background is a class (not so in Table A.7)."""

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
                raise InputError(f"The label map {path} is a {image.mode} image; it must be 8-bit grey or palette.")
            labels = np.array(image)
    except FileNotFoundError:
        raise InputError(f"The label map {path} does not exist; check the folder.") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"The label map {path} cannot be read ({error}); copy or download it again.") from None
    if shape is not None and labels.shape != tuple(shape):
        raise InputError(f"The label map {path} must have the shape {tuple(shape)} of its image, not {labels.shape}.")
    return labels


def read_stored(path: Path) -> np.ndarray:
    """An image u8 RGB (H, W, 3), its pixels as stored: label maps are drawn on those, whatever rotation EXIF asks."""
    image = read_image(path)
    with Image.open(path) as opened:
        exif = opened.getexif()
        if exif.get(ExifTags.Base.Orientation, 1) == 1:
            return image
        del exif[ExifTags.Base.Orientation]
        return read_image(opened)


class SavedPredictions:
    """Label maps of a folder, in place of a segmenter: 8-bit ``<id>.png``, or ``<id>_labels.png`` as ``ovdiff segment``
    writes. With ``zero_based`` label i is category i, as methods without a background have it."""

    def __init__(self, folder: str | Path, zero_based: bool = False) -> None:
        self.folder, self.zero_based = Path(folder).expanduser(), zero_based
        if not self.folder.is_dir():
            raise InputError(f"The folder of predictions {self.folder} does not exist; give one with a PNG an image.")
        stored = {path.stem: path for path in self.folder.glob("*.png")}
        self._stored = {name.removesuffix("_labels"): path for name, path in stored.items()} | stored

    def check(self, ids: Sequence[str]) -> None:
        """``InputError`` naming the images of ``ids`` without a prediction."""
        missing = [i for i in ids if i not in self._stored]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(f"The folder {self.folder} lacks {len(missing)} of {len(ids)} predictions:"
                             f" {', '.join(f'{i}.png' for i in missing[:3])}{more}; write one PNG an image.")

    def __call__(self, sample: Sample) -> np.ndarray:
        """Labels i64 (H, W) of a sample; ``InputError`` for a label map of another size."""
        return read_labels(self._stored[sample.id], sample.labels.shape).astype(np.int64) + self.zero_based
