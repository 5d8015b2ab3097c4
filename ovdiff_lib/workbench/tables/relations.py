"""What the claims about results say, as tests of numbers: greater, about equal, largest drop, grows then flat, linear.

**Noise.** Two cells with runs of the same three or more seeds are compared run by run: the mean of the paired
differences, with twice its standard error as noise. For all others the noise is twice the largest of the standard
deviations over seeds that are known: those of the two cells, where they have two or more runs, and that of the
reference, OVDiff's own row of Table 1 with the same extractors on the same data set. A cell of one run or two may vary
more than its own runs show, and rows with SD features alone spread more than the ensemble: so neither the cells nor one
reference for all would do. Where nothing is known it is :data:`TOLERANCE`. A difference up to the noise decides
nothing. In a claim of equality it holds up to :data:`TOLERANCE`: a larger one within the noise may be one or the other.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1.0
"""Percent of mIoU: differences up to it are "little" in a claim of equality, and noise where no spread is known."""

LINEAR_R2, LINEAR_RATIO = 0.98, (0.5, 2.0)
"""For times to grow linearly: least R^2 of the straight line, and range of (growth in time) / (growth in N)."""

PAIRS = 3
"""Fewest pairs of runs whose spread is believed: with two, both differences are often alike by chance."""

ORDER = ("fails", "within noise", "holds")
"""Verdicts on numbers, worst first: of several comparisons the worst counts."""


@dataclass(frozen=True)
class Sample:
    """A measured cell: ``mean`` in the table's unit, ``values`` of single runs with their ``seeds`` (() = not known),
    ``count`` the N in the name of a cell found by a pattern, ``std`` over its runs (None: one run, or not known)."""

    label: str
    mean: float
    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    count: int = 0
    std: float | None = None


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds (None: not measured) of the reference row ``row`` of Table 1 on the data set
    ``name``."""

    name: str
    std: float | None = None
    row: str = "OVDiff"


@dataclass(frozen=True)
class Part:
    """The outcome on one data set: a verdict of :data:`ORDER`, the numbers, and which noise was used."""

    verdict: str
    measured: str
    how: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """``left`` minus ``right``: mean, noise (both in the table's unit) and where the noise is from."""

    left: Sample
    right: Sample
    mean: float
    noise: float
    how: str

    def greater(self) -> str:
        """Verdict of left > right."""
        return "holds" if self.mean > self.noise else "fails" if self.mean < -self.noise else "within noise"

    def at_least(self) -> str:
        """Verdict of left >= right."""
        return "holds" if self.mean >= 0 else self.greater()

    def little(self) -> str:
        """Verdict of left being about right."""
        return "holds" if abs(self.mean) <= TOLERANCE else "within noise" if abs(self.mean) <= self.noise else "fails"

    def __str__(self) -> str:
        return f"{self.left.label} {self.left.mean:.1f} against {self.against()}"

    def against(self) -> str:
        """The right-hand side of the text, for several comparisons with one cell."""
        return f"{self.right.label} {self.right.mean:.1f} ({self.mean:+.2f}, noise {self.noise:.2f})"


def difference(left: Sample, right: Sample, spread: Spread) -> Difference:
    """Compare two cells by the rule at the head of this module."""
    if _paired(left, right):
        values = [a - b for a, b in zip(left.values, right.values, strict=True)]
        error = statistics.stdev(values) / math.sqrt(len(values))
        how = f"paired differences of {len(values)} seeds, 2 standard errors"
        return Difference(left, right, statistics.fmean(values), 2 * error, how)
    known = [(cell.std, cell.label) for cell in (left, right) if cell.std is not None]
    known += [(spread.std, f"{spread.row} in Table 1")] if spread.std is not None else []
    std, whose = max(known, default=(TOLERANCE / 2, ""))
    how = f"no pairs of runs: 2 standard deviations over seeds of {whose} on {spread.name} ({std:.2f})" if known else \
        f"no spread over seeds known on {spread.name}: {TOLERANCE} assumed"
    return Difference(left, right, left.mean - right.mean, 2 * std, how)


def greater(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """Each left-hand cell exceeds each right-hand cell by more than the noise."""
    return _worst([difference(a, b, spread) for a, b in itertools.product(left, right)], Difference.greater)


def greater_than_best(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The left-hand cell exceeds the best of the right-hand cells by more than the noise."""
    part = greater(left, [max(right, key=lambda s: s.mean)], spread)
    return Part(part.verdict, part.measured + (f" (the best of {len(right)})" if len(right) > 1 else ""), part.how)


def greater_pairwise(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """Each left-hand cell exceeds its right-hand partner by more than the noise."""
    return _worst([difference(a, b, spread) for a, b in zip(left, right, strict=True)], Difference.greater)


def at_least(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The left-hand cell is not below any right-hand cell; below by up to the noise is within noise."""
    return _worst([difference(a, b, spread) for a, b in itertools.product(left, right)], Difference.at_least)


def about_equal(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The cells differ by at most 1 % of mIoU; by more, but no more than the noise, is within noise."""
    return _worst([difference(a, b, spread) for a, b in itertools.product(left, right)], Difference.little)


def small_spread(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The best and the worst of the cells are about equal."""
    ordered = sorted(left, key=lambda s: s.mean)
    part = about_equal(ordered[-1:], ordered[:1], spread)
    shown = ", ".join(f"{s.label} {s.mean:.1f}" for s in left)
    return Part(part.verdict, f"{shown}; best and worst: {part.measured}", part.how)


def largest_drops(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The first left-hand cell is the whole, each other cell the whole without a part: the left-hand parts cost more
    than every right-hand part, by more than the noise, and cost something at all."""
    whole, *named = left
    least = max(named, key=lambda s: s.mean)  # of the named parts the one that costs least
    rival = min(right, key=lambda s: s.mean)
    part = greater([whole, rival], [least], spread)
    drops = (f"{s.label} {s.mean - whole.mean:+.2f}" for s in sorted([*named, *right], key=lambda s: s.mean))
    return Part(part.verdict, f"{whole.label} {whole.mean:.1f}; {', '.join(drops)}", part.how)


def smaller_gains(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """Cells come in twos, with and without: the gain on the right exceeds every gain on the left by more than the
    noise."""
    gains = [[_gain(a, b) for a, b in zip(side[::2], side[1::2], strict=True)] for side in (left, right)]
    return greater(gains[1], gains[0], spread)


def grows_then_flat(left: list[Sample], right: list[Sample], spread: Spread) -> Part | None:
    """The largest N up to 8 exceeds the smallest N by more than the noise, and doubling up to the largest N changes
    little. None (cells are missing) without two values of N up to 8 and one pair N, 2 N above them."""
    by_count = {s.count: s for s in left}
    early = sorted(n for n in by_count if n <= 8)
    doubled = [n for n in by_count if n > 8 and n % 2 == 0 and n // 2 in by_count]
    if len(early) < 2 or not doubled:
        return None
    growth = difference(by_count[early[-1]], by_count[early[0]], spread)
    end = difference(by_count[max(doubled)], by_count[max(doubled) // 2], spread)
    verdict = min((growth.greater(), end.little()), key=ORDER.index)
    return Part(verdict, f"{growth}; {end}", tuple(dict.fromkeys((growth.how, end.how))))


def linear(left: list[Sample], right: list[Sample], spread: Spread) -> Part | None:
    """A straight line through the times has an R^2 of at least 0.98, and between the smallest and the largest N time
    grows by half to twice as much as N. None (cells are missing) with fewer than three N."""
    points = sorted(left, key=lambda s: s.count)
    if len(points) < 3:
        return None
    counts, times = np.array([(s.count, s.mean) for s in points]).T
    r2 = np.corrcoef(counts, times)[0, 1] ** 2 if np.ptp(times) else 0.0
    ratio = (times[-1] / times[0]) / (counts[-1] / counts[0])
    verdict = "holds" if r2 >= LINEAR_R2 and LINEAR_RATIO[0] <= ratio <= LINEAR_RATIO[1] else "fails"
    shown = ", ".join(f"N={s.count}: {s.mean:.3g}" for s in points)
    measured = f"{shown} (R^2 {r2:.4f}; growth in time / growth in N {ratio:.2f})"
    return Part(verdict, measured, ("least squares, one run a point",))


RELATIONS: dict[str, Callable[[list[Sample], list[Sample], Spread], Part | None]] = {
    ">": greater,
    "> best": greater_than_best,
    "> best on most": greater_than_best,
    "> pairwise": greater_pairwise,
    ">=": at_least,
    "~": about_equal,
    "spread": small_spread,
    "largest drops": largest_drops,
    "smaller gains": smaller_gains,
    "grows then flat": grows_then_flat,
    "linear": linear,
}
"""Column ``relation`` of claims.csv."""


def _paired(left: Sample, right: Sample) -> bool:
    known = left.seeds and right.seeds
    return len(left.values) == len(right.values) >= PAIRS and (not known or left.seeds == right.seeds)


def _gain(with_it: Sample, without: Sample) -> Sample:
    values = tuple(a - b for a, b in zip(with_it.values, without.values, strict=True)) if _paired(with_it,
                                                                                                  without) else ()
    std = statistics.stdev(values) if values else max((s.std for s in (with_it, without) if s.std is not None),
                                                      default=None)
    return Sample(f"gain of {with_it.label.split(',')[0]}", with_it.mean - without.mean, values, with_it.seeds, std=std)


def _worst(compared: list[Difference], verdict: Callable[[Difference], str]) -> Part:
    texts = [", ".join([str(first), *(d.against() for d in others)])
             for _, (first, *others) in itertools.groupby(compared, key=lambda d: d.left.label)]
    return Part(min(map(verdict, compared), key=ORDER.index), "; ".join(texts),
                tuple(dict.fromkeys(d.how for d in compared)))
