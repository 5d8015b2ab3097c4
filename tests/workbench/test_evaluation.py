"""The mini data sets against their own files, the mIoU against scikit-learn, torchmetrics and loops, the protocol against brute force."""

import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.data.predictions import predictions_from
from ovdiff_lib.workbench.data.readers import MINI_DATA
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.evaluation import measure
from ovdiff_lib.workbench.evaluation.measure import best_of, evaluate, foreground_labels, label_predictor, search_threshold

SPLITS = ("val", "wild")
MINI = ("mini-voc", "mini-object", "mini-context")


def sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text


# ---- metrics

def labelled(seed, classes, shapes=((7, 11), (13, 5), (1, 9))):
    rng = np.random.default_rng(seed)
    for shape in shapes:
        target = rng.integers(0, classes, shape).astype(np.uint8)
        predicted = np.where(rng.random(shape) < 0.6, target, rng.integers(0, classes, shape))
        target[rng.random(shape) < 0.2] = 255
        yield predicted, target


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (5, 1), (21, 2), (60, 3)])
def test_confusion_and_miou_equal_two_libraries(classes, seed):
    import torch
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

    matrix = ConfusionMatrix(classes)
    reference = MulticlassConfusionMatrix(classes, ignore_index=255)
    jaccard = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
    flat = []
    for predicted, target in labelled(seed, classes):
        matrix.update(predicted, target)
        pair = torch.from_numpy(predicted.astype(np.int64))[None], torch.from_numpy(target.astype(np.int64))[None]
        reference.update(*pair)
        jaccard.update(*pair)
        flat.append((predicted[target != 255], target[target != 255]))
    predicted, target = (np.concatenate(part) for part in zip(*flat, strict=True))
    assert (matrix.counts == reference.compute().numpy()).all()
    assert (matrix.counts == confusion_matrix(target, predicted, labels=range(classes))).all()
    assert matrix.miou() == pytest.approx(float(jaccard.compute()), abs=1e-6)
    seen = np.union1d(target, predicted)
    assert matrix.miou() == pytest.approx(jaccard_score(target, predicted, labels=seen, average="macro"))


def test_miou_by_hand():
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([[0, 1, 1], [2, 0, 1]]), np.array([[0, 0, 1], [1, 255, 255]]))
    # class 0: 1 of 2; class 1: 1 of 3; class 2: predicted once, never true: 0; class 3: nowhere
    assert matrix.iou()[:3].tolist() == [1 / 2, 1 / 3, 0] and np.isnan(matrix.iou()[3])
    assert matrix.miou() == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert matrix.counts.sum() == 4 and matrix.counts[1, 2] == 1 and matrix.counts.dtype == np.int64


def test_miou_is_that_of_the_sums_not_the_mean_over_images():
    matrix = ConfusionMatrix(2)
    matrix.update(np.ones((1, 1), int), np.ones((1, 1), int))
    matrix.update(np.zeros((1, 9), int), np.ones((1, 9), int))
    assert matrix.iou().tolist() == [0, 0.1]


def test_nothing_counted():
    matrix = ConfusionMatrix(3)
    matrix.update(np.zeros((2, 3), int), np.full((2, 3), 255))
    assert np.isnan(matrix.miou()) and np.isnan(matrix.iou()).all()


@pytest.mark.parametrize(("predicted", "target"), [
    (np.zeros((2, 3), int), np.zeros((3, 2), int)), (np.full((1, 2), 3), np.zeros((1, 2), int)),
    (np.full((1, 2), -1), np.zeros((1, 2), int)), (np.zeros((1, 2), int), np.full((1, 2), 3)),
    (np.zeros((1, 2)), np.zeros((1, 2), int)), (np.zeros((1, 2), bool), np.zeros((1, 2), int))])
def test_shapes_and_labels_that_do_not_fit(predicted, target):
    matrix = ConfusionMatrix(3)
    with pytest.raises(InputError) as caught:
        matrix.update(predicted, target)
    sentence(caught)
    assert not matrix.counts.any()


def test_predictions_on_ignored_pixels_do_not_matter():
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([[99, 1]]), np.array([[255, 1]]))
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


# ---- the mini data sets

@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MINI)
def test_every_label_is_that_of_its_own_file(name, split):
    dataset, world = load_dataset(name, split=split), load_world()
    assert dataset.name == name and dataset.vocabulary.names == world.vocabulary(name)
    scenes = {row["id"]: row for row in json.loads((MINI_DATA / split / "scenes.json").read_text())}
    shown = [i for i, row in scenes.items() if set(row["things"] + row["stuff"]) & set(dataset.vocabulary.names)]
    assert list(dataset.ids) == shown and len(dataset) == len(shown) > 0
    for index in range(0, len(dataset), max(1, len(dataset) // 12)):
        sample = dataset[index]
        raw = np.array(Image.open(MINI_DATA / split / "labels" / f"{sample.id}.png"))
        assert sample.image.dtype == sample.labels.dtype == np.uint8
        assert sample.image.shape == (*sample.labels.shape, 3) and sample.labels.shape == raw.shape and raw.shape[0] != raw.shape[1]
        for value in np.unique(raw):
            labels = np.unique(sample.labels[raw == value]).tolist()
            word = None if value in (0, 255) else world.names[value - 1]
            expected = 255 if value == 255 else dataset.vocabulary.names.index(word) + 1 if word in dataset.vocabulary.names else 0
            assert labels == [expected], (sample.id, word)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MINI)
def test_every_class_is_seen_and_ignored_pixels_are_few(name, split):
    dataset = load_dataset(name, split=split)
    counts = sum(np.bincount(sample.labels.ravel(), minlength=256) for sample in dataset)
    assert (counts[1:len(dataset.vocabulary) + 1] > 0).all()
    assert counts[len(dataset.vocabulary) + 1:255].sum() == 0
    assert 0 < counts[255] < 0.2 * counts.sum()


def test_kinds_of_the_vocabularies():
    kinds = {name: [c.kind for c in load_dataset(name).vocabulary] for name in MINI}
    assert set(kinds["mini-voc"]) == set(kinds["mini-object"]) == {"thing"}
    assert len(kinds["mini-voc"]) == 20 and kinds["mini-context"] == ["thing"] * 20 + ["stuff"] * len(load_world().stuff)


@pytest.mark.parametrize(("name", "plain"), [("mini-voc20", "mini-voc"), ("mini-context28", "mini-context"),
                                             ("mini-object42", "mini-object")])
def test_without_background_the_rest_is_ignored(name, plain):
    """App. A.3: the same images and categories; what was background does not count."""
    bare, whole = load_dataset(name), load_dataset(plain)
    assert bare.vocabulary == whole.vocabulary and bare.ids == whole.ids and (bare.has_background, whole.has_background) == (False, True)
    for one, other in [(bare[i], whole[i]) for i in (0, 7)]:
        assert (one.labels == np.where(other.labels == 0, 255, other.labels)).all() and (one.labels == 255).any()


def test_the_same_samples_every_time():
    first, second = (load_dataset("mini-voc", "wild") for _ in range(2))
    assert first.ids == second.ids
    assert all((a.image == b.image).all() and (a.labels == b.labels).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("arguments", [("mini-coco",), ("mini-voc", "test"), ("mini-voc", "../val")])
def test_unknown_names(arguments):
    with pytest.raises(InputError, match="choose") as caught:
        load_dataset(*arguments)
    sentence(caught)


@pytest.fixture
def copied(tmp_path):
    """The first three scenes of val in a folder of their own."""
    source, target = MINI_DATA / "val", tmp_path / "val"
    rows = json.loads((source / "scenes.json").read_text())[:3]
    for folder, suffix in (("images", "webp"), ("labels", "png")):
        (target / folder).mkdir(parents=True)
        for row in rows:
            shutil.copy(source / folder / f"{row['id']}.{suffix}", target / folder)
    (target / "scenes.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_folder_elsewhere(copied):
    assert [s.id for s in load_dataset("mini-object", "val", copied)] == ["0000", "0001", "0002"]


@pytest.mark.parametrize("name", ["scenes.json", "images/0001.webp", "labels/0002.png"])
def test_missing_files_are_named_before_anything_runs(copied, name):
    (copied / "val" / name).unlink()
    with pytest.raises(InputError, match=name.split("/")[-1]) as caught:
        load_dataset("mini-object", "val", copied)
    sentence(caught)


@pytest.mark.parametrize(("name", "content"), [
    ("scenes.json", b"{"), ("images/0000.webp", b"RIFF"), ("labels/0000.png", b"x"), ("labels/0000.png", b"")])
def test_broken_files_are_named(copied, name, content):
    (copied / "val" / name).write_bytes(content)
    with pytest.raises(InputError, match=name.split("/")[-1]) as caught:
        load_dataset("mini-object", "val", copied)[0]
    sentence(caught)


@pytest.mark.parametrize(("image", "what"), [
    (Image.new("L", (20, 30)), "shape"), (Image.new("RGB", (160, 128)), "8-bit"), (Image.new("L", (160, 128), 200), "200")])
def test_label_maps_that_do_not_fit_their_image(copied, image, what):
    image.save(copied / "val" / "labels" / "0000.png")
    with pytest.raises(InputError, match=what) as caught:
        load_dataset("mini-object", "val", copied)[0]
    sentence(caught)


# ---- the protocol

@dataclass
class Toy:
    """Small images; the red channel of each pixel is its true label."""

    count: int = 3
    name: str = "toy"
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary.of("cat, dog"))
    has_background: bool = True

    @property
    def ids(self):
        return tuple(str(i) for i in range(self.count))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0 if self.has_background else 1, 3, (4 + index, 9, 3), dtype=np.uint8)
        labels = image[..., 0].copy()
        labels[0, index] = 255
        return Sample(str(index), image, labels)

    def __iter__(self):
        return (self[i] for i in range(self.count))


def test_a_perfect_segmenter_scores_one_and_a_blind_one_its_share():
    result = evaluate(lambda image: image[..., 0], Toy(), progress=False, settings={"seed": 3})
    assert (result.miou, result.images, result.dataset, result.settings) == (1.0, 3, "toy", {"seed": 3})
    assert result.class_names == ("background", "cat", "dog") and result.confusion.sum() == 9 * (4 + 5 + 6) - 3
    blind = evaluate(lambda image: np.zeros(image.shape[:2], int), Toy(), progress=False)
    share = blind.confusion[0].sum() / blind.confusion.sum()
    assert blind.iou.tolist() == [pytest.approx(share), 0, 0] and blind.miou == pytest.approx(share / 3)


def test_limit_takes_the_first_images(capsys):
    seen = []
    result = evaluate(lambda image: (seen.append(image.shape[0]), image[..., 0])[1], Toy(), limit=2)
    assert result.images == 2 and seen == [4, 5]
    assert "toy" in capsys.readouterr().err
    assert evaluate(lambda image: image[..., 0], Toy(), limit=99, progress=False).images == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("dataset", "limit"), [(Toy(), 0), (Toy(), -1), (Toy(count=0), None)])
def test_nothing_to_evaluate(dataset, limit):
    with pytest.raises(InputError) as caught:
        evaluate(lambda image: image[..., 0], dataset, limit=limit, progress=False)
    sentence(caught)


def test_a_prediction_of_the_wrong_shape_is_refused():
    with pytest.raises(InputError, match="shape"):
        evaluate(lambda image: image[..., 0].T, Toy(), progress=False)


def toy_scores(image):
    """Noisy scores that favour the truth; row 0 is nonsense that a threshold search must not use."""
    rng = np.random.default_rng(int(image.astype(int).sum()))
    scores = rng.random((3, *image.shape[:2]), dtype=np.float32)
    scores[1:] += image[..., 0] == np.arange(1, 3)[:, None, None]
    scores[0] = 100
    return scores


def test_threshold_search_equals_one_evaluation_a_threshold():
    thresholds = [0.9, -1.0, 0.5, 1.2, 3.0]
    scored = []
    found = search_threshold(lambda image: (scored.append(1), toy_scores(image))[1], Toy(), thresholds, progress=False)
    assert len(scored) == 3 and list(found) == sorted(thresholds)  # once an image, whatever the number of thresholds
    for threshold, result in found.items():
        def predict(image, constant=threshold):
            scores = toy_scores(image)
            scores[0] = constant
            return scores.argmax(axis=0)

        alone = evaluate(predict, Toy(), progress=False)
        assert (result.confusion == alone.confusion).all() and result.miou == alone.miou
        assert (result.by_image() == alone.by_image()).all()
    best = max(result.miou for result in found.values())
    threshold, result = best_of(found)
    assert result.miou == best and found[threshold] is result and all(found[t].miou < best for t in found if t < threshold)
    assert len({result.miou for result in found.values()}) > 2


def test_threshold_search_with_categories_that_a_filter_dropped():
    def scores(image):
        return np.stack([np.zeros(image.shape[:2]), np.full(image.shape[:2], -np.inf), np.full(image.shape[:2], -np.inf)])

    assert search_threshold(scores, Toy(), [-1e9], progress=False)[-1e9].confusion[:, 1:].sum() == 0


def test_threshold_search_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match="thresholds is empty"):
        search_threshold(toy_scores, Toy(), [], progress=False)
    with pytest.raises(InputError, match="scores 1 categories") as caught:
        search_threshold(lambda image: toy_scores(image)[:2], Toy(), [0.5], progress=False)
    sentence(caught)


# ---- data sets without background

def guess(image):
    """A segmenter that is right about half of the time, with labels 1 and 2 only."""
    return 1 + (image.astype(int).sum(axis=-1) % 2)


def by_hand(pairs, classes, first):
    """Confusion matrix and IoU of (predicted, true) label maps, pixel by pixel; the labels of the classes start at ``first``."""
    counts = [[0] * classes for _ in range(classes)]
    for predicted, true in pairs:
        for row_p, row_t in zip(predicted.tolist(), true.tolist(), strict=True):
            for p, t in zip(row_p, row_t, strict=True):
                if t != 255:
                    counts[t - first][p - first] += 1
    iou = []
    for c in range(classes):
        union = sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c]
        iou.append(counts[c][c] / union if union else float("nan"))
    return counts, iou


@pytest.mark.parametrize("background", [True, False])
def test_evaluation_equals_a_loop_over_pixels(background):
    dataset = Toy(4, has_background=background)
    result = evaluate(guess, dataset, progress=False)
    first = 0 if background else 1
    counts, iou = by_hand([(guess(s.image), s.labels) for s in dataset], 3 - first, first)
    assert result.confusion.tolist() == counts and result.confusion.dtype == np.int64
    assert result.iou.tolist() == pytest.approx(iou) and result.miou == pytest.approx(sum(iou) / len(iou))
    assert result.class_names == ("background", "cat", "dog")[first:]
    predicted, true = (np.concatenate([part.ravel() for part in parts]) for parts in zip(
        *[(guess(s.image), s.labels) for s in dataset], strict=True))
    assert (confusion_matrix(true[true != 255], predicted[true != 255], labels=range(first, 3)) == result.confusion).all()


@pytest.mark.parametrize("background", [True, False])
def test_the_counts_of_each_image_are_kept(background):
    dataset = Toy(4, has_background=background)
    result = evaluate(guess, dataset, progress=False)
    first = 0 if background else 1
    alone = [by_hand([(guess(s.image), s.labels)], 3 - first, first)[0] for s in dataset]
    assert result.by_image().tolist() == alone and (result.by_image().sum(0) == result.confusion).all()


def test_without_background_the_mean_is_over_the_categories():
    result = evaluate(lambda image: image[..., 0], Toy(has_background=False), progress=False)
    assert result.miou == 1 and result.iou.tolist() == [1, 1] and len(result.class_names) == 2
    # One class right, the other never predicted: half, not a third.
    only_cats = evaluate(lambda image: np.ones(image.shape[:2], np.uint8), Toy(has_background=False), progress=False)
    assert only_cats.iou[1] == 0 and only_cats.miou == pytest.approx(only_cats.iou[0] / 2)


def test_without_background_a_class_that_is_nowhere_is_left_out():
    dataset = Toy(has_background=False, vocabulary=Vocabulary.of("cat, dog, horse, bird"))
    result = evaluate(lambda image: np.where(image[..., 0] == 2, 3, 1), dataset, progress=False)
    assert result.iou[0] == 1 and result.iou[1] == result.iou[2] == 0 and np.isnan(result.iou[3])
    assert result.miou == pytest.approx(1 / 3)  # dogs missed, horses seen where there are none, birds nowhere


def test_background_must_not_be_predicted_where_there_is_none():
    def wrong(image):
        labels = image[..., 0].copy()
        labels[1, 1] = 0
        return labels

    with pytest.raises(InputError, match=r"Image 0 of toy: .*background") as caught:
        evaluate(wrong, Toy(has_background=False), progress=False)
    sentence(caught)

    def only_where_ignored(image):
        labels = image[..., 0].copy()
        labels[0, image.shape[0] - 4] = 0
        return labels

    assert evaluate(only_where_ignored, Toy(has_background=False), progress=False).miou == 1
    with pytest.raises(InputError, match="threshold") as caught:
        search_threshold(toy_scores, Toy(has_background=False), [0.5], progress=False)
    sentence(caught)


def test_a_bad_prediction_names_its_image():
    with pytest.raises(InputError, match="Image 2 of toy") as caught:
        evaluate(lambda image: image[..., 0] if len(image) < 6 else image[..., 0].T, Toy(), progress=False)
    sentence(caught)


def test_foreground_labels_leave_background_out():
    scores = np.full((3, 2, 3), -np.inf, np.float32)
    scores[0] = 9
    scores[1], scores[2, 0, 1] = 0.1, 0.2
    assert foreground_labels(scores).tolist() == [[1, 2, 1], [1, 1, 1]]


def test_the_pipeline_without_background(tiny_profile, tmp_path):
    """Background prototypes take no part, and every pixel goes to the category of the highest score."""
    from ovdiff_lib.pipeline import OVDiff

    ovdiff = OVDiff(tiny_profile, {"support.size": 2}, library=tmp_path, progress=False)
    vocabulary = Vocabulary.of("cat, dog")
    bank = ovdiff.build(vocabulary)
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    labels = {b: label_predictor(ovdiff, bank, Toy(vocabulary=vocabulary, has_background=b))(image) for b in (True, False)}
    assert labels[True].shape == labels[False].shape == (40, 70)
    assert (labels[True] == ovdiff.segment(image, bank).labels).all()
    scores = ovdiff.segment(image, bank).scores
    assert set(np.unique(labels[False])) <= {1, 2} and (labels[False] == np.where(scores[2] > scores[1], 2, 1)).all()


def test_a_score_of_the_background_is_asked_for_only_where_it_counts(tiny_profile, tmp_path):
    """Without background prototypes and without a threshold a data set without background is labelled as with any threshold."""
    from ovdiff_lib.errors import ProfileError
    from ovdiff_lib.pipeline import OVDiff
    from ovdiff_lib.workbench.evaluation.measure import for_dataset

    vocabulary, image = Vocabulary.of("cat, dog"), np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    with_, without = Toy(vocabulary=vocabulary), Toy(vocabulary=vocabulary, has_background=False)
    settings = {"support.size": 2, "prototypes.background": False, "filters.category": False}
    bare = OVDiff(tiny_profile, settings, library=tmp_path, progress=False)
    bank = for_dataset(bare, without).build(vocabulary)
    assert bank.without_background().prototypes["sd"][0].vectors.shape == bank.prototypes["sd"][0].vectors.shape
    labels = label_predictor(bare, bank, without)(image)
    assert set(np.unique(labels)) == {1, 2} and bare.profile.matching.background_threshold is None
    for threshold in (0.99, -0.5):
        given = OVDiff(bare.profile, {"matching.background_threshold": threshold}, library=tmp_path, progress=False)
        assert for_dataset(given, without) is given and np.array_equal(label_predictor(given, bank, without)(image), labels)
    assert for_dataset(bare, with_) is bare
    with pytest.raises(ProfileError, match=r"matching\.background_threshold") as caught:
        for_dataset(bare, with_).build(vocabulary)
    sentence(caught)


# ---- saved predictions

def save_all(folder, dataset, predict, shift=0, name="{}.png", palette=False):
    folder.mkdir()
    for sample in dataset:
        image = Image.fromarray((predict(sample.image) - shift).astype(np.uint8))
        if palette:
            image.putpalette(list(range(256)) * 3)
        image.save(folder / name.format(sample.id))
    return folder


@pytest.mark.parametrize("options", [{}, {"name": "{}_labels.png"}, {"palette": True}])
@pytest.mark.parametrize("background", [True, False])
def test_saved_predictions_score_as_the_method_itself(tmp_path, options, background):
    dataset = Toy(has_background=background)
    folder = save_all(tmp_path / "p", dataset, guess, **options)
    direct, saved = evaluate(guess, dataset, progress=False), evaluate(predictions_from(folder), dataset, progress=False)
    assert (direct.confusion == saved.confusion).all() and direct.miou == saved.miou and 0 < direct.miou < 1
    shifted = save_all(tmp_path / "z", dataset, guess, shift=1, **options)
    assert (evaluate(predictions_from(shifted, zero_based=True), dataset, progress=False).confusion == direct.confusion).all()


def test_mistakes_in_saved_predictions(tmp_path):
    dataset = Toy(8)
    folder = save_all(tmp_path / "p", dataset, guess)
    for i in (2, 3, 5, 7):
        (folder / f"{i}.png").unlink()
    with pytest.raises(InputError, match=r"lacks 4 of 8 predictions: 2.png, 3.png, 5.png and 1 more") as caught:
        evaluate(predictions_from(folder), dataset, progress=False)
    sentence(caught)
    assert evaluate(predictions_from(folder), dataset, limit=2, progress=False).images == 2
    Image.fromarray(np.zeros((9, 4), np.uint8)).save(folder / "0.png")
    with pytest.raises(InputError, match=r"0.png has the shape \(9, 4\)") as caught:
        evaluate(predictions_from(folder), dataset, limit=1, progress=False)
    sentence(caught)
    Image.fromarray(np.full((4, 9), 7, np.uint8)).save(folder / "0.png")
    with pytest.raises(InputError, match=r"Image 0 of toy: .*0 to 2") as caught:
        evaluate(predictions_from(folder), dataset, limit=1, progress=False)
    sentence(caught)
    with pytest.raises(InputError, match="does not exist") as caught:
        predictions_from(tmp_path / "none")
    sentence(caught)


# ---- going on after an interruption

class Interrupted:
    """Predicts until the image number ``at``, then ctrl-C; counts what it saw."""

    def __init__(self, at=None):
        self.at, self.seen = at, 0

    def __call__(self, image):
        if self.seen == self.at:
            raise KeyboardInterrupt
        self.seen += 1
        return guess(image)


SETTINGS = {"profile": "abc", "seed": 1}


@pytest.mark.parametrize("background", [True, False])
def test_an_interrupted_evaluation_goes_on_to_the_same_result(tmp_path, background):
    dataset = Toy(7, has_background=background)
    whole = evaluate(guess, dataset, progress=False)
    for stops, seen in ((3, 3), (2, 2)):
        part = Interrupted(stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(part, dataset, progress=False, settings=SETTINGS, resume=tmp_path / "deep" / "state")
        assert part.seen == seen and len(list((tmp_path / "deep" / "state").iterdir())) == 1
    rest = Interrupted()
    result = evaluate(rest, dataset, progress=False, settings=SETTINGS, resume=tmp_path / "deep" / "state")
    assert rest.seen == 2 and result.images == 7
    assert (result.confusion == whole.confusion).all() and result.miou == whole.miou
    assert (result.by_image() == whole.by_image()).all()
    again = Interrupted()
    finished = evaluate(again, dataset, progress=False, settings=SETTINGS, resume=tmp_path / "deep" / "state")
    assert again.seen == 0 and (finished.confusion == whole.confusion).all()


def test_a_killed_evaluation_loses_only_what_was_not_written(tmp_path, monkeypatch):
    """The state as it lies on disk while the run is at the fourth image, as after kill -9."""
    monkeypatch.setattr(measure, "SAVE_EVERY", 0.0)
    copy, dataset = tmp_path / "copy", Toy(6)

    def predict(image):
        if len(image) == 4 + 3:
            shutil.copytree(tmp_path / "state", copy)
        return guess(image)

    whole = evaluate(predict, dataset, progress=False, settings=SETTINGS, resume=tmp_path / "state")
    rest = Interrupted()
    result = evaluate(rest, dataset, progress=False, settings=SETTINGS, resume=copy)
    assert rest.seen == 3 and (result.confusion == whole.confusion).all()


def interrupted_state(folder, dataset, settings=SETTINGS, **options):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(3), dataset, progress=False, settings=settings, resume=folder, **options)
    return next(iter(folder.iterdir()))


@pytest.mark.parametrize("other", [
    {"settings": {"profile": "abd", "seed": 1}}, {"settings": {**SETTINGS, "more": None}}, {"limit": 5},
    {"dataset": Toy(8)}, {"dataset": Toy(7, name="other")}, {"dataset": Toy(7, vocabulary=Vocabulary.of("cat, cow"))},
    {"dataset": Toy(7, has_background=False)}])
def test_another_evaluation_does_not_go_on_from_it(tmp_path, other):
    state = interrupted_state(tmp_path, Toy(7))
    kept = state.read_bytes()
    fresh = Interrupted()
    options = {"dataset": Toy(7), "settings": SETTINGS, **other}
    result = evaluate(fresh, progress=False, resume=tmp_path, **options)
    assert fresh.seen == result.images == (5 if "limit" in other else len(options["dataset"]))
    assert state.read_bytes() == kept


@pytest.mark.parametrize("damage", ["empty", "torn", "garbage", "other key", "other shape", "too far", "cut", "negative"])
def test_a_state_that_cannot_be_used_is_reported_and_not_used(tmp_path, caplog, damage):
    dataset = Toy(7)
    whole = evaluate(guess, dataset, progress=False)
    state = interrupted_state(tmp_path, dataset)
    content = state.read_bytes()
    with np.load(state) as stored:
        fields = dict(stored)
    if damage in ("empty", "torn", "garbage"):
        state.write_bytes({"empty": b"", "torn": content[:len(content) // 2], "garbage": b"x" * 100}[damage])
    else:
        changes = {"other key": {"key": np.array("{}")}, "other shape": {"places": fields["places"] + 9},
                   "cut": {"values": fields["values"][1:]}, "negative": {"values": -fields["values"]},
                   "too far": {"lengths": np.append(fields["lengths"], [0] * 5)}}[damage]
        np.savez(state, **{**fields, **changes})
    fresh = Interrupted()
    result = evaluate(fresh, dataset, progress=False, settings=SETTINGS, resume=tmp_path)
    assert fresh.seen == 7 and (result.confusion == whole.confusion).all()
    assert len(caplog.records) == 1 and str(state) in caplog.text and "measured again" in caplog.text


def test_a_state_needs_settings_that_tell_it_from_others(tmp_path):
    for settings, words in ((None, "needs its settings"), ({}, "needs its settings"), ({"model": object()}, "plain")):
        with pytest.raises(InputError, match=words) as caught:
            evaluate(guess, Toy(), progress=False, settings=settings, resume=tmp_path)
        sentence(caught)


def test_an_error_keeps_the_state_too(tmp_path):
    def broken(image):
        if len(image) == 6:
            raise RuntimeError("out of memory")
        return guess(image)

    with pytest.raises(RuntimeError):
        evaluate(broken, Toy(), progress=False, settings=SETTINGS, resume=tmp_path)
    rest = Interrupted()
    assert evaluate(rest, Toy(), progress=False, settings=SETTINGS, resume=tmp_path).images == 3 and rest.seen == 1


# ---- the commands

@pytest.fixture
def cli(tiny_profile, tmp_path, monkeypatch):
    """Runs ``ovdiff evaluate | convert`` with a stand-in for the pipeline; returns the exit code."""
    from ovdiff_lib.cli.main import parser
    from ovdiff_lib.errors import OVDiffError
    from ovdiff_lib.pipeline import OVDiff

    extra = {}

    def ovdiff(options):
        return OVDiff(tiny_profile, {"support.size": 2, **extra}, library=tmp_path / "library", progress=False)

    monkeypatch.setattr("ovdiff_lib.cli.evaluate.ovdiff_of", ovdiff)

    def run(*arguments, settings=None):
        extra.clear()
        extra.update(settings or {})
        options = parser().parse_args([str(a) for a in arguments])
        try:
            options.run(options)
        except OVDiffError as error:
            return str(error)
        return 0

    return run


@pytest.fixture
def two_classes(monkeypatch):
    """Cityscapes cut to its first two classes, so that a tiny pipeline can build them."""
    from ovdiff_lib.workbench.data import classes, readers

    original = classes.vocabulary_of
    monkeypatch.setattr(readers, "vocabulary_of", lambda *a: Vocabulary(original(*a).categories[:2]))


def write_cityscapes(root):
    for i, shape in enumerate(((9, 14), (12, 8))):
        for part, end, values in (("leftImg8bit", "leftImg8bit", None), ("gtFine", "gtFine_labelIds", [7, 8, 0])):
            path = root / part / "val" / "ulm" / f"ulm_{i}_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8) if values is None else np.resize(values, shape)
            Image.fromarray(array.astype(np.uint8)).save(path)


def test_commands_on_a_data_set_without_background(cli, tmp_path, capsys, two_classes):
    write_cityscapes(tmp_path / "data")
    target = tmp_path / "result.json"
    assert cli("evaluate", "cityscapes", "--data", tmp_path / "data", "--json", target, "--resume", tmp_path / "state") == 0
    said = capsys.readouterr().out
    table = json.loads(target.read_text())
    assert list(table["iou"]) == ["road", "sidewalk"] and table["background"] is False and table["images"] == 2
    assert "500 images" in said and "Background is not evaluated" in said and f"{100 * table['miou']:.1f}" in said.splitlines()[-1]
    assert len(list(tmp_path.glob("state/*"))) == 1
    bare = tmp_path / "bare.json"
    assert cli("evaluate", "cityscapes", "--data", tmp_path / "data", "--json", bare, settings={"prototypes.background": False}) == 0
    assert json.loads(bare.read_text())["iou"] == table["iou"]  # background prototypes take no part
    capsys.readouterr()

    assert cli("convert", "cityscapes", "--data", tmp_path / "data") == 0
    assert "2 label maps" in capsys.readouterr().out
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for path in (tmp_path / "data" / "gtFine").rglob("*_gtFine_labelTrainIds.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 255, 0, labels)).save(predictions / path.name.replace("_gtFine_labelTrainIds", ""))
    assert cli("evaluate", "cityscapes", "--data", tmp_path / "data", "--predictions", predictions, "--zero-based", "--json", target) == 0
    assert json.loads(target.read_text())["miou"] == 1 and "100.0" in capsys.readouterr().out
    assert "background" in cli("evaluate", "cityscapes", "--data", tmp_path / "data", "--predictions", predictions)


@pytest.mark.parametrize(("arguments", "words"), [
    (("evaluate", "cityscapes"), "--data"), (("evaluate", "coco"), "choose one of"),
    (("evaluate", "mini-voc", "--zero-based"), "--predictions"),
    (("evaluate", "mini-voc", "--predictions", "x", "--resume", "y"), "--resume"), (("evaluate", "mini-voc", "--names", "x"), "fourteen"),
    (("evaluate", "mini-voc", "--predictions", "none"), "does not exist"), (("convert", "context", "--data", "x"), "--json"),
    (("convert", "coco-stuff", "--data", "none"), "does not exist")])
def test_mistakes_on_the_command_line(cli, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = cli(*arguments)
    assert said != 0 and words in said and "\n" not in said
