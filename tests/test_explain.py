"""From a pixel to the support regions: on a bank and a segmentation made by hand."""

import numpy as np
import pytest

from ovdiff_lib.errors import InputError
from ovdiff_lib.explain import explain, origin, region_mask
from ovdiff_lib.profiles.profile import PrototypeSettings
from ovdiff_lib.prototypes import build_prototypes
from ovdiff_lib.types import ForegroundBackground, PrototypeBank, Prototypes, Segmentation, Vocabulary

# Two support images on a 2 x 3 grid, K = 4: foreground clusters 0 and 1, background clusters 4 and 5, -1 unused.
ASSIGNMENT = np.array([[[0, 0, 4], [1, -1, 5]], [[1, 4, 4], [1, 1, 4]]], np.int16)
KIND = np.array(["class", "instance", "instance", "part", "part", "class", "instance", "instance", "part", "part"])
REGION = np.array(["foreground"] * 5 + ["background"] * 5)
IMAGE = np.array([-1, 0, 1, -1, -1, -1, 0, 1, -1, -1], np.int32)
CLUSTER = np.array([-1, -1, -1, 0, 1, -1, -1, -1, 4, 5], np.int32)
FOREGROUND = np.array([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 0]]], bool)
BACKGROUND = np.array([[[0, 0, 1], [0, 0, 1]], [[0, 1, 1], [0, 0, 1]]], bool)


def rows():
    return Prototypes(np.arange(30, dtype=np.float32).reshape(10, 3), KIND, REGION, IMAGE, CLUSTER, ASSIGNMENT)


def make(label, winner, kept=(0, 2)):
    """A 3 x 5 segmentation of cat, dog (dropped by the filter) and sofa, decided at (2, 3)."""
    labels, winners = np.zeros((3, 5), np.int32), np.full((3, 5), -1, np.int32)
    labels[2, 3], winners[2, 3] = label, winner
    scores = np.full((4, 3, 5), -np.inf, np.float32)
    scores[[0, *(k + 1 for k in kept)], 2, 3] = [0.4, 0.5, 0.3][: len(kept) + 1]
    scores[label, 2, 3] = 0.9
    vocabulary = Vocabulary.of("cat, dog, sofa")
    bank = PrototypeBank(vocabulary, {"sd": (rows(),) * 3, "clip": (rows(),) * 3})
    return Segmentation(np.zeros((3, 5, 3), np.uint8), labels, scores, winners, vocabulary, kept, np.ones(3, np.float32)), bank


def test_a_part_prototype_leads_to_the_pixels_of_its_cluster():
    found = explain(*make(3, 4), 2, 3)
    assert (found.class_name, found.category, found.kind, found.region, found.index) == ("sofa", "sofa", "part", "foreground", 4)
    assert found.extractor == "sd" and found.images == (1, 0)  # three pixels there, one here
    assert found.masks.tolist() == (ASSIGNMENT[[1, 0]] == 1).tolist()
    assert found.score == pytest.approx(0.9) and found.runner_up == "cat" and found.margin == pytest.approx(0.4)
    assert str(found).startswith("pixel (2, 3) is sofa (score 0.900, 0.400 above cat): a foreground part prototype of sofa")


def test_instance_and_class_prototypes():
    instance = explain(*make(1, 2), 2, 3)
    assert instance.category == "cat" and instance.images == (1,) and (instance.masks == FOREGROUND[[1]]).all()
    whole = explain(*make(1, 0), 2, 3)
    assert whole.images == (0, 1) and (whole.masks == FOREGROUND).all()  # equal counts keep the order of the images


@pytest.mark.parametrize(("winner", "category", "index"), [(0, "cat", 5), (4, "cat", 9), (5, "sofa", 5), (8, "sofa", 8)])
def test_background_counts_the_rows_of_the_kept_categories(winner, category, index):
    found = explain(*make(0, winner), 2, 3)
    assert (found.class_name, found.category, found.index, found.region) == ("background", category, index, "background")
    if found.kind == "part":
        assert (found.masks == (ASSIGNMENT == CLUSTER[index])[list(found.images)]).all()
    else:
        assert (found.masks == BACKGROUND[list(found.images)]).all()


def test_the_restricted_bank_gives_the_same_and_another_bank_is_refused():
    segmentation, bank = make(0, 8)
    assert str(explain(segmentation, bank, 2, 3)) == str(explain(segmentation, bank.restrict([0, 2]), 2, 3))
    with pytest.raises(InputError, match="other classes"):
        explain(segmentation, bank.restrict([0, 1]), 2, 3)
    for label, winner in ((0, 10), (1, 7), (1, 12)):  # too many; a background row of a class; no such row
        with pytest.raises(InputError, match="does not hold"):
            explain(*make(label, winner), 2, 3)


def test_a_constant_background_has_no_prototype_and_a_lone_class_no_runner_up():
    found = explain(*make(0, -1), 2, 3)
    assert found.kind is None and found.index is None and found.category is None and found.images == () and found.masks.shape == (0, 0, 0)
    assert "constant background score" in str(found)
    segmentation, bank = make(1, 0, kept=(0,))
    segmentation.scores[0] = -np.inf
    lone = explain(segmentation, bank, 2, 3)
    assert lone.runner_up is None and lone.margin is None


@pytest.mark.parametrize(("row", "column"), [(3, 0), (0, 5), (-1, 0), (0, -1)])
def test_pixels_outside_the_image(row, column):
    with pytest.raises(InputError, match=r"row from 0 to 2 and a column from 0 to 4"):
        explain(*make(1, 0), row, column)


@pytest.mark.parametrize("kinds", [["class", "instance", "part"], ["class", "instance"], ["part"]])
def test_every_built_prototype_is_the_mean_of_the_pixels_it_is_explained_by(kinds):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    level = rng.integers(0, 3, (3, 4, 5))
    masks = ForegroundBackground(level == 2, level == 0, ("threshold",) * 3)
    built = build_prototypes(features, masks, PrototypeSettings(kinds=kinds, clusters=3))
    assert (region_mask(built, "foreground") == (level == 2)).all() and (region_mask(built, "background") == (level == 0)).all()
    for index in range(len(built)):
        images, pixels = origin(built, index)
        assert np.allclose(features[list(images)][pixels].mean(0), built.vectors[index], atol=1e-5)


def test_background_rows_may_be_filtered_but_parts_must_stay():
    less = rows().select(np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 1], bool))
    assert (region_mask(less, "background") == BACKGROUND).all()
    with pytest.raises(InputError, match="taken out"):
        origin(rows().select(KIND != "part"), 0)
    images, _ = origin(rows().select(KIND == "part"), 0)
    assert images == (0,)
