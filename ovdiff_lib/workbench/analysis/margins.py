"""Does a small margin predict an error? How far the winning class is ahead, of right and of wrong pixels."""

from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.workbench.data.samples import Sample

BIN = 0.001  # width of a bin of margins; two cosines differ by at most 2


def margins(segmentation: Segmentation) -> np.ndarray:
    """How far the winning class is ahead of the next at each pixel, f32 (H, W), in cosine; inf where it was alone."""
    if len(segmentation.kept_scores) < 2:
        return np.full(segmentation.labels.shape, np.inf, np.float32)
    second, first = np.partition(segmentation.kept_scores, -2, axis=0)[-2:]
    return first - second


class MarginStatistics:
    """Pixels by margin, summed over images: ``right`` and ``wrong`` i64 (B,), one count a bin of width :data:`BIN`.

    Pixels whose true label is ignored do not count; margins above 2, as of a class alone, are in the last bin.
    """

    def __init__(self) -> None:
        self.right, self.wrong = np.zeros((2, round(2 / BIN)), np.int64)

    def update(self, segmentation: Segmentation, target: np.ndarray) -> None:
        """Count one image against its true labels int (H, W)."""
        bins = np.minimum(margins(segmentation) / BIN, len(self.right) - 1).astype(np.int64)
        correct = segmentation.labels == target
        for counts, chosen in ((self.right, correct), (self.wrong, ~correct)):
            counts += np.bincount(bins[chosen & (target != IGNORE)], minlength=len(counts))

    def auc(self) -> float:
        """Probability that a right pixel has a larger margin than a wrong one, both drawn at random, ties counted half:
        0.5 = the margin says nothing, 1 = it tells every error. nan unless there are both."""
        if not self.right.any() or not self.wrong.any():
            return float("nan")
        smaller = np.cumsum(self.wrong) - self.wrong
        return float((self.right * (smaller + self.wrong / 2)).sum() / (self.right.sum() * self.wrong.sum()))

    def error_rates(self, parts: int = 10) -> list[tuple[float, float]]:
        """Pixels sorted by margin and cut into ``parts`` of about equal size, smallest margins first: (mean margin,
        share of wrong pixels) of each. Pixels of one bin stay together, so that a part may be missing."""
        total, centre = self.right + self.wrong, (np.arange(len(self.right)) + 0.5) * BIN
        middle = (np.cumsum(total) - total / 2) / max(1, total.sum())
        part = np.minimum((middle * parts).astype(int), parts - 1)
        chosen = [part == i for i in range(parts) if total[part == i].any()]
        return [(float(np.average(centre[one], weights=total[one])), float(self.wrong[one].sum() / total[one].sum()))
                for one in chosen]


def confusions(ovdiff: OVDiff, bank: PrototypeBank, samples: Iterable[Sample], names: Sequence[str]) -> np.ndarray:
    """Pixel counts of each of ``samples``, background and the classes of ``bank``, i64 (images, C + 1, C + 1), rows
    true. ``names`` of the samples' labels 1, 2, ... are compared without case; what the bank lacks is background."""
    place = {name.casefold(): i + 1 for i, name in enumerate(bank.vocabulary.names)}
    table = np.zeros(256, np.int32)
    table[1:len(names) + 1] = [place.get(name.casefold(), 0) for name in names]
    table[IGNORE] = -1  # a vocabulary of one's own may have more than 255 classes
    matrices = []
    for sample in tqdm(list(samples), unit="image", mininterval=5):
        matrices.append(ConfusionMatrix(len(bank.vocabulary) + 1, ignore=-1))
        matrices[-1].update(ovdiff.segment(sample.image, bank).labels, table[sample.labels])
    return np.stack([matrix.counts for matrix in matrices])
