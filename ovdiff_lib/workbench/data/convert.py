"""Label maps that have to be made: PASCAL Context from its JSON file, train ids of COCO and Cityscapes for other tools.

The readers need only the first; they translate COCO's and Cityscapes' published label maps as they go.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.workbench.data.classes import class_table
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.data.metrics import IGNORE
from ovdiff_lib.workbench.data.readers import CONTEXT_PLACES, FolderDataset, find_root

ENDINGS = {"coco-object": "_instanceTrainIds", "coco-stuff": "_labelTrainIds", "cityscapes": "_gtFine_labelTrainIds"}
"""Data set -> what the names of its converted label maps end with."""

PHASES = ("train", "val")
"""Splits of PASCAL Context with labels."""


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """Mask bool (H, W) from COCO's run-length encoding: ``size`` [H, W] and ``counts``, the lengths of runs of 0 and 1 in turn, column by
    column.

    ``counts`` is a list, or text: each length in groups of 5 bits, lowest first, as characters from "0" on (32: another group follows; the
    highest bit of the last group is the sign), from the fourth on less the length before the last. Raises ``ValueError`` if it is
    neither.
    """
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    if isinstance(counts, str):
        groups = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
        last = (groups & 32) == 0
        if len(groups) and (groups.min() < 0 or groups.max() > 63 or not last[-1]):
            raise ValueError("the run lengths are no COCO encoding")
        starts = np.flatnonzero(np.concatenate([[True], last[:-1]])) if len(groups) else np.zeros(0, int)
        place = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
        if place.size and place.max() > 11:
            raise ValueError("the run lengths are no COCO encoding")
        value = np.add.reduceat((groups & 31) << (5 * place), starts) if len(groups) else np.zeros(0, np.int64)
        value -= np.where(groups[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
        # From the fourth on differences to the last but one: two interleaved sums, the first length apart.
        value[1::2], value[2::2] = value[1::2].cumsum(), value[2::2].cumsum()
        counts = value
    runs = np.asarray(counts, np.int64).ravel()
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the run lengths add up to {runs.sum()}, not {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def convert_context(json_path: str | Path, folder: str | Path, progress: bool = True) -> dict[str, int]:
    """PASCAL Context's label maps from ``trainval_merged.json`` (PASCAL in Detail), below the VOC 2010 that ``folder`` holds.

    Writes ``SegmentationClassContext/<id>.png`` (0 = background, 1 to 59 in alphabetical order; where annotations overlap the later one
    counts) and, last, ``ImageSets/SegmentationContext/train.txt`` and ``val.txt``. Returns the number of images a split. Raises
    ``InputError`` for a file that is not of this form. Lists made by the usual converter have one val image less (5104): its
    annotation reader loses some while filtering.
    """
    home = find_root(Path(folder).expanduser(), "PASCAL VOC 2010", CONTEXT_PLACES, ("JPEGImages",))
    labels = {value: i + 1 for i, value in enumerate(class_table()["data_sets"]["context"]["ids"])}
    path = Path(json_path).expanduser()
    images, annotations = _detail(path)
    listed: dict[str, list[str]] = {phase: [] for phase in PHASES}
    for image in tqdm([i for i in images if i["phase"] in PHASES], desc="label maps", unit="image", disable=not progress):
        name = Path(image["file_name"]).stem
        drawn = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in annotations[image["image_id"]]:
            if annotation["category_id"] not in labels:
                raise InputError(f"{path} marks a region of {name} with the category {annotation['category_id']}, which is none of the"
                                 " 59 of PASCAL Context; give trainval_merged.json as published.")
            try:
                mask = decode_rle(annotation["segmentation"])
                if mask.shape != drawn.shape:
                    raise ValueError(f"it has the shape {mask.shape}, the image {drawn.shape}")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"A mask of the image {name} in {path} cannot be decoded ({error}); download the file again.") from None
            drawn[mask] = labels[annotation["category_id"]]
        _write(home / "SegmentationClassContext" / f"{name}.png", drawn)
        listed[image["phase"]].append(name)
    for phase, names in listed.items():
        write_atomic(home / "ImageSets" / "SegmentationContext" / f"{phase}.txt", "".join(f"{n}\n" for n in sorted(names)).encode())
    return {phase: len(names) for phase, names in listed.items()}


def _detail(path: Path) -> tuple[list[dict[str, Any]], dict[Any, list[dict[str, Any]]]]:
    """Images and, by image id, annotations in the file's order."""
    try:
        table = json.loads(path.read_bytes())
        images = table["images"]
        for image in images:
            _ = image["image_id"], image["file_name"], image["phase"], image["height"] * image["width"]
        annotations = defaultdict(list)
        for annotation in table["annos_segmentation"]:
            _ = annotation["category_id"], annotation["segmentation"]
            annotations[annotation["image_id"]].append(annotation)
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist; give trainval_merged.json of PASCAL in Detail with --json.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not trainval_merged.json of PASCAL in Detail ({type(error).__name__}: {error}); download it again."
                         ) from None
    return images, annotations


def convert_train_ids(name: str, folder: str | Path, split: str = "val", progress: bool = True) -> int:
    """Write the label maps of COCO-Object, COCO-Stuff or Cityscapes with their train ids, under the names that other tools look for.

    COCO's go to ``annotations/<split>2017/<id>_instanceTrainIds.png`` (0 = background, 1 to 80) and ``<id>_labelTrainIds.png`` (0 to 170,
    255 = unlabelled), Cityscapes' beside the published ones (``*_gtFine_labelTrainIds.png``, 0 to 18, 255 = ignored). Returns their
    number. Raises ``InputError`` as the reader of the data set does.
    """
    if name not in ENDINGS:
        raise InputError(f"The data set {name!r} needs no conversion; convert one of context, {', '.join(ENDINGS)}.")
    dataset = load_dataset(name, split, folder)
    assert isinstance(dataset, FolderDataset)
    for index, file in enumerate(tqdm(dataset.files, desc=f"{name} labels", unit="image", disable=not progress)):
        place = file.labels.parent
        if name != "cityscapes":
            inside = file.image.parent.parent  # <home>/val2017 or <home>/images/val2017
            place = (inside.parent if inside.name == "images" else inside) / "annotations" / file.image.parent.name
        labels = dataset.labels(index)
        if not dataset.has_background:
            labels = np.where(labels == IGNORE, IGNORE, labels.astype(np.int16) - 1).astype(np.uint8)
        _write(place / f"{file.id}{ENDINGS[name]}.png", labels)
    return len(dataset)


def _write(path: Path, labels: np.ndarray) -> None:
    # Grey, not palette: some tools read a palette's colours.
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
