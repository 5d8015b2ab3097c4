"""What ``ovdiff benchmark`` measures with: ratios of time and memory against a named alternative, taken in turns.

A ratio of two ways of doing the same thing says the same on a slow and on a fast machine, which seconds do not.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.files import size_text
from ovdiff_lib.networks.loading import load_diffusion, resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.cost.instruments import Measured, joined, measured

CLASSES = ("dog", "boat")
"""Real classes that are drawn for the measurements; made-up ones are copies of theirs."""

NOISE = 0.1
"""Noise on the copies, in standard deviations of a channel: enough that no two prototypes are equal."""


class Check(NamedTuple):
    """Beside the ratio: ``value`` of ``what`` (differences of results, seconds, bytes) is at most ``limit``."""

    what: str
    value: float
    limit: float


@dataclass(frozen=True)
class Ratio:
    """OVDiff's way against a named alternative, of seconds or (``memory``) of memory.

    ``measures`` and ``alternative`` say in words what was done. ``limit``: at most so many times the alternative's
    cost; with ``faster`` the alternative takes at least so many times as long. None: the row reports only.
    """

    name: str
    measures: str
    alternative: str
    ours: Measured
    theirs: Measured
    limit: float | None = None
    checks: tuple[Check, ...] = ()
    faster: bool = False
    memory: bool = False

    @property
    def value(self) -> float:
        """Of the medians, or of the memory added: ours by theirs, or theirs by ours where OVDiff is to be faster."""
        return self._over(*(side.added if self.memory else side.median for side in (self.ours, self.theirs)))

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest ratio of one round of both; None for a single round and for memory."""
        rounds = [self._over(*pair) for pair in zip(self.ours.seconds, self.theirs.seconds, strict=False)]
        return None if self.memory or len(rounds) < 2 else (min(rounds), max(rounds))

    @property
    def met(self) -> bool | None:
        """Whether limit and checks hold; None for a row that has neither."""
        if self.limit is None and not self.checks:
            return None
        within = self.limit is None or (self.value >= self.limit if self.faster else self.value <= self.limit)
        return within and all(check.value <= check.limit for check in self.checks)  # NaN is not met

    def _over(self, ours: float, theirs: float) -> float:
        upper, lower = (theirs, ours) if self.faster else (ours, theirs)
        return upper / lower if lower else math.inf if upper else 1.0

    def __str__(self) -> str:
        """Lines for a person: the ratio, what was measured against what, and the checks."""
        result = {True: "met", False: "MISSED", None: "no bound"}
        spread = f" ({self.spread[0]:.3g}-{self.spread[1]:.3g})" if self.spread else ""
        bound = "" if self.limit is None else f", {'at least' if self.faster else 'at most'} {self.limit:g}"
        of = "faster" if self.faster else "the memory" if self.memory else "the time"
        sides = (f"{side.median:.3g} s and {size_text(side.added)}" for side in (self.ours, self.theirs))
        lines = [f"{self.name}: {self.value:.3g}x {of}{spread}{bound}: {result[self.met]}", self.measures,
                 f"against {self.alternative}", f"{' against '.join(sides)} added",
                 *(f"{what}: {value:.3g}, at most {limit:g}: {result[value <= limit]}"
                   for what, value, limit in self.checks)]
        return "\n    ".join(lines)


class Session:
    """What the scenarios share: ``profile`` with the extractor sd alone, a ``library`` folder of its own (a new one, so
    that nothing is read that an earlier run left), ``repeats`` rounds a ratio, real prototypes and made-up ones."""

    def __init__(self, profile: Profile, library: str | Path, repeats: int = 3) -> None:
        self.profile, self.library = profile.override({"features.extractors": ["sd"]}), library
        self.repeats, self.device, self.category = repeats, resolve_device(self.profile), Category(CLASSES[0])
        self.ovdiff = OVDiff(self.profile, library=library, progress=False)

    @property
    def pipe(self) -> Any:
        """The text-to-image pipeline."""
        return load_diffusion(self.profile)

    @functools.cached_property
    def bank(self) -> PrototypeBank:
        """Real prototypes of :data:`CLASSES`, drawn on first use."""
        return self.ovdiff.build(CLASSES)

    @functools.cached_property
    def _images(self) -> list[np.ndarray]:
        from ovdiff_lib.workbench.data.datasets import load_dataset

        data = load_dataset("mini-voc")  # ships with the package: at hand for every profile
        return [data[i].image for i in range(min(64, len(data)))]

    def image(self, number: int) -> np.ndarray:
        """A validation image u8 (H, W, 3) of the mini world, from the first again after the last."""
        return self._images[number % len(self._images)]

    def made_up(self, count: int) -> PrototypeBank:
        """:func:`made_up_vocabulary` with, in turns, copies of the real classes' prototypes, with noise of
        :data:`NOISE`. Class i is the same for every ``count``."""
        rows, made = self.bank.prototypes["sd"], []
        scales = [NOISE * one.vectors.std(0) for one in rows]
        for i in range(count):
            source, scale = rows[i % len(rows)], scales[i % len(rows)].astype(np.float32)
            noise = np.random.default_rng([0, i]).standard_normal(source.vectors.shape, dtype=np.float32)
            made.append(replace(source, vectors=source.vectors + noise * scale))
        return PrototypeBank(made_up_vocabulary(count), {"sd": tuple(made)})


def made_up_vocabulary(count: int) -> Vocabulary:
    """Classes "w0001", "w0002", ... whose prompts are two or three words of the mini world, no two alike: as long as
    names of large vocabularies are."""
    from ovdiff_lib.mini.world import load_world

    words = load_world().names
    prompts = itertools.chain(itertools.product(words, repeat=2), itertools.product(words, repeat=3))
    return Vocabulary(tuple(Category(f"w{i + 1:04}", " ".join(reversed(prompt)))
                            for i, prompt in enumerate(itertools.islice(prompts, count))))


def alternate(ways: Sequence[Callable[[int], Any]], rounds: int, device: torch.device,
              budget: float = math.inf) -> list[Measured]:
    """Call every way with 1, then every way with 2, ... ``rounds``: a machine that is busy for a while slows them all.

    Before, all are called with 0, to warm up (a way may do less then), and not counted. ``budget``: no further round
    once the rounds took so many seconds together.
    """
    for way in ways:
        way(0)
    runs: list[list[Measured]] = [[] for _ in ways]
    for number in range(1, rounds + 1):
        if sum(sum(run.seconds) for side in runs for run in side) >= budget:
            break
        for side, way in zip(runs, ways, strict=True):
            gc.collect()
            with warnings.catch_warnings():  # of too long joined prompts, at every image
                warnings.filterwarnings("ignore", message="The category filter left out")
                side.append(measured(way, [(number,)], device=device))
    return [joined(side) for side in runs]


def in_new_process(function: Callable, *args: Any) -> Any:
    """``function(*args)`` in a new process: memory that an earlier step left free would hide what a step takes."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def difference(left: np.ndarray | torch.Tensor, right: np.ndarray | torch.Tensor) -> float:
    """Largest absolute difference of two arrays of one shape; infinite values at the same places are equal."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return float(np.abs(np.subtract(left, right, where=left != right, out=np.zeros_like(left))).max(initial=0.0))
