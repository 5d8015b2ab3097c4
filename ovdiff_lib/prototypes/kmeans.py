"""k-means for part prototypes (Sec. 3.3): few clusters, very many channels, and data that may not fit in memory twice.

Seeding (greedy k-means++) and most of Lloyd's iterations run on a sample of :data:`SAMPLE` points a cluster, in
:data:`PROJECTED` random directions, which nearly keep distances (Johnson and Lindenstrauss, 1984); a few iterations
over all points and channels then settle the result. Of points fewer than the sample it is plain Lloyd's algorithm.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.networks.instruments import undisturbed

SAMPLE = 256
"""Points a cluster in the sample: a mean of that many strays from the true one by 1/256 of the cluster's variance."""

PROJECTED = 512
"""Directions that the sample is projected to, where it has more channels."""

RESTARTS = 2
"""Seedings tried on a sample, of which the better is taken: a second costs little beside the passes over all points."""

ITERATIONS, REFINE = 50, 3
"""Most iterations, and most of those over all points once the sample has converged."""

TOLERANCE = 1e-4
"""Iterations end when the centroids' squared shift is below so many mean variances of a channel, as in scikit-learn."""

BLOCK = 2**23
"""Values per block of rows: what a pass over the data allocates beside it (32 MB a copy)."""


@undisturbed()
def kmeans(x: torch.Tensor | np.ndarray, k: int, seed: int = 0,
           restarts: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids f32 (k', D), assignment i64 (M,) of points ``x`` (M, D), on their device, deterministic in ``seed``.

    k' <= k: fewer only where there are fewer distinct points. Each centroid is the mean of its points, no cluster is
    empty. Of ``restarts`` seedings (default: :data:`RESTARTS` on a sample, else 1) the one of least inertia is kept.
    """
    x = torch.as_tensor(x)
    generator = torch.Generator("cpu").manual_seed(seed)
    # Distances are differences of squares, so the common mean is taken off first: without it they drown in rounding.
    mean = (sum(points.sum(0).double() for points in _blocks(x)) / len(x)).float()
    whole, sampled = x, len(x) > k * SAMPLE
    if sampled:
        order = torch.randperm(len(x), generator=generator, dtype=torch.long, device="cpu")
        whole = x[order[: k * SAMPLE].sort().values.to(x.device)]
    if sampled and x.shape[1] > PROJECTED:
        directions = torch.randn(x.shape[1], PROJECTED, generator=generator, dtype=torch.float32, device="cpu")
        directions = directions.to(x.device) / PROJECTED ** 0.5
        sample = torch.cat([points @ directions for points in _blocks(whole, mean)])
    else:
        sample = whole.float() - mean
    seedings = (_seed_centroids(sample, k, generator) for _ in range(restarts or (RESTARTS if sampled else 1)))
    centroids, assignment, _ = min((_lloyd(sample, None, seeds) for seeds in seedings), key=lambda found: found[2])
    if sampled:
        means = _means(whole, mean, assignment, len(centroids))
        centroids, assignment, _ = _lloyd(x, mean, means, REFINE)
    return centroids + mean, assignment


def _rows(x: torch.Tensor) -> int:
    return max(1, BLOCK // x.shape[1])


def _blocks(x: torch.Tensor, mean: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """The points, less ``mean``, in blocks f32 (m, D), each gone when the next is asked for."""
    copied = mean is not None or x.dtype != torch.float32
    # One buffer for all of them, filled without a copy in between.
    buffer = torch.empty(min(_rows(x), len(x)) * copied, x.shape[1], dtype=torch.float32, device=x.device)
    for part in x.split(_rows(x)):
        points = buffer[: len(part)].copy_(part) if copied else part
        yield points if mean is None else points.sub_(mean)


def _means(x: torch.Tensor, mean: torch.Tensor, assignment: torch.Tensor, k: int) -> torch.Tensor:
    """Means f32 (k, D), relative to ``mean``, of the points of each cluster; none is empty."""
    parts = zip(_blocks(x, mean), assignment.split(_rows(x)), strict=True)
    sums = sum((F.one_hot(index, k).float().T @ points).double() for points, index in parts)
    return (sums / torch.bincount(assignment, minlength=k)[:, None]).float()


def _seed_centroids(points: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): of a few draws by squared distance the best for inertia."""
    norms, trials = points.square().sum(1), 2 + int(math.log(k))
    chosen = [int(torch.randint(len(points), (1,), generator=generator, dtype=torch.long, device="cpu"))]
    distance = _distances(points, norms, points[chosen])[:, 0]
    scale = 1e-6 * norms.max().clamp(min=1e-30)  # below this a distance is rounding, and the point a duplicate
    for _ in range(1, min(k, len(points))):
        weight = torch.where(distance > scale, distance, 0.0).double().cumsum(0)
        if weight[-1] <= 0:
            break
        draws = torch.rand(trials, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)
        candidates = torch.searchsorted(weight, draws * weight[-1], right=True).clamp(max=len(points) - 1)
        lowered = torch.minimum(distance[:, None], _distances(points, norms, points[candidates]))
        pick = int(lowered.sum(0).argmin())
        chosen.append(int(candidates[pick]))
        distance = lowered[:, pick]
    return points[chosen]


def _distances(points: torch.Tensor, norms: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances (M, c)."""
    return torch.addmm(centres.square().sum(1), points, centres.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)


def _lloyd(x: torch.Tensor, mean: torch.Tensor | None, centroids: torch.Tensor, iterations: int = ITERATIONS,
           tolerance: float = TOLERANCE) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Centroids, assignment and inertia after Lloyd's iterations. ``mean`` (None: 0), which centroids are relative to,
    is subtracted block by block: a centred copy of all data would not fit."""
    lengths = torch.cat([torch.linalg.vector_norm(points, dim=1).square_() for points in _blocks(x, mean)])
    limit = tolerance * float(lengths.sum(dtype=torch.float64)) / x.numel()
    for _ in range(iterations):
        assignment, distance, sums, counts = _assign(x, mean, centroids, lengths)
        means = (sums / counts.clamp(min=1)[:, None]).float()
        empty = counts == 0
        if empty.any():  # seeded again from the points that are farthest from their centroids
            farthest = x[distance.topk(int(empty.sum())).indices].float()
            means[empty] = farthest if mean is None else farthest - mean
        shift = float((means - centroids).square().sum())
        centroids = means
        if shift <= limit:
            break
    relabel = (~empty).cumsum(0) - 1
    return centroids[~empty], relabel[assignment], float(distance.sum(dtype=torch.float64))


def _assign(x: torch.Tensor, mean: torch.Tensor | None, centroids: torch.Tensor, lengths: torch.Tensor):
    """One pass: nearest centroid and squared distance of every point; sum and number of every centroid's points."""
    square = centroids.square().sum(1)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=x.device)
    assignment, nearest = [], []
    for points in _blocks(x, mean):
        least, index = torch.addmm(square, points, centroids.T, alpha=-2).min(1)
        sums += F.one_hot(index, len(centroids)).to(points.dtype).T @ points
        assignment.append(index)
        nearest.append(least)
    assignment, nearest = torch.cat(assignment), torch.cat(nearest).add_(lengths).clamp_(min=0)
    return assignment, nearest, sums, torch.bincount(assignment, minlength=len(centroids)).double()
