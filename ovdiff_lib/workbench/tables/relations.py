"""What the claims about results say, as comparisons of numbers: greater, about equal, largest drop, linear, and so on.

:data:`LEGEND` says what counts as noise. No one spread alone would do: a cell of one run or two may vary more than its
own runs show, and rows with SD features alone spread more than the ensemble.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from scipy import stats

TOLERANCE = 1.0
"""Percent of mIoU: differences up to it are "little" in a claim of equality, and noise where no spread is known."""

LINEAR_R2, LINEAR_RATIO = 0.98, (0.5, 2.0)
"""For times to grow linearly: least R^2 of the straight line, and range of (growth in time) / (growth in N)."""

PAIRS = 3
"""Fewest pairs of runs whose spread is believed: with two, both differences are often alike by chance."""

ORDER = ("fails", "within noise", "holds")
"""Verdicts on numbers, worst first: of several comparisons the worst counts."""

MEAN = attrgetter("mean")

LEGEND = (
    "A difference up to the noise decides nothing (within noise). The noise is twice the standard error of paired "
    "differences where both cells have runs of the same three or more seeds, else twice the largest of the standard "
    "deviations over seeds that are known: of the two cells, where they have two or more runs, and of OVDiff's own row "
    "of Table 1 with the same extractors on the same data set (also for rivals, which have no seeds); "
    f"{TOLERANCE} where none is known. A claim that something changes little holds up to a difference of {TOLERANCE} % "
    "of mIoU, and fails beyond that and the noise. A claim about several data sets holds if it holds on each and fails "
    "if it fails on one; one about most of them fails where even the undecided ones would make no majority.")


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
class Part:
    """The outcome on one data set: a verdict of :data:`ORDER`, the numbers, and which noise was used."""

    verdict: str
    measured: str
    how: tuple[str, ...] = ()


def difference(left: Sample, right: Sample, reference: Sample, name: str) -> tuple[float, float, str]:
    """``left`` minus ``right`` on the data set ``name``: mean, noise (:data:`LEGEND`) and where the noise is from."""
    if values := paired(left, right):
        error = statistics.stdev(values) / math.sqrt(len(values))
        return statistics.fmean(values), 2 * error, f"paired differences of {len(values)} seeds, 2 standard errors"
    mean, known = left.mean - right.mean, [(s.std, s.label) for s in (left, right, reference) if s.std is not None]
    if not known:
        return mean, TOLERANCE, f"no spread over seeds known on {name}: {TOLERANCE} assumed"
    std, whose = max(known)
    return mean, 2 * std, f"no pairs of runs: 2 standard deviations over seeds of {whose} on {name} ({std:.2f})"


def paired(left: Sample, right: Sample) -> tuple[float, ...]:
    """Differences run by run, () where the cells have no pairs."""
    alike = len(left.values) == len(right.values) >= PAIRS
    if not alike or (left.seeds and right.seeds and left.seeds != right.seeds):
        return ()
    return tuple(a - b for a, b in zip(left.values, right.values, strict=True))


def verdict_of(sign: str, mean: float, noise: float) -> str:
    """Of :data:`ORDER`: whether a difference says left ">", ">=" or "~" (about equal) right."""
    if sign == "~":
        return "holds" if abs(mean) <= TOLERANCE else "within noise" if abs(mean) <= noise else "fails"
    return "holds" if mean > noise or (sign == ">=" and mean >= 0) else "fails" if mean < -noise else "within noise"


def outcome(relation: str, left: list[Sample], right: list[Sample], reference: Sample, name: str) -> Part | None:
    """What becomes of a relation of claims.csv on the data set ``name``; None where it needs more cells than these."""
    if relation == "linear":
        return linear(left)
    pairs, text = RELATIONS[relation](left, right)
    if not pairs:
        return None
    verdicts, hows, numbers = [], [], {}
    for a, sign, b in pairs:
        mean, noise, how = difference(a, b, reference, name)
        verdicts.append(verdict_of(sign, mean, noise))
        hows.append(how)
        against = f"{b.label} {b.mean:.1f} ({mean:+.2f}, noise {noise:.2f})"
        numbers.setdefault(f"{a.label} {a.mean:.1f} against ", []).append(against)
    shown = "; ".join(first + ", ".join(others) for first, others in numbers.items())
    return Part(min(verdicts, key=ORDER.index), text.replace("{}", shown), tuple(hows))


Pairs = tuple[list[tuple[Sample, str, Sample]], str]
"""What a relation compares: (left, sign, right), each of which has to hold, and a text with {} for their numbers."""


def _every(sign: str) -> Callable[[list[Sample], list[Sample]], Pairs]:
    """Each left-hand cell against each right-hand cell."""
    return lambda left, right: ([(a, sign, b) for a, b in itertools.product(left, right)], "{}")


def _pairwise(left: list[Sample], right: list[Sample]) -> Pairs:
    return [(a, ">", b) for a, b in zip(left, right, strict=True)], "{}"


def _best(left: list[Sample], right: list[Sample]) -> Pairs:
    return [(left[0], ">", max(right, key=MEAN))], f"{{}} (the best of {len(right)})" if len(right) > 1 else "{}"


def _spread(left: list[Sample], _: list[Sample]) -> Pairs:
    """The best and the worst of the left-hand cells are about equal."""
    ordered, shown = sorted(left, key=MEAN), ", ".join(f"{s.label} {s.mean:.1f}" for s in left)
    return [(ordered[-1], "~", ordered[0])], f"{shown}; best and worst: {{}}"


def _drops(left: list[Sample], right: list[Sample]) -> Pairs:
    """The first left-hand cell is the whole, each other cell the whole without a part: the left-hand parts cost more
    than every right-hand part, and cost something at all."""
    whole, *named = left
    least, rival = max(named, key=MEAN), min(right, key=MEAN)  # of the named parts the one that costs least
    drops = ", ".join(f"{s.label} {s.mean - whole.mean:+.2f}" for s in sorted([*named, *right], key=MEAN))
    return [(whole, ">", least), (rival, ">", least)], f"{whole.label} {whole.mean:.1f}; {drops}"


def _gains(left: list[Sample], right: list[Sample]) -> Pairs:
    """Cells come in twos, with and without: each gain on the right exceeds every gain on the left."""
    small, large = ([_gain(*two) for two in zip(side[::2], side[1::2], strict=True)] for side in (left, right))
    return _every(">")(large, small)


def _gain(with_it: Sample, without: Sample) -> Sample:
    values = paired(with_it, without)
    known = [s.std for s in (with_it, without) if s.std is not None]
    std = statistics.stdev(values) if values else max(known, default=None)
    label = f"gain of {with_it.label.split(',')[0]}"
    return Sample(label, with_it.mean - without.mean, values, with_it.seeds, std=std)


def _grows_then_flat(left: list[Sample], _: list[Sample]) -> Pairs:
    """The largest N up to 8 exceeds the smallest N, and doubling up to the largest N changes little. Needs two values
    of N up to 8 and one pair N, 2 N above them."""
    at = {s.count: s for s in left}
    early, doubled = sorted(n for n in at if n <= 8), [n for n in at if n > 8 and n % 2 == 0 and n // 2 in at]
    if len(early) < 2 or not doubled:
        return [], ""
    last = max(doubled)
    return [(at[early[-1]], ">", at[early[0]]), (at[last], "~", at[last // 2])], "{}"


RELATIONS: dict[str, Callable[[list[Sample], list[Sample]], Pairs]] = {
    ">": _every(">"), ">=": _every(">="), "~": _every("~"), "> best": _best, "> best on most": _best,
    "> pairwise": _pairwise, "spread": _spread, "largest drops": _drops, "smaller gains": _gains,
    "grows then flat": _grows_then_flat}
"""Column ``relation`` of claims.csv: what is compared with what; beside these there is "linear"."""


def linear(left: list[Sample]) -> Part | None:
    """A straight line through the times has an R^2 of at least 0.98, and between the smallest and the largest N time
    grows by half to twice as much as N. None with fewer than three N."""
    points = sorted(left, key=lambda s: s.count)
    if len(points) < 3:
        return None
    counts, times = np.array([(s.count, s.mean) for s in points]).T
    r2 = stats.linregress(counts, times).rvalue ** 2
    ratio = (times[-1] / times[0]) / (counts[-1] / counts[0])
    verdict = "holds" if r2 >= LINEAR_R2 and LINEAR_RATIO[0] <= ratio <= LINEAR_RATIO[1] else "fails"
    shown = ", ".join(f"N={s.count}: {s.mean:.3g}" for s in points)
    measured = f"{shown} (R^2 {r2:.4f}; growth in time / growth in N {ratio:.2f})"
    return Part(verdict, measured, ("least squares, one run a point",))
