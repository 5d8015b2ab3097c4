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
"""In a label table: a value that label maps of this kind must not hold."""


@dataclass(frozen=True)
class File:
    """One image and its label map; ``table`` i16 (256,) turns a stored value into a label or :data:`UNKNOWN`."""

    id: str
    image: Path
    labels: Path
    table: np.ndarray


@dataclass(frozen=True)
class Layout:
    """How the data set ``what`` lies in its folder, or in one of ``places`` below it.

    ``images`` and ``labels`` are paths from there, with ``{split}`` and ``{id}``, the preferred first; each of
    ``labels`` comes with its stored values and their labels, 0 = background. ``splits`` names the splits' folders;
    ``ids(home, split)`` lists the images, default: all that have an image or label map, ``any_id`` being an id as glob.
    ``hint`` says how label maps are come by; ``shipped`` is where the package has the data.
    """

    what: str
    places: tuple[str, ...]
    images: tuple[str, ...]
    labels: dict[str, dict[int, int]]
    splits: dict[str, str] | None = None
    ids: Callable[[Path, str], list[str]] | None = None
    any_id: str = "*"
    hint: str = "unpack it again"
    shipped: Path | None = None

    def home(self, root: Path, split: str) -> Path:
        """The place below ``root`` that has images. Raises ``InputError`` if there is none."""
        wanted = [_parts(path, split)[0] for path in self.images]
        for place in self.places:
            if any((root / place / folder).is_dir() for folder in wanted):
                return root / place
        raise InputError(f"{root} does not hold {self.what}: looked for the folder {' or '.join(wanted)} in it and in"
                         f" {', '.join(filter(None, self.places))}; give the folder that the archive was unpacked to.")

    def files(self, root: Path, split: str, background: bool) -> list[File]:
        """The images of a split; an id with only one of image and label map has the path of what is missing."""
        if self.splits is not None and split not in self.splits:
            raise InputError(f"{self.what} has no split {split!r} with labels; choose one of {', '.join(self.splits)}.")
        split = self.splits[split] if self.splits else split
        home = self.home(root, split)
        images, labels = ([path for path in paths if (home / _parts(path, split)[0]).is_dir()]
                          for paths in (self.images, self.labels))
        if not labels:
            looked = dict.fromkeys(_parts(path, split)[0] for path in self.labels)
            raise InputError(f"{home} has no label maps of {self.what} ({', '.join(looked)}); {self.hint}.")
        tables = {path: label_table(values, background) for path, values in self.labels.items()}
        pictures, maps = self._stored(home, images[0], split), {}
        for path in reversed(labels):
            maps |= {i: (file, tables[path]) for i, file in self._stored(home, path, split).items()}
        listed = self.ids(home, split) if self.ids and labels[0] == next(iter(self.labels)) else sorted(pictures | maps)

        def expected(path: str, i: str) -> Path:
            return home / path.format(split=split, id=i)

        return [File(i.rpartition("/")[2], pictures.get(i, expected(images[0], i)),
                     *maps.get(i, (expected(labels[0], i), tables[labels[0]]))) for i in listed]

    def _stored(self, home: Path, path: str, split: str) -> dict[str, Path]:
        before, after = _parts(path, split)
        found = {file.relative_to(home).as_posix()[len(before):-len(after)]: file
                 for file in home.glob(f"{before}{self.any_id}{after}")}
        # Converted copies may lie beside the published maps, whose names have no ending.
        return {i: file for i, file in found.items() if not i.endswith("TrainIds")}


def _parts(path: str, split: str) -> list[str]:
    """What stands before and after the id in a path of a layout."""
    return path.replace("{split}", split).split("{id}")


def label_table(values: dict[int, int], background: bool = True) -> np.ndarray:
    """i16 (256,): stored value -> label, :data:`UNKNOWN` for others; without ``background`` label 0 is ignored."""
    table = np.full(256, UNKNOWN, np.int16)
    for value, label in values.items():
        table[value] = label if label or background else IGNORE
    return table


class FolderDataset:
    """A data set on disk, its images in the order of its split file or of their ids.

    ``standard_images`` is the size of the split "val" in the literature, None for other splits and for the mini world.
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
        self.files = tuple(layout.files(root, split, has_background))
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
        file = self.files[index]
        stored = read_labels(file.labels, shape)
        labels = file.table[stored]
        if (labels == UNKNOWN).any():
            known = np.flatnonzero(file.table != UNKNOWN)
            runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
            shown = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
            raise InputError(f"The label map {file.labels} holds the id {stored[labels == UNKNOWN][0]}, which"
                             f" {self.name} does not have (its ids: {shown}); give the data set's own label files.")
        return labels.astype(np.uint8)
