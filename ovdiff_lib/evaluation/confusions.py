"""What a vocabulary of one's own does on a data set with label maps: which pixels of a class go to which other class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ovdiff_lib.evaluation.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.evaluation.samples import Sample
from ovdiff_lib.types import PrototypeBank

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff


def confusions(ovdiff: OVDiff, bank: PrototypeBank, samples: Iterable[Sample], names: Sequence[str],
               progress: bool = True) -> ConfusionMatrix:
    """Pixel counts over ``samples`` of the classes of ``bank`` and, first, background: i64 (C + 1, C + 1), rows true, columns predicted.

    ``names`` are the classes of the samples' labels 1, 2, ... Those that the bank does not have are background, and a class of the bank
    that ``names`` lacks has an empty row: no pixel truly shows it. Names are compared without case; ignored pixels do not count.
    """
    place = {name.casefold(): i + 1 for i, name in enumerate(bank.vocabulary.names)}
    table = np.zeros(256, np.int32)
    table[IGNORE] = -1  # a vocabulary of one's own may have more than 255 classes
    for label, name in enumerate(names, 1):
        table[label] = place.get(name.casefold(), 0)
    matrix = ConfusionMatrix(len(bank.vocabulary) + 1, ignore=-1)
    for sample in tqdm(list(samples), unit="image", mininterval=5, disable=not progress):
        matrix.update(ovdiff.segment(sample.image, bank).labels, table[sample.labels])
    return matrix
