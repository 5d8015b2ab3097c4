"""Intervals by resampling: against a loop over draws, against truths that are known because the populations are made, by hand."""

import numpy as np
import pytest

from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.measure import EvaluationResult
from ovdiff_lib.workbench.evaluation.results import Counts
from ovdiff_lib.workbench.tables import intervals
from ovdiff_lib.workbench.tables.intervals import Runs, holm, interval, p_value, resampled


def confusions(seeds=3, images=7, classes=4, seed=0):
    """Matrices i64 (seeds, images, K, K); a class is in few images, so that some draws lack it."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 50, (seeds, images, classes, classes))
    counts[:, 2:, -1] = 0
    return counts


def test_a_draw_is_the_confusion_matrix_of_its_images_and_the_mean_over_its_seeds(monkeypatch):
    """Draw by draw, with the images and seeds that were drawn: of 7 images 7 less half of 4 classes; a class that the draw lacks
    is predicted and does not count; the factor of Student's t for three seeds is by hand."""
    drawn = []

    def recording(key, draws, things, taken, draw=intervals._multiplicities):
        drawn.append(draw(key, draws, things, taken))
        return drawn[-1]

    monkeypatch.setattr(intervals, "_multiplicities", recording)
    monkeypatch.setattr(intervals, "BLOCK", 30)
    counts = confusions()
    found = resampled(Runs.of("x", counts), draws=100)
    images, seeds = drawn
    assert images.shape == (100, 7) and (images.sum(1) == 5).all() and seeds.shape == (100, 3) and (seeds.sum(1) == 2).all()
    lacking, wider = 0, 4.302653 / 1.959964
    for value, of_images, of_seeds in zip(found, images, seeds, strict=True):
        miou = []
        for matrices in counts:
            matrix = ConfusionMatrix(4)
            for image, times in zip(matrices, of_images, strict=True):
                matrix.counts += times * image
            miou.append(100 * np.mean([matrix.iou()[k] for k in range(4) if matrix.counts[k].sum()]))
        lacking += not matrix.counts[-1].any()
        expected = np.mean(miou) + wider * (np.average(miou, weights=of_seeds) - np.mean(miou))
        assert value == pytest.approx(expected, rel=1e-5)
    assert 0 < lacking < 100
    assert len({tuple(row) for row in images}) > 80 and images.mean(0) == pytest.approx(np.full(7, 5 / 7), abs=0.3)


def test_cells_of_a_data_set_share_their_draws_and_those_of_others_do_not():
    three, again, one, other = (Runs.of(name, confusions()[:seeds]) for name, seeds in (("a", 3), ("a", 3), ("a", 1), ("b", 1)))
    assert np.array_equal(resampled(three, 500), resampled(again, 500))
    assert abs(np.corrcoef(resampled(one, 500), resampled(other, 500))[0, 1]) < 0.2
    repeated = Runs("a", np.repeat(one.counts, 3, 0))
    assert resampled(repeated, 500) == pytest.approx(resampled(one, 500))  # what has no seeds is the same for each


def population(rng, seeds, seed_noise, images=1500):
    """Counts of two methods, i32 (seeds, images, 3, 3) each: images are hard or easy for both, seeds good or bad for one."""
    size = np.round(rng.gamma(2.0, 200.0, (images, 3)) * (rng.random((images, 3)) < 0.7))
    hard, made = 0.12 * rng.standard_normal((images, 1)), []
    for base in ((0.7, 0.5, 0.6), (0.62, 0.45, 0.55)):
        right = np.array(base) + hard + 0.06 * rng.standard_normal((images, 3)) + seed_noise * rng.standard_normal((seeds, 1, 1))
        both = np.round(size * right.clip(0.02, 0.98))
        made.append(np.stack([both, *2 * [np.broadcast_to(size, both.shape)]], 2).astype(np.int32))
    return made


def mean_iou(counts):
    both, either, _ = np.moveaxis(counts.sum(1, dtype=np.int64), 1, 0)
    return 100 * (both / either).mean()


@pytest.mark.parametrize("seeds, seed_noise", [(1, 0.0), (4, 0.01), (4, 0.03)])
def test_the_interval_of_a_difference_covers_the_truth_in_95_percent_of_all_samples(seeds, seed_noise):
    """Of 1,000 samples of 64 images and of seeds from a population, whose own difference is the truth; unpaired, the interval of
    a difference would be much wider than need be. With seeds that hardly differ it is 96 to 97 percent."""
    rng = np.random.default_rng(2)
    methods = population(rng, 60 if seeds > 1 else 1, seed_noise)
    truth, covered, paired, unpaired = mean_iou(methods[0]) - mean_iou(methods[1]), 0, [], []
    for sample in range(1000):
        of_seeds, of_images = (rng.integers(n, size=size) for n, size in zip(methods[0].shape, (seeds, 64), strict=False))
        one, two = (Runs(str(sample), method[of_seeds][:, of_images]) for method in methods)
        draws = resampled(one, 300) - resampled(two, 300)
        low, high = interval(draws)
        covered += low <= truth <= high
        if sample < 50 and seeds == 1:
            paired.append(high - low)
            low, high = interval(resampled(one, 300) - resampled(Runs("other", two.counts), 300))
            unpaired.append(high - low)
    assert 930 <= covered <= 970
    assert seeds > 1 or np.mean(paired) < 0.6 * np.mean(unpaired)


def rare_classes(rng, classes=42, each=200):
    """Counts of two methods, i32 (1, images, 3, K): image i shows class i modulo K, and a class is predicted in images of others, too;
    some images are taken for another class."""
    true = np.arange(classes * each) % classes
    other, size = rng.integers(classes, size=true.size), np.round(rng.gamma(3, 300, true.size)) + 50
    easy, wrong, made = rng.uniform(0.2, 0.8, classes)[true] + 0.15 * rng.standard_normal(true.size), rng.random(true.size) < 0.3, []
    for better in (0, 0.06):
        right = np.where(wrong, 0, np.round(size * (easy + better + 0.1 * rng.standard_normal(true.size)).clip(0, 0.98)))
        counts, rows = np.zeros((true.size, 3, classes)), np.arange(true.size)
        counts[rows, 0, true], counts[rows, 1, true], counts[rows, 2, true] = right, size, size
        counts[rows, 1, other] += np.where(other == true, 0, np.round(size * np.where(wrong, 0.7, 0.15)))
        made.append(counts[None].astype(np.int32))
    return true, made


@pytest.mark.parametrize("images", [64, 160])
def test_intervals_cover_the_truth_where_each_class_is_in_few_images(images, monkeypatch):
    """42 classes, one, two or four images each: the interval of a mIoU and of a difference, whose middles are what was measured."""
    monkeypatch.setattr(intervals, "resampled", lambda runs: resampled(runs, 400))
    rng = np.random.default_rng(3)
    shows, methods = rare_classes(rng)
    truths, covered = [mean_iou(method) for method in methods], np.zeros(2)
    for sample in range(400):
        chosen = np.stack([rng.choice(np.flatnonzero(shows == k), 4, replace=False) for k in range(42)], 1).ravel()[:images]
        one, two = (Runs(str(sample), method[:, chosen]) for method in methods)
        for n, (draws, truth) in enumerate([(one.draws, truths[0]), (two.draws - one.draws, truths[1] - truths[0])]):
            low, high = interval(draws)
            covered[n] += low <= truth <= high
    assert one.draws.mean() == pytest.approx(one.values.mean())
    assert (covered >= 0.92 * 400).all() and (covered <= 0.98 * 400).all(), covered


def test_p_values_count_the_draws_on_the_wrong_side():
    draws = np.arange(-5, 95) + 0.5  # five below 0, ten below 5
    assert p_value(draws, 0, np.inf) == 2 * 6 / 101 and p_value(-draws, -np.inf, 0) == p_value(-draws, 0, np.inf) == 2 * 6 / 101
    assert p_value(draws, 5, np.inf) == 2 * 11 / 101 and p_value(draws, -9, np.inf) == 2 / 101
    assert p_value(draws, -9, 99) == 2 / 101  # surely between the two
    assert p_value(draws, -9, 80) == 2 * 16 / 101 and p_value(draws, 44, 46) == pytest.approx(1.0, abs=0.06)
    assert p_value(draws, -99, -98) == p_value(draws, 100, 101) == 2 / 101  # surely not
    assert interval(np.arange(1001.0)) == (25, 975)


def test_holm_by_hand():
    """0.01 x 4; 0.02 x 3; 0.03 x 2 is no less than that; 0.04 x 1 would be less than 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1] and holm([0.02]) == [0.02] and holm([]) == []


def test_a_cell_of_the_bench_is_the_mean_over_seeds_of_the_miou_of_each():
    results, counts = [], confusions()
    for matrices in counts:
        kept = Counts((1, 4, 4))
        for matrix in matrices:
            kept.add(matrix[None])
        results.append(EvaluationResult("mini-voc", tuple("abcd"), kept.total()[0], kept))
    cell = Bench.cell("OVDiff", results)
    assert (cell.row, cell.column, cell.n) == ("OVDiff", "mini-voc", 3) and cell.runs.dataset == "mini-voc"
    assert cell.measured == pytest.approx(np.mean([100 * ConfusionMatrix(4, counts=c.sum(0)).miou() for c in counts]))
    assert cell.low < cell.measured < cell.high and (cell.low, cell.high) == interval(cell.runs.draws)
