"""The mini data sets against their own files, the mIoU against scikit-learn, torchmetrics and loops, the protocol."""

import json
import shutil

import numpy as np
import pytest
import torch
from oracles import Toy, guess, refused
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import ProfileError
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.workbench.data import classes, datasets
from ovdiff_lib.workbench.data.datasets import MINI_DATA, load_dataset
from ovdiff_lib.workbench.data.metrics import ConfusionMatrix
from ovdiff_lib.workbench.data.samples import SavedPredictions
from ovdiff_lib.workbench.evaluation.measure import evaluate, for_dataset, foreground_labels, label_predictor

SPLITS = ("tune", "val", "wild")
MINI = ("mini-voc", "mini-object", "mini-context")


# ---- metrics

@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (5, 1), (21, 2), (60, 3)])
def test_confusion_and_miou_equal_two_libraries(classes, seed):
    rng, matrix = np.random.default_rng(seed), ConfusionMatrix(classes)
    reference = MulticlassConfusionMatrix(classes, ignore_index=255)
    jaccard = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
    flat = []
    for shape in ((7, 11), (13, 5), (1, 9)):
        target = rng.integers(0, classes, shape).astype(np.uint8)
        predicted = np.where(rng.random(shape) < 0.6, target, rng.integers(0, classes, shape))
        target[rng.random(shape) < 0.2] = 255
        matrix.update(predicted, target)
        pair = [torch.from_numpy(labels.astype(np.int64))[None] for labels in (predicted, target)]
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
    matrix.update(np.array([[0, 1, 1], [2, 0, 99]]), np.array([[0, 0, 1], [1, 255, 255]]))
    # class 0: 1 of 2; class 1: 1 of 3; class 2: predicted once, never true: 0; class 3: nowhere
    assert matrix.iou()[:3].tolist() == [1 / 2, 1 / 3, 0] and np.isnan(matrix.iou()[3])
    assert matrix.miou() == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert matrix.counts.sum() == 4 and matrix.counts[1, 2] == 1 and matrix.counts.dtype == np.int64
    nothing = ConfusionMatrix(3)
    nothing.update(np.zeros((2, 3), int), np.full((2, 3), 255))
    assert np.isnan(nothing.miou()) and np.isnan(nothing.iou()).all()


@pytest.mark.parametrize(("predicted", "target"), [
    (np.zeros((2, 3), int), np.zeros((3, 2), int)), (np.full((1, 2), 3), np.zeros((1, 2), int)),
    (np.full((1, 2), -1), np.zeros((1, 2), int)), (np.zeros((1, 2), int), np.full((1, 2), 3)),
    (np.zeros((1, 2)), np.zeros((1, 2), int)), (np.zeros((1, 2), bool), np.zeros((1, 2), int))])
def test_shapes_and_labels_that_do_not_fit(predicted, target):
    matrix = ConfusionMatrix(3)
    refused("", matrix.update, predicted, target)
    assert not matrix.counts.any()


# ---- the mini data sets

@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MINI)
def test_every_label_is_that_of_its_own_file(name, split):
    dataset, world = load_dataset(name, split=split), load_world()
    names = dataset.vocabulary.names
    assert dataset.name == name and names == world.vocabulary(name)
    assert [c.kind for c in dataset.vocabulary] == ["stuff" if word in world.stuff else "thing" for word in names]
    scenes = {row["id"]: row for row in json.loads((MINI_DATA / split / "scenes.json").read_text())}
    shown = [i for i, row in scenes.items() if set(row["things"] + row["stuff"]) & set(names)]
    assert list(dataset.ids) == shown and len(dataset) == len(shown) > 0
    for index in range(0, len(dataset), max(1, len(dataset) // 12)):
        sample = dataset[index]
        raw = np.array(Image.open(MINI_DATA / split / "labels" / f"{sample.id}.png"))
        assert sample.image.dtype == sample.labels.dtype == np.uint8 and raw.shape[0] != raw.shape[1]
        assert sample.image.shape == (*sample.labels.shape, 3) and sample.labels.shape == raw.shape
        for value in np.unique(raw):
            word = None if value in (0, 255) else world.names[value - 1]
            expected = 255 if value == 255 else names.index(word) + 1 if word in names else 0
            assert np.unique(sample.labels[raw == value]).tolist() == [expected], (sample.id, word)
    # Every class is seen, and ignored pixels are few.
    counts = sum(np.bincount(dataset.labels(i).ravel(), minlength=256) for i in range(len(dataset)))
    assert (counts[1:len(dataset.vocabulary) + 1] > 0).all()
    assert counts[len(dataset.vocabulary) + 1:255].sum() == 0
    assert 0 < counts[255] < 0.2 * counts.sum()
    first = load_dataset(name, split=split)[0]  # the same samples every time
    assert (first.image == dataset[0].image).all() and (first.labels == dataset[0].labels).all()


@pytest.mark.parametrize(("name", "plain"), [
    ("mini-voc20", "mini-voc"), ("mini-context28", "mini-context"), ("mini-object42", "mini-object")])
def test_without_background_the_rest_is_ignored(name, plain):
    """App. A.3: the same images and categories; what was background does not count."""
    bare, whole = load_dataset(name), load_dataset(plain)
    assert bare.vocabulary == whole.vocabulary and bare.ids == whole.ids
    assert (bare.has_background, whole.has_background) == (False, True)
    for one, other in [(bare[i], whole[i]) for i in (0, 7)]:
        assert (one.labels == np.where(other.labels == 0, 255, other.labels)).all() and (one.labels == 255).any()


def test_a_source_may_name_the_split_or_the_folder():
    elsewhere = load_dataset(f"mini-voc:{MINI_DATA}")
    assert elsewhere.folder == MINI_DATA and elsewhere.ids == load_dataset("mini-voc").ids
    assert load_dataset("mini-voc/wild").ids == load_dataset("mini-voc", "wild").ids != elsewhere.ids


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
    assert [s.id for s in load_dataset("mini-object", "val", tmp_path)] == ["0000", "0001", "0002"]
    return tmp_path


@pytest.mark.parametrize(("name", "content"), [
    ("scenes.json", None), ("images/0001.webp", None), ("labels/0002.png", None), ("scenes.json", b"{"),
    ("images/0000.webp", b"RIFF"), ("labels/0000.png", b"x"), ("labels/0000.png", b"")])
def test_missing_and_broken_files_are_named(copied, name, content):
    path = copied / "val" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    refused(path.name, lambda: load_dataset("mini-object", "val", copied)[0])


@pytest.mark.parametrize(("image", "what"), [
    (Image.new("L", (20, 30)), "shape"), (Image.new("RGB", (160, 128)), "8-bit"), (Image.new("L", (160, 128), 200), "200")])
def test_label_maps_that_do_not_fit_their_image(copied, image, what):
    image.save(copied / "val" / "labels" / "0000.png")
    refused(what, lambda: load_dataset("mini-object", "val", copied)[0])


# ---- the protocol

def red(image):
    return image[..., 0]


def measured(predict, dataset=None, **options):
    return evaluate(predict, Toy() if dataset is None else dataset, progress=False, **options)


@pytest.mark.parametrize("background", [True, False])
def test_an_evaluation_is_the_sum_of_its_images_without_what_is_ignored(background):
    dataset, first = Toy(4, has_background=background), 0 if background else 1
    result = measured(guess, dataset)
    alone = [confusion_matrix(s.labels[s.labels != 255], guess(s.image)[s.labels != 255], labels=range(first, 3)) for s in dataset]
    assert (result.by_image() == alone).all() and (result.confusion == sum(alone)).all() and result.confusion.dtype == np.int64
    by_hand = ConfusionMatrix(3 - first, counts=sum(alone))
    assert result.miou == by_hand.miou() and result.iou.tolist() == by_hand.iou().tolist()
    assert (result.class_names, result.images, result.dataset) == (("background", "cat", "dog")[first:], 4, "toy")


def test_limit_takes_the_first_images(capsys):
    seen = []
    result = evaluate(lambda image: (seen.append(image.shape[0]), red(image))[1], Toy(), limit=2)
    assert result.images == 2 and seen == [4, 5] and "toy" in capsys.readouterr().err
    assert measured(red, limit=99).images == 3 and capsys.readouterr().err == ""
    for dataset, limit in ((Toy(), 0), (Toy(), -1), (Toy(count=0), None)):
        refused("", measured, red, dataset, limit=limit)


def test_a_bad_prediction_names_its_image():
    refused("Image 2 of toy", measured, lambda image: red(image) if len(image) < 6 else red(image).T)


# ---- data sets without background

def test_without_background_the_mean_is_over_the_categories():
    dataset = Toy(has_background=False)
    assert measured(red, dataset).miou == 1 and measured(red, dataset).iou.tolist() == [1, 1]
    # One class right, the other never predicted: half, not a third.
    only_cats = measured(lambda image: np.ones(image.shape[:2], np.uint8), dataset)
    assert only_cats.iou[1] == 0 and only_cats.miou == pytest.approx(only_cats.iou[0] / 2)
    more = Toy(has_background=False, vocabulary=Vocabulary.of("cat, dog, horse, bird"))
    result = measured(lambda image: np.where(red(image) == 2, 3, 1), more)
    assert result.iou[0] == 1 and result.iou[1] == result.iou[2] == 0 and np.isnan(result.iou[3])
    assert result.miou == pytest.approx(1 / 3)  # dogs missed, horses seen where there are none, birds nowhere


def test_background_must_not_be_predicted_where_there_is_none():
    def background_at(row, column_of):
        def predict(image):
            labels = red(image).copy()
            labels[row, column_of(image)] = 0
            return labels

        return predict

    dataset = Toy(has_background=False)
    refused("Image 0 of toy", measured, background_at(1, lambda image: 1), dataset)
    assert measured(background_at(0, lambda image: len(image) - 4), dataset).miou == 1  # where it is ignored


def test_the_pipeline_without_background(tiny_profile, tmp_path):
    """Background prototypes take no part, and every pixel goes to the category of the highest score; a profile without
    them needs no threshold there."""
    vocabulary = Vocabulary.of("cat, dog")
    with_, without = (Toy(vocabulary=vocabulary, has_background=b) for b in (True, False))
    ovdiff = OVDiff(tiny_profile, {"support.size": 2, "filters.category": False}, library=tmp_path, progress=False)
    bank, image = ovdiff.build(vocabulary), np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    labels = {dataset.has_background: label_predictor(ovdiff, bank, dataset)(image) for dataset in (with_, without)}
    whole = ovdiff.segment(image, bank)
    assert labels[True].shape == labels[False].shape == (40, 70) and (labels[True] == whole.labels).all()
    assert (labels[False] == np.where(whole.scores[2] > whole.scores[1], 2, 1)).all()
    scores = np.full((3, 2, 3), -np.inf, np.float32)
    scores[0], scores[1], scores[2, 0, 1] = 9, 0.1, 0.2
    assert foreground_labels(scores).tolist() == [[1, 2, 1], [1, 1, 1]]

    bare = ovdiff.replaced({"prototypes.background": False})
    bank = for_dataset(bare, without).build(vocabulary)
    assert bank.without_background().prototypes["sd"][0].vectors.shape == bank.prototypes["sd"][0].vectors.shape
    labels = label_predictor(bare, bank, without)(image)
    assert set(np.unique(labels)) == {1, 2} and bare.profile.matching.background_threshold is None
    for threshold in (0.99, -0.5):
        given = bare.replaced({"matching.background_threshold": threshold})
        assert np.array_equal(label_predictor(given, bank, without)(image), labels)
    assert for_dataset(bare, with_) is bare
    with pytest.raises(ProfileError, match=r"matching\.background_threshold"):
        for_dataset(bare, with_).build(vocabulary)


# ---- saved predictions

def save_all(folder, dataset, name="{}.png", palette=False):
    folder.mkdir()
    for sample in dataset:
        image = Image.fromarray(guess(sample.image).astype(np.uint8))
        if palette:
            image.putpalette(list(range(256)) * 3)
        image.save(folder / name.format(sample.id))
    return folder


@pytest.mark.parametrize("options", [{}, {"name": "{}_labels.png"}, {"palette": True}])
@pytest.mark.parametrize("background", [True, False])
def test_saved_predictions_score_as_the_method_itself(tmp_path, options, background):
    dataset = Toy(has_background=background)
    direct = measured(guess, dataset)
    saved = measured(SavedPredictions(save_all(tmp_path / "p", dataset, **options)), dataset)
    assert (direct.confusion == saved.confusion).all() and direct.miou == saved.miou and 0 < direct.miou < 1


def test_mistakes_in_saved_predictions(tmp_path):
    dataset = Toy(8)
    folder = save_all(tmp_path / "p", dataset)
    for i in (2, 3, 5, 7):
        (folder / f"{i}.png").unlink()
    refused("4 of 8 predictions, the first is 2.png", measured, SavedPredictions(folder), dataset)
    assert measured(SavedPredictions(folder), dataset, limit=2).images == 2
    for wrong, words in ((np.zeros((9, 4)), "(9, 4)"), (np.full((4, 9), 7), "Image 0 of toy")):
        Image.fromarray(wrong.astype(np.uint8)).save(folder / "0.png")
        refused(words, measured, SavedPredictions(folder), dataset, limit=1)
    refused("does not exist", SavedPredictions, tmp_path / "none")


# ---- the commands

def write_cityscapes(root):
    for i, shape in enumerate(((9, 14), (12, 8))):
        image = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
        for place, array in ((f"leftImg8bit/val/ulm/ulm_{i}_leftImg8bit.png", image),
                             (f"gtFine/val/ulm/ulm_{i}_gtFine_labelIds.png", np.resize([7, 8, 0], shape))):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(root / place)


@pytest.fixture
def two_classes(tmp_path, monkeypatch):
    """A folder of Cityscapes, which is cut to its first two classes, so that a tiny pipeline can build them."""
    original = classes.vocabulary_of
    monkeypatch.setattr(datasets, "vocabulary_of", lambda *a: Vocabulary(original(*a).categories[:2]))
    write_cityscapes(tmp_path / "data")
    return tmp_path / "data"


def test_commands_on_a_data_set_without_background(tiny, two_classes, tmp_path, capsys):
    target, bare, command = tmp_path / "result.json", tmp_path / "bare.json", ["evaluate", "cityscapes", "--data", str(two_classes)]
    assert main([*command, "--json", str(target), *tiny]) == 0
    said = capsys.readouterr().out
    table = json.loads(target.read_text())
    assert list(table) == ["road", "sidewalk", "mIoU"] and "2 images" in said
    assert "Background is not" in said and f"{100 * table['mIoU']:.1f}" in said.splitlines()[-1]
    assert main([*command, "--json", str(bare), *tiny, "--set", "prototypes.background=false"]) == 0
    assert json.loads(bare.read_text()) == table  # background prototypes take no part

    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for sample in load_dataset("cityscapes", folder=two_classes):
        Image.fromarray(np.where(sample.labels == 255, 1, sample.labels)).save(predictions / f"{sample.id}.png")
    assert main([*command, "--predictions", str(predictions), "--json", str(target)]) == 0
    assert json.loads(target.read_text())["mIoU"] == 1


def test_an_interrupted_evaluation_goes_on(tiny, two_classes, tmp_path, monkeypatch):
    """The second of two images is interrupted; the same command then segments that one alone."""
    segment, seen, target = OVDiff.segment, [], tmp_path / "result.json"

    def interrupted(self, image, bank):
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return segment(self, image, bank)

    command = ["evaluate", "cityscapes", "--data", str(two_classes), "--json", str(target), *tiny]
    monkeypatch.setattr(OVDiff, "segment", interrupted)
    assert main(command) == 130 and main(command) == 0 and len(seen) == 3
    in_parts = target.read_text()
    shutil.rmtree(tmp_path / "library" / "counts")
    assert main(command) == 0 and len(seen) == 5 and target.read_text() == in_parts
