"""Data sets against their own files, the mIoU against scikit-learn and torchmetrics, the threshold search against brute force."""

import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from ovdiff_lib.errors import InputError
from ovdiff_lib.evaluation import DATASETS, ConfusionMatrix, Sample, evaluate, grid_search_threshold, load_dataset
from ovdiff_lib.evaluation.datasets import MINI_DATA
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.types import Vocabulary

SPLITS = ("val", "wild")


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
    (np.full((1, 2), -1), np.zeros((1, 2), int)), (np.zeros((1, 2), int), np.full((1, 2), 3))])
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
@pytest.mark.parametrize("name", DATASETS)
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
@pytest.mark.parametrize("name", DATASETS)
def test_every_class_is_seen_and_ignored_pixels_are_few(name, split):
    dataset = load_dataset(name, split=split)
    counts = sum(np.bincount(sample.labels.ravel(), minlength=256) for sample in dataset)
    assert (counts[1:len(dataset.vocabulary) + 1] > 0).all()
    assert counts[len(dataset.vocabulary) + 1:255].sum() == 0
    assert 0 < counts[255] < 0.2 * counts.sum()


def test_kinds_of_the_vocabularies():
    kinds = {name: [c.kind for c in load_dataset(name).vocabulary] for name in DATASETS}
    assert set(kinds["mini-voc"]) == set(kinds["mini-object"]) == {"thing"}
    assert len(kinds["mini-voc"]) == 20 and kinds["mini-context"] == ["thing"] * 20 + ["stuff"] * len(load_world().stuff)


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
    """Three small images; the red channel of each pixel is its true label."""

    count: int = 3
    name: str = "toy"
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary.of("cat, dog"))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 3, (4 + index, 9, 3), dtype=np.uint8)
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
    thresholds = [-1.0, 0.5, 0.9, 1.2, 3.0]
    scored = []
    search = grid_search_threshold(lambda image: (scored.append(1), toy_scores(image))[1], Toy(), thresholds, progress=False,
                                   settings={"method": "x"})
    assert len(scored) == 3  # once an image, whatever the number of thresholds
    for threshold, result in zip(thresholds, search.results, strict=True):
        def predict(image, constant=threshold):
            scores = toy_scores(image)
            scores[0] = constant
            return scores.argmax(axis=0)

        alone = evaluate(predict, Toy(), progress=False)
        assert (result.confusion == alone.confusion).all() and result.miou == alone.miou
        assert result.settings == {"method": "x", "background_threshold": threshold}
    best = max(result.miou for result in search.results)
    assert search.best.miou == best and search.results[thresholds.index(search.best_threshold)] is search.best
    assert len({result.miou for result in search.results}) > 2


def test_threshold_search_with_categories_that_a_filter_dropped():
    def scores(image):
        return np.stack([np.zeros(image.shape[:2]), np.full(image.shape[:2], -np.inf), np.full(image.shape[:2], -np.inf)])

    assert grid_search_threshold(scores, Toy(), [-1e9], progress=False).best.confusion[:, 1:].sum() == 0


def test_threshold_search_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match="thresholds is empty"):
        grid_search_threshold(toy_scores, Toy(), [], progress=False)
    with pytest.raises(InputError, match="scores 1 categories") as caught:
        grid_search_threshold(lambda image: toy_scores(image)[:2], Toy(), [0.5], progress=False)
    sentence(caught)
