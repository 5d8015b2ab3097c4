"""Margins of right and wrong pixels, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.workbench.analysis.margins import BIN, MarginStatistics, margins

SHAPE = (13, 21)


def segmented(seed, shape=SHAPE, kept=(0, 2)):
    """Scores of background, cat, dog (dropped) and sofa at random, and true labels that depend on the margin a little."""
    rng = np.random.default_rng(seed)
    scores = np.full((4, *shape), -np.inf, np.float32)
    scores[[0, *(k + 1 for k in kept)]] = rng.random((1 + len(kept), *shape)) * 0.2
    labels = scores.argmax(0).astype(np.int32)
    ordered = np.sort(scores, 0)
    target = np.where(rng.random(shape) < 0.3 + 4 * np.nan_to_num(ordered[-1] - ordered[-2], posinf=0.1), labels, (labels + 1) % 4)
    target[rng.random(shape) < 0.1] = 255
    result = Segmentation(np.zeros((*shape, 3), np.uint8), labels, scores[[0, *(k + 1 for k in kept)]], np.zeros((2, *shape), np.int32),
                          Vocabulary.of("cat, dog, sofa"), kept, np.ones(3, np.float32), None)
    return result, target


def test_a_margin_is_the_best_score_minus_the_next():
    result, _ = segmented(0)
    found = margins(result)
    for r, c in np.ndindex(SHAPE):
        best, second = sorted(result.scores[:, r, c].tolist(), reverse=True)[:2]
        assert found[r, c] == pytest.approx(best - second)
    result.kept_scores[[0, 2]] = -np.inf
    assert np.isposinf(margins(result)).all()  # one class alone


def test_counts_and_area_under_the_curve_equal_scikit_learn():
    statistics, margin, correct = MarginStatistics(), [], []
    for seed in range(4):
        result, target = segmented(seed)
        statistics.update(result, target)
        margin.append(margins(result)[target != 255])
        correct.append((result.labels == target)[target != 255])
    margin, correct = np.concatenate(margin), np.concatenate(correct)
    assert statistics.right.sum() == correct.sum() and statistics.wrong.sum() == (~correct).sum()
    bins = np.floor(margin / BIN)  # the class bins margins; so does the oracle, so that ties are the same
    assert statistics.auc() == pytest.approx(roc_auc_score(correct, bins), abs=1e-9) and 0.6 < statistics.auc() < 0.95


def test_error_rates_of_equal_parts():
    statistics = MarginStatistics()
    statistics.right[[0, 10, 20, 30]] = [1, 2, 3, 4]
    statistics.wrong[[0, 10, 20, 30]] = [3, 2, 1, 0]
    assert np.allclose(statistics.error_rates(4), [(0.0005, 0.75), (0.0105, 0.5), (0.0205, 0.25), (0.0305, 0.0)])
    halves = statistics.error_rates(2)
    assert [rate for _, rate in halves] == pytest.approx([5 / 8, 1 / 8])
    assert [margin for margin, _ in halves] == pytest.approx([0.0055, 0.0255])
    # All pairs of a right and a wrong pixel: P(right > wrong) + P(equal) / 2.
    pairs = sum(r * w * ((i > j) + (i == j) / 2) for i, r in enumerate([1, 2, 3, 4]) for j, w in enumerate([3, 2, 1, 0]))
    assert statistics.auc() == pytest.approx(pairs / 60)


def test_one_bin_for_all_and_nothing_at_all():
    statistics = MarginStatistics()
    assert statistics.error_rates() == [] and np.isnan(statistics.auc())
    result, target = segmented(0, kept=())
    statistics.update(result, target)  # background alone: infinite margins go to the last bin
    assert (statistics.right + statistics.wrong)[:-1].sum() == 0 and len(statistics.error_rates()) == 1
