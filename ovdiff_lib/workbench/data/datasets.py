"""Data sets with label maps, by name: the mini world's, and the published ones as their archives unpack (Sec. 4, A.3).

A further one is a :class:`Layout` and a line of :data:`DATASETS`; its classes stand in ``classes.json``.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.workbench.data.classes import class_table, vocabulary_of
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.samples import UNKNOWN, Dataset

MINI_DATA = Path(__file__).parents[2] / "mini" / "data"
VOID = {IGNORE: IGNORE}


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

    def files(self, root: Path, split: str) -> list[tuple[str, Path, Path]]:
        """Id, image and label map of each image of a split, also where only one of the two files is there."""
        if self.splits is not None and split not in self.splits:
            raise InputError(f"{self.what} has no split {split!r} with labels; choose one of {', '.join(self.splits)}.")
        split = self.splits[split] if self.splits else split
        home = self.home(root, split)
        image, labels = (_present(home, paths, split) for paths in (self.images, self.labels))
        if not labels:
            raise InputError(f"{home} has no label maps of {self.what} ({_folders(self.labels, split)}); {self.hint}.")
        listed = self.ids(home, split) if self.ids else sorted(self._found(home, image) | self._found(home, labels))
        return [(i.rpartition("/")[2], home / image.format(id=i), home / labels.format(id=i)) for i in listed]

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


def numbered(stored: Iterable[int]) -> dict[int, int]:
    """The stored values of the classes, in order -> labels 1, 2, ..."""
    return {value: label for label, value in enumerate(stored, 1)}


def mini(classes: str) -> Layout:
    """The mini world, its scenes that show at least one of the classes; all else is background."""
    world = load_world()
    names = world.vocabulary(classes)
    values = dict.fromkeys(range(len(world.names) + 1), 0) | VOID | numbered(world.label(name) for name in names)

    def scenes(home: Path, split: str) -> list[str]:
        path = home / split / "scenes.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            return [scene["id"] for scene in table if {*scene["things"], *scene["stuff"]} & set(names)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"The list of scenes {path} cannot be read ({error}); install it again.") from None

    return Layout("The mini world", ("",), ("{split}/images/{id}.webp",), ("{split}/labels/{id}.png",),
                  values, {split: split for split in ("tune", "val", "wild")}, scenes, shipped=MINI_DATA)


def voc() -> Layout:
    """PASCAL VOC 2012; the splits are ``ImageSets/Segmentation/<split>.txt``."""
    return Layout("PASCAL VOC 2012", ("VOC2012", "VOCdevkit/VOC2012", ""), ("JPEGImages/{id}.jpg",),
                  ("SegmentationClass/{id}.png",), {0: 0} | VOID | numbered(range(1, 21)),
                  ids=partial(_listed, "Segmentation"))


def context() -> Layout:
    """PASCAL Context on VOC 2010's images, labels (0 = background, 1 to 59, alphabetical) by ``ovdiff convert``."""
    return Layout("PASCAL Context (PASCAL VOC 2010)", ("VOC2010", "VOCdevkit/VOC2010", ""), ("JPEGImages/{id}.jpg",),
                  ("SegmentationClassContext/{id}.png",), {0: 0} | numbered(range(1, 60)),
                  ids=partial(_listed, "SegmentationContext"),
                  hint="make them with: ovdiff convert context --data FOLDER --json trainval_merged.json")


def coco(objects: bool) -> Layout:
    """COCO 2017 with the pixel maps of COCO-Stuff 164k as published (ids 0 to 181): COCO-Object, or COCO-Stuff.

    In COCO-Object stuff and what is unlabelled are background, nothing ignored, as the literature converts it.
    """
    tables = class_table()["data_sets"]
    values, things = numbered(tables["coco-stuff"]["ids"]) | VOID, len(tables["coco-object"]["classes"])
    if objects:
        values = {value: label if label <= things else 0 for value, label in values.items()}
    folders = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations/stuffthingmaps", "annotations")
    return Layout("COCO 2017 with COCO-Stuff", ("", "coco", "coco_stuff164k", "COCO"),
                  ("images/{split}/{id}.jpg", "{split}/{id}.jpg"),
                  tuple(f"{folder}/{{split}}/{{id}}.png" for folder in folders), values,
                  {"val": "val2017", "train": "train2017"}, any_id="[0-9]" * 12,
                  hint="unpack stuffthingmaps_trainval2017.zip to the folder stuffthingmaps")


def ade() -> Layout:
    """ADE20K as in ADEChallengeData2016; 0 is not labelled."""
    archive = "ADEChallengeData2016"
    return Layout(archive, (archive, "", f"ade/{archive}"), ("images/{split}/{id}.jpg",),
                  ("annotations/{split}/{id}.png",), {0: 0} | numbered(range(1, 151)),
                  {"val": "validation", "train": "training"})


def cityscapes() -> Layout:
    """Cityscapes, one folder a city, with label ids (0 to 33, those without a class ignored)."""
    ids = dict.fromkeys(range(34), IGNORE) | numbered(class_table()["data_sets"]["cityscapes"]["ids"])
    return Layout("Cityscapes", ("", "cityscapes", "Cityscapes"), ("leftImg8bit/{split}/{id}_leftImg8bit.png",),
                  ("gtFine/{split}/{id}_gtFine_labelIds.png",), ids | VOID, {"val": "val", "train": "train"},
                  any_id="*/*")


def _listed(folder: str, home: Path, split: str) -> list[str]:
    """The ids in ``ImageSets/<folder>/<split>.txt``, in the file's order."""
    path = home / "ImageSets" / folder / f"{split}.txt"
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise InputError(f"The split file {path} cannot be read ({error}); choose a split that is here ({known}), or "
                         "unpack it again.") from None


DATASETS: dict[str, tuple[str, Callable[[], Layout], bool]] = {
    **{name: (name, partial(mini, name), True) for name in ("mini-voc", "mini-object", "mini-context")},
    "voc": ("voc", voc, True),
    "context": ("context", context, True),
    "coco-object": ("coco-object", partial(coco, True), True),
    # Background is no class of these (Table A.7).
    **{name: (name.rstrip("0123456789"), partial(mini, name.rstrip("0123456789")), False)
       for name in ("mini-voc20", "mini-object42", "mini-context28")},
    "voc20": ("voc", voc, False),
    "context59": ("context", context, False),
    "coco-stuff": ("coco-stuff", partial(coco, False), False),
    "ade20k": ("ade20k", ade, False),
    "cityscapes": ("cityscapes", cityscapes, False)}
"""Name -> (its classes, how it lies on disk, whether background is a class)."""

UNMEASURED = "no folder is named, so its published numbers stand alone"


def has_folder(source: str) -> bool:
    """Whether it is said where the data set of a ``source`` lies, or it ships."""
    name = source.partition(":")[0].partition("/")[0]
    return ":" in source or name not in DATASETS or DATASETS[name][1]().shipped is not None


def load_dataset(source: str, split: str = "val", folder: str | Path | None = None, names: str = "fixed") -> Dataset:
    """The data set of ``source`` = "name", "name/split" or, with its folder (those of the mini world ship),
    "name:folder", with the class names ``names`` (:data:`~ovdiff_lib.workbench.data.classes.NAMES`).

    Raises ``InputError`` for an unknown name, split or selection of names, and for files that are missing.
    """
    name, _, within = source.partition(":")
    name, _, part = name.partition("/")
    if name not in DATASETS:
        raise InputError(f"There is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    classes, layout, has_background = DATASETS[name]
    vocabulary, layout, folder, split = vocabulary_of(classes, names), layout(), within or folder, part or split
    root = layout.shipped if folder is None else Path(folder).expanduser()
    if root is None:
        raise InputError(f"The data set {name} is not shipped; say where: --data FOLDER, or {name}:FOLDER.")
    if not root.is_dir():
        raise InputError(f"The folder {root} of the data set {name} does not exist; give the one it lies in.")
    table = np.full(256, UNKNOWN, np.int16)
    for value, label in layout.values.items():
        table[value] = label if label or has_background else IGNORE
    files = layout.files(root, split)
    missing = [path for _, *paths in files for path in paths if not path.is_file()]
    if missing or not files:
        lack = f"lacks {len(missing)} of its files, the first is {missing[0]}" if missing else "lists no image"
        raise InputError(f"The data set {name} ({split}) in {root} {lack}; unpack it again or give another folder.")
    return Dataset(name, split, root, vocabulary, has_background, table, files)
