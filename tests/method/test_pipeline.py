"""The whole method on tiny models: what a result may depend on, and what it may not."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from sentences import refused

from ovdiff_lib import InputError, ModelNotAvailable, OVDiff, OVDiffError, ProfileError, pipeline
from ovdiff_lib.categories import Category
from ovdiff_lib.keys import check_profile
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.doctor import inspect

NAMES = ("cat", "dog", "sofa")
SHAPE = (40, 72)
ALL = {"filters.category": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("library")


def method(profile, folder, overrides=None) -> OVDiff:
    return OVDiff(profile, overrides, library=folder, progress=False)


@pytest.fixture(scope="module")
def ovdiff(tiny_profile, folder) -> OVDiff:
    """The tiny method without the category filter, whose random CLIP would leave one class of three."""
    return method(tiny_profile, folder, ALL)


@pytest.fixture(scope="module")
def bank(ovdiff) -> PrototypeBank:
    return ovdiff.build(NAMES)


def picture(seed: int = 0, shape=SHAPE) -> np.ndarray:
    """Patches of random colour, u8 (H, W, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.NEAREST))


def equal(a: Prototypes, b: Prototypes) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Prototypes))


@pytest.fixture
def no_drawing(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a support set was drawn")

    monkeypatch.setattr(pipeline, "sample_support", refuse)


# ---------------------------------------------------------------------- what comes out

def test_a_bank_has_every_kind_for_every_class(bank, tiny_profile):
    assert bank.vocabulary.names == NAMES and bank.extractors == ("sd",)
    channels = {p.vectors.shape[1] for p in bank.prototypes["sd"]}
    assert len(channels) == 1
    for own in bank.prototypes["sd"]:
        assert own.vectors.dtype == np.float32 and np.isfinite(own.vectors).all()
        assert len(own.assignment) == tiny_profile.support.size
        for region in ("foreground", "background"):
            here = own.region == region
            count = {kind: int((own.kind[here] == kind).sum()) for kind in ("class", "instance", "part")}
            assert count["class"] == 1
            assert 1 <= count["instance"] <= tiny_profile.support.size and 1 <= count["part"] <= tiny_profile.prototypes.clusters
    assert not equal(*bank.prototypes["sd"][:2])


def test_a_segmentation_fits_its_image(ovdiff, bank):
    image = picture()
    result = ovdiff.segment(image, bank)
    assert np.array_equal(result.image, image)
    assert result.labels.shape == SHAPE and result.labels.dtype == np.int32 and 0 <= result.labels.min() <= result.labels.max() <= 3
    assert result.scores.shape == (4, *SHAPE) and result.scores.dtype == np.float32
    assert np.abs(result.scores).max() <= 1 + 1e-5
    assert np.array_equal(result.labels, result.scores.argmax(0))
    assert len(np.unique(result.labels)) >= 3  # the labels of patches differ
    assert result.kept == (0, 1, 2) and np.isnan(result.filter_scores).all()
    assert result.winner.shape == (2, *SHAPE) and result.winner.dtype == np.int32
    for label, own in enumerate(bank.prototypes["sd"], 1):
        category, row = result.winner[:, result.labels == label]
        assert (category == label - 1).all() and (own.region[row] == "foreground").all()
    assert result.overlay().height > SHAPE[0]


def test_the_filter_drops_classes_and_only_classes(tiny_profile, folder, bank):
    filtered = method(tiny_profile, folder)
    image = picture()
    result = filtered.segment(image, bank)
    assert result.filter_scores.shape == (3,) and result.filter_scores.sum() == pytest.approx(1, abs=1e-5)
    assert 0 < len(result.kept) < 3, "choose another picture: the test needs a class that is dropped"
    for index in range(3):
        assert np.isinf(result.scores[index + 1]).all() == (index not in result.kept)
    assert set(np.unique(result.labels)) <= {0, *(k + 1 for k in result.kept)}
    # What is kept scores as if the vocabulary were those classes alone.
    unfiltered = method(tiny_profile, folder, ALL)
    alone = unfiltered.segment(image, bank.restrict(result.kept))
    assert np.array_equal(alone.scores, result.scores[[0, *(k + 1 for k in result.kept)]])


def test_stuff_loses_its_background_prototypes(tiny_profile, folder, bank, no_drawing):
    ovdiff = method(tiny_profile, folder, {**ALL, "filters.stuff_threshold": -1.0})
    mixed = ovdiff.build(NAMES, stuff=["sofa"])
    assert all(equal(a, b) for a, b in zip(mixed.prototypes["sd"], bank.prototypes["sd"], strict=True))
    # At threshold -1 every background prototype is too like the stuff: background cannot win.
    result = ovdiff.segment(picture(), mixed)
    assert np.isinf(result.scores[0]).all() and result.labels.min() >= 1 and (result.winner >= 0).all()
    # The filter can be switched off, and at threshold 1 it takes the stuff's own background alone.
    off = method(tiny_profile, folder, {**ALL, "filters.stuff": False})
    assert np.array_equal(off.segment(picture(), mixed).scores, off.segment(picture(), bank).scores)
    lenient = method(tiny_profile, folder, {**ALL, "filters.stuff_threshold": 1.0})
    assert np.isfinite(lenient.segment(picture(), mixed).scores).all()
    assert lenient.stuff_filter(mixed) is lenient.stuff_filter(mixed) is not lenient.stuff_filter(bank)  # filtered once


# ---------------------------------------------------------------------- what a class depends on

def test_a_new_class_and_the_order_change_no_other(ovdiff, bank):
    grown, turned = ovdiff.build((*NAMES, "boat")), ovdiff.build(NAMES[::-1])
    assert all(equal(a, b) for a, b in zip(bank.prototypes["sd"], grown.prototypes["sd"][:3], strict=True))
    assert not any(equal(grown.prototypes["sd"][3], own) for own in bank.prototypes["sd"])
    assert all(equal(a, b) for a, b in zip(bank.prototypes["sd"], turned.prototypes["sd"][::-1], strict=True))
    first, second = ovdiff.segment(picture(), bank), ovdiff.segment(picture(), turned)
    assert np.array_equal(first.scores[[0, 3, 2, 1]], second.scores)
    assert np.array_equal(first.labels, np.array([0, 3, 2, 1])[second.labels])


def test_a_class_is_its_words_not_its_label(ovdiff, bank, no_drawing):
    renamed = ovdiff.build([Category("mine", prompt="cat", kind="stuff")])
    assert equal(renamed.prototypes["sd"][0], bank.prototypes["sd"][0])
    assert renamed.vocabulary.categories == (Category("mine", "cat", "stuff"),)
    assert ovdiff.support(Category("mine", prompt="cat")).category.name == "mine"


# ---------------------------------------------------------------------- the library

def test_a_second_build_draws_nothing(tiny_profile, folder, bank, no_drawing, monkeypatch):
    for module in ("ovdiff_lib.pipeline", "ovdiff_lib.features.diffusion"):
        monkeypatch.setattr(f"{module}.load_diffusion", lambda profile: pytest.fail("the model was loaded"))
    again = method(tiny_profile, folder).build(NAMES)
    assert all(equal(a, b) for a, b in zip(bank.prototypes["sd"], again.prototypes["sd"], strict=True))


def test_a_support_set_grows_and_shrinks_without_drawing_again(tiny_profile, tmp_path, monkeypatch):
    """Two images, then five: three are drawn; then one: none is. What was there stays bit by bit."""
    drawn, real = [], pipeline.sample_support

    def counted(pipe, category, profile, count=None, progress=True, start=0):
        drawn.append((start, count))
        return real(pipe, category, profile, count, progress, start)

    monkeypatch.setattr(pipeline, "sample_support", counted)
    sets = {n: method(tiny_profile, tmp_path, {"support.size": n}).support("dog") for n in (2, 5, 1)}
    assert drawn == [(0, 2), (2, 3)]
    whole = real(OVDiff(tiny_profile).diffusion, Category("dog"), tiny_profile, 5, progress=False)
    for n, support in sets.items():
        assert len(support) == n and np.array_equal(support.seeds, whole.seeds[:n])
        assert np.array_equal(support.images, sets[5].images[:n]) and np.array_equal(support.attribution, sets[5].attribution[:n])
    # Drawn at once or in two parts: rounding of other batches at most.
    assert np.abs(sets[5].images.astype(int) - whole.images).max() <= 2


def test_an_ensemble_has_one_space_an_extractor(tiny_profile, folder, bank, no_drawing):
    both = method(tiny_profile, folder, {"features.extractors": ["sd", "clip-keys"], **ALL})
    made = both.build("cat, dog")
    assert made.extractors == ("sd", "clip-keys")
    assert equal(made.prototypes["sd"][0], bank.prototypes["sd"][0])
    result = both.segment(picture(), made)
    alone = method(tiny_profile, folder, ALL).segment(picture(), "cat, dog")
    assert result.scores.shape == alone.scores.shape and not np.allclose(result.scores, alone.scores, atol=1e-3)


# ---------------------------------------------------------------------- what a prediction depends on

def test_images_segmented_together_are_those_segmented_alone(tiny_profile, folder, bank):
    """Other sizes, batches and numbers of kept classes, with two extractors, two scales and the whole image, and PAMR."""
    both = method(tiny_profile, folder, {"features.extractors": ["sd", "clip-keys"], "matching.whole_image": True,
                                         "matching.refine": "pamr", "matching.batch_size": 5})
    made = both.build(NAMES)
    images = [picture(i, shape) for i, shape in enumerate([SHAPE, (72, 40), SHAPE, (33, 50), (40, 41)])]
    kept = [(0, 1, 2), (1,), (0, 2), (0,), (1, 2)]  # as if the filter had chosen so
    answers = {image.tobytes(): (chosen, np.ones(3, np.float32)) for image, chosen in zip(images, kept, strict=True)}
    both.category_filter = lambda image, vocabulary: answers[image.tobytes()]
    alone = [both.segment(image, made) for image in images]
    for together in (2, 5, 8):
        several = list(both.segment_many(iter(images), made, together))
        assert len(several) == len(images)
        for one, many, chosen in zip(alone, several, kept, strict=True):
            assert many.kept == one.kept == chosen and many.labels.shape == one.labels.shape
            assert np.allclose(many.kept_scores, one.kept_scores, atol=1e-4)
            # Of prototypes that are alike, rounding tells the winner.
            assert (many.labels == one.labels).mean() > 0.99 and (many.winner == one.winner).mean() > 0.95
            assert np.array_equal(many.filter_scores, one.filter_scores)


def test_images_are_read_as_they_are_needed(ovdiff, bank):
    asked = []

    def images():
        for i in range(5):
            asked.append(i)
            yield picture(i)

    results = ovdiff.segment_many(images(), bank, together=2)
    assert asked == []
    next(results)
    assert asked == [0, 1]
    assert len(list(results)) == 4 and asked == [0, 1, 2, 3, 4]


def test_masks_come_from_the_library(tiny_profile, tmp_path, monkeypatch):
    ovdiff = method(tiny_profile, tmp_path)
    made = ovdiff.masks_of("cat")
    direct = ovdiff.masks(ovdiff.support("cat"))
    assert np.array_equal(made.foreground, direct.foreground) and np.array_equal(made.background, direct.background)
    monkeypatch.setattr(OVDiff, "masks", None)  # not made again, for another extractor's prototypes either
    again = method(tiny_profile, tmp_path, {"features.extractors": ["clip-keys"]})
    assert again.masks_of(Category("cat")).source == made.source
    again.build_class("cat")


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (130, 20)])
def test_odd_shapes_are_segmented(ovdiff, bank, shape):
    result = ovdiff.segment(picture(2, shape), bank)
    assert result.labels.shape == result.winner.shape[1:] == shape and result.scores.shape == (4, *shape)


# ---------------------------------------------------------------------- what goes wrong

@pytest.mark.parametrize("make, error, word", [
    (lambda p, f: OVDiff("nothing"), ProfileError, "nothing"), (lambda p, f: OVDiff(p, {"support.sizes": 3}), ProfileError, "support.size"),
    (lambda p, f: method(p, f, {"features.extractors": ["dino2"]}).build("cat"), ProfileError, "sd, clip-keys"),
    (lambda p, f: method(p, f).build([]), InputError, "no class"),
    (lambda p, f: method(p, f).segment(f / "no.jpg", "cat"), InputError, "no.jpg"),
    (lambda p, f: method(p, f, {"support.prompt": "A picture"}).build("cat"), OVDiffError, "name"),
    (lambda p, f: method(p, f, {"models.diffusion": "a b"}).build("cat"), ModelNotAvailable, "hub id"),
    (lambda p, f: method(p, f, {"features.extractors": ["clip-keys"], **ALL}).segment(
        picture(), method(p, f).build(NAMES)), InputError, "clip-keys")])
def test_mistakes_are_one_sentence(tiny_profile, folder, bank, make, error, word):
    with refused(error, word):
        make(tiny_profile, folder)


@pytest.mark.parametrize("overrides, word", [
    ({"models.clip": "/nowhere"}, "/nowhere"), ({"features.extractors": ["dino"], "models.dino": "/nowhere"}, "/nowhere"),
    ({"masks.segmenter": "sam", "models.sam": "/nowhere"}, "/nowhere"),
    ({"prototypes.background": False, "matching.background_threshold": None}, "matching.background_threshold"),
    ({"filters.stuff_threshold": {"dino": 0.5}}, "filters.stuff_threshold names dino but not 'sd'"),
    ({"matching.background_threshold": {"sd": 0.5, "dinno": 0.5}}, "Did you mean 'dino'?")])
def test_what_a_later_step_needs_is_asked_for_before_anything_is_drawn(tiny_profile, tmp_path, no_drawing, overrides, word):
    own = method(tiny_profile, tmp_path, overrides)
    for start in (lambda: own.build(NAMES), lambda: own.build_class("cat"), lambda: own.segment(picture(), "cat, dog"),
                  lambda: check_profile(own.profile)):
        with refused(ModelNotAvailable if word == "/nowhere" else ProfileError, word):
            start()
    assert not list(tmp_path.iterdir())
    assert any(word in problem for problem in inspect(own.profile).problems)


def test_what_no_step_needs_is_not_asked_for(tiny_profile, tmp_path):
    unused = {**ALL, "models.clip": "/nowhere", "masks.fallback": "fixed", "masks.threshold_foreground": 9}
    check_profile(tiny_profile.override(unused))
    check_profile(load_profile("mini"))
    for name in ("paper", "official"):  # a hub id is no missing folder; CutLER's weights are a file
        check_profile(load_profile(name, {"masks.segmenter": "threshold"}))


def test_replaced_shares_all_but_the_fields(tiny_profile, tmp_path):
    networks = object()
    own = OVDiff(tiny_profile, library=tmp_path, progress=False, networks=networks)
    other = own.replaced({"matching.background_threshold": 0.5})
    assert other.profile == tiny_profile.override({"matching.background_threshold": 0.5}) and own.profile == tiny_profile
    assert (other.library.root, other.progress, other.networks) == (tmp_path, False, networks)
