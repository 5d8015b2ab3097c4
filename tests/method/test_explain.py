"""From a pixel to the support regions, and from an absent class to the reason: on a bank and segmentations made by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.explain import BELOW, NOT_AMONG_TOP, NOT_BEST, absent_classes, activated, decided_by
from ovdiff_lib.profiles.schema import Filters, PrototypeSettings
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import ForegroundBackground, PrototypeBank, Prototypes

# Two support images on a 2 x 3 grid: foreground clusters 1 and 2, background clusters -1 and -2, 0 unused.
ASSIGNMENT = np.array([[[1, 1, -1], [2, 0, -2]], [[2, -1, -1], [2, 2, -1]]], np.int16)
KIND = np.array(["class", "instance", "instance", "part", "part", "class", "instance", "instance", "part", "part"])
REGION = np.array(["foreground"] * 5 + ["background"] * 5)
IMAGE = np.array([-1, 0, 1, -1, -1, -1, 0, 1, -1, -1], np.int32)
CLUSTER = np.array([0, 0, 0, 1, 2, 0, 0, 0, -1, -2], np.int32)
BACKGROUND = np.array([[[0, 0, 1], [0, 0, 1]], [[0, 1, 1], [0, 0, 1]]], bool)


def rows():
    return Prototypes(np.arange(30, dtype=np.float32).reshape(10, 3), KIND, REGION, IMAGE, CLUSTER, ASSIGNMENT)


def make(label, winner, kept=(0, 2)):
    """A 3 x 5 segmentation of cat, dog (dropped by the filter) and sofa, decided at (2, 3) by ``winner`` = (category among kept, row)."""
    labels, winners = np.zeros((3, 5), np.int32), np.full((2, 3, 5), -1, np.int32)
    labels[2, 3], winners[:, 2, 3] = label, winner
    scores = np.full((4, 3, 5), -np.inf, np.float32)
    scores[[0, *(k + 1 for k in kept)], 2, 3] = [0.4, 0.5, 0.3][: len(kept) + 1]
    scores[label, 2, 3] = 0.9
    vocabulary = Vocabulary.of("cat, dog, sofa")
    bank = PrototypeBank(vocabulary, {"sd": (rows(),) * 3, "clip": (rows(),) * 3}).restrict(kept)
    return Segmentation(np.zeros((3, 5, 3), np.uint8), labels, scores[[0, *(k + 1 for k in kept)]], winners, vocabulary, kept,
                        np.ones(3, np.float32), bank)


def test_a_part_prototype_leads_to_the_pixels_of_its_cluster():
    found = make(3, (1, 4)).explain(2, 3)
    assert (found.class_name, found.category, found.kind, found.region, found.index) == ("sofa", "sofa", "part", "foreground", 4)
    assert found.extractor == "sd" and found.images == (1, 0)  # three pixels there, one here
    assert found.masks.tolist() == (ASSIGNMENT[[1, 0]] == 2).tolist()
    assert found.score == pytest.approx(0.9) and found.runner_up == "cat" and found.margin == pytest.approx(0.4)
    assert str(found).startswith("pixel (2, 3) is sofa (score 0.900, 0.400 above cat): a foreground part prototype of sofa")


@pytest.mark.parametrize(("number", "category", "index"), [(0, "cat", 5), (0, "cat", 9), (1, "sofa", 5), (1, "sofa", 8)])
def test_background_is_explained_by_any_kept_category(number, category, index):
    found = make(0, (number, index)).explain(2, 3)
    assert (found.class_name, found.category, found.index, found.region) == ("background", category, index, "background")
    wanted = ASSIGNMENT == CLUSTER[index] if found.kind == "part" else BACKGROUND
    assert (found.masks == wanted[list(found.images)]).all()


def test_a_constant_background_has_no_prototype_and_a_lone_class_no_runner_up():
    found = make(0, (-1, -1)).explain(2, 3)
    assert found.kind is None and found.index is None and found.category is None and found.images == () and found.masks.shape == (0, 0, 0)
    assert "constant background score" in str(found)
    segmentation = make(1, (0, 0), kept=(0,))
    segmentation.kept_scores[0] = -np.inf
    lone = segmentation.explain(2, 3)
    assert lone.runner_up is None and lone.margin is None


def test_what_cannot_be_explained_is_one_sentence():
    for row, column in ((3, 0), (0, 5), (-1, 0), (0, -1)):
        with pytest.raises(InputError, match=r"row from 0 to 2 and a column from 0 to 4"):
            make(1, (0, 0)).explain(row, column)
    with pytest.raises(InputError, match="horse"):
        activated(make(1, (0, 0)), "horse")


@pytest.mark.parametrize("kinds", [["class", "instance", "part"], ["class", "instance"], ["part"]])
def test_every_built_prototype_is_the_mean_of_the_pixels_it_is_explained_by(kinds):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    level = rng.integers(0, 3, (3, 4, 5))
    masks = ForegroundBackground(level == 2, level == 0, ("threshold",) * 3)
    built = build_prototypes(features, masks, PrototypeSettings(kinds=kinds, clusters=3))
    assert (built.cells("foreground") == (level == 2)).all() and (built.cells("background") == (level == 0)).all()
    for index in range(len(built)):
        origin = built.origin(index)
        images, pixels = origin["images"], origin["masks"]
        assert np.allclose(features[list(images)][pixels].mean(0), built.vectors[index], atol=1e-5)
        assert np.array_equal(built.cells_of(index)[list(images)], pixels) and built.cells_of(index).sum() == pixels.sum()


# ---- whole images

def many(seed=0):
    """A 4 x 7 segmentation of cat, dog and sofa (dog dropped) with winners drawn at random, and its bank."""
    rng = np.random.default_rng(seed)
    segmentation = make(1, (0, 0))
    labels = rng.choice([0, 1, 3], (4, 7)).astype(np.int32)
    category = np.where(labels == 0, rng.integers(0, 2, labels.shape), (labels == 3).astype(int))
    row = rng.integers(0, 5, labels.shape) + 5 * (labels == 0)  # foreground comes before background
    constant = (labels == 0) & (rng.random(labels.shape) < 0.3)
    winner = np.where(constant, -1, np.stack([category, row])).astype(np.int32)
    scores = rng.random((4, 4, 7)).astype(np.float32)
    scores[2] = -np.inf
    np.put_along_axis(scores, labels[None], 2.0, 0)
    return replace(segmentation, image=np.zeros((4, 7, 3), np.uint8), labels=labels, winner=winner,
                   kept_scores=scores[[0, 1, 3]]), segmentation.bank


def test_counts_and_activated_prototypes_are_what_explain_says_of_each_pixel():
    segmentation, _ = many()
    said = {(r, c): segmentation.explain(r, c) for r in range(4) for c in range(7)}
    counts = Counter((e.region, e.kind) for e in said.values())
    assert counts[None, None] > 0  # a constant background score: no prototype's pixel
    assert decided_by(segmentation) == {(r, k): counts[r, k] for r in ("foreground", "background") for k in ("class", "instance", "part")}
    assert sum(decided_by(segmentation).values()) == 28 - counts[None, None]
    for name in ("background", "cat", "sofa"):
        found = activated(segmentation, name, count=99)
        regions = {}
        for (r, c), e in said.items():
            if e.class_name == name and e.kind is not None:
                regions.setdefault((e.category, e.index), np.zeros((4, 7), bool))[r, c] = True
        assert {(a.category, a.index) for a in found} == set(regions)
        for a in found:
            assert (a.pixels == regions[a.category, a.index]).all()
            one = segmentation.explain(*np.argwhere(a.pixels)[0].tolist())
            assert (a.kind, a.region, a.images) == (one.kind, one.region, one.images) and (a.masks == one.masks).all()
        sizes = [int(a.pixels.sum()) for a in found]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) > 2
        assert [a.index for a in activated(segmentation, name, 2)] == [a.index for a in found[:2]]
        assert [a.index for a in activated(segmentation, name, 99, ["part"])] == [a.index for a in found if a.kind == "part"]
    assert activated(segmentation, "dog") == ()  # dropped: no pixel


# ---- absent classes

def asked(probabilities, kept, kinds=None):
    names = [f"class {i}" for i in range(len(probabilities))]
    vocabulary = Vocabulary(tuple(Category(n, kind=k) for n, k in zip(names, kinds or ["thing"] * len(names), strict=True)))
    scores = np.zeros((len(kept) + 1, 2, 3), np.float32)
    return Segmentation(np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.int32), scores, np.zeros((2, 2, 3), np.int32), vocabulary, kept,
                        np.array(probabilities, np.float32), None)


def test_equal_probabilities_are_not_below_the_threshold():
    third = np.float32(1) / np.float32(3)
    assert [a.reason for a in absent_classes(asked([third] * 3, (0,)), Filters())] == [NOT_BEST, NOT_BEST]


def test_stuff_that_is_not_judged_does_not_count_and_without_the_filter_nothing_is_absent():
    assert absent_classes(asked([np.nan] * 3, (0, 1, 2))) == []
    segmentation = asked([0.6, 0.4, 1.0], (0, 2), ["thing", "thing", "stuff"])  # the filter gives stuff probability 1
    (only,) = absent_classes(segmentation, Filters(category_keep_stuff=True))
    assert (only.name, only.threshold, only.reason) == ("class 1", 0.5, BELOW)


@pytest.mark.parametrize("top", [1, 2, 4])
def test_reasons_are_those_of_the_category_filter(tiny_profile, top):
    """Against the filter itself, redone step by step from its probabilities."""
    from ovdiff_lib.filters.category import CategoryFilter
    from ovdiff_lib.networks.loading import load_clip

    profile = tiny_profile.override({"filters.category_top": top})
    category_filter, vocabulary = CategoryFilter(*load_clip(profile), profile), Vocabulary.of("cat, dog, sofa, boat, water")
    seen = set()
    for seed in range(12):
        image = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        kept, probabilities = category_filter(image, vocabulary)
        above = [i for i in np.argsort(-probabilities, kind="stable") if probabilities[i] >= 0.2 * (1 - 1e-5)]
        segmentation = replace(asked(probabilities, kept), vocabulary=vocabulary)
        for absent in absent_classes(segmentation, profile.filters):
            i = vocabulary.names.index(absent.name)
            expected = BELOW if i not in above else NOT_BEST if i in above[:top] else NOT_AMONG_TOP
            assert absent.reason == expected and i not in kept
            assert absent.probability == pytest.approx(probabilities[i]) and absent.threshold == 0.2
            seen.add(absent.reason)
        order = [absent.probability for absent in absent_classes(segmentation, profile.filters)]
        assert order == sorted(order, reverse=True) and len(order) == 5 - len(kept)
    assert BELOW in seen and (top != 1 or NOT_AMONG_TOP in seen) and (top != 4 or NOT_BEST in seen)
