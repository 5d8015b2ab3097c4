"""What the claims about results say, as comparisons of numbers: greater, about equal, largest drop, linear, ..."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Self

import numpy as np
from scipy import stats

from ovdiff_lib.workbench.tables.intervals import LEVEL, interval, p_value
from ovdiff_lib.workbench.tables.tables import NOT_EXERCISED

MEAN = attrgetter("mean")
TOLERANCE = 1.0  # percent of mIoU: differences up to it are "little"
WITHIN = {">": (0.0, np.inf), ">=": (-TOLERANCE, np.inf), "<=": (-np.inf, TOLERANCE), "~": (-TOLERANCE, TOLERANCE)}
"""Edges of a difference left - right: more; not less but for a little; more by a little at most; about equal."""

LINEAR_R2, LINEAR_RATIO = 0.98, (0.5, 2.0)
"""For times to grow linearly: least R^2 of the straight line, and range of (growth in time) / (growth in N)."""

ORDER = ("fails", NOT_EXERCISED, "within noise", "holds")
"""Verdicts on numbers, worst first: of several comparisons the worst counts."""

LEGEND = (
    "In brackets 95 % intervals of differences: images and seeds were drawn again 10,000 times, the same ones for both "
    "sides (a rival without seeds is the same for each; one seed says nothing of others; constants stay as searched). "
    "A comparison decides where twice the share of the draws that disagree is below 5 %, after Holm's correction for "
    f"the number of comparisons of all claims; else it is within noise. Little is up to {TOLERANCE} % of mIoU: that "
    "something changes little holds where the draws lie within that, and fails where they lie beyond. Not exercised: "
    "two rows have the same counts in every image, so that nothing acted, or a filter left one of them no background "
    "prototypes. A claim about several data sets holds if it holds on each and fails if it fails on one; one about "
    "most of them fails where even the undecided ones would make no majority.")


@dataclass(frozen=True, eq=False)
class Measured:
    """A measured cell: ``mean`` in the table's unit, of an mIoU its ``draws`` f64 (DRAWS,), which cells of a data set
    share, its number of ``seeds`` and foot``note``, and ``count``, the N in the name of a cell found by a pattern."""

    label: str
    mean: float
    draws: np.ndarray | None = None
    seeds: int = 1
    note: str = ""
    count: int = 0

    bare = property(lambda self: "; ".join(re.findall(r"\b[^.:]* left none [^.:]*", self.note)))
    """What the footnote says of extractors to which a filter left no background prototypes."""

    def minus(self, other: Self, label: str = "") -> Self:
        """The difference, as a sample called ``label``."""
        return Measured(label, self.mean - other.mean, self.draws - other.draws, note=f"{self.note} {other.note}")


@dataclass
class Comparison:
    """Whether the difference ``left`` - ``right`` lies within the edges of ``sign`` (:data:`WITHIN`); ``corrected`` is
    its p-value after Holm, which all comparisons of all claims together make."""

    left: Measured
    sign: str
    right: Measured
    corrected: float = 1.0

    difference = cached_property(lambda self: self.left.minus(self.right))
    exercised = cached_property(lambda self: bool(self.difference.draws.any()) and not self.difference.bare)
    p = cached_property(lambda self: p_value(self.difference.draws, *WITHIN[self.sign]))

    @property
    def verdict(self) -> str:
        """Of :data:`ORDER`."""
        low, high = WITHIN[self.sign]
        decided = "holds" if low < self.difference.mean < high else "fails"
        return NOT_EXERCISED if not self.exercised else "within noise" if self.corrected >= LEVEL else decided

    def __str__(self) -> str:
        low, high = interval(self.difference.draws)
        found = f"{self.difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]" if self.exercised else NOT_EXERCISED
        return f"{self.right.label} {self.right.mean:.1f} ({': '.join(filter(None, (found, self.difference.bare)))})"


@dataclass
class Outcome:
    """A data set's outcome: comparisons, a text with {} for their numbers; of no comparison the verdict by ``rule``."""

    comparisons: list[Comparison]
    text: str
    fixed: str = ""
    rule: str = ""

    verdict = property(lambda self: self.fixed or min((c.verdict for c in self.comparisons), key=ORDER.index))
    """Of :data:`ORDER`."""

    @property
    def measured(self) -> str:
        """The numbers."""
        numbers: dict[str, list[str]] = {}
        for one in self.comparisons:
            numbers.setdefault(f"{one.left.label} {one.left.mean:.1f} against ", []).append(str(one))
        return self.text.replace("{}", "; ".join(first + ", ".join(others) for first, others in numbers.items()))

    @property
    def how(self) -> str:
        """What the verdict stands on."""
        found = ", ".join(f"{one.corrected:.2g}" for one in self.comparisons if one.exercised)
        return self.rule or (f"p after Holm {found}" if found else "")


def outcome(relation: str, left: list[Measured], right: list[Measured]) -> Outcome | None:
    """What a relation of claims.csv compares on a data set; None where it needs more cells than these."""
    if relation == "linear":
        return linear(left)
    pairs, text = RELATIONS[relation](left, right)
    return Outcome([Comparison(*pair) for pair in pairs], text) if pairs else None


Pairs = tuple[list[tuple[Measured, str, Measured]], str]
"""What a relation compares: (left, sign, right), each of which has to hold, and a text with {} for their numbers."""


def _every(sign: str) -> Callable[[list[Measured], list[Measured]], Pairs]:
    """Each left-hand cell against each right-hand cell."""
    return lambda left, right: ([(a, sign, b) for a, b in itertools.product(left, right)], "{}")


def _pairwise(left: list[Measured], right: list[Measured]) -> Pairs:
    return [(a, ">", b) for a, b in zip(left, right, strict=True)], "{}"


def _best(left: list[Measured], right: list[Measured]) -> Pairs:
    return [(left[0], ">", max(right, key=MEAN))], f"{{}} (the best of {len(right)})" if len(right) > 1 else "{}"


def _spread(left: list[Measured], _: list[Measured]) -> Pairs:
    """The best and the worst of the left-hand cells are about equal."""
    ordered, shown = sorted(left, key=MEAN), ", ".join(f"{s.label} {s.mean:.1f}" for s in left)
    return [(ordered[-1], "~", ordered[0])], f"{shown}; best and worst: {{}}"


def _drops(left: list[Measured], right: list[Measured]) -> Pairs:
    """The first left cell is the whole, all others lack a part: the left parts cost something, more than any right."""
    whole, *named = left
    least, rival = max(named, key=MEAN), min(right, key=MEAN)  # of the named parts the one that costs least
    drops = ", ".join(f"{s.label} {s.mean - whole.mean:+.2f}" for s in sorted([*named, *right], key=MEAN))
    return [(whole, ">", least), (rival, ">", least)], f"{whole.label} {whole.mean:.1f}; {drops}; {{}}"


def _gains(left: list[Measured], right: list[Measured]) -> Pairs:
    """Cells come in twos, with and without: each gain on the left is little, and less than every gain on the right."""
    small, large = ([a.minus(b, f"gain of {a.label.split(',')[0]}") for a, b in zip(side[::2], side[1::2], strict=True)]
                    for side in (left, right))
    nothing = Measured("none", 0.0, np.zeros_like(left[0].draws))
    more = [(gain, ">", other) for other, gain in itertools.product(small, large)]
    return [*((gain, "<=", nothing) for gain in small), *more], "{}"


def _grows_then_flat(left: list[Measured], _: list[Measured]) -> Pairs:
    """The largest N up to 8 beats the smallest, doubling to the largest of all changes little. None without such N."""
    at = {s.count: s for s in left}
    early, doubled = sorted(n for n in at if n <= 8), [n for n in at if n > 8 and n % 2 == 0 and n // 2 in at]
    if len(early) < 2 or not doubled:
        return [], ""
    last = max(doubled)
    return [(at[early[-1]], ">", at[early[0]]), (at[last], "~", at[last // 2])], "{}"


RELATIONS: dict[str, Callable[[list[Measured], list[Measured]], Pairs]] = {
    **{sign: _every(sign) for sign in WITHIN}, "> best": _best, "> best on most": _best, "> pairwise": _pairwise,
    "spread": _spread, "largest drops": _drops, "little gains": _gains, "grows then flat": _grows_then_flat}
"""Column ``relation`` of claims.csv: what is compared with what; beside these there is "linear"."""


def linear(left: list[Measured]) -> Outcome | None:
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
    return Outcome([], measured, verdict, "least squares through the medians of each N's runs")
