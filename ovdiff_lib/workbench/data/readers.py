"""Data sets in folders: where images and label maps lie, and what the values of a label map mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.data.classes import class_table, vocabulary_of
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Sample, read_labels, read_stored

MINI_DATA = Path(__file__).parents[2] / "mini" / "data"

UNKNOWN = -1
"""In a table of labels: a value that label maps of this kind must not hold."""


@dataclass(frozen=True)
class File:
    """One image and its label map."""

    id: str
    image: Path
    labels: Path


@dataclass(frozen=True)
class Layout:
    """How the data set ``what`` lies in its folder, or in one of ``places`` below it.

    ``images`` and ``labels`` are paths from there, with ``{split}`` and ``{id}``: the first counts whose folder exists.
    ``values`` are what a label map holds, and the label of each, 0 = background. ``splits`` names the splits' folders;
    ``ids(home, split)`` lists the images, default: all that have an image or label map, ``any_id`` being an id as glob.
    ``hint`` says how label maps are come by; ``shipped`` is where the package has the data.
    """

    what: str
    places: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    values: dict[int, int]
    splits: dict[str, str] | None = None
    ids: Callable[[Path, str], list[str]] | None = None
    any_id: str = "*"
    hint: str = "unpack it again"
    shipped: Path | None = None

    def home(self, root: Path, split: str) -> Path:
        """The place below ``root`` that has images. Raises ``InputError`` if there is none."""
        for place in self.places:
            if _present(root / place, self.images, split):
                return root / place
        looked = ", ".join(filter(None, self.places))
        raise InputError(f"{root} does not hold {self.what}: looked for the folder {_folders(self.images, split)} in it"
                         f" and in {looked}; give the folder that the archive was unpacked to.")

    def files(self, root: Path, split: str) -> list[File]:
        """The images of a split, also those of which only the image or only the label map is there."""
        if self.splits is not None and split not in self.splits:
            raise InputError(f"{self.what} has no split {split!r} with labels; choose one of {', '.join(self.splits)}.")
        split = self.splits[split] if self.splits else split
        home = self.home(root, split)
        image, labels = (_present(home, paths, split) for paths in (self.images, self.labels))
        if not labels:
            raise InputError(f"{home} has no label maps of {self.what} ({_folders(self.labels, split)}); {self.hint}.")
        listed = self.ids(home, split) if self.ids else sorted(self._found(home, image) | self._found(home, labels))
        return [File(i.rpartition("/")[2], *(home / path.format(id=i) for path in (image, labels))) for i in listed]

    def _found(self, home: Path, path: str) -> set[str]:
        before, after = path.split("{id}")
        found = home.glob(path.format(id=self.any_id))
        return {file.relative_to(home).as_posix()[len(before):-len(after)] for file in found}


def _present(home: Path, paths: tuple[str, ...], split: str) -> str:
    """The first of the paths whose folder there is, with its ``{id}`` left open; "" if there is none."""
    named = [path.replace("{split}", split) for path in paths]
    return next((path for path in named if (home / path.split("{id}")[0]).is_dir()), "")


def _folders(paths: tuple[str, ...], split: str) -> str:
    return " or ".join(path.replace("{split}", split).split("{id}")[0] for path in paths)


class FolderDataset:
    """A data set on disk, its images in the order of its split file or of their ids.

    ``table`` i16 (256,) turns a stored value into a label or :data:`UNKNOWN`. ``standard_images`` is the size of the
    split "val" in the literature, None for other splits and for the mini world.
    """

    def __init__(self, name: str, classes: str, layout: Layout, has_background: bool, split: str = "val",
                 folder: str | Path | None = None, names: str = "fixed") -> None:
        """``classes`` and ``names`` as in :func:`~ovdiff_lib.workbench.data.classes.vocabulary_of`; ``folder`` is where
        the data lies; ``has_background`` False ignores background pixels (App. A.3).

        Raises ``InputError`` for a folder that does not hold the data set, an unknown split, and missing files.
        """
        self.vocabulary = vocabulary_of(classes, names)
        self.name, self.split, self.has_background = name, split, has_background
        if folder is None and not layout.shipped:
            raise InputError(f"The data set {name} is not shipped; say where it lies with --data FOLDER.")
        self.folder = root = layout.shipped if folder is None else Path(folder).expanduser()
        if not root.is_dir():
            raise InputError(f"The folder {root} of the data set {name} does not exist; give the one it lies in.")
        self.table = np.full(256, UNKNOWN, np.int16)
        for value, label in layout.values.items():
            self.table[value] = label if label or has_background else IGNORE
        self.files = tuple(layout.files(root, split))
        self.ids = tuple(file.id for file in self.files)
        missing = [path for file in self.files for path in (file.image, file.labels) if not path.is_file()]
        if missing or not self.files:
            lack = f"lacks {len(missing)} of its files, the first is {missing[0]}" if missing else "lists no image"
            raise InputError(f"The data set {name} ({split}) in {root} {lack}; unpack it again or give another folder.")
        published = class_table()["data_sets"].get(classes, {})
        self.standard_images: int | None = published.get("images") if split == "val" else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image = read_stored(self.files[index].image)
        return Sample(self.ids[index], image, self.labels(index, image.shape[:2]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def labels(self, index: int, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Labels u8 (H, W) of one image; ``InputError`` for a broken file, one not of ``shape``, and unknown ids."""
        path = self.files[index].labels
        stored = read_labels(path, shape)
        labels = self.table[stored]
        if (unknown := stored[labels == UNKNOWN]).size:
            raise InputError(f"The label map {path} holds the id {unknown[0]}, which {self.name} does not have; give"
                             " the data set's own label files.")
        return labels.astype(np.uint8)
