"""Evaluation (Sec. 4): data sets, the mIoU and the protocol that joins them to a segmenter."""

from ovdiff_lib.workbench.data.datasets import DATASETS, load_dataset
from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.data.predictions import predictions_from
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import (
                                                     EvaluationResult,
                                                     ThresholdSearch,
                                                     evaluate,
                                                     foreground_labels,
                                                     grid_search_threshold,
                                                     label_predictor,
)

__all__ = ["DATASETS", "ConfusionMatrix", "Dataset", "EvaluationResult", "Sample", "ThresholdSearch", "evaluate", "foreground_labels",
           "grid_search_threshold", "label_predictor", "load_dataset", "predictions_from"]
