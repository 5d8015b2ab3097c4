"""k-means against scikit-learn, by hand, and at its limits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from ovdiff_lib.prototypes import kmeans as clustering
from ovdiff_lib.prototypes.kmeans import kmeans


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


def test_deterministic_in_the_seed_and_free_of_global_state():
    x = blobs(seed=6)
    torch.manual_seed(1)
    first = kmeans(x, 8, seed=3)
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = kmeans(x, 8, seed=3)
    assert torch.equal(state, torch.random.get_rng_state()) and not torch.equal(before, state)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], kmeans(x, 8, seed=4)[0])


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
    for points in (torch.from_numpy(x + 3000), torch.from_numpy(x).half()):
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
