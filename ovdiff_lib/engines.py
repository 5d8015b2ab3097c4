"""Building many classes on several processors: worker processes that share one library, a class and seed each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from ovdiff_lib.errors import OVDiffError
from ovdiff_lib.profiles import Profile
from ovdiff_lib.types import Category

_state: dict = {}


def processors(profile: Profile) -> int:
    """Processes that a profile's networks can use side by side on this machine: the processors, or one where they run on a GPU."""
    from ovdiff_lib.models import resolve_device

    return 1 if resolve_device(profile).type != "cpu" else len(os.sched_getaffinity(0))


def build_classes(profile: Profile, categories: Iterable[Category], seeds: Sequence[int], library: str | Path, workers: int = 1,
                  progress: bool = True) -> list[str]:
    """Build the prototypes of every category for every seed into ``library``; what is there already is not built again.

    Seeds replace ``support.seed`` and ``prototypes.seed``. With several ``workers`` each is a process with its share of the processors.
    Returns one sentence for each class that could not be built; the others are.
    """
    # The library knows a class by its words: two data sets may name one alike.
    words = list({category.prompt: category for category in categories}.values())
    tasks = [(category, seed) for seed in seeds for category in words]
    failures = []
    # Fresh processes, not copies of this one: threads of a copied process hang.
    with ProcessPoolExecutor(min(workers, len(tasks)) or 1, multiprocessing.get_context("spawn"), _start,
                             (profile, str(library), max(1, len(os.sched_getaffinity(0)) // workers))) as pool:
        try:
            running = [pool.submit(_build, category, seed) for category, seed in tasks]
            for future in tqdm(as_completed(running), total=len(running), desc="building classes", unit="class", disable=not progress):
                if sentence := future.result():
                    failures.append(sentence)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _start(profile: Profile, library: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _state.update(profile=profile, library=library, made={})


def _build(category: Category, seed: int) -> str:
    from ovdiff_lib.parts import Parts
    from ovdiff_lib.pipeline import OVDiff

    made = _state["made"]
    if seed not in made:
        parts = _state.setdefault("parts", Parts())
        made[seed] = OVDiff(_state["profile"], {"support.seed": seed, "prototypes.seed": seed}, library=_state["library"], progress=False,
                            parts=parts)
    try:
        made[seed].build_class(category)
    except OVDiffError as error:
        return f"The class {category.name!r} (seed {seed}) could not be built: {error}"
    return ""
