"""Step 2c: Eq. 2 and Eq. 3 by hand on small features."""

import numpy as np
import pytest
import torch

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.schema import PrototypeSettings
from ovdiff_lib.prototypes.build import build_prototypes, resize_masks
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.types import ForegroundBackground

SETTINGS = PrototypeSettings(clusters=3)


def make(n=3, grid=(3, 5), channels=4, factor=2, seed=0):
    """Features (n, *grid, channels), masks at ``factor`` times the grid, and the masks on the grid. Image 1 has no foreground."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(1, 2, (n, *grid, channels)).astype(np.float32))
    foreground = rng.random((n, *grid)) < 0.5
    background = ~foreground & (rng.random((n, *grid)) < 0.7)
    foreground[1] = False

    def enlarge(masks):
        return masks.repeat(factor, 1).repeat(factor, 2)

    return features, ForegroundBackground(enlarge(foreground), enlarge(background), ("threshold",) * n), foreground, background


def test_class_and_instance_prototypes_are_the_means_of_equation_2():
    features, masks, foreground, background = make()
    built = build_prototypes(features, masks, SETTINGS)
    for region, inside in (("foreground", foreground), ("background", background)):
        own = built.region == region
        instances = own & (built.kind == "instance")
        shown = [n for n in range(3) if inside[n].any()]
        assert built.image[instances].tolist() == shown
        for row, n in zip(built.vectors[instances], shown, strict=True):
            assert np.allclose(row, features[n].numpy()[inside[n]].mean(0), atol=1e-5)
        (mean,) = built.vectors[own & (built.kind == "class")]
        sizes = inside.sum((1, 2))[shown]
        assert np.allclose(mean, (built.vectors[instances] * sizes[:, None]).sum(0) / sizes.sum(), atol=1e-5)
        assert not np.allclose(mean, built.vectors[instances].mean(0), atol=1e-3)  # weighted by size, not plain
    assert 1 not in built.image[built.region == "foreground"]


def test_part_prototypes_are_kmeans_of_each_region_and_the_assignment_says_where():
    features, masks, foreground, background = make()
    built = build_prototypes(features, masks, SETTINGS)
    for region, inside, sign in (("foreground", foreground, 1), ("background", background, -1)):
        parts = (built.region == region) & (built.kind == "part")
        centroids, _ = kmeans(features[torch.from_numpy(inside)], 3)
        assert np.allclose(built.vectors[parts], centroids, atol=1e-5)
        assert built.cluster[parts].tolist() == [sign, 2 * sign, 3 * sign]
        for vector, code in zip(built.vectors[parts], built.cluster[parts], strict=True):
            members = built.assignment == code
            assert members.any() and not (members & ~inside).any()
            assert np.allclose(features.numpy()[members].mean(0), vector, atol=1e-5)
    assert ((built.assignment == 0) == ~(foreground | background)).all()
    assert built.assignment.dtype == np.int16 and built.vectors.dtype == np.float32


def test_order_of_rows_and_their_labels():
    built = build_prototypes(*make()[:2], SETTINGS)
    foreground = ["class", "instance", "instance", "part", "part", "part"]
    background = ["class", "instance", "instance", "instance", "part", "part", "part"]
    assert built.kind.tolist() == foreground + background
    assert built.region.tolist() == ["foreground"] * 6 + ["background"] * 7
    assert (built.image[built.kind != "instance"] == -1).all() and (built.cluster[built.kind != "part"] == 0).all()


@pytest.mark.parametrize("kinds", [["class"], ["instance"], ["part"], ["class", "part"]])
def test_kinds_choose_and_leave_the_others_as_they_were(kinds):
    data = make()[:2]
    every, some = build_prototypes(*data, SETTINGS), build_prototypes(*data, PrototypeSettings(kinds=kinds, clusters=3))
    assert np.array_equal(some.vectors, every.vectors[np.isin(every.kind, kinds)])
    if "part" not in kinds:
        assert np.array_equal(some.assignment, np.sign(every.assignment))


def test_without_background():
    features, masks, *_ = make()
    built = build_prototypes(features, masks, PrototypeSettings(clusters=3, background=False))
    assert set(built.region) == {"foreground"} and set(np.unique(built.assignment)) == {0, 1, 2, 3}
    masks.background[:] = False
    assert np.array_equal(build_prototypes(features, masks, SETTINGS).vectors, built.vectors)


def test_a_cell_of_both_regions_counts_for_both_and_is_recorded_as_foreground():
    features, masks, foreground, _ = make()
    masks.background[:] = True
    built = build_prototypes(features, masks, SETTINGS)
    codes = built.assignment.reshape(-1)
    assert ((codes > 0) == foreground.reshape(-1)).all() and (codes != 0).all()
    (mean,) = built.vectors[(built.region == "background") & (built.kind == "class")]
    assert np.allclose(mean, features.reshape(-1, 4).mean(0), atol=1e-5)


def test_fewer_features_than_clusters_give_fewer_parts():
    features, masks, *_ = make(n=2, grid=(1, 3))
    masks.foreground[:], masks.background[:] = False, False
    masks.foreground[0, :, :4] = True  # two cells
    built = build_prototypes(features, masks, PrototypeSettings(kinds=["part"], clusters=8))
    assert len(built) == 2
    assert np.allclose(sorted(built.vectors.tolist()), sorted(features[0, 0, :2].tolist()), atol=1e-5)


def test_masks_on_the_feature_grid_by_area_and_interpolated():
    mask = np.zeros((3, 4, 6), bool)
    mask[0, :2, :3] = mask[0, 2, :3] = True  # fills the first cell of a (2, 2) grid, and half of the one below
    mask[1, 0, 0:5] = True  # a line: 3 of 6 and 2 of 6 pixels, never more than half
    resized = resize_masks(mask, (2, 2))
    assert resized.tolist() == [[[True, False], [False, False]], [[True, False], [False, False]], [[False, False], [False, False]]]
    mask[1, 0, 5] = True
    assert resize_masks(mask, (2, 2))[1].tolist() == [[True, True], [False, False]]  # a tie keeps both
    assert resize_masks(mask, (4, 6)).numpy().tolist() == mask.tolist()
    mask = np.zeros((1, 4, 6), bool)
    mask[0, 3, 5] = mask[0, 0, 0] = True
    assert resize_masks(mask, (2, 3), "bilinear").tolist() == [[[True, False, False], [False, False, True]]]
    mask = np.zeros((1, 16, 24), bool)
    mask[0, 3:5, 3:5] = True  # at a scale of 8 the middle of a cell is between its pixels 3 and 4
    assert resize_masks(mask, (2, 3), "bilinear").tolist() == [[[True, False, False], [False, False, False]]]
    mask = np.roll(mask, 2, axis=2)
    assert not resize_masks(mask, (2, 3), "bilinear").any()


def test_features_and_masks_that_give_no_prototypes():
    features, masks, *_ = make()
    with pytest.raises(InputError, match="of shape"):
        build_prototypes(features[:2], masks, SETTINGS)
    features[2] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        build_prototypes(features, masks, SETTINGS)
    masks.foreground[:] = False
    with pytest.raises(OVDiffError, match="foreground"):
        build_prototypes(features, masks, SETTINGS)
