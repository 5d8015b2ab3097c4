"""Data sets with label maps, by name. Each is an entry of :data:`DATASETS`: ``builder(split, folder, names) -> Dataset``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.data import readers
from ovdiff_lib.workbench.data.readers import FolderDataset
from ovdiff_lib.workbench.data.samples import Dataset

DATASETS: dict[str, Callable[..., Dataset]] = {
    **{name: partial(FolderDataset, name, name, readers.mini_files, True) for name in ("mini-voc", "mini-object", "mini-context")},
    "voc": partial(FolderDataset, "voc", "voc", readers.voc_files, True),
    "context": partial(FolderDataset, "context", "context", readers.context_files, True),
    "coco-object": partial(FolderDataset, "coco-object", "coco-object", readers.coco_files, True),
    # Background is no class of these (Table A.7).
    "mini-voc20": partial(FolderDataset, "mini-voc20", "mini-voc", readers.mini_files, False),
    "mini-object42": partial(FolderDataset, "mini-object42", "mini-object", readers.mini_files, False),
    "mini-context28": partial(FolderDataset, "mini-context28", "mini-context", readers.mini_files, False),
    "voc20": partial(FolderDataset, "voc20", "voc", readers.voc_files, False),
    "context59": partial(FolderDataset, "context59", "context", readers.context_files, False),
    "coco-stuff": partial(FolderDataset, "coco-stuff", "coco-stuff", readers.coco_files, False),
    "ade20k": partial(FolderDataset, "ade20k", "ade20k", readers.ade_files, False),
    "cityscapes": partial(FolderDataset, "cityscapes", "cityscapes", readers.cityscapes_files, False),
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
