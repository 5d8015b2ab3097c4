"""What ``ovdiff benchmark`` measures with: ratios of time against a named alternative, taken in turns.

A ratio of two ways of doing the same thing says the same on a slow and on a fast machine, which seconds do not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.console import size_text
from ovdiff_lib.workbench.cost.instruments import Measured, alternate
from ovdiff_lib.workbench.data.datasets import load_dataset


class Check(NamedTuple):
    """Beside the ratio: ``value`` of ``what``, by which the results differ, is at most ``limit``."""

    what: str
    value: float
    limit: float


@dataclass(frozen=True)
class Ratio:
    """Seconds of OVDiff's way against a named alternative's.

    ``measures`` and ``alternative`` say in words what was done. ``limit``: at most so many times the alternative's
    time; None: the row reports only.
    """

    name: str
    measures: str
    alternative: str
    ours: Measured
    theirs: Measured
    limit: float | None = None
    check: Check | None = None

    @property
    def value(self) -> float:
        """Of the medians: ours by theirs."""
        return self.ours.median / self.theirs.median

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest ratio of one round of both; None for a single round."""
        rounds = [ours / theirs for ours, theirs in zip(self.ours.seconds, self.theirs.seconds, strict=False)]
        return None if len(rounds) < 2 else (min(rounds), max(rounds))

    @property
    def met(self) -> bool | None:
        """Whether limit and check hold; None for a row that has neither."""
        bounds = [] if self.limit is None else [(self.value, self.limit)]
        bounds += [self.check[1:]] if self.check else []
        return all(value <= limit for value, limit in bounds) if bounds else None  # NaN is not met

    def __str__(self) -> str:
        """Lines for a person: the ratio, what was measured against what, and by what the results differ."""
        spread = f" ({self.spread[0]:.3g}-{self.spread[1]:.3g})" if self.spread else ""
        bound = "" if self.limit is None else f", at most {self.limit:g}"
        result = {True: "met", False: "MISSED", None: "no bound"}[self.met]
        lines = [f"{self.name}: {self.value:.3g}x the time{spread}{bound}: {result}"]
        lines += [f"{what}: {side.median:.3g} s, {size_text(side.added)} added" for what, side in (
            (self.measures, self.ours), (f"against {self.alternative}", self.theirs))]
        if self.check:
            lines.append(f"{self.check.what}: {self.check.value:.3g}, at most {self.check.limit:g}")
        return "\n    ".join(lines)


class Session:
    """What the scenarios share: ``profile`` with the extractor sd alone, ``repeats`` rounds a ratio, images and made-up
    classes. Nothing is built, so that no library is asked."""

    def __init__(self, profile: Profile, repeats: int = 3) -> None:
        self.profile, self.category = profile.override({"features.extractors": ["sd"]}), Category("dog")
        self.repeats, self.device = repeats, resolve_device(self.profile)
        self.ovdiff = OVDiff(self.profile, progress=False)

    def take_turns(self, *ways: Callable[[int], Any], rounds: int | None = None) -> list[Measured]:
        """Each way with the numbers of the rounds (see ``alternate``); a slow one is not repeated for long."""
        return alternate(ways, self.repeats if rounds is None else rounds, self.device, budget=45)

    @functools.cached_property
    def images(self) -> Sequence[np.ndarray]:
        """64 validation images u8 (H, W, 3) of the mini world, which ships: they are at hand for every profile."""
        data = load_dataset("mini-voc")
        return [data[i].image for i in range(64)]

    def made_up(self, count: int) -> PrototypeBank:
        """Classes "w0001", "w0002", ... of random prototypes, as many as a class may have. Their prompts are two or
        three words of the mini world, no two alike: as long as names of large vocabularies are."""
        words, rows = load_world().names, prototype_rows(self.profile)
        pairs, triples = (itertools.product(words, repeat=length) for length in (2, 3))
        prompts = itertools.islice(itertools.chain(pairs, triples), count)
        vocabulary = Vocabulary(tuple(Category(f"w{i:04}", " ".join(prompt)) for i, prompt in enumerate(prompts, 1)))
        rng, channels = np.random.default_rng(0), self.ovdiff.extractors["sd"].channels
        none, nowhere = np.full(rows, -1, np.int32), np.zeros((1, 1, 1), np.int16)
        kind, region = np.full(rows, "class"), np.where(np.arange(rows) % 2, "background", "foreground")
        made = (Prototypes(rng.standard_normal((rows, channels), np.float32), kind, region, none, none, nowhere)
                for _ in range(count))
        return PrototypeBank(vocabulary, {"sd": tuple(made)})


def prototype_rows(profile: Profile) -> int:
    """Most prototypes of one class (Eq. 2, 3): of each region one of the class, N of the drawings, K of the parts."""
    settings = profile.prototypes
    count = {"class": 1, "instance": profile.support.size, "part": settings.clusters}
    return (1 + settings.background) * sum(count[kind] for kind in settings.kinds)


def difference(left: np.ndarray | torch.Tensor, right: np.ndarray | torch.Tensor) -> float:
    """Largest absolute difference of two arrays of one shape; infinite values at the same places are equal."""
    left, right = (np.nan_to_num(torch.as_tensor(side).cpu().double().numpy(), nan=np.nan) for side in (left, right))
    return float(np.abs(left - right).max())
