"""The mean intersection over union of a whole data set, from one confusion matrix."""

from __future__ import annotations

import numpy as np

from ovdiff_lib.errors import InputError

IGNORE = 255
"""Label of pixels that do not count."""


class ConfusionMatrix:
    """Pixel counts i64 (K, K): row = true class, column = predicted class, summed over a data set.

    IoU is computed once from the sums, as Pascal VOC does: a mean of per-image IoU is another number.
    """

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        self.classes, self.ignore = classes, ignore
        self.counts = np.zeros((classes, classes), np.int64)

    @classmethod
    def of(cls, counts: np.ndarray, ignore: int = IGNORE) -> ConfusionMatrix:
        """The matrix whose counts are ``counts`` i64 (K, K); updates go into that array."""
        matrix = cls.__new__(cls)
        matrix.classes, matrix.ignore, matrix.counts = len(counts), ignore, counts
        return matrix

    def update(self, predicted: np.ndarray, target: np.ndarray) -> None:
        """Count one image: ``predicted`` and ``target`` int (H, W) with labels in [0, K), ``target`` also the ignored label.

        Raises ``InputError`` for different shapes, labels out of range and predictions that are no integers (scores, say).
        """
        if not np.issubdtype(predicted.dtype, np.integer):
            raise InputError(f"The prediction holds {predicted.dtype} values; it must hold integer labels.")
        if predicted.shape != target.shape:
            raise InputError(f"The prediction has the shape {predicted.shape} and the label map {target.shape}; they must be equal.")
        counted = target != self.ignore
        predicted, target = predicted[counted].astype(np.int64), target[counted].astype(np.int64)
        for what, labels in (("prediction", predicted), ("label map", target)):
            if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
                raise InputError(f"The {what} holds labels from {labels.min()} to {labels.max()}; with {self.classes} classes they must lie"
                                 f" in 0 to {self.classes - 1}.")
        counts = np.bincount(target * self.classes + predicted, minlength=self.classes**2)
        self.counts += counts.reshape(self.classes, self.classes)

    def iou(self) -> np.ndarray:
        """f64 (K,) in [0, 1]; nan for a class that neither the label maps nor the predictions show."""
        intersection = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - intersection
        return np.divide(intersection, union, out=np.full(self.classes, np.nan), where=union > 0)

    def miou(self) -> float:
        """Mean of the IoU over the classes that occur; a class predicted but never true counts as 0. nan if no pixel was counted."""
        iou = self.iou()
        seen = ~np.isnan(iou)
        return float(iou[seen].mean()) if seen.any() else float("nan")
