"""Data sets in folders: the mini world's, and the published ones as their archives unpack (Sec. 4, App. A.3).

A layout is a function ``files(root, split, vocabulary, background) -> list[File]``: it finds the images and label maps and says what each
value of a label map means. :class:`FolderDataset` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.workbench.data.classes import class_table, vocabulary_of
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import Sample, read_labels, read_stored

UNKNOWN = -1
"""In a label table: a value that label maps of this kind must not hold."""

CITYSCAPES_IDS = 34
"""Cityscapes' label ids are 0 to 33; those without a class are ignored."""


@dataclass(frozen=True)
class File:
    """One image and its label map; ``table`` i16 (256,) turns a stored value into a label, :data:`UNKNOWN` where there is none."""

    id: str
    image: Path
    labels: Path
    table: np.ndarray


Layout = Callable[[Path, str, Vocabulary, bool], list[File]]

MINI_DATA = Path(__file__).parents[2] / "mini" / "data"


class FolderDataset:
    """A data set on disk, its images in the order of its split file or of their ids.

    ``standard_images`` is the size of the split "val" in the literature, None for other splits and for the mini world.
    """

    def __init__(self, name: str, classes: str, layout: Layout, has_background: bool, split: str = "val",
                 folder: str | Path | None = None, names: str = "fixed") -> None:
        """``classes`` names the classes (:func:`~ovdiff_lib.workbench.data.classes.vocabulary_of`, as ``names`` does their prompts),
        ``folder`` is where the data lies. ``has_background`` False ignores background pixels (App. A.3).

        Raises ``InputError`` for a folder that does not hold the data set, an unknown split, and images or label maps that are missing.
        """
        self.vocabulary = vocabulary_of(classes, names)
        self.name, self.split, self.has_background = name, split, has_background
        shipped = layout is mini_files and folder is None
        if folder is None and not shipped:
            raise InputError(f"The data set {name} is not shipped: say where it lies with --data FOLDER (folder=... in Python),"
                             " or choose mini-voc, mini-object or mini-context.")
        self.folder = root = MINI_DATA if shipped else Path(folder).expanduser()
        remedy = "install the project again" if shipped else "unpack it again or give another folder"
        if not root.is_dir():
            raise InputError(f"The folder {root} of the data set {name} does not exist; give the folder its archive was unpacked to.")
        self.files = tuple(layout(root, split, self.vocabulary, has_background))
        self.ids = tuple(file.id for file in self.files)
        missing = [path for file in self.files for path in (file.image, file.labels) if not path.is_file()]
        if missing:
            raise InputError(f"The data set {name} ({split}) lacks {len(missing)} of its files, the first is {missing[0]};"
                             f" {remedy}.")
        if not self.files:
            raise InputError(f"The data set {name} ({split}) lists no image in {root}; {remedy}.")
        self.standard_images: int | None = class_table()["data_sets"].get(classes, {}).get("images") if split == "val" else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image = read_stored(self.files[index].image)
        return Sample(self.ids[index], image, self.labels(index, image.shape[:2]))

    def labels(self, index: int, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Labels u8 (H, W) of one image; ``InputError`` for a broken file, one not of ``shape``, and ids the data set does not have."""
        file = self.files[index]
        stored = read_labels(file.labels, shape)
        labels = file.table[stored]
        if (labels == UNKNOWN).any():
            known = np.flatnonzero(file.table != UNKNOWN)
            raise InputError(f"The label map {file.labels} holds the id {stored[labels == UNKNOWN][0]}, which {self.name} does not have"
                             f" (its ids: {_ranges(known)}); give the data set's own label files.")
        return labels.astype(np.uint8)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


# ---- label tables

def label_table(values: Mapping[int, int]) -> np.ndarray:
    """i16 (256,): stored value -> label, :data:`UNKNOWN` for all values not in ``values``."""
    table = np.full(256, UNKNOWN, np.int16)
    for value, label in values.items():
        table[value] = label
    return table


def numbered(count: int, first: int = 1) -> dict[int, int]:
    """Classes stored as ``first``, ``first`` + 1, ...: value -> label 1 to ``count``."""
    return {first + i: i + 1 for i in range(count)}


def coco_table(objects: bool, raw: bool) -> np.ndarray:
    """Labels of COCO-Object (``objects``; background 0) or COCO-Stuff from COCO-Stuff's pixel maps: ``raw`` ids 0 to 181 as published, else
    contiguous ids 0 to 170; 255 is unlabelled.

    In COCO-Object stuff and what is unlabelled become background: nothing is ignored, as in the conversion the literature uses.
    """
    ids = class_table()["data_sets"]["coco-stuff"]["ids"] if raw else range(171)
    things = len(class_table()["data_sets"]["coco-object"]["classes"])
    if objects:
        return label_table({value: i + 1 if i < things else 0 for i, value in enumerate(ids)} | {IGNORE: 0})
    return label_table({value: i + 1 for i, value in enumerate(ids)} | {IGNORE: IGNORE})


def cityscapes_table(raw: bool) -> np.ndarray:
    """Labels of Cityscapes from its label ids (``raw``; those without a class are ignored) or its train ids 0 to 18."""
    ids = class_table()["data_sets"]["cityscapes"]["ids"] if raw else range(19)
    void = dict.fromkeys((*(range(CITYSCAPES_IDS) if raw else ()), IGNORE), IGNORE)
    return label_table(void | {value: i + 1 for i, value in enumerate(ids)})


# ---- layouts

def mini_files(root: Path, split: str, vocabulary: Vocabulary, background: bool) -> list[File]:
    """The mini world, its scenes that show at least one class of the vocabulary; all else is background, or ignored without one."""
    world, path = load_world(), root / split / "scenes.json"
    if split not in ("tune", "val", "wild"):
        raise InputError(f"The mini world has no split {split!r}; choose tune, val or wild.")
    table = label_table(dict.fromkeys(range(len(world.names) + 1), 0 if background else IGNORE) | {IGNORE: IGNORE}
                        | {world.label(word): number + 1 for number, word in enumerate(vocabulary.names)})
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))
        shown = [scene["id"] for scene in scenes if {*scene["things"], *scene["stuff"]} & set(vocabulary.names)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The list of scenes {path} cannot be read ({error}); install the project again.") from None
    return [File(i, root / split / "images" / f"{i}.webp", root / split / "labels" / f"{i}.png", table) for i in shown]


def voc_files(root: Path, split: str, vocabulary: Vocabulary, background: bool) -> list[File]:
    """PASCAL VOC 2012: ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/<split>.txt``."""
    home = find_root(root, "PASCAL VOC 2012", ("VOC2012", "VOCdevkit/VOC2012", ""), ("JPEGImages", "SegmentationClass"))
    table = label_table({0: 0 if background else IGNORE, IGNORE: IGNORE} | numbered(20))
    return [File(i, home / "JPEGImages" / f"{i}.jpg", home / "SegmentationClass" / f"{i}.png", table)
            for i in _listed(home / "ImageSets" / "Segmentation", split)]


CONTEXT_PLACES = ("VOC2010", "VOCdevkit/VOC2010", "")
"""Where VOC 2010 is looked for."""


def context_files(root: Path, split: str, vocabulary: Vocabulary, background: bool) -> list[File]:
    """PASCAL Context on the images of VOC 2010, labels as PNG in either common form.

    ``SegmentationClassContext`` (0 = background, 1 to 59, alphabetical) with ``ImageSets/SegmentationContext/<split>.txt``, as
    ``ovdiff convert context`` writes it; or ``annotations_detectron2/pc59_<split>`` (0 to 58, alphabetical, 255 = background).
    """
    home = find_root(root, "PASCAL VOC 2010", CONTEXT_PLACES, ("JPEGImages",))
    outside = 0 if background else IGNORE
    plain, shifted = home / "SegmentationClassContext", home / "annotations_detectron2" / f"pc59_{split}"
    if plain.is_dir():
        table = label_table({0: outside} | numbered(59))
        return [File(i, home / "JPEGImages" / f"{i}.jpg", plain / f"{i}.png", table)
                for i in _listed(home / "ImageSets" / "SegmentationContext", split)]
    if shifted.is_dir():
        table = label_table({IGNORE: outside} | numbered(59, first=0))
        return [File(p.stem, home / "JPEGImages" / f"{p.stem}.jpg", p, table) for p in sorted(shifted.glob("*.png"))]
    raise InputError(f"{home} has no label maps of PASCAL Context (SegmentationClassContext or annotations_detectron2/pc59_{split});"
                     " make them with: ovdiff convert context --data FOLDER --json trainval_merged.json.")


COCO_LABELS = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations/stuffthingmaps", "annotations")
"""Folders in which the COCO-Stuff 164k pixel maps ``<split>2017`` are looked for."""

CONVERTED = ("_labelTrainIds", "_instanceTrainIds")
"""Endings of label maps that were converted from the published ones."""


def coco_files(root: Path, split: str, vocabulary: Vocabulary, background: bool) -> list[File]:
    """COCO 2017 with the pixel maps of COCO-Stuff 164k; with ``background`` COCO-Object, else COCO-Stuff.

    Images in ``images/<split>2017`` or ``<split>2017``, maps in one of :data:`COCO_LABELS`: as published (``<id>.png``) or converted
    (``<id>_labelTrainIds.png``, for COCO-Object also ``<id>_instanceTrainIds.png``).
    """
    year = _split_folder(split, {"val": "val2017", "train": "train2017"}, "COCO")
    home = find_root(root, "COCO 2017", ("", "coco", "coco_stuff164k", "COCO"), (f"images/{year}", year), any_of=True)
    images = next(home / place for place in (f"images/{year}", year) if (home / place).is_dir())
    maps = next((home / place / year for place in COCO_LABELS if (home / place / year).is_dir()), None)
    if maps is None:
        raise InputError(f"{home} has no pixel maps of COCO-Stuff; unpack stuffthingmaps_trainval2017.zip to {home / COCO_LABELS[0]}.")
    kinds = {"": coco_table(background, raw=True), "_labelTrainIds": coco_table(background, raw=False)}
    if background:
        kinds["_instanceTrainIds"] = label_table({0: 0} | numbered(80))
    return _paired(images, ".jpg", maps, kinds)


def ade_files(root: Path, split: str, vocabulary: Vocabulary, background: bool) -> list[File]:
    """ADE20K as in ADEChallengeData2016: ``images`` and ``annotations``, each ``training`` or ``validation``; 0 is not labelled."""
    place = _split_folder(split, {"val": "validation", "train": "training"}, "ADE20K")
    home = find_root(root, "ADEChallengeData2016", ("ADEChallengeData2016", "", "ade/ADEChallengeData2016"), ("images", "annotations"))
    table = label_table({0: 0 if background else IGNORE} | numbered(150))
    return _paired(home / "images" / place, ".jpg", home / "annotations" / place, {"": table})


def cityscapes_files(root: Path, split: str, vocabulary: Vocabulary, background: bool) -> list[File]:
    """Cityscapes: ``leftImg8bit/<split>/<city>`` and ``gtFine/<split>/<city>`` with label ids or train ids."""
    place = _split_folder(split, {"val": "val", "train": "train"}, "Cityscapes")
    home = find_root(root, "Cityscapes", ("", "cityscapes", "Cityscapes"), ("leftImg8bit", "gtFine"))
    tables = {"_gtFine_labelIds": cityscapes_table(raw=True), "_gtFine_labelTrainIds": cityscapes_table(raw=False)}
    cities = {p.name for part in ("leftImg8bit", "gtFine") for p in (home / part / place).glob("*") if p.is_dir()}
    return [file for city in sorted(cities) for file in _paired(
        home / "leftImg8bit" / place / city, "_leftImg8bit.png", home / "gtFine" / place / city, tables)]


def find_root(folder: Path, what: str, places: tuple[str, ...], needed: tuple[str, ...], any_of: bool = False) -> Path:
    """The first of ``places`` below ``folder`` that holds all (``any_of``: one) of the folders ``needed``; ``InputError`` if none does."""
    for place in places:
        found = [(folder / place / name).is_dir() for name in needed]
        if any(found) if any_of else all(found):
            return folder / place
    inside = ", ".join(place for place in places if place)
    raise InputError(f"{folder} does not hold {what}: looked for the folders {(' or ' if any_of else ' and ').join(needed)} in it and in"
                     f" {inside}; give the folder that the archive was unpacked to.")


def _listed(folder: Path, split: str) -> list[str]:
    """The ids in ``folder/<split>.txt``, in the file's order."""
    known = sorted(p.stem for p in folder.glob("*.txt"))
    if split not in known:
        raise InputError(f"There is no split file {folder / f'{split}.txt'}; {f'choose {_or(known)}' if known else 'unpack it again'}.")
    try:
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The split file {folder / f'{split}.txt'} cannot be read ({error}); unpack it again.") from None
    ids = [line.strip() for line in lines if line.strip()]
    if len(set(ids)) < len(ids):
        raise InputError(f"The split file {folder / f'{split}.txt'} names an image twice; unpack it again.")
    return ids


def _split_folder(split: str, folders: dict[str, str], what: str) -> str:
    if split not in folders:
        raise InputError(f"{what} has no split {split!r} with labels; choose {_or(list(folders))}.")
    return folders[split]


def _paired(images: Path, image_end: str, maps: Path, kinds: dict[str, np.ndarray]) -> list[File]:
    """Images ``<id><image_end>`` and label maps by id. ``kinds`` has the endings of label maps' names with their tables, the preferred
    first. An id with only one of the two stays, with the path of what is missing."""
    pictures = {path.name.removesuffix(image_end): path for path in images.glob(f"*{image_end}")}
    stored = sorted(maps.glob("*.png"))
    found: dict[str, tuple[Path, np.ndarray]] = {}
    for end, table in reversed(kinds.items()):
        # Converted copies may lie beside the published maps, whose names have no ending.
        found |= {path.stem.removesuffix(end): (path, table) for path in stored
                  if path.stem.endswith(end) and (end or not path.stem.endswith(CONVERTED))}
    end, table = next(iter(kinds.items()))
    return [File(i, pictures.get(i, images / f"{i}{image_end}"), *found.get(i, (maps / f"{i}{end}.png", table)))
            for i in sorted(pictures | found)]


def _or(options: list[str]) -> str:
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def _ranges(values: np.ndarray) -> str:
    """Sorted integers as text: "0 to 20, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
