"""Evaluation (Sec. 4): data sets, the mIoU and the protocol that joins them to a segmenter."""

from ovdiff_lib.evaluation.datasets import DATASETS, load_dataset
from ovdiff_lib.evaluation.metrics import ConfusionMatrix
from ovdiff_lib.evaluation.predictions import predictions_from
from ovdiff_lib.evaluation.protocol import (
    EvaluationResult,
    ThresholdSearch,
    evaluate,
    foreground_labels,
    grid_search_threshold,
    label_predictor,
)
from ovdiff_lib.evaluation.samples import Dataset, Sample

__all__ = ["DATASETS", "ConfusionMatrix", "Dataset", "EvaluationResult", "Sample", "ThresholdSearch", "evaluate", "foreground_labels",
           "grid_search_threshold", "label_predictor", "load_dataset", "predictions_from"]
