"""How well a segmenter's proposals cover the objects of the mini world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.masks import Segmenter
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.data.metrics import IGNORE


@dataclass(frozen=True)
class Recall:
    """``best`` is the mean over objects of the highest IoU that any proposal reaches, ``found`` the share that reaches
    one half, ``by_noun`` the mean by noun, ``proposals`` the mean number of proposals an image, ``objects`` and
    ``images`` how many were measured.
    """

    best: float
    found: float
    by_noun: dict[str, float]
    proposals: float
    objects: int
    images: int


def best_ious(proposals: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """For each label of an object in u8 (H, W), the highest IoU of a proposal, bool (M, H, W), with its pixels; 0
    without proposals.

    Ignored pixels count for nothing. Objects of one noun that share an image share a label and count as one.
    """
    known = labels != IGNORE
    found = {}
    for label in np.setdiff1d(np.unique(labels), (0, IGNORE)):
        truth = labels == label
        both = (proposals & truth).sum(axis=(1, 2))
        either = ((proposals | truth) & known).sum(axis=(1, 2))
        found[int(label)] = float((both / either).max(initial=0))
    return found


def recall(segmenter: Segmenter, limit: int | None = None, split: str = "val", progress: bool = True) -> Recall:
    """Measure ``segmenter`` on ``limit`` images of a split of mini-object, spread evenly over it (default: all).

    A segmenter that reads words is given the nouns that the image shows. Raises ``InputError`` for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The number of images is {limit}; measure at least 1.")
    data = load_dataset("mini-object", split)
    count = min(limit or len(data), len(data))
    names, rows, proposals = data.vocabulary.names, [], []
    for index in tqdm(np.arange(count) * len(data) // count, desc=segmenter.name, unit="image", disable=not progress):
        sample = data[int(index)]
        nouns = [names[label - 1] for label in np.setdiff1d(np.unique(sample.labels), (0, IGNORE))]
        masks = segmenter.propose(sample.image, " and ".join(nouns))
        proposals.append(len(masks))
        rows += [(names[label - 1], value) for label, value in best_ious(masks, sample.labels).items()]
    values = np.array([value for _, value in rows])
    by_noun = {noun: float(np.mean([v for n, v in rows if n == noun])) for noun in names if any(n == noun for n, _ in rows)}
    return Recall(float(values.mean()), float((values >= 0.5).mean()), by_noun, float(np.mean(proposals)), len(rows), count)
