"""The scenarios by name, and running them: one that fails is one sentence, and the others go on."""

from __future__ import annotations

import difflib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.cost import clusters, drawing, growth, segmenting, texts, vocabulary
from ovdiff_lib.workbench.cost.estimates import Estimate, estimates
from ovdiff_lib.workbench.cost.growth import Growth
from ovdiff_lib.workbench.cost.ratio import Ratio
from ovdiff_lib.workbench.cost.scene import Scene

Row = Ratio | Growth | Estimate


@dataclass(frozen=True)
class Scenario:
    """``run(scene)`` gives rows. ``full_size``: only with ``--full-size`` or by name. ``named``: only by name. ``quick``: seconds, for a
    notebook."""

    run: Callable[[Scene], Sequence[Row]]
    full_size: bool = False
    named: bool = False
    quick: bool = False


SCENARIOS: dict[str, Scenario] = {
    "sampling": Scenario(drawing.sampling, quick=True),
    "building": Scenario(drawing.building, quick=True),
    "attribution-memory": Scenario(drawing.attribution_memory),
    "kmeans": Scenario(clusters.kmeans_profile, quick=True),
    "texts": Scenario(texts.profile_texts, quick=True),
    "texts-vit-b16": Scenario(texts.published_texts),
    "segmenting": Scenario(segmenting.segmenting, quick=True),
    "images-together": Scenario(segmenting.images_together, quick=True),
    "vocabulary-2000": Scenario(vocabulary.growing, quick=True),
    "library-1000": Scenario(vocabulary.stored),
    "matching-memory": Scenario(segmenting.matching_memory),
    "pamr": Scenario(segmenting.pamr_memory),
    "bfloat16": Scenario(partial(segmenting.number_type, dtype="bfloat16"), quick=True),
    "float16": Scenario(partial(segmenting.number_type, dtype="float16")),
    "growth-classes": Scenario(growth.classes),
    "growth-images": Scenario(growth.images, quick=True),
    "growth-N": Scenario(growth.support_images, quick=True),
    "growth-K": Scenario(growth.clusters, quick=True),
    "estimates": Scenario(estimates),
    "sampling-full-size": Scenario(drawing.sampling_full_size, full_size=True),
    "kmeans-full-size": Scenario(clusters.kmeans_full_size, full_size=True),
    "kmeans-support-set": Scenario(clusters.kmeans_support_set, named=True),  # 13 GB of memory
    "kmeans-noise": Scenario(clusters.kmeans_noise, full_size=True),
}
"""Name -> scenario, in the order they run."""

QUICK = tuple(name for name, scenario in SCENARIOS.items() if scenario.quick)
"""Scenarios that take seconds with the profile mini."""


@dataclass(frozen=True)
class Outcome:
    """What a scenario gave: its rows, or in ``error`` one sentence of why it has none; ``seconds`` it took in all."""

    name: str
    rows: tuple[Row, ...] = ()
    error: str = ""
    seconds: float = 0.0

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        return tuple(row for row in self.rows if isinstance(row, Ratio))

    @property
    def passed(self) -> bool:
        """Whether it ran and no bound or check was missed."""
        return not self.error and all(ratio.met is not False for ratio in self.ratios)


def select(only: Sequence[str] | None, full_size: bool) -> list[str]:
    """Names of the scenarios to run: those named in ``only``, whatever their size, else all that ``full_size`` allows and that need not be
    named. Raises ``InputError`` for a name that is none."""
    for name in only or ():
        if name not in SCENARIOS:
            near = [known for known in SCENARIOS if known.lower() == name.lower()] or difflib.get_close_matches(name, SCENARIOS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"There is no scenario {name!r}; {hint}choose from {', '.join(SCENARIOS)}.")
    if only:
        return [name for name in SCENARIOS if name in only]
    return [name for name, scenario in SCENARIOS.items() if (full_size or not scenario.full_size) and not scenario.named]


def outcomes(profile: Profile | str | Path = "mini", only: Sequence[str] | None = None, full_size: bool = False,
             repeats: int = 3) -> Iterator[Outcome]:
    """Run scenarios one after the other, ``repeats`` rounds each. Errors within a scenario end it alone; wrong arguments raise
    ``InputError`` or ``ProfileError`` before anything runs, ``KeyboardInterrupt`` goes through."""
    names = select(only, full_size)
    with Scene(load_profile(profile), repeats) as scene:
        for name in names:
            started = time.perf_counter()
            try:
                rows, error = tuple(SCENARIOS[name].run(scene)), ""
            except Exception as problem:  # whatever it is, the others shall run
                rows, error = (), _sentence(problem)
            gc.collect()
            yield Outcome(name, rows, error, time.perf_counter() - started)


def ratios(profile: Profile | str | Path = "mini", only: Sequence[str] | None = None, full_size: bool = False,
           repeats: int = 3) -> list[Ratio]:
    """The ratios of the scenarios named in ``only`` (default: all; :data:`QUICK` are those that take seconds).

    Raises ``InputError`` for a name that is no scenario and ``OVDiffError`` with the sentence of the first scenario that fails.
    """
    return [row for row in rows(profile, only, full_size, repeats) if isinstance(row, Ratio)]


def rows(profile: Profile | str | Path = "mini", only: Sequence[str] | None = None, full_size: bool = False,
         repeats: int = 3) -> list[Row]:
    """All rows of the scenarios, growth and estimates with them; errors as in :func:`ratios`."""
    found: list[Row] = []
    for outcome in outcomes(profile, only, full_size, repeats):
        if outcome.error:
            raise OVDiffError(f"The scenario {outcome.name} failed: {outcome.error}")
        found += outcome.rows
    return found


def _sentence(problem: Exception) -> str:
    """One line: the project's own errors are sentences already."""
    if isinstance(problem, OVDiffError):
        return str(problem)
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or ['no message'])[0]}"
