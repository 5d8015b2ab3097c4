"""Step 2a: multi-Otsu and the selection of Eq. 1, against values computed by hand and by search."""

import itertools

import numpy as np
import pytest

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.masks.segmenters.detector import DetectorSegmenter
from ovdiff_lib.masks.select import TOGETHER, check_masks, make_masks, select, separate, upsample
from ovdiff_lib.masks.threshold import BINS, fixed_thresholds, multi_otsu
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import SupportSet


def three_levels(seed=0, shape=(1, 13, 21)):
    """A map of three noisy levels and the level of every pixel."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 3, shape)
    return (level * 0.4 + rng.normal(0, 0.03, shape)).astype(np.float32), level


def between_class_variance(values, cuts):
    groups = np.digitize(values, cuts)
    return sum((groups == g).mean() * (values[groups == g].mean() - values.mean()) ** 2 for g in np.unique(groups))


@pytest.mark.parametrize("scope", ["image", "set"])
def test_multi_otsu_finds_three_planted_levels(scope):
    values, level = three_levels()
    foreground, background = multi_otsu(values, 3, scope)
    assert (foreground == (level == 2)).all() and (background == (level == 0)).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_multi_otsu_maximises_between_class_variance(classes):
    # 24 integer values fall into 24 separate bins, so every cut can be tried.
    values = np.random.default_rng(3).integers(0, 24, (1, 9, 14)).astype(np.float32) ** 1.5
    distinct = np.unique(values)
    assert len(distinct) == 24 < BINS
    middles = (distinct[1:] + distinct[:-1]) / 2
    best = max(between_class_variance(values, cuts) for cuts in itertools.combinations(middles, classes - 1))
    foreground, background = multi_otsu(values, classes, "image")
    cuts = [values[background].max(), values[~foreground].max()][: classes - 1]
    found = between_class_variance(values, [c + 1e-3 for c in cuts])
    assert found == pytest.approx(best, rel=1e-5)


def test_scope_set_uses_one_threshold_for_all_maps_and_image_one_each():
    bright, _ = three_levels(1)
    maps = np.concatenate([bright, bright * 0.1])  # the second map lies wholly below the first one's upper levels
    each, _ = multi_otsu(maps, 3, "image")
    shared, low = multi_otsu(maps, 3, "set")
    assert (each[0] == each[1]).all()
    assert not shared[1].any() and low[1].all()


def test_multi_otsu_ignores_scale_and_offset():
    values, _ = three_levels(2)
    for a, b in zip(multi_otsu(values), multi_otsu(values.astype(np.float64) * 1e-9 - 5e-9), strict=True):
        assert (a == b).all()


def test_multi_otsu_of_few_values():
    constant = np.full((2, 3, 5), 0.7, np.float32)
    for scope in ("image", "set"):
        assert not any(m.any() for m in multi_otsu(constant, 3, scope))
    two = constant.copy()
    two[0, 1, 2] = 0.9
    foreground, background = multi_otsu(two, 3, "image")
    assert foreground.sum() == 1 and foreground[0, 1, 2] and background[0].sum() == 14 and not background[1].any()
    three = np.array([[[0.0, 0.5035, 1.0]]])  # as many values as classes, the middle one above its bin's centre
    foreground, background = multi_otsu(three, 3)
    assert foreground.tolist() == [[[False, False, True]]] and background.tolist() == [[[True, False, False]]]


def test_multi_otsu_refuses_bad_values():
    values, _ = three_levels()
    values[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        multi_otsu(values)


def test_select_by_hand():
    attribution = np.array([[1.0, 0.8, 0.1, 0.2], [0.6, 0.6, 0.3, 0.2]], np.float32)
    left, right = np.zeros((2, 2, 4), bool)
    left[:, :2] = True  # mean 0.75
    right[0, 2:] = True  # mean 0.15; the complement of both has mean 0.25
    foreground, background = select(np.stack([right, left]), attribution)
    assert (foreground == left).all() and (background == right).all()


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
        assert (foreground == candidates[int(np.argmax(means))]).all()
        assert (background == (candidates[int(np.argmin(means))] & ~foreground)).all()
        assert not (foreground & background).any()


def test_select_edge_cases():
    attribution = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    for proposals in (np.zeros((0, 3, 4), bool), np.zeros((2, 3, 4), bool)):
        assert not any(m.any() for m in select(proposals, attribution))
    foreground, background = select(np.ones((1, 3, 4), bool), attribution)  # its complement is empty
    assert foreground.all() and not background.any()


class FirstColumn:
    """Proposes the left column of images whose first pixel is not black."""

    name = "FirstColumn"

    def propose(self, image, words):
        masks = np.zeros((int(image[0, 0, 0] > 0), *image.shape[:2]), bool)
        masks[:, :, 0] = True
        return masks


def make_support(n=2, size=(6, 10), grid=(3, 5)):
    attribution = np.zeros((n, *grid), np.float32)
    attribution[:, 1, 1:3] = 1
    attribution[:, 2, 4] = 0.4
    images = np.zeros((n, *size, 3), np.uint8)
    images[0] = 9
    return SupportSet(Category("cat"), images, attribution, np.arange(n))


def test_make_masks_asks_a_segmenter_for_several_images_at_a_time_where_it_can():
    """The same masks as one by one, also where their number is no multiple of the group."""
    support, single = make_support(n=TOGETHER + 3), FirstColumn()
    support.images[::2] = 9

    asked = []

    class Many(FirstColumn):
        def propose(self, image, words):
            raise AssertionError("asked for one")

        def propose_many(self, images, words):
            asked.append(len(images))
            return [single.propose(image, words) for image in images]

    class Changed(DetectorSegmenter):
        def __init__(self):
            pass

        def propose(self, image, words):
            return np.zeros((0, *image.shape[:2]), bool)

    profile = load_profile("mini")
    expected, found, changed = (make_masks(support, profile, segmenter) for segmenter in (single, Many(), Changed()))
    assert asked == [TOGETHER, 3] and found.source == expected.source and len(set(found.source)) == 2
    assert (found.foreground == expected.foreground).all() and (found.background == expected.background).all()
    assert set(changed.source) == {"threshold"}  # it is asked, not the method that it inherited


def test_make_masks_falls_back_to_the_threshold_where_nothing_is_proposed():
    support, profile = make_support(), load_profile("mini", {"masks.segmenter": "threshold"})
    masks = make_masks(support, profile, FirstColumn())
    plain = make_masks(support, profile)
    assert masks.source == ("FirstColumn", "threshold") and plain.source == ("threshold", "threshold")
    assert masks.foreground.shape == masks.background.shape == (2, 6, 10)
    assert (masks.foreground[1] == plain.foreground[1]).all() and (masks.background[1] == plain.background[1]).all()
    attribution = upsample(support.attribution, (6, 10))
    column = np.zeros((6, 10), bool)
    column[:, 0] = True
    assert attribution[0][column].mean() < attribution[0][~column].mean()
    assert (masks.foreground[0] == ~column).all() and (masks.background[0] == column).all()
    assert plain.foreground.any() and not (plain.foreground & plain.background).any()


def test_upsample_is_bilinear_and_keeps_rows_and_columns():
    maps = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert upsample(maps, (2, 3)).tolist() == maps.tolist()
    assert upsample(maps, (2, 6))[0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2]
    assert upsample(maps, (4, 3))[0, :, 0].tolist() == [0, 0.75, 2.25, 3]


def test_background_can_be_tightened():
    support = make_support()
    class Middle:
        name = "Middle"

        def propose(self, image, words):
            mask = np.zeros((1, 6, 10), bool)
            mask[:, 2, 2:6] = True
            return mask

    support.images[:] = 9
    full = make_masks(support, load_profile("mini", {"masks.segmenter": "threshold"}), Middle()).background
    low = make_masks(support, load_profile("mini", {"masks.background_below": 0.3}), Middle()).background
    assert (low == (full & (upsample(support.attribution, (6, 10)) < 0.3))).all() and low.sum() < full.sum()
    eroded = make_masks(support, load_profile("mini", {"masks.erosion": 1}), Middle()).background
    seam = {(1, c) for c in range(2, 6)} | {(3, c) for c in range(2, 6)} | {(2, 1), (2, 6)}  # 4-neighbours of the object
    for n in range(2):
        assert {tuple(p) for p in np.argwhere(full[n] & ~eroded[n])} == seam


def test_unknown_segmenter_and_wrong_shapes_are_named():
    with pytest.raises(ProfileError, match=r"masks\.segmenter.*threshold"):
        make_masks(make_support(), load_profile("mini", {"masks.segmenter": "cutlr"}))

    class Transposed:
        name = "Transposed"

        def propose(self, image, words):
            return np.ones((1, image.shape[1], image.shape[0]), bool)

    with pytest.raises(InputError, match="Transposed"):
        make_masks(make_support(), load_profile("mini", {"masks.segmenter": "threshold"}), Transposed())


def test_more_levels_of_foreground():
    """Four plateaus on a 2 x 6 map: the upper two levels are foreground, the third is not used, the lowest is background."""
    plateaus = np.array([[0.0, 0.0, 0.3, 0.3, 0.6, 0.6], [0.0, 0.0, 0.3, 0.6, 1.0, 1.0]], np.float32)[None]
    foreground, background = multi_otsu(plateaus, 4, "image", 2)
    assert np.array_equal(foreground, plateaus >= 0.6) and np.array_equal(background, plateaus == 0.0)
    narrow, _ = multi_otsu(plateaus, 4, "image", 1)
    assert np.array_equal(narrow, plateaus == 1.0)
    for levels in (0, 4):
        with pytest.raises(ProfileError, match="threshold_foreground"):
            multi_otsu(plateaus, 4, "image", levels)


def test_overlaps_stay_with_the_proposal_of_highest_mean_attribution():
    attribution = np.array([[1.0, 0.8, 0.2, 0.0, 0.0], [1.0, 0.6, 0.2, 0.0, 0.5]], np.float32)
    wide, narrow, inner, empty = np.zeros((4, 2, 5), bool)
    wide[:, :3] = True  # mean 3.8 / 6
    narrow[:, 1:3] = True  # mean 1.8 / 4
    inner[:, 2] = True  # mean 0.2, wholly inside the others
    alone = separate(np.stack([narrow, wide, inner, empty]), attribution)
    assert [mask.tolist() for mask in alone] == [wide.tolist()]
    narrow[:, 4] = True
    alone = separate(np.stack([narrow, wide]), attribution)
    assert (alone[1] == wide).all() and (alone[0] == (narrow & ~wide)).all()
    assert separate(np.zeros((0, 2, 5), bool), attribution).shape == (0, 2, 5)


def test_separate_matches_the_definition_pixel_by_pixel():
    rng = np.random.default_rng(0)
    for _ in range(10):
        proposals, attribution = rng.random((5, 4, 7)) < 0.4, rng.random((4, 7)).astype(np.float32)
        means = [attribution[mask].mean() for mask in proposals]
        expected = np.zeros_like(proposals)
        for y in range(4):
            for x in range(7):
                holders = [n for n in range(5) if proposals[n, y, x]]
                if holders:
                    expected[max(holders, key=lambda n: means[n]), y, x] = True
        assert np.array_equal(separate(proposals, attribution), expected[expected.any(axis=(1, 2))])


def test_overlaps_and_fallback_as_the_profile_says():
    support = make_support()
    support.images[:] = 9

    class Two:
        name = "Two"

        def propose(self, image, words):
            masks = np.zeros((2, 6, 10), bool)
            masks[0, 2:4, 2:6] = True
            masks[1, 2:6, 4:10] = True
            return masks

    kept = make_masks(support, load_profile("mini", {"masks.segmenter": "threshold"}), Two())
    apart = make_masks(support, load_profile("mini", {"masks.segmenter": "threshold", "masks.overlaps": "attribution"}), Two())
    assert (kept.foreground == apart.foreground).all()
    proposals, attribution = Two().propose(None, ""), upsample(support.attribution, (6, 10))
    for n in range(2):
        expected = select(separate(proposals, attribution[n]), attribution[n])
        assert (apart.foreground[n] == expected[0]).all() and (apart.background[n] == expected[1]).all()
    fixed = make_masks(support, load_profile("mini", {
        "masks.segmenter": "threshold", "masks.fallback": "fixed", "masks.fallback_foreground": 0.6}))
    low, high = attribution.min((1, 2), keepdims=True), attribution.max((1, 2), keepdims=True)
    unit = (attribution - low) / (high - low)
    assert high.max() < 1 and (fixed.foreground == (unit > 0.6)).all() and (fixed.background == (unit < 0.2)).all()
    assert fixed.source == ("threshold", "threshold")


def test_settings_are_judged_without_a_support_set():
    for name in ("mini", "paper", "official"):
        check_masks(load_profile(name).masks)
    many = load_profile("mini", {"masks.threshold_classes": 3, "masks.threshold_foreground": 3})
    with pytest.raises(ProfileError, match=r"masks\.threshold_foreground"):
        check_masks(many.masks)
    check_masks(many.override({"masks.fallback": "fixed"}).masks)  # which do not use it
    crossed = load_profile("mini", {"masks.fallback": "fixed", "masks.fallback_foreground": 0.1}).masks
    with pytest.raises(ProfileError, match="fallback_background"):
        check_masks(crossed)


def test_fixed_thresholds_scale_each_map_by_itself():
    values, _ = three_levels(3)
    maps = np.concatenate([values, values * 0.1 + 7, np.full_like(values, 0.9)])
    foreground, background = fixed_thresholds(maps, 0.5, 0.2)
    for n in range(2):
        unit = (maps[n] - maps[n].min()) / (maps[n].max() - maps[n].min())
        assert (foreground[n] == (unit > 0.5)).all() and (background[n] == (unit < 0.2)).all()
    assert not foreground[2].any() and not background[2].any()  # constant
    for pair in ((0.2, 0.5), (1.5, 0.2), (0.5, -0.1)):
        with pytest.raises(ProfileError, match="fallback_background"):
            fixed_thresholds(maps, *pair)
    maps[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        fixed_thresholds(maps, 0.5, 0.2)
