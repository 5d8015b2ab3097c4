"""How far a measured mIoU, or a difference of two, can be trusted: images and seeds are drawn again, many times.

A draw takes images with replacement. mIoU needs of an image only in how many pixels a class is both true and predicted,
in how many either, and in how many true, so that a draw is a product of these counts with how often each image was
taken. Where many classes are in two or three images each, some draws lack a class: its mean is over the classes that
the draw shows, and all draws are shifted so that their mean is the number measured. Few things drawn from spread too
little. Of N images that show K classes a draw takes N - K / 2 (N / 2 at least), by which intervals cover what they
should from one image a class to many; of S seeds S - 1, and their spread is widened as Student's t is wider than the
normal distribution, for four seeds by 1.6. All cells of a data set share the draws, so differences are paired.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from scipy import stats

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import written_whole

DRAWS, BLOCK = 10_000, 1_000  # draws, and how many of them are in memory at a time
LEVEL = 0.05  # what lies outside of an interval, and the largest p-value of a verdict


@dataclass(frozen=True, eq=False)
class Runs:
    """What a mean over seeds of mIoU, or of a share, was counted from: ``counts`` i32 (seeds, images, 3, K), of each
    image the pixels in which a class is both true and predicted, those in which it is either, and the true ones. One
    run is a method without seeds; a constant that was searched on the images is not searched anew in each draw."""

    dataset: str
    counts: np.ndarray

    images = property(lambda self: self.counts.shape[1])  # of a single one no other can be drawn: it has no interval

    @classmethod
    def of(cls, dataset: str, confusions: Sequence[np.ndarray]) -> Self:
        """``confusions``: for each seed the confusion matrices of the images, i64 (images, K, K)."""
        found = []
        for matrices in confusions:
            both, true = np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(2)
            found.append(np.stack([both, matrices.sum(1) + true - both, true], 1))
        return cls(dataset, np.stack(found).astype(np.int32))

    @classmethod
    def of_shares(cls, dataset: str, part: Sequence[int], whole: Sequence[int]) -> Self:
        """Of all images' ``whole`` the share that is ``part``, each (images,): as the IoU of one class is counted."""
        return cls(dataset, np.stack([part, whole, whole], 1).astype(np.int32)[None, :, :, None])

    @property
    def values(self) -> np.ndarray:
        """mIoU in percent of each seed on all images, f64 (seeds,)."""
        counts = self.counts.sum(1, dtype=np.int64)
        return 100 * _miou(counts, counts[:, 1] > 0)

    @cached_property
    def draws(self) -> np.ndarray:
        """mIoU in percent, mean over seeds, of each draw, f64 (DRAWS,); their mean is that of :attr:`values`."""
        found = resampled(self)
        return found + self.values.mean() - found.mean()


def resampled(runs: Runs, draws: int = DRAWS) -> np.ndarray:
    """mIoU in percent of ``draws`` draws, f64 (draws,), the same draws for all runs with one data set, number of images
    and number of seeds. A class that images show counts in the draws that show it, another where it is predicted."""
    seeds, images, kinds, classes = runs.counts.shape
    shown = runs.counts[:, :, 2].any((0, 1))
    size = max((images + 1) // 2, images - int(shown.sum()) // 2)
    taken = _multiplicities(zlib.crc32(runs.dataset.encode()), draws, images, size)
    counts = np.moveaxis(runs.counts, 0, 1).reshape(images, -1).astype(np.float32)
    made = []
    for first in range(0, draws, BLOCK):
        summed = (taken[first:first + BLOCK].astype(np.float32) @ counts).astype(np.float64)
        summed = summed.reshape(-1, seeds, kinds, classes)
        made.append(_miou(summed, np.where(shown, summed[:, :, 2], summed[:, :, 1]) > 0))
    miou = 100 * np.concatenate(made)
    if seeds == 1:
        return miou[:, 0]
    shares = _multiplicities(0, draws, seeds, seeds - 1) / (seeds - 1)
    wider = stats.t.ppf(1 - LEVEL / 2, seeds - 1) / stats.norm.ppf(1 - LEVEL / 2)
    return (miou * (1 / seeds + wider * (shares - 1 / seeds))).sum(1)


def _miou(counts: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Of counts (..., 3, K) the mean over the classes ``counted`` bool (..., K), in [0, 1]; 0 where there is none."""
    iou = counts[..., 0, :] / np.maximum(counts[..., 1, :], 1)
    return (iou * counted).sum(-1) / np.maximum(counted.sum(-1), 1)


@lru_cache(maxsize=8)
def _multiplicities(key: int, draws: int, things: int, taken: int) -> np.ndarray:
    """How often each of ``things`` is among ``taken`` drawn with replacement, u8 (draws, things)."""
    places = np.random.default_rng([key, things]).integers(things, size=(draws, taken))
    return np.stack([np.bincount(row, minlength=things) for row in places]).astype(np.uint8)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def p_value(draws: np.ndarray, low: float, high: float) -> float:
    """Two-sided: how surely a difference lies between ``low`` and ``high``, or not, by the draws on the wrong sides."""
    sides = [min((draws <= edge).sum(), (draws >= edge).sum()) for edge in (low, high)]
    return min(1.0, 2 * (1 + max(sides)) / (1 + len(draws)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's method: of all below a level, the chance that any is wrong is at most that level."""
    order = np.argsort(p)
    corrected = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)[np.argsort(order)].tolist()


def write_runs(table: Path, runs: Mapping[tuple[str, str], Runs]) -> None:
    """Write the counts of a table's cells by row and column beside it (.npz); without any, remove what lies there."""
    path = table.with_suffix(".npz")
    if not runs:
        return path.unlink(missing_ok=True)
    cells = np.array([(*place, one.dataset) for place, one in runs.items()])
    with written_whole(path) as file:
        np.savez_compressed(file, cells=cells, **{str(n): one.counts for n, one in enumerate(runs.values())})


def read_runs(table: Path) -> dict[tuple[str, str], Runs]:
    """What :func:`write_runs` wrote beside a table, {} where nothing lies there. Raises ``InputError`` if broken."""
    path = table.with_suffix(".npz")
    try:
        with np.load(path) as read:
            found = {(row, column): Runs(dataset, read[str(n)])
                     for n, (row, column, dataset) in enumerate(read["cells"].tolist())}
        if any(runs.counts.ndim != 4 or runs.counts.shape[2] != 3 for runs in found.values()):
            raise ValueError("not counts of this edition")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"The counts in {path} cannot be read; run their notebook again.") from None
