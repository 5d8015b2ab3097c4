"""Step 2a: multi-Otsu and the selection of Eq. 1, against values computed by hand and by search."""

import itertools

import numpy as np
import pytest
from sentences import refused
from skimage.filters import threshold_multiotsu

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import TOGETHER, make_masks, mean_attribution, select, separate, upsample
from ovdiff_lib.masks.threshold import BINS, _last_bins, fixed_thresholds, multi_otsu
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import SupportSet


def three_levels(seed=0, shape=(13, 21)):
    """A map of three noisy levels and the level of every pixel."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 3, shape)
    return (level * 0.4 + rng.normal(0, 0.03, shape)).astype(np.float32), level


def test_multi_otsu_finds_three_planted_levels_whatever_their_scale_and_offset():
    values, level = three_levels()
    for scaled in (values, values.astype(np.float64) * 1e-9 - 5e-9):
        foreground, background = multi_otsu(scaled)
        assert (foreground == (level == 2)).all() and (background == (level == 0)).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_multi_otsu_maximises_between_class_variance(classes):
    def variance(cuts):
        groups = np.digitize(values, cuts)
        return sum((groups == g).mean() * (values[groups == g].mean() - values.mean()) ** 2 for g in np.unique(groups))

    # 24 integer values fall into 24 separate bins, so every cut can be tried.
    values = np.random.default_rng(3).integers(0, 24, (9, 14)).astype(np.float32) ** 1.5
    distinct = np.unique(values)
    assert len(distinct) == 24 < BINS
    best = max(map(variance, itertools.combinations((distinct[1:] + distinct[:-1]) / 2, classes - 1)))
    foreground, background = multi_otsu(values, classes)
    cuts = [values[background].max(), values[~foreground].max()][: classes - 1]
    assert variance([c + 1e-3 for c in cuts]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_multi_otsu_divides_as_scikit_image_does(classes):
    """Or better by what that loses in float32."""
    def spread(last):
        levels = np.split(np.repeat(np.arange(BINS), counts), np.cumsum(counts)[last])
        return sum(len(level) * level.mean() ** 2 for level in levels)

    rng, same = np.random.default_rng(1), []
    for _ in range(12):
        counts = np.histogram(rng.normal(rng.random(5).repeat(300), 0.05), BINS, (0, 1))[0]
        ours, theirs = _last_bins(counts, classes), threshold_multiotsu(hist=(counts, np.arange(BINS)), classes=classes)
        same.append((ours == theirs).all())
        assert spread(theirs) <= spread(ours) <= spread(theirs) * (1 + 1e-6)
    assert np.mean(same) > 0.7


def test_multi_otsu_of_few_values():
    constant = np.full((3, 5), 0.7, np.float32)
    assert not any(m.any() for m in multi_otsu(constant, 3))
    two = constant.copy()
    two[1, 2] = 0.9
    foreground, background = multi_otsu(two, 3)
    assert foreground.sum() == 1 and foreground[1, 2] and background.sum() == 14
    three = np.array([[0.0, 0.5035, 1.0]])  # as many values as classes, the middle one above its bin's centre
    foreground, background = multi_otsu(three, 3)
    assert foreground.tolist() == [[False, False, True]] and background.tolist() == [[True, False, False]]
    foreground, background = multi_otsu(np.array([[0.0, 0.5, 1.0]]), 4)  # the middle of the range is background
    assert foreground.tolist() == [[False, False, True]] and background.tolist() == [[True, True, False]]
    for values in ([0.0, 0.252, 0.255, 1.0], [0.0, 0.3, 0.995, 1.0]):  # neighbours among 256 bins, also the last two
        foreground, background = multi_otsu(np.array([values]), 4)
        assert foreground.tolist() == [[False, False, False, True]] and background.tolist() == [[True, False, False, False]]
        assert multi_otsu(np.array([values]), 4, 2)[0].tolist() == [[False, False, True, True]]


def test_more_levels_of_foreground():
    """Four plateaus: the upper two levels are foreground, the third is not used, the lowest is background."""
    plateaus = np.array([[0.0, 0.0, 0.3, 0.3, 0.6, 0.6], [0.0, 0.0, 0.3, 0.6, 1.0, 1.0]], np.float32)
    foreground, background = multi_otsu(plateaus, 4, 2)
    assert np.array_equal(foreground, plateaus >= 0.6) and np.array_equal(background, plateaus == 0.0)
    assert np.array_equal(multi_otsu(plateaus, 4, 1)[0], plateaus == 1.0)


def test_fixed_thresholds_scale_each_map_by_itself():
    values, _ = three_levels(3)
    maps = np.stack([values, values * 0.1 + 7, np.full_like(values, 0.9)])
    foreground, background = fixed_thresholds(maps, 0.5, 0.2)
    for n in range(2):
        unit = (maps[n] - maps[n].min()) / (maps[n].max() - maps[n].min())
        assert (foreground[n] == (unit > 0.5)).all() and (background[n] == (unit < 0.2)).all()
    assert not foreground[2].any() and not background[2].any()  # constant
    plateaus = np.array([[[0.0, 0.25, 0.5, 1.0]]])  # what lies on a threshold is on neither side of it
    assert [m.tolist() for m in fixed_thresholds(plateaus, 0.5, 0.25)] == [[[[0, 0, 0, 1]]], [[[1, 0, 0, 0]]]]


# ---- Eq. 1

def test_select_takes_the_mean_not_the_sum_and_the_complement_as_background():
    attribution = np.array([[1.0, 0.5, 0.5, 0.5, 0.0]], np.float32)
    small, large = np.zeros((2, 1, 5), bool)
    small[0, 0] = True
    large[0, 1:4] = True  # larger sum (1.5), lower mean
    foreground, background = select(np.stack([small, large]), attribution)
    assert foreground.tolist() == [[True, False, False, False, False]]
    assert background.tolist() == [[False, False, False, False, True]]


def test_select_matches_equation_1_by_search_and_is_disjoint():
    rng = np.random.default_rng(0)
    for _ in range(20):
        proposals = rng.random((4, 5, 7)) < 0.2
        proposals[rng.integers(4)] = False  # an empty proposal must not divide by zero nor win
        attribution = rng.random((5, 7)).astype(np.float32)
        candidates = [m for m in [*proposals, ~proposals.any(0)] if m.any()]
        means = [attribution[m].mean() for m in candidates]
        foreground, background = select(proposals, attribution)
        assert np.allclose(mean_attribution(np.stack(candidates), attribution), means)
        assert (foreground == candidates[int(np.argmax(means))]).all()
        assert (background == (candidates[int(np.argmin(means))] & ~foreground)).all()
    for nothing in (np.zeros((0, 5, 7), bool), np.zeros((2, 5, 7), bool)):
        assert not any(m.any() for m in select(nothing, attribution))
    foreground, background = select(np.ones((1, 5, 7), bool), attribution)  # its complement is empty
    assert foreground.all() and not background.any()


def test_separate_matches_the_definition_pixel_by_pixel():
    rng = np.random.default_rng(0)
    for _ in range(10):
        proposals, attribution = rng.random((5, 4, 7)) < 0.4, rng.random((4, 7)).astype(np.float32)
        means = [attribution[mask].mean() for mask in proposals]
        expected = np.zeros_like(proposals)
        for y, x in np.ndindex(4, 7):
            holders = [n for n in range(5) if proposals[n, y, x]]
            if holders:
                expected[max(holders, key=lambda n: means[n]), y, x] = True
        assert np.array_equal(separate(proposals, attribution), expected[expected.any(axis=(1, 2))])
    inner = proposals[0] & proposals[1]  # wholly inside another, and nothing at all
    assert len(separate(np.stack([proposals[0], inner, inner & ~inner]), np.where(inner, 0, 1))) == 1
    assert separate(proposals[:0], attribution).shape == (0, 4, 7)


# ---- masks of a support set

class Fixed:
    """Proposes the same masks for every image whose first pixel is not black."""

    name = "fixed"

    def __init__(self, *masks):
        self.masks = np.array(masks) if masks else np.zeros((0, 6, 10), bool)

    def propose(self, image, words):
        assert words == "the words"
        return self.masks if image[0, 0, 0] else self.masks[:0]


def region(rows, columns, size=(6, 10)):
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


COLUMN, MIDDLE = region(slice(None), 0), region(2, slice(2, 6))


def make_support(n=2, black=(1,)):
    """Images of 6 x 10 with maps of 3 x 5 that differ; the images at the places ``black`` show nothing."""
    attribution = np.zeros((n, 3, 5), np.float32)
    attribution[:, 1, 1:3] = 1
    attribution[:, 2, 4] = 0.4
    attribution *= np.linspace(1, 0.5, n, dtype=np.float32)[:, None, None]
    images = np.full((n, 6, 10, 3), 9, np.uint8)
    images[list(black)] = 0
    return SupportSet(Category("cat", prompt="the words"), images, attribution, np.arange(n))


def masks_of(support, own=None, **fields):
    fields = {f"masks.{name}": value for name, value in {"segmenter": "threshold", **fields}.items()}
    profile = load_profile("mini", fields)
    return make_masks(support, profile, own or build_segmenter(profile))


def same(found, wanted, chosen=slice(None)):
    return all(np.array_equal(getattr(found, f)[chosen], getattr(wanted, f)[chosen]) for f in ("foreground", "background"))


def test_several_images_at_a_time_where_the_segmenter_can():
    """The same masks as one by one, also where their number is no multiple of the group."""
    support, single, asked = make_support(TOGETHER + 3, range(1, TOGETHER + 3, 2)), Fixed(COLUMN), []

    class Many(Fixed):
        def propose(self, image, words):
            raise AssertionError("asked for one")

        def propose_many(self, images, words):
            asked.append(len(images))
            return [single.propose(image, words) for image in images]

    expected, found = (masks_of(support, segmenter) for segmenter in (single, Many()))
    assert asked == [TOGETHER, 3] and found.source == expected.source and len(set(found.source)) == 2
    assert same(found, expected)


@pytest.mark.parametrize("scope", ["image", "set"])
def test_thresholds_decide_where_nothing_is_proposed(scope):
    support = make_support(3)
    masks, plain = (masks_of(support, segmenter, threshold_scope=scope, threshold_classes=4, threshold_foreground=2)
                    for segmenter in (Fixed(COLUMN), None))
    assert masks.source == ("fixed", "threshold", "fixed") and plain.source == ("threshold",) * 3
    attribution = upsample(support.attribution, (6, 10))
    assert attribution[0][COLUMN].mean() < attribution[0][~COLUMN].mean()
    assert (masks.foreground[[0, 2]] == ~COLUMN).all() and (masks.background[[0, 2]] == COLUMN).all()
    assert same(masks, plain, [1]) and plain.foreground[0].any()
    if scope == "set":  # one threshold for all maps, the others' too
        expected = multi_otsu(attribution, 4, 2)
        assert plain.foreground[2].sum() < plain.foreground[0].sum()
    else:
        expected = np.stack([multi_otsu(one, 4, 2) for one in attribution], axis=1)
        assert np.array_equal(plain.foreground[0], plain.foreground[2])  # one map is half the other
    assert np.array_equal(plain.foreground, expected[0]) and np.array_equal(plain.background, expected[1])


def test_overlaps_and_fallback_as_the_profile_says():
    support, top = make_support(black=()), region(0, slice(None))  # of lowest attribution
    three = Fixed(region(slice(2, 4), slice(2, 6)), region(slice(0, 2), slice(0, 6)), top)
    kept, apart = (masks_of(support, three, overlaps=how) for how in ("keep", "attribution"))
    attribution = upsample(support.attribution, (6, 10))
    for n in range(2):
        for found, proposals in ((kept, three.masks), (apart, separate(three.masks, attribution[n]))):
            expected = select(proposals, attribution[n])
            assert (found.foreground[n] == expected[0]).all() and (found.background[n] == expected[1]).all()
    assert (kept.background == top).all() and (apart.background == region(0, slice(6, 10))).all()
    fixed = masks_of(support, Fixed(), fallback="fixed", fallback_foreground=0.6)
    expected = fixed_thresholds(attribution, 0.6, 0.2)
    assert np.array_equal(fixed.foreground, expected[0]) and np.array_equal(fixed.background, expected[1])
    alone = [masks_of(support, threshold_scope="set", fallback=how) for how in ("fixed", "otsu")]  # "-CutLER" of the released code
    assert np.array_equal(alone[0].foreground, alone[1].foreground)
    assert np.array_equal(alone[0].foreground, multi_otsu(attribution, 4, 2)[0])


def test_background_can_be_tightened():
    support, middle = make_support(black=()), Fixed(MIDDLE)
    full, low, eroded, twice = (masks_of(support, middle, **fields).background for fields in (
        {}, {"background_below": 0.3}, {"erosion": 1}, {"erosion": 2}))
    assert (low == (full & (upsample(support.attribution, (6, 10)) < 0.3))).all() and low.sum() < full.sum()
    seam = {(1, c) for c in range(2, 6)} | {(3, c) for c in range(2, 6)} | {(2, 1), (2, 6)}  # 4-neighbours of the object
    for n in range(2):
        assert {tuple(p) for p in np.argwhere(full[n] & ~eroded[n])} == seam
        assert (0, 3) in {tuple(p) for p in np.argwhere(eroded[n] & ~twice[n])}
    support.attribution[:] = np.eye(3, 5, dtype=np.float32) * [[1], [0], [0]]  # the corner pixel is 1 and no object
    assert masks_of(support, Fixed(region(0, 1))).background[:, 0, 0].all()


def test_upsample_is_bilinear_and_keeps_rows_and_columns():
    maps = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert upsample(maps, (2, 3)).tolist() == maps.tolist()
    assert upsample(maps, (2, 6))[0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2]
    assert upsample(maps, (4, 3))[0, :, 0].tolist() == [0, 0.75, 2.25, 3]


def test_what_is_wrong_is_named():
    with refused(ProfileError, "masks.segmenter", "threshold"):
        masks_of(make_support(), segmenter="cutlr")
    for wrong in (np.ones((1, 10, 6), bool), COLUMN):  # transposed; one mask alone
        with refused(InputError, "'fixed'", "(M, 6, 10)"):
            masks_of(make_support(), Fixed(*wrong))
    for fine in ({"masks.threshold_classes": 3, "masks.threshold_foreground": 3, "masks.fallback": "fixed"},
                 {"masks.fallback_foreground": 0.1}):  # which do not use them
        load_profile("mini", fine)
