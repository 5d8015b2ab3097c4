"""Building many classes on several processors or machines: workers that share one library, a class and seed each."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.engines.base import Engine
from ovdiff_lib.workbench.engines.local import LocalEngine


def processors(profile: Profile) -> int:
    """Processes that a profile's networks can use side by side on this machine: the processors, or one where they run on a GPU."""
    from ovdiff_lib.networks.loading import resolve_device

    return 1 if resolve_device(profile).type != "cpu" else len(os.sched_getaffinity(0))


def build_classes(profile: Profile, categories: Iterable[Category], seeds: Sequence[int] | None, library: str | Path, workers: int = 1,
                  progress: bool = True, engine: Engine | None = None) -> list[str]:
    """Build the prototypes of every category for every seed into ``library``; what is there already is not built again.

    Seeds replace ``support.seed`` and ``prototypes.seed``; None keeps those of the profile. ``engine`` does the work (default: a
    :class:`~ovdiff_lib.workbench.engines.local.LocalEngine` of ``workers``); all its machines must see the folder ``library``. Returns one sentence for
    each class that could not be built; the others are. Raises ``InputError`` where the library cannot be written, and what
    :meth:`~ovdiff_lib.workbench.engines.base.Engine.run` raises.
    """
    # The library knows a class by its words: two data sets may name one alike.
    words = list({category.prompt: category for category in categories}.values())
    tasks = [(category, seed) for seed in ([None] if seeds is None else seeds) for category in words]
    engine, failures = engine or LocalEngine(workers), []
    root = Path(library).expanduser().absolute()
    with _marked(root) as mark, closing(engine.run(partial(ClassBuilder, profile, root, mark), tasks)) as outcomes:
        for outcome in tqdm(outcomes, total=len(tasks), desc="building classes", unit="class", disable=not progress):
            if outcome.error:
                category, seed = tasks[outcome.index]
                which = f"The class {category.name!r}" + (f" (seed {seed})" if seed is not None else "")
                failures.append(f"{which} could not be built: {outcome.error}")
    return failures


class ClassBuilder:
    """A worker that builds the class and seed of a task into the library; the networks are loaded once for all seeds.

    ``InputError`` where the folder ``root`` does not have the file ``mark``: it is another folder than the one of this name elsewhere.
    """

    def __init__(self, profile: Profile, root: Path, mark: str) -> None:
        from ovdiff_lib.workbench.evaluation.shared import SharedNetworks

        if not (root / mark).exists():
            raise InputError(f"The folder {root} on the machine {platform.node()} is not the library that is built; put it on a file system"
                             " that all machines share and name it with --library.")
        self.profile, self.root, self.parts = profile, root, SharedNetworks()
        self._made: dict[int | None, Any] = {}

    def __call__(self, task: tuple[Category, int | None]) -> None:
        from ovdiff_lib.pipeline import OVDiff

        category, seed = task
        if seed not in self._made:
            seeds = {} if seed is None else {"support.seed": seed, "prototypes.seed": seed}
            self._made[seed] = OVDiff(self.profile, seeds, library=self.root, progress=False, networks=self.parts)
        self._made[seed].build_class(category)


@contextmanager
def _marked(root: Path) -> Iterator[str]:
    """The name of a file in ``root`` that is there meanwhile, by which workers know the folder again."""
    from ovdiff_lib.files import check_output

    check_output(root)
    path = root / f".shared-{secrets.token_hex(8)}"
    root.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
