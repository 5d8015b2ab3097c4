"""Scenarios of the part prototypes (Sec. 3.3): this project's k-means against scikit-learn's."""

from __future__ import annotations

import math

import torch

from ovdiff_lib.prototypes.kmeans import inertia, kmeans
from ovdiff_lib.workbench.cost.ratio import AT_LEAST, Bound, Check, Ratio, alternate
from ovdiff_lib.workbench.cost.scene import Scene

PAPER = (65_536, 7_680)
"""Half of the 32 x 64 x 64 support features of a class, and Stable Diffusion's channels (App. C.2)."""

SOURCES, RANK, WHITE = 200, 64, 0.05
"""Of :func:`clustered_points`: groups, directions, and noise in standard deviations of all else."""

FEW_POINTS_ROUNDS = 5
"""Rounds for each of the scene's where a round takes a fraction of a second."""

ADDED = 1e9
"""Bytes of memory beside the points, however many they are."""

WORSE = 0.01
"""Of inertia, the share by which it may be above scikit-learn's."""


def clustered_points(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Points f32 (count, channels) that are like features of images: in 200 groups of different sizes, which overlap, within 64 directions
    whose variances fall off as 1 / rank, plus white noise of 5 % in all channels.

    The groups are more than the clusters looked for, so that there is no one right answer; features have far fewer independent directions
    than channels, which is what makes clustering them different from clustering noise.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(RANK, channels)
    scale = torch.arange(1, rank + 1).float().rsqrt()
    sizes = torch.rand(SOURCES, generator=generator).square()
    group = torch.multinomial(sizes, count, replacement=True, generator=generator)
    centres = torch.randn(SOURCES, rank, generator=generator) * scale
    inner = centres[group] + 0.5 * torch.randn(count, rank, generator=generator) * scale
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=generator))[0].T * math.sqrt(channels / rank)
    return torch.randn(count, channels, generator=generator).mul_(WHITE).addmm_(inner, basis)


def noise_points(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Points f32 (count, channels) of white noise: nothing to find, and the most iterations."""
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def kmeans_profile(scene: Scene) -> list[Ratio]:
    """A class of the profile: half of its support features are the foreground."""
    features = scene.ovdiff.extractors["sd"]
    cells = (scene.profile.features.sd_input_size // scene.pipe.vae_scale_factor) ** 2
    count = max(scene.profile.prototypes.clusters, scene.profile.support.size * cells // 2)
    return [compare(scene, clustered_points(count, features.channels), "k-means, profile's shape", None,
                    rounds=FEW_POINTS_ROUNDS * scene.repeats)]


def kmeans_full_size(scene: Scene) -> list[Ratio]:
    """A class of the paper."""
    return [compare(scene, clustered_points(*PAPER), "k-means, full size", Bound(10, AT_LEAST), budget=90)]


def kmeans_support_set(scene: Scene) -> list[Ratio]:
    """All features of a support set, as many as both regions of a class have together: 4 GB of points."""
    return [compare(scene, clustered_points(2 * PAPER[0], PAPER[1]), "k-means, all of a support set", Bound(10, AT_LEAST), budget=90)]


def kmeans_noise(scene: Scene) -> list[Ratio]:
    """The same shape without any structure."""
    return [compare(scene, noise_points(*PAPER), "k-means, full size, noise", None, budget=90)]


def compare(scene: Scene, points: torch.Tensor, name: str, bound: Bound | None, budget: float = math.inf, rounds: int = 0) -> Ratio:
    """Both on the same points, the profile's number of clusters, a new seed every round. Inertia depends on the seed: means are compared.

    ``rounds`` default to the scene's.
    """
    from sklearn.cluster import KMeans

    k, array = scene.profile.prototypes.clusters, points.numpy()
    points = points.to(scene.device)
    found, theirs = [], []

    def ours(seed: int) -> None:
        found.append(kmeans(points, k, seed=seed))

    def other(seed: int) -> None:
        theirs.append(float(KMeans(k, n_init="auto", random_state=seed).fit(array).inertia_))

    small = array[: 4 * k]
    pair = alternate(ours, other, rounds or scene.repeats, device=scene.device, budget=budget, warm_up=(
        lambda: kmeans(points[: 4 * k], k), lambda: KMeans(k, n_init="auto", random_state=0).fit(small)))
    reached = sum(inertia(points, *one) for one in found) / len(found)
    worse = reached / (sum(theirs) / len(theirs)) - 1
    return Ratio(name, f"k-means of {len(points):,} x {points.shape[1]:,} points in {k} clusters",
                 f'sklearn.cluster.KMeans({k}, n_init="auto")', pair.ours, pair.theirs, bound,
                 (Check("share of mean inertia above the alternative's", worse, WORSE),
                  Check("bytes added to the points", pair.ours.peak, ADDED)), note="" if bound else "no bound at this shape")
