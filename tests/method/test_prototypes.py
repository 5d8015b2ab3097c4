"""Step 2c: Eq. 2 and Eq. 3 by hand on small features; k-means against scikit-learn, by hand, and at its limits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.schema import PrototypeSettings
from ovdiff_lib.prototypes import kmeans as clustering
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


# ---- k-means

def blobs(points=600, centres=7, channels=5, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    middle = rng.normal(0, 3, (centres, channels))
    return (middle[rng.integers(0, centres, points)] + rng.normal(0, spread, (points, channels)) + 50).astype(np.float32)


def inertia(x, centroids, assignment):
    return ((x - centroids.numpy()[assignment]).astype(np.float64) ** 2).sum()


def best_inertia(x, k):
    return KMeans(k, n_init=4, random_state=0).fit(x).inertia_


def means(x, assignment, k):
    return np.stack([x[assignment.numpy() == j].mean(0) for j in range(k)])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [4, 7, 12])
def test_inertia_is_that_of_scikit_learn(seed, k):
    x = blobs(seed=seed)
    centroids, assignment = kmeans(x, k, seed, restarts=3)
    assert inertia(x, centroids, assignment) <= 1.02 * best_inertia(x, k)
    assert centroids.dtype == torch.float32 and centroids.shape == (k, 5) and assignment.shape == (600,)
    assert np.allclose(means(x, assignment, k), centroids, atol=1e-4)


def test_sampling_loses_little(monkeypatch):
    x = blobs(points=3000, seed=4)
    monkeypatch.setattr(clustering, "SAMPLE", 40)  # 280 of 3,000 points
    monkeypatch.setattr(clustering, "BLOCK", 5 * 333)  # several uneven blocks a pass
    centroids, assignment = kmeans(x, 7, restarts=3)
    assert len(assignment) == 3000
    assert inertia(x, centroids, assignment) <= 1.02 * best_inertia(x, 7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projecting_the_sample_loses_little(monkeypatch, seed):
    """Wide points of low rank in noise, in clusters that overlap; the centroids are means in all channels nevertheless."""
    rng = np.random.default_rng(seed)
    x = (blobs(points=3000, centres=12, channels=20, spread=2.5, seed=seed) @ rng.normal(size=(20, 400)) / 4
         + rng.normal(0, 1.0, (3000, 400))).astype(np.float32)
    monkeypatch.setattr(clustering, "SAMPLE", 80)
    monkeypatch.setattr(clustering, "PROJECTED", 64)
    centroids, assignment = kmeans(x, 12, seed, restarts=3)
    assert centroids.shape == (12, 400)
    assert np.allclose(means(x, assignment, 12), centroids, atol=0.35)  # a few iterations only
    assert inertia(x, centroids, assignment) <= 1.01 * best_inertia(x, 12)
    again = kmeans(x, 12, seed, restarts=3)
    assert torch.equal(again[0], centroids) and torch.equal(again[1], assignment)


def test_deterministic_in_the_seed_whatever_was_drawn_before():
    x = blobs(seed=6)
    first, second = ((torch.manual_seed(n), kmeans(x, 8, seed=3))[1] for n in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], kmeans(x, 8, seed=4)[0])
    for seed in range(6):  # a sample would hold them all, so that one seeding is tried
        assert torch.equal(kmeans(x, 8, seed)[0], kmeans(x, 8, seed, restarts=1)[0])


@pytest.mark.parametrize(("points", "k", "expected"), [(3, 8, 3), (1, 4, 1), (5, 1, 1)])
def test_fewer_points_than_clusters(points, k, expected):
    x = blobs(points=points)
    centroids, assignment = kmeans(x, k)
    assert len(centroids) == expected == len(assignment.unique())
    if expected == points:
        assert np.allclose(centroids[assignment], x, atol=1e-4)


def test_duplicates_give_as_many_clusters_as_distinct_points():
    x = torch.tensor([[1.0, 2], [3, 4], [5, 0]]).repeat(20, 1)
    centroids, assignment = kmeans(x, 10)
    assert sorted(centroids.tolist()) == [[1, 2], [3, 4], [5, 0]]
    assert torch.equal(centroids[assignment], x)
    assert len(kmeans(torch.ones(30, 3), 5)[0]) == 1


def test_an_empty_cluster_is_seeded_again_from_the_farthest_point():
    x = torch.tensor([[0.0], [1], [2], [30]])
    # The third starting centroid attracts nothing; the point farthest from its own centroid is 30.
    centroids, _, total = clustering._lloyd(x, torch.zeros(1), torch.tensor([[0.5], [2.5], [-1000.0]]), 10, 0.0)
    assert sorted(centroids.flatten().tolist()) == [0.5, 2.0, 30.0]
    assert total == pytest.approx(0.5)


def test_a_large_common_offset_half_precision_and_scale_do_not_matter():
    x = blobs(seed=7) - 50
    assert torch.equal(kmeans(x * 2.0**-12, 7)[1], kmeans(x, 7)[1])
    plain = inertia(x, *kmeans(x, 7, restarts=3))
    for points in (torch.from_numpy(x + 3000), torch.from_numpy(x + 200).half()):  # whose sum no half-precision number holds
        centroids, assignment = kmeans(points, 7, restarts=3)
        assert centroids.dtype == torch.float32
        assert ((x - means(x, assignment, 7)[assignment]) ** 2).sum() <= 1.02 * plain


@pytest.mark.parametrize("shape, kind", [((40_000, 960), torch.float32), ((12_000, 3_000), torch.float16)])
def test_memory_beside_the_points_is_bounded(shape, kind):
    """In a process of its own: the passes over all points take blocks, whatever their number and precision."""
    code = f"""
import torch
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.workbench.cost.instruments import measured
generator = torch.Generator().manual_seed(0)
points = torch.empty({shape}, dtype={kind})
for part in points.split(2_000):
    part.copy_(torch.randn(part.shape, generator=generator) + 3 * torch.randint(5, (len(part), 1), generator=generator))
kmeans(points[:500], 4)
step = measured(kmeans, [(points, 4)])
print(points.nbytes, step.peak - step.held)
"""
    held, added = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert held > 70e6 and added < 140e6, added  # two or three blocks of 32 MB and the sample
