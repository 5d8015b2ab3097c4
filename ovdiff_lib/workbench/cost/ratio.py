"""A ratio: two ways of doing one thing, timed in turns, and the bound that the comparison is held to."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.cost.instruments import Measured, joined, measured

AT_MOST, AT_LEAST = "at most", "at least"


@dataclass(frozen=True)
class Side:
    """One of the two ways: ``seconds`` of every round, and ``peak``, the most bytes of resident memory that a round added to what the
    process held when it began (None where memory was not looked at); ``whole`` the most that the whole process held during a round;
    ``device`` the peak of the GPU's memory, None on a CPU."""

    seconds: tuple[float, ...]
    peak: int | None = None
    device: int | None = None
    whole: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def memory(self) -> int | None:
        """What is compared: the GPU's peak where there is one, else what was added to the process."""
        return self.peak if self.device is None else self.device


@dataclass(frozen=True)
class Bound:
    """"at most" ``limit`` times the alternative's cost, or the alternative costs "at least" ``limit`` times as much. ``InputError`` for
    any other ``sense``."""

    limit: float
    sense: str = AT_MOST

    def __post_init__(self) -> None:
        if self.sense not in (AT_MOST, AT_LEAST):
            raise InputError(f"The sense of a bound is {self.sense!r}; write {AT_MOST!r} or {AT_LEAST!r}.")

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.sense == AT_MOST else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.sense == AT_MOST else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Check:
    """A condition beside the ratio: ``value`` of ``what`` is at most ``limit`` (differences of results, seconds, bytes)."""

    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit  # NaN is not met


@dataclass(frozen=True)
class Ratio:
    """OVDiff's way against a named alternative.

    ``name`` is the row's, unique in a run; ``measures`` what was done, ``alternative`` what it was compared with, in words. ``by`` is
    "seconds" or "memory": what the ratio is of. Without a ``bound`` the row reports only. ``note`` says what else a reader should know.
    """

    name: str
    measures: str
    alternative: str
    ours: Side
    theirs: Side
    bound: Bound | None = None
    checks: tuple[Check, ...] = ()
    by: str = "seconds"
    note: str = ""

    def __post_init__(self) -> None:
        if self.by not in ("seconds", "memory"):
            raise InputError(f"The ratio {self.name!r} is by {self.by!r}; write 'seconds' or 'memory'.")
        if self.by == "memory" and None in (self.ours.memory, self.theirs.memory):
            raise InputError(f"The ratio {self.name!r} is of memory that was not measured; measure both sides with `alternate`.")

    @property
    def value(self) -> float:
        """Ratio of the medians, or of the peaks: ours by theirs, and theirs by ours under a bound of "at least"."""
        if self.by == "memory":
            return self._over(self.ours.memory, self.theirs.memory)
        return self._over(self.ours.median, self.theirs.median)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest ratio of one round of both; None for a single round and for memory."""
        if self.by == "memory" or min(len(self.ours.seconds), len(self.theirs.seconds)) < 2:
            return None
        rounds = [self._over(a, b) for a, b in zip(self.ours.seconds, self.theirs.seconds, strict=False)]
        return min(rounds), max(rounds)

    @property
    def met(self) -> bool | None:
        """Whether bound and checks hold; None for a row that has neither."""
        if self.bound is None and not self.checks:
            return None
        return (self.bound is None or self.bound.holds(self.value)) and all(check.met for check in self.checks)

    def _over(self, ours: float, theirs: float) -> float:
        upper, lower = (theirs, ours) if self.bound and self.bound.sense == AT_LEAST else (ours, theirs)
        return upper / lower if lower else math.inf if upper else 1.0


@dataclass(frozen=True)
class Pair:
    """Both sides of an :func:`alternate`, with the results of their last rounds."""

    ours: Side
    theirs: Side
    our_result: Any
    their_result: Any


def alternate(ours: Callable[[int], Any], theirs: Callable[[int], Any], rounds: int, *, device: torch.device | None = None,
              budget: float = math.inf, warm_up: bool | tuple[Callable[[], Any], Callable[[], Any]] = True) -> Pair:
    """Call ``ours(i)`` and ``theirs(i)`` in turns, i = 1 ... ``rounds``, so that a machine that is busy for a while slows both.

    Before, both are called with 0 and not counted (``warm_up``; or the two given calls, where a whole round is long; False: nothing).
    ``budget``: no further round once the rounds took so many seconds together. Raises ``InputError`` for fewer than one round.
    """
    if rounds < 1:
        raise InputError(f"The number of repeats is {rounds}; give at least 1.")
    if warm_up is True:
        warm_up = (lambda: ours(0)), (lambda: theirs(0))
    for call in warm_up or ():
        call()
    runs: tuple[list[Measured], list[Measured]] = [], []
    for number in range(1, rounds + 1):
        if number > 1 and sum(sum(run.seconds) for side in runs for run in side) >= budget:
            break
        for side, function in zip(runs, (ours, theirs), strict=True):
            gc.collect()
            side.append(measured(function, [(number,)], device=device))
    first, second = (joined(side) for side in runs)
    peaks = [max(run.peak - run.held for run in side) for side in runs]
    sides = [Side(run.seconds, peak, run.device, run.peak) for run, peak in zip((first, second), peaks, strict=True)]
    return Pair(*sides, first.result, second.result)
