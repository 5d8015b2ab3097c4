"""Evaluation (Sec. 4): data sets, the mIoU and the protocol that joins them to a segmenter."""

from ovdiff_lib.evaluation.datasets import DATASETS, Dataset, Sample, load_dataset
from ovdiff_lib.evaluation.metrics import ConfusionMatrix
from ovdiff_lib.evaluation.protocol import EvaluationResult, ThresholdSearch, evaluate, grid_search_threshold

__all__ = ["DATASETS", "ConfusionMatrix", "Dataset", "EvaluationResult", "Sample", "ThresholdSearch", "evaluate", "grid_search_threshold",
           "load_dataset"]
