"""The mean intersection over union of a whole data set, from one confusion matrix."""

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.mini.world import IGNORE


class ConfusionMatrix:
    """Pixel counts i64 (K, K): row = true class, column = predicted class, summed over a data set.

    IoU is computed once from the sums, as Pascal VOC does: a mean of per-image IoU is another number.
    """

    def __init__(self, classes: int, ignore: int = IGNORE, counts: np.ndarray | None = None) -> None:
        """Empty, or with ``counts`` i64 (classes, classes), into which updates go."""
        self.classes, self.ignore = classes, ignore
        self.counts = np.zeros((classes, classes), np.int64) if counts is None else counts

    def update(self, predicted: np.ndarray, target: np.ndarray) -> None:
        """Count one image: ``predicted`` and ``target`` int (H, W) with labels in [0, K), ``target`` also the ignored.

        Raises ``InputError`` for different shapes, labels out of range and predictions that are no integers (scores).
        """
        if not np.issubdtype(predicted.dtype, np.integer):
            raise InputError(f"The prediction holds {predicted.dtype} values; it must hold integer labels.")
        if predicted.shape != target.shape:
            raise InputError(f"The prediction must have the shape {target.shape} of the labels, not {predicted.shape}.")
        counted = target != self.ignore
        predicted, target = predicted[counted].astype(np.int64), target[counted].astype(np.int64)
        for what, labels in (("prediction", predicted), ("label map", target)):
            if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
                raise InputError(f"The {what} holds labels from {labels.min()} to {labels.max()}; they must lie in 0 to"
                                 f" {self.classes - 1}.")
        counts = np.bincount(target * self.classes + predicted, minlength=self.classes**2)
        self.counts += counts.reshape(self.classes, self.classes)

    def iou(self) -> np.ndarray:
        """f64 (K,) in [0, 1]; nan for a class that neither the label maps nor the predictions show."""
        intersection = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - intersection
        return np.divide(intersection, union, out=np.full(self.classes, np.nan), where=union > 0)

    def miou(self) -> float:
        """Mean IoU of the classes that occur; one predicted but never true counts as 0. nan if no pixel was counted."""
        iou = self.iou()
        seen = ~np.isnan(iou)
        return float(iou[seen].mean()) if seen.any() else float("nan")
