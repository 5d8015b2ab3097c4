"""k-means for part prototypes (Sec. 3.3): few clusters, very many channels, and data that may not fit in memory twice.

Seeding (greedy k-means++) and most of Lloyd's iterations run on a sample of :data:`SAMPLE` points a cluster, in
:data:`PROJECTED` random directions, which keep distances nearly as they are (Johnson and Lindenstrauss, 1984); a few
iterations over all points and channels then settle centroids and assignment. A mini support set is smaller than its
sample, so there it is plain Lloyd's algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.networks.instruments import undisturbed

SAMPLE = 256
"""Points a cluster in the sample: the centroid of that many strays from the true one by 1/256 of the cluster's
variance."""

PROJECTED = 512
"""Directions that the sample is projected to, where it has more channels."""

RESTARTS = 2
"""Seedings tried on a sample, of which the better is taken: a second costs little beside the passes over all points."""

REFINE = 3
"""Most iterations over all points, once the sample has converged."""

BLOCK = 2**23
"""Values per block of rows: what a pass over the data allocates beside it (32 MB a copy)."""


@undisturbed()
def kmeans(x: torch.Tensor | np.ndarray, k: int, seed: int = 0, iterations: int = 50, restarts: int | None = None,
           tolerance: float = 1e-4) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids f32 (k', D) and assignment i64 (M,) of the points ``x`` (M, D), on the device of ``x``; deterministic
    in ``seed``.

    k' <= k: fewer only where there are fewer distinct points. Each centroid is the mean of its points, no cluster is
    empty. Lloyd's iterations stop after ``iterations``, or when the centroids' squared shift falls below ``tolerance``
    times the mean variance of a channel (as in scikit-learn). Of ``restarts`` seedings (default: :data:`RESTARTS` on a
    sample, else 1) the one of least inertia is kept.
    """
    x = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x))
    if k < 1 or x.ndim != 2 or len(x) == 0:
        raise ValueError(f"kmeans needs k >= 1 and points of shape (M, D) with M >= 1, not k={k} and shape {tuple(x.shape)}.")
    generator = torch.Generator("cpu").manual_seed(seed)
    # Distances are differences of squares, so the common mean is taken off first: without it they drown in rounding.
    mean = _mean(x)
    if sampled := len(x) > k * SAMPLE:
        whole = x[torch.randperm(len(x), generator=generator, dtype=torch.long, device="cpu")[: k * SAMPLE].sort().values.to(x.device)]
        sample = _projected(whole, mean, generator) if x.shape[1] > PROJECTED else whole.float() - mean
    else:
        sample = x.float() - mean
    best = None
    for _ in range(max(1, restarts or (RESTARTS if sampled else 1))):
        found = _lloyd(sample, None, _seed_centroids(sample, k, generator), iterations, tolerance)
        if best is None or found[2] < best[2]:
            best = found
    if sampled:
        best = _lloyd(x, mean, _means(whole, mean, best[1], len(best[0])), REFINE, tolerance)
    return best[0] + mean, best[1]


def inertia(x: torch.Tensor, centroids: torch.Tensor, assignment: torch.Tensor) -> float:
    """Sum of squared distances of the points (M, D) to the centroids they are assigned to."""
    rows = max(1, BLOCK // x.shape[1])
    return sum(float((part.float() - centroids[index]).square().sum(dtype=torch.float64))
               for part, index in zip(x.split(rows), assignment.split(rows), strict=True))


def _mean(x: torch.Tensor) -> torch.Tensor:
    """Mean f32 (D,) of the points, by blocks: as a whole, points in half precision would be copied."""
    rows = max(1, BLOCK // x.shape[1])
    buffer = torch.empty(0 if x.dtype == torch.float32 else min(rows, len(x)), x.shape[1], dtype=torch.float32, device=x.device)
    parts = (part if x.dtype == torch.float32 else buffer[: len(part)].copy_(part) for part in x.split(rows))
    return (sum(part.sum(0).double() for part in parts) / len(x)).float()


def _projected(x: torch.Tensor, mean: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The points less ``mean`` in :data:`PROJECTED` random directions, f32 (M, d)."""
    directions = torch.randn(x.shape[1], PROJECTED, generator=generator, dtype=torch.float32, device="cpu").to(x.device) / PROJECTED ** 0.5
    return torch.cat([(part.float() - mean) @ directions for part in x.split(max(1, BLOCK // x.shape[1]))])


def _means(x: torch.Tensor, mean: torch.Tensor, assignment: torch.Tensor, k: int) -> torch.Tensor:
    """Means f32 (k, D), relative to ``mean``, of the points of each cluster; none is empty."""
    rows = max(1, BLOCK // x.shape[1])
    sums = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device)
    for part, index in zip(x.split(rows), assignment.split(rows), strict=True):
        points = part.float() - mean
        sums += F.one_hot(index, k).to(points.dtype).T @ points
    return (sums / torch.bincount(assignment, minlength=k)[:, None]).float()


def _seed_centroids(points: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): of a few points drawn by squared distance, the one that lowers
    inertia most."""
    norms = points.square().sum(1)
    trials = 2 + int(math.log(k))
    first = int(torch.randint(len(points), (1,), generator=generator, dtype=torch.long, device="cpu"))
    chosen = [first]
    distance = _distances(points, norms, points[[first]])[:, 0]
    scale = 1e-6 * norms.max().clamp(min=1e-30)  # below this a distance is rounding, and the point a duplicate
    for _ in range(1, min(k, len(points))):
        weight = torch.where(distance > scale, distance, 0.0).double().cumsum(0)
        if weight[-1] <= 0:
            break
        draws = torch.rand(trials, generator=generator, dtype=torch.float64, device="cpu").to(weight.device) * weight[-1]
        candidates = torch.searchsorted(weight, draws, right=True).clamp(max=len(points) - 1)
        lowered = torch.minimum(distance[:, None], _distances(points, norms, points[candidates]))
        pick = int(lowered.sum(0).argmin())
        chosen.append(int(candidates[pick]))
        distance = lowered[:, pick]
    return points[chosen]


def _distances(points: torch.Tensor, norms: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances (M, c)."""
    return torch.addmm(centres.square().sum(1), points, centres.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)


def _lloyd(x: torch.Tensor, mean: torch.Tensor | None, centroids: torch.Tensor, iterations: int,
           tolerance: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Centroids (relative to ``mean``), assignment and inertia after Lloyd's iterations from ``centroids``; ``mean``
    None: ``x`` is f32 and has it taken off."""
    lengths = _lengths(x, mean)
    spread = float(lengths.sum(dtype=torch.float64))
    for _ in range(max(1, iterations)):
        assignment, distance, sums, counts = _assign(x, mean, centroids, lengths)
        means = (sums / counts.clamp(min=1)[:, None]).float()
        empty = counts == 0
        if empty.any():
            means[empty] = _centred(x[distance.topk(int(empty.sum())).indices], mean)
        shift = float((means - centroids).square().sum())
        centroids = means
        if shift <= tolerance * spread / x.numel():
            break
    keep = ~empty
    relabel = keep.cumsum(0) - 1
    return centroids[keep], relabel[assignment], float(distance.sum(dtype=torch.float64))


def _centred(x: torch.Tensor, mean: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    if mean is None:
        return x
    return x.float() - mean if out is None else out.copy_(x).sub_(mean)  # into `out` without a copy of its own in between


def _blocks(x: torch.Tensor, mean: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The points less ``mean`` in blocks f32 (m, D), each gone when the next is asked for."""
    rows = max(1, BLOCK // x.shape[1])
    buffer = torch.empty(0 if mean is None else min(rows, len(x)), x.shape[1], dtype=torch.float32, device=x.device)
    return (_centred(part, mean, buffer[: len(part)]) for part in x.split(rows))


def _lengths(x: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    """Squared lengths f32 (M,) of the points less ``mean``, without a block of squares."""
    return torch.cat([torch.linalg.vector_norm(points, dim=1).square_() for points in _blocks(x, mean)])


def _assign(x: torch.Tensor, mean: torch.Tensor | None, centroids: torch.Tensor, lengths: torch.Tensor):
    """One pass: nearest centroid and squared distance of every point; sum and number of the points of every
    centroid."""
    k = len(centroids)
    square = centroids.square().sum(1)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=x.device)
    counts = torch.zeros(k, dtype=torch.float64, device=x.device)
    assignment, nearest = [], []
    for points in _blocks(x, mean):
        least, index = torch.addmm(square, points, centroids.T, alpha=-2).min(1)
        member = F.one_hot(index, k).to(points.dtype)
        sums += member.T @ points
        counts += member.sum(0)
        assignment.append(index)
        nearest.append(least)
    return torch.cat(assignment), torch.cat(nearest).add_(lengths).clamp_(min=0), sums, counts
