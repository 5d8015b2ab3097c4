"""What the claims about results say, as tests of numbers: greater, about equal, largest drop, grows then flat, linear.

**Noise.** Two cells with runs of the same three or more seeds are compared run by run: the mean of the paired differences, with twice its
standard error as noise. For all others the noise is twice the largest of the standard deviations over seeds that are known: those of the
two cells, where they have two or more runs, and that of the reference, OVDiff's own row of Table 1 with the same extractors on the same
data set. A cell of one run or two may vary more than its own runs show, and rows with SD features alone spread more than the
ensemble: so neither the cells nor one reference for all would do. Where nothing is known it is :data:`TOLERANCE`. A difference up to the
noise decides nothing. In a claim of equality it holds up to :data:`TOLERANCE`: a larger one within the noise may be one or the other.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1.0
"""Percent of mIoU: differences up to it are "little" in a claim of equality, and noise where no spread over seeds is known."""

LINEAR_R2 = 0.98
"""Least R^2 of the straight line through times for them to grow linearly."""

LINEAR_RATIO = (0.5, 2.0)
"""Legal range of (growth in time) / (growth in N); 1 = proportional, 0 = no growth."""

PAIRS = 3
"""Fewest pairs of runs whose spread is believed: with two, both differences are often alike by chance."""

ORDER = ("fails", "within noise", "holds")
"""Verdicts on numbers, worst first: of several comparisons the worst counts."""


@dataclass(frozen=True)
class Sample:
    """A measured cell. ``mean`` in the table's unit, ``values`` of single runs with their ``seeds`` () = not known, ``count`` the N in the
    name of a cell that was found by a pattern, ``std`` over its runs (None: one run, or not known)."""

    label: str
    mean: float
    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    count: int = 0
    std: float | None = None


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds (None: not measured) of the reference row ``row`` of Table 1 on the data set ``name``."""

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

    def __str__(self) -> str:
        return f"{self.left.label} {_number(self.left.mean)} against {self.against()}"

    def against(self) -> str:
        """The right-hand side of the text, for several comparisons with one cell."""
        return f"{self.right.label} {_number(self.right.mean)} ({self.mean:+.2f}, noise {self.noise:.2f})"


def difference(left: Sample, right: Sample, spread: Spread) -> Difference:
    """Compare two cells by the rule at the head of this module."""
    if _paired(left, right):
        values = [a - b for a, b in zip(left.values, right.values, strict=True)]
        error = statistics.stdev(values) / math.sqrt(len(values))
        return Difference(left, right, statistics.fmean(values), 2 * error, f"paired differences of {len(values)} seeds, 2 standard errors")
    mean = left.mean - right.mean
    known = [(cell.std, cell.label) for cell in (left, right) if cell.std is not None]
    if spread.std is not None:
        known.append((spread.std, f"{spread.row} in Table 1"))
    if not known:
        return Difference(left, right, mean, TOLERANCE, f"no spread over seeds known on {spread.name}: {TOLERANCE} assumed")
    std, whose = max(known)
    return Difference(left, right, mean, 2 * std,
                      f"no pairs of runs: 2 standard deviations over seeds of {whose} on {spread.name} ({std:.2f})")


def greater(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """Each left-hand cell exceeds each right-hand cell by more than the noise."""
    return _worst([difference(a, b, spread) for a, b in itertools.product(left, right)], Difference.greater)


def greater_than_best(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The left-hand cell exceeds the best of the right-hand cells by more than the noise."""
    best = max(right, key=lambda s: s.mean)
    part = greater(left, [best], spread)
    return Part(part.verdict, part.measured + (f" (the best of {len(right)})" if len(right) > 1 else ""), part.how)


def greater_pairwise(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """Each left-hand cell exceeds its right-hand partner by more than the noise."""
    return _worst([difference(a, b, spread) for a, b in zip(left, right, strict=True)], Difference.greater)


def at_least(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The left-hand cell is not below any right-hand cell; below by up to the noise is within noise."""
    def verdict(d: Difference) -> str:
        return "holds" if d.mean >= 0 else d.greater()

    return _worst([difference(a, b, spread) for a, b in itertools.product(left, right)], verdict)


def about_equal(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The cells differ by at most 1 % of mIoU; by more, but no more than the noise, is within noise."""
    return _worst([difference(a, b, spread) for a, b in itertools.product(left, right)], _little)


def small_spread(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The best and the worst of the cells differ by at most 1 % of mIoU; by more, but no more than the noise, is within noise."""
    ordered = sorted(left, key=lambda s: s.mean)
    part = _worst([difference(ordered[-1], ordered[0], spread)], _little)
    return Part(part.verdict, ", ".join(f"{s.label} {_number(s.mean)}" for s in left) + f"; best and worst: {part.measured}", part.how)


def largest_drops(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """The first left-hand cell is the whole, each other cell the whole without a part: the left-hand parts cost more than every
    right-hand part, by more than the noise, and cost something at all."""
    whole, *named = left
    least = max(named, key=lambda s: s.mean)  # of the named parts the one that costs least
    rival = min(right, key=lambda s: s.mean)
    compared = [difference(whole, least, spread), difference(rival, least, spread)]
    drops = ", ".join(f"{s.label} {s.mean - whole.mean:+.2f}" for s in sorted([*named, *right], key=lambda s: s.mean))
    part = _worst(compared, Difference.greater)
    return Part(part.verdict, f"{whole.label} {_number(whole.mean)}; {drops}", part.how)


def smaller_gains(left: list[Sample], right: list[Sample], spread: Spread) -> Part:
    """Cells come in twos, with and without: the gain on the right exceeds every gain on the left by more than the noise."""
    def gains(cells: list[Sample]) -> list[Sample]:
        return [_gain(a, b) for a, b in zip(cells[::2], cells[1::2], strict=True)]

    return _worst([difference(gain, other, spread) for gain in gains(right) for other in gains(left)], Difference.greater)


def grows_then_flat(left: list[Sample], right: list[Sample], spread: Spread) -> Part | None:
    """The largest N up to 8 exceeds the smallest N by more than the noise, and doubling up to the largest N changes at most 1 % of mIoU;
    by more, but no more than the noise, is within noise. None (cells are missing) without two values of N up to 8 and one pair N, 2 N
    above them."""
    by_count = {s.count: s for s in left}
    early = sorted(n for n in by_count if n <= 8)
    doubled = [n for n in by_count if n > 8 and n % 2 == 0 and n // 2 in by_count]
    if len(early) < 2 or not doubled:
        return None
    growth = difference(by_count[early[-1]], by_count[early[0]], spread)
    end = difference(by_count[max(doubled)], by_count[max(doubled) // 2], spread)
    verdict = min((growth.greater(), _little(end)), key=ORDER.index)
    return Part(verdict, f"{growth}; {end}", tuple(dict.fromkeys((growth.how, end.how))))


def linear(left: list[Sample], right: list[Sample], spread: Spread) -> Part | None:
    """A straight line through the times has an R^2 of at least 0.98, and between the smallest and the largest N time grows by half to
    twice as much as N. None (cells are missing) with fewer than three N."""
    points = sorted(left, key=lambda s: s.count)
    if len(points) < 3:
        return None
    counts, times = np.array([(s.count, s.mean) for s in points]).T
    residual = times - np.polyval(np.polyfit(counts, times, 1), counts)
    total = ((times - times.mean()) ** 2).sum()
    r2 = 1 - (residual**2).sum() / total if total > 0 else 0.0
    ratio = (times[-1] / times[0]) / (counts[-1] / counts[0])
    verdict = "holds" if r2 >= LINEAR_R2 and LINEAR_RATIO[0] <= ratio <= LINEAR_RATIO[1] else "fails"
    shown = ", ".join(f"N={s.count}: {s.mean:.3g}" for s in points)
    return Part(verdict, f"{shown} (R^2 {r2:.4f}; growth in time / growth in N {ratio:.2f})", ("least squares, one run a point",))


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
    values = tuple(a - b for a, b in zip(with_it.values, without.values, strict=True)) if _paired(with_it, without) else ()
    std = statistics.stdev(values) if values else max((s.std for s in (with_it, without) if s.std is not None), default=None)
    return Sample(f"gain of {with_it.label.split(',')[0]}", with_it.mean - without.mean, values, with_it.seeds, std=std)


def _little(d: Difference) -> str:
    return "holds" if abs(d.mean) <= TOLERANCE else "within noise" if abs(d.mean) <= d.noise else "fails"


def _worst(compared: list[Difference], verdict: Callable[[Difference], str]) -> Part:
    verdicts = [verdict(d) for d in compared]
    texts = [", ".join([str(first), *(d.against() for d in others)])
             for _, (first, *others) in itertools.groupby(compared, key=lambda d: d.left.label)]
    return Part(min(verdicts, key=ORDER.index), "; ".join(texts), tuple(dict.fromkeys(d.how for d in compared)))


def _number(value: float) -> str:
    return f"{value:.1f}"


def join(parts: Iterable[str]) -> str:
    """Texts once each, in order, as one."""
    return "; ".join(dict.fromkeys(p for p in parts if p))
