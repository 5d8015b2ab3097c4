"""Data sets with label maps. Each is an entry of :data:`DATASETS`: ``builder(split, folder, names) -> Dataset``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import read_image
from ovdiff_lib.workbench.data import readers
from ovdiff_lib.workbench.data.classes import check_names
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Dataset, Sample, read_labels

MINI_DATA = Path(__file__).parents[2] / "mini" / "data"


class MiniDataset:
    """A split of the mini world seen through one of its vocabularies.

    Of the images, those are taken that show at least one class of the vocabulary; nouns and stuff outside it are background, or ignored
    where the data set has none.
    """

    standard_images = None

    def __init__(self, name: str, vocabulary: str, has_background: bool, split: str = "val", folder: str | Path | None = None,
                 names: str = "fixed") -> None:
        """``vocabulary`` is one of the mini world's, ``split`` "tune", "val" or "wild", ``folder`` holds them (default: those shipped).
        Without background, pixels outside the vocabulary are ignored (App. A.3). The world's names need no fixes: every selection
        ``names`` is the same.

        Raises ``InputError`` for an unknown split and for files that are missing or cannot be read.
        """
        from ovdiff_lib.mini.world import load_world

        check_names(names)
        self.name, self.split, self.has_background = name, split, has_background
        world = load_world()
        self.vocabulary = Vocabulary.of(world.vocabulary(vocabulary), stuff=world.stuff)
        self.folder = Path(folder or MINI_DATA) / split
        if split not in ("tune", "val", "wild"):
            raise InputError(f"The mini world has no split {split!r}; choose tune, val or wild.")
        # World id -> label of this vocabulary.
        self._labels = np.full(256, 0 if has_background else IGNORE, np.uint8)
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


DATASETS: dict[str, Callable[..., Dataset]] = {
    "mini-voc": partial(MiniDataset, "mini-voc", "mini-voc", True),
    "mini-object": partial(MiniDataset, "mini-object", "mini-object", True),
    "mini-context": partial(MiniDataset, "mini-context", "mini-context", True),
    "voc": partial(readers.FolderDataset, "voc", "voc", readers.voc_files, True),
    "context": partial(readers.FolderDataset, "context", "context", readers.context_files, True),
    "coco-object": partial(readers.FolderDataset, "coco-object", "coco-object", readers.coco_files, True),
    # Background is no class of these (Table A.7).
    "mini-voc20": partial(MiniDataset, "mini-voc20", "mini-voc", False),
    "mini-object42": partial(MiniDataset, "mini-object42", "mini-object", False),
    "mini-context28": partial(MiniDataset, "mini-context28", "mini-context", False),
    "voc20": partial(readers.FolderDataset, "voc20", "voc", readers.voc_files, False),
    "context59": partial(readers.FolderDataset, "context59", "context", readers.context_files, False),
    "coco-stuff": partial(readers.FolderDataset, "coco-stuff", "coco-stuff", readers.coco_files, False),
    "ade20k": partial(readers.FolderDataset, "ade20k", "ade20k", readers.ade_files, False),
    "cityscapes": partial(readers.FolderDataset, "cityscapes", "cityscapes", readers.cityscapes_files, False),
}
"""Name -> ``builder(split="val", folder=None, names="fixed")``."""


def load_dataset(name: str, split: str = "val", folder: str | Path | None = None, names: str = "fixed") -> Dataset:
    """The data set called ``name``, read from ``folder`` (data sets of the mini world ship), with the class names ``names``
    (:data:`~ovdiff_lib.workbench.data.classes.NAMES`).

    Raises ``InputError`` for an unknown name, split or selection of names, and for files that are missing.
    """
    if name not in DATASETS:
        raise InputError(f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name](split=split, folder=folder, names=names)
