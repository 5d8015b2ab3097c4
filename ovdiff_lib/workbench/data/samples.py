"""What the protocol reads: annotated images in a fixed order, and predictions that any method saved as label maps.

Labels: 0 = background (none is 0 where the data set has none), i + 1 = ``vocabulary.categories[i]``, 255 = ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import read_image

UNKNOWN = -1
"""In a table of labels: a value that label maps of this kind must not hold."""


@dataclass(frozen=True)
class Sample:
    """One annotated image: ``image`` u8 (H, W, 3), ``labels`` u8 (H, W)."""

    id: str
    image: np.ndarray
    labels: np.ndarray


def read_labels(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """A label map u8 (H, W) from a grey or palette PNG; ``InputError`` if it is missing, broken or not of ``shape``."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise InputError(f"The label map {path} is a {image.mode} image; it must be 8-bit grey or palette.")
            labels = np.array(image)
    except (OSError, SyntaxError) as error:
        raise InputError(f"The label map {path} cannot be read ({error}); copy or download it again.") from None
    if shape is not None and labels.shape != tuple(shape):
        raise InputError(f"The label map {path} must have the shape {tuple(shape)} of its image, not {labels.shape}.")
    return labels


def read_stored(path: Path) -> np.ndarray:
    """An image u8 RGB (H, W, 3), its pixels as stored: label maps are drawn on those, whatever rotation EXIF asks."""
    image = read_image(path)
    with Image.open(path) as opened:
        turned = opened.getexif().pop(ExifTags.Base.Orientation, 1) != 1
        return read_image(opened) if turned else image


@dataclass(eq=False)
class Dataset:
    """A data set on disk: samples in the order of its split file or of their ids.

    ``has_background``: background is a class (not so in Table A.7). ``table`` i16 (256,) turns a stored value into a
    label or :data:`UNKNOWN`. ``files`` are of each image its id, its path and that of its label map.
    """

    name: str
    split: str
    folder: Path
    vocabulary: Vocabulary
    has_background: bool
    table: np.ndarray
    files: list[tuple[str, Path, Path]]

    ids = cached_property(lambda self: tuple(name for name, _, _ in self.files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image = read_stored(self.files[index][1])
        return Sample(self.ids[index], image, self.labels(index, image.shape[:2]))

    def labels(self, index: int, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Labels u8 (H, W) of one image; ``InputError`` for a broken file, one not of ``shape``, and unknown ids."""
        path = self.files[index][2]
        stored = read_labels(path, shape)
        labels = self.table[stored]
        if (unknown := stored[labels == UNKNOWN]).size:
            raise InputError(f"The label map {path} holds the id {unknown[0]}, which {self.name} does not have; give"
                             " the data set's own label files.")
        return labels.astype(np.uint8)


class SavedPredictions:
    """Label maps of a folder as segmenter: 8-bit ``<id>.png``, or ``<id>_labels.png`` as by ``ovdiff segment``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise InputError(f"The folder of predictions {self.folder} does not exist; give one with a PNG an image.")
        stored = {path.stem: path for path in self.folder.glob("*.png")}
        self._stored = {name.removesuffix("_labels"): path for name, path in stored.items()} | stored

    def check(self, ids: Sequence[str]) -> None:
        """``InputError`` naming the images of ``ids`` without a prediction."""
        missing = [i for i in ids if i not in self._stored]
        if missing:
            raise InputError(f"The folder {self.folder} lacks {len(missing)} of {len(ids)} predictions, the first is"
                             f" {missing[0]}.png; write one PNG an image.")

    def __call__(self, sample: Sample) -> np.ndarray:
        """Labels i64 (H, W) of a sample; ``InputError`` for a label map of another size."""
        return read_labels(self._stored[sample.id], sample.labels.shape).astype(np.int64)
