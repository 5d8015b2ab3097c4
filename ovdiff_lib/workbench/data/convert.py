"""PASCAL Context's label maps, which have to be made from the JSON file in which they are published."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic, written_whole
from ovdiff_lib.workbench.data.classes import class_table
from ovdiff_lib.workbench.data.datasets import context, numbered

PHASES = ("train", "val")  # splits with labels


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """Mask bool (H, W) from COCO's run-length encoding: ``size`` [H, W] and ``counts``, the lengths of runs of 0 and 1
    in turn, column by column. ``ValueError`` if they do not make a mask.

    Each length is written in groups of 5 bits, lowest first, as characters from "0" on (32: another group follows; the
    highest bit of the last group is the sign), from the fourth on less the length before the last.
    """
    height, width = segmentation["size"]
    runs, value, bits = [], 0, 0
    for character in segmentation["counts"]:
        group = ord(character) - ord("0")
        value |= (group & 31) << bits
        bits += 5
        if not group & 32:
            value -= (group & 16) << (bits - 4)  # twice the highest bit of the value
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, bits = 0, 0
    if bits or min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"the run lengths add up to {sum(runs)}, not {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def convert_context(json_path: str | Path, folder: str | Path) -> dict[str, int]:
    """PASCAL Context's label maps from ``trainval_merged.json`` (PASCAL in Detail), below ``folder``'s VOC 2010.

    Writes ``SegmentationClassContext/<id>.png`` (0 = background, 1 to 59 in alphabetical order; of overlapping regions
    the later one counts) and, last, ``ImageSets/SegmentationContext/<split>.txt``. Returns the number of images of
    each (the usual converter loses one of val's 5105). Raises ``InputError`` for a file of another form.
    """
    home, path = context().home(Path(folder).expanduser(), "val"), Path(json_path).expanduser()
    labels = numbered(class_table()["data_sets"]["context"]["ids"])
    listed, name = {phase: [] for phase in PHASES}, "none"
    try:
        table, annotations = json.loads(path.read_bytes()), defaultdict(list)
        for annotation in table["annos_segmentation"]:
            annotations[annotation["image_id"]].append(annotation)
        for image in tqdm([image for image in table["images"] if image["phase"] in PHASES], "label maps", unit="image"):
            name = Path(image["file_name"]).stem
            drawn = np.zeros((image["height"], image["width"]), np.uint8)
            for annotation in annotations[image["image_id"]]:
                drawn[decode_rle(annotation["segmentation"])] = labels[annotation["category_id"]]
            with written_whole(home / "SegmentationClassContext" / f"{name}.png") as file:
                Image.fromarray(drawn).save(file, "PNG")
            listed[image["phase"]].append(name)
    except InputError:  # a label map that cannot be written
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be converted ({type(error).__name__}: {error}; last image: {name}); give"
                         " trainval_merged.json of PASCAL in Detail as published, or download it again.") from None
    for phase, names in listed.items():
        text = "".join(f"{name}\n" for name in sorted(names))
        write_atomic(home / "ImageSets" / "SegmentationContext" / f"{phase}.txt", text.encode())
    return {phase: len(names) for phase, names in listed.items()}
