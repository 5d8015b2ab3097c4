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
from ovdiff_lib.workbench.data.datasets import context, load_dataset, numbered
from ovdiff_lib.workbench.data.metrics import IGNORE

ENDINGS = {"coco-object": "_instanceTrainIds", "coco-stuff": "_labelTrainIds", "cityscapes": "_gtFine_labelTrainIds"}
"""Data set -> what the names of its converted label maps end with."""

PHASES = ("train", "val")
"""Splits of PASCAL Context with labels."""


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """Mask bool (H, W) from COCO's run-length encoding: ``size`` [H, W] and ``counts``, the lengths of runs of 0 and 1
    in turn, column by column.

    ``counts`` is a list, or text: each length in groups of 5 bits, lowest first, as characters from "0" on (32: another
    group follows; the highest bit of the last group is the sign), from the fourth on less the length before the last.
    Raises ``ValueError`` if it is neither.
    """
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    runs = _run_lengths(counts.encode("ascii")) if isinstance(counts, str) else np.asarray(counts, np.int64).ravel()
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the run lengths add up to {runs.sum()}, not {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _run_lengths(text: bytes) -> np.ndarray:
    """i64 (n,) from their text form."""
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(groups):
        return groups
    last = (groups & 32) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    if groups.min() < 0 or groups.max() > 63 or not last[-1] or place.max() > 11:
        raise ValueError("the run lengths are no COCO encoding")
    value = np.add.reduceat((groups & 31) << (5 * place), starts)
    value -= np.where(groups[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
    # From the fourth on differences to the last but one: two interleaved sums, the first length apart.
    value[1::2], value[2::2] = value[1::2].cumsum(), value[2::2].cumsum()
    return value


def convert_context(json_path: str | Path, folder: str | Path, progress: bool = True) -> dict[str, int]:
    """PASCAL Context's label maps from ``trainval_merged.json`` (PASCAL in Detail), below ``folder``'s VOC 2010.

    Writes ``SegmentationClassContext/<id>.png`` (0 = background, 1 to 59 in alphabetical order; of overlapping regions
    the later one counts) and, last, ``ImageSets/SegmentationContext/<split>.txt``. Returns the number of images of
    each. Raises ``InputError`` for a file of another form. Lists made by the usual converter have one val image less
    (5104): its annotation reader loses some while filtering.
    """
    home, path = context().home(Path(folder).expanduser(), "val"), Path(json_path).expanduser()
    listed, name = {phase: [] for phase in PHASES}, "none"
    if not path.is_file():
        raise InputError(f"The file {path} does not exist; give trainval_merged.json of PASCAL in Detail with --json.")
    try:
        table, annotations = json.loads(path.read_bytes()), defaultdict(list)
        for annotation in table["annos_segmentation"]:
            annotations[annotation["image_id"]].append(annotation)
        images = [image for image in table["images"] if image["phase"] in PHASES]
        for image in tqdm(images, "label maps", unit="image", disable=not progress):
            name = Path(image["file_name"]).stem
            drawn = _drawn((image["height"], image["width"]), annotations[image["image_id"]])
            _write(home / "SegmentationClassContext" / f"{name}.png", drawn)
            listed[image["phase"]].append(name)
    except InputError:  # a label map that cannot be written
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be converted ({type(error).__name__}: {error}; last image: {name}); give"
                         " trainval_merged.json of PASCAL in Detail as published, or download it again.") from None
    for phase, names in listed.items():
        text = "".join(f"{name}\n" for name in sorted(names))
        write_atomic(home / "ImageSets" / "SegmentationContext" / f"{phase}.txt", text.encode())
    return {phase: len(names) for phase, names in listed.items()}


def _drawn(shape: tuple[int, int], annotations: list[dict[str, Any]]) -> np.ndarray:
    """Labels u8 (H, W) of one image."""
    drawn, labels = np.zeros(shape, np.uint8), numbered(class_table()["data_sets"]["context"]["ids"])
    for annotation in annotations:
        category, mask = annotation["category_id"], decode_rle(annotation["segmentation"])
        if category not in labels:
            raise ValueError(f"a region has the category {category}, none of the 59")
        if mask.shape != shape:
            raise ValueError(f"a mask has the shape {mask.shape}, the image {shape}")
        drawn[mask] = labels[category]
    return drawn


def convert_train_ids(name: str, folder: str | Path, split: str = "val", progress: bool = True) -> int:
    """Write the label maps of COCO-Object, COCO-Stuff or Cityscapes with train ids, under the names other tools expect.

    COCO's go to ``annotations/<split>2017`` (COCO-Object: 0 = background, 1 to 80; COCO-Stuff: 0 to 170, 255 =
    unlabelled), Cityscapes' beside the published ones (0 to 18, 255 = ignored). Returns their number.
    """
    if name not in ENDINGS:
        raise InputError(f"The data set {name!r} needs no conversion; convert one of context, {', '.join(ENDINGS)}.")
    dataset = load_dataset(name, split, folder)
    for index, file in enumerate(tqdm(dataset.files, f"{name} labels", unit="image", disable=not progress)):
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
