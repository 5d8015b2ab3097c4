"""Margins against scikit-learn and by hand; absent queries counted by hand; example images chosen by their label maps."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from test_explain import many

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.workbench.analysis.absent import AbsentTest, absent_tests, one_absent_word, search_threshold
from ovdiff_lib.workbench.analysis.examples import Examples, fullest, plainest, showing, shown_labels, side_by_side
from ovdiff_lib.workbench.analysis.margins import BIN, MarginStatistics, margins
from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.tables.intervals import interval

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


# ---------------------------------------------------------------------- absent classes

def sample(name, *rows, grey=None):
    labels = np.array(rows, np.uint8)
    image = np.zeros((*labels.shape, 3), np.uint8) if grey is None else np.repeat(np.array(grey, np.uint8)[..., None], 3, 2)
    return Sample(name, image, labels)


def test_counts_of_two_images_by_hand():
    test = AbsentTest(least=0.25)
    assert test.rates("") == {}

    def rates():
        return {name: pytest.approx(runs.values.item() / 100) for name, runs in test.rates("some").items()}

    # Eight pixels, two ignored; shown: 1. Predicted: 2 on three of six, 3 on one of six (too few), 1 on ignored ones.
    test.update(np.array([[1, 2, 2, 2], [1, 3, 0, 0]]), np.array([[255, 1, 0, 0], [255, 1, 0, 0]]), [1, 2, 3])
    assert [test.counts[name] for name in ("absent", "segmented", "shown", "missed", "fooled")] == [2, 1, 1, 1, 1]
    assert {"pixels given to them": 4 / 6}.items() <= rates().items()
    # Shown: 1 and 2, both found, in the wrong places; 3 was not asked.
    test.update(np.array([[2, 2, 1, 1]]), np.array([[1, 1, 2, 2]]), [1, 2])
    assert rates() == {"absent classes segmented": 1 / 2, "shown classes missed": 1 / 3, "images with one": 1 / 2,
                       "pixels given to them": 4 / 10}


def test_rates_have_the_intervals_of_their_images():
    test, rng = AbsentTest(), np.random.default_rng(0)
    for _ in range(50):
        test.update(rng.integers(0, 3, (1, 1)), np.zeros((1, 1), int), [1, 2])  # one of the two absent words, or none
    low, high = interval(test.rates("some")["images with one"].draws)
    expected = test.counts["fooled"] / 50
    again = rng.choice([image["fooled"] for image in test.images], (10_000, 50)).mean(1)
    assert [low, high] == pytest.approx(100 * np.quantile(again, [0.025, 0.975]), abs=2.1) and low < 100 * expected < high


def test_one_absent_word_is_absent_and_stays_the_same():
    samples = [sample(str(i), [0, 1 + i % 5, 255]) for i in range(40)]
    trials = one_absent_word(samples, 6, seed=1)
    for s, labels in trials:
        (extra,) = set(labels) - set(shown_labels(s))
        assert 1 <= extra <= 6 and set(shown_labels(s)) < set(labels) and labels == tuple(sorted(labels))
    assert one_absent_word(samples[::-1], 6, seed=1)[::-1] == trials  # the order of the images changes nothing
    assert one_absent_word(samples, 6, seed=2) != trials
    assert len({labels for _, labels in trials}) > 10  # and not always the same word
    with pytest.raises(InputError, match="shows all 2 classes"):
        one_absent_word([sample("x", [1, 2])], 2)


def test_the_best_threshold_against_trying_each():
    rng, thresholds = np.random.default_rng(0), [0.1, 0.4, 0.5, 0.8]
    trials = [(sample(str(i), *rng.choice([0, 1, 2, 3], size=(4, 6))), labels) for i, labels in enumerate([(1, 3), (2, 3), (1, 2), (3,)])]
    scores = {labels: rng.random((len(labels) + 1, 4, 6)) for _, labels in trials}
    expected = []
    for threshold in thresholds:
        matrix = ConfusionMatrix(4)
        for s, labels in trials:
            predicted = np.zeros((4, 6), int)
            for place in np.ndindex(4, 6):
                own = [score[place] for score in scores[labels][1:]]
                predicted[place] = labels[own.index(max(own))] if max(own) > threshold else 0
            matrix.update(predicted, s.labels)
        expected.append(matrix.miou())
    best = thresholds[int(np.argmax(expected))], pytest.approx(max(expected))
    assert search_threshold(lambda image, labels: scores[labels], trials, 3, thresholds) == best


# ---- example images

def test_the_image_that_shows_most_of_what_is_asked():
    few, both = sample("a", [1, 0, 0, 0]), sample("b", [1, 2, 0, 0])
    more, large = sample("c", [1, 2, 3, 0]), sample("d", [1, 1, 2, 255])
    assert showing([few, more, both], [1, 2]) is both  # as many as `more`, and nothing besides
    assert showing([few, both, large], [1, 2]) is large
    assert showing([both, both, few], [5]) is few  # nothing asked is there: the fewest others


def test_two_instances_side_by_side():
    wide, tall = sample("w", [1, 0, 0, 0, 0], [0] * 5), sample("t", *[[2, 0]] * 4)
    others = [sample("m", [1, 2], [0, 0]), sample("w2", [0, 255], [0, 1]), sample("t2", *[[0, 2]] * 4), sample("w3", [1, 1], [0, 1])]
    pair = side_by_side([wide, tall, *others])
    assert [p.id for p in pair] == ["t + t2", "w + w2"]  # 4 x 4 before 2 x 7; the third of a class is not used
    assert pair[1].labels.tolist() == [[1, 0, 0, 0, 0, 0, 255], [0, 0, 0, 0, 0, 0, 1]] and pair[1].image.shape == (2, 7, 3)
    assert side_by_side([wide, sample("other height", [1, 0])]) == []


def test_plain_and_full_images():
    smooth = sample("smooth", [0, 0, 0], [1, 1, 0], grey=[[10, 12, 14], [0, 255, 14]])  # what is rough is the object
    rough = sample("rough", [0, 0, 0], [1, 1, 0], grey=[[10, 30, 10], [0, 0, 14]])
    bare = sample("bare", [1, 2, 3], [1, 2, 3])
    assert plainest([bare, rough, smooth], 2) == [smooth, rough] and plainest([bare, rough], 5) == [rough, bare]
    assert fullest([smooth, rough, bare, sample("two", [1, 2, 0])], 2)[0] is bare


def test_examples_are_the_best_images_seen():
    found, by_hand, by_kind = Examples(), {}, {}
    for seed in range(5):
        segmentation, _ = many(seed)
        target = np.random.default_rng(seed).choice([0, 1, 3, 255], size=(4, 7), p=[0.3, 0.3, 0.3, 0.1])
        found.update(seed, segmentation, target)
        for label, name in ((0, "background"), (1, "cat"), (3, "sofa")):
            pairs = [(p, t) for p, t in zip(segmentation.labels.flat, target.flat, strict=True) if t != 255]
            iou = sum(p == t == label for p, t in pairs) / sum(label in (p, t) for p, t in pairs)
            if label:
                by_hand.setdefault(name, []).append((iou, -seed))
            pixels = {}
            for r, c in zip(*np.nonzero(segmentation.labels == label), strict=True):
                why = segmentation.explain(r, c)
                if why.kind:
                    key = (why.kind if label else "background"), why.category, why.index
                    pixels[key] = pixels.get(key, 0) + 1
            for (kind, _, _), number in pixels.items():
                by_kind.setdefault(kind, []).append((iou * number / (segmentation.labels == label).sum(), -seed, name))
    assert found.classes == {name: (pytest.approx(max(values)[0]), -max(values)[1]) for name, values in by_hand.items()}
    assert set(found.kinds) == set(by_kind) == {"class", "instance", "part", "background"}
    for kind, values in by_kind.items():
        assert found.kinds[kind][0] == pytest.approx(max(values)[0])
        assert (found.kinds[kind][1:]) in [(-place, name) for value, place, name in values if value == pytest.approx(max(values)[0])]


def test_every_method_is_asked_every_trial():
    samples = [sample("a", [0, 1, 2, 255]), sample("b", [3, 3, 0, 0])]
    askings = {"all": [(s, (1, 2, 3)) for s in samples], "two": [(samples[0], (1, 2)), (samples[1], (1, 3))]}
    calls = []

    def last(image, asked):  # the last of the words everywhere
        calls.append(asked)
        return np.full(image.shape[:2], len(asked))

    tests = absent_tests({"last": last, "none": lambda image, asked: np.zeros(image.shape[:2], int)}, askings, 3)
    assert set(tests) == {(a, m) for a in askings for m in ("last", "none")}
    assert calls == [(1, 2, 3), (1, 2), (1, 2, 3), (1, 3)]  # image by image
    matrices, absent = tests["two", "last"]
    assert matrices.tolist() == [[[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 2], [0] * 4, [0] * 4, [0, 0, 0, 2]]]
    assert [absent.counts[name] for name in ("absent", "segmented", "shown", "missed")] == [1, 0, 3, 1]
    assert tests["all", "last"][1].counts["segmented"] == 1 and tests["all", "none"][1].counts["missed"] == 3
