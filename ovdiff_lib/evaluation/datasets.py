"""Data sets with label maps. Each is an entry of :data:`DATASETS`: ``builder(split, folder) -> Dataset``.

Labels: 0 = background, i + 1 = ``vocabulary.categories[i]``, 255 = ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ovdiff_lib.errors import InputError
from ovdiff_lib.evaluation.metrics import IGNORE
from ovdiff_lib.images import read_image
from ovdiff_lib.types import Vocabulary

MINI_DATA = Path(__file__).parent.parent / "mini" / "data"


@dataclass(frozen=True)
class Sample:
    """One annotated image: ``image`` u8 (H, W, 3), ``labels`` u8 (H, W)."""

    id: str
    image: np.ndarray
    labels: np.ndarray


class Dataset(Protocol):
    """What :func:`~ovdiff_lib.evaluation.protocol.evaluate` needs: a name, a vocabulary and samples in a fixed order."""

    name: str
    vocabulary: Vocabulary

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...


class MiniDataset:
    """A split of the mini world seen through one of its vocabularies.

    Of the images, those are taken that show at least one class of the vocabulary; nouns and stuff outside it are background.
    """

    def __init__(self, name: str, split: str = "val", folder: str | Path | None = None) -> None:
        """``name`` is a vocabulary of the mini world, ``split`` "val" or "wild", ``folder`` holds the splits (default: those shipped).

        Raises ``InputError`` for an unknown split and for files that are missing or cannot be read.
        """
        from ovdiff_lib.mini.world import load_world

        self.name = name
        world = load_world()
        self.vocabulary = Vocabulary.of(world.vocabulary(name), stuff=world.stuff)
        self.folder = Path(folder or MINI_DATA) / split
        if split not in ("val", "wild"):
            raise InputError(f"The mini world has no split {split!r}; choose val or wild.")
        # World id -> label of this vocabulary.
        self._labels = np.zeros(256, np.uint8)
        self._labels[IGNORE] = IGNORE
        for i, known in enumerate(self.vocabulary.names):
            self._labels[world.label(known)] = i + 1
        self._largest = len(world.names)
        shown = set(self.vocabulary.names)
        self.ids = tuple(row["id"] for row in self._scenes() if shown & {*row["things"], *row["stuff"]})
        missing = [p for i in self.ids for p in (self._image(i), self._label(i)) if not p.exists()]
        if missing:
            raise InputError(f"The data set {name} ({split}) lacks {len(missing)} files, the first is {missing[0]};"
                             " restore them by installing the project again.")

    def _scenes(self) -> list[dict]:
        path = self.folder / "scenes.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"The data set {self.name} has no file {path}; restore it by installing the project again.") from None
        except (OSError, ValueError) as error:
            raise InputError(f"The file {path} of the data set {self.name} cannot be read ({error}); install the project again.") from None

    def _image(self, identity: str) -> Path:
        return self.folder / "images" / f"{identity}.webp"

    def _label(self, identity: str) -> Path:
        return self.folder / "labels" / f"{identity}.png"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        identity = self.ids[index]
        image = read_image(self._image(identity))
        ids = read_labels(self._label(identity), image.shape[:2])
        unknown = ids[(ids > self._largest) & (ids != IGNORE)]
        if unknown.size:
            raise InputError(f"The label map {self._label(identity)} holds the id {unknown[0]}, but the mini world ends at {self._largest};"
                             " install the project again.")
        return Sample(identity, image, self._labels[ids])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def read_labels(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A label map u8 (H, W) from a grey or palette PNG; ``InputError`` if it is missing, broken or not of ``shape``."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise InputError(f"The label map {path} is a {image.mode} image; it must be 8-bit grey or palette, holding class ids.")
            labels = np.array(image)
    except FileNotFoundError:
        raise InputError(f"The label map {path} does not exist; check the data set's folder.") from None
    except (OSError, SyntaxError) as error:
        raise InputError(f"The label map {path} cannot be read ({error}); copy or download it again.") from None
    if labels.shape != tuple(shape):
        raise InputError(f"The label map {path} has the shape {labels.shape} but its image {tuple(shape)}; they must be equal.")
    return labels


DATASETS: dict[str, Callable[..., Dataset]] = {
    "mini-voc": partial(MiniDataset, "mini-voc"),
    "mini-object": partial(MiniDataset, "mini-object"),
    "mini-context": partial(MiniDataset, "mini-context"),
}
"""Name -> ``builder(split="val", folder=None)``."""


def load_dataset(name: str, split: str = "val", folder: str | Path | None = None) -> Dataset:
    """The data set called ``name``; ``InputError`` for an unknown name, an unknown split, or files that are missing."""
    if name not in DATASETS:
        raise InputError(f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name](split=split, folder=folder)
