"""Building many classes and segmenting many images on the workers of an engine, with the results of one process."""

from __future__ import annotations

import logging
import os
import platform
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import check_output
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.samples import Dataset
from ovdiff_lib.workbench.evaluation import measure
from ovdiff_lib.workbench.evaluation.measure import EvaluationResult, Predict
from ovdiff_lib.workbench.evaluation.results import Counts
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks
from ovdiff_lib.workbench.parallel import Engine, LocalEngine, described

BATCH = 4
"""Images that go to a worker at a time."""

NAMED = 3
"""Failed images that the closing sentence names; the log names all."""

logger = logging.getLogger(__name__)


def processors(profile: Profile) -> int:
    """Processes that a profile's networks can use side by side: the processors, or one where they run on a GPU."""
    return 1 if resolve_device(profile).type != "cpu" else len(os.sched_getaffinity(0))


def build_classes(profile: Profile, categories: Iterable[Category], seeds: Sequence[int] | None, library: str | Path,
                  workers: int = 1, progress: bool = True, engine: Engine | None = None) -> list[str]:
    """Build the prototypes of every category for every seed into ``library``; what is there is not built again.

    Seeds replace ``support.seed`` and ``prototypes.seed``; None keeps the profile's. ``engine`` does the work (default:
    ``workers`` processes of this machine); all its machines must see the folder ``library``. Returns one sentence for
    each class that could not be built. Raises ``InputError`` where the library cannot be written, and as ``run``.
    """
    # The library knows a class by its words: two data sets may name one alike.
    words = list({category.prompt: category for category in categories}.values())
    tasks = [(category, seed) for seed in ([None] if seeds is None else seeds) for category in words]
    engine, failures, root = engine or LocalEngine(workers), [], Path(library).expanduser().absolute()
    with _marked(root) as mark, closing(engine.run(partial(ClassBuilder, profile, root, mark), tasks)) as done:
        for task in tqdm(done, "building classes", len(tasks), unit="class", disable=not progress):
            if task.error:
                category, seed = tasks[task.index]
                which = f"The class {category.name!r}" + (f" (seed {seed})" if seed is not None else "")
                failures.append(f"{which} could not be built: {task.error}")
    return failures


class ClassBuilder:
    """A worker that builds the class and seed of a task into the library; networks are loaded once for all seeds.

    ``InputError`` where ``root`` lacks the file ``mark``: another folder than the one of this name elsewhere.
    """

    def __init__(self, profile: Profile, root: Path, mark: str) -> None:
        if not (root / mark).exists():
            raise InputError(f"The folder {root} on the machine {platform.node()} is not the library that is built; put"
                             " it on a file system that all machines share and name it with --library.")
        self.profile, self.root, self.parts = profile, root, SharedNetworks()

    def __call__(self, task: tuple[Category, int | None]) -> None:
        category, seed = task
        seeds = {} if seed is None else {"support.seed": seed, "prototypes.seed": seed}
        ovdiff = OVDiff(self.profile, seeds, library=self.root, progress=False, networks=self.parts)
        ovdiff.build_class(category)


@contextmanager
def _marked(root: Path) -> Iterator[str]:
    """The name of a file that is in ``root`` meanwhile, by which workers know the folder again."""
    check_output(root)
    path = root / f".shared-{secrets.token_hex(8)}"
    root.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class WithBank:
    """Makes a worker's segmenter for a data set: OVDiff with a profile and prototypes."""

    profile: Profile
    bank: PrototypeBank

    def __call__(self, dataset: Dataset) -> Predict:
        return measure.label_predictor(OVDiff(self.profile, progress=False), self.bank, dataset)


def _counter(make_predict: Callable[[Dataset], Predict], dataset: Dataset) -> Callable:
    """A worker: numbers of images -> by number the confusion i64 (K, K), or a sentence that says why there is none."""
    predict = make_predict(dataset)

    def count(index: int) -> np.ndarray | str:
        try:
            sample = dataset[index]
            return measure.confusion(dataset, predict(sample.image), sample)
        except Exception as error:  # whatever it is, the other images do not depend on it
            return described(error)

    return lambda task: {index: count(index) for index in task}


def evaluate_on(engine: Engine, make_predict: Callable[[Dataset], Predict], dataset: Dataset, limit: int | None = None,
                progress: bool = True, settings: dict[str, Any] | None = None) -> EvaluationResult:
    """:func:`~ovdiff_lib.workbench.evaluation.measure.evaluate` on the workers of ``engine``, with the same result.

    ``make_predict``, which can be pickled, makes a worker's segmenter for the data set. An image that fails does not
    stop the others; the log names each, and in the end ``OVDiffError`` says how many failed and why: the mIoU of a part
    would pass for that of the whole. Raises ``InputError`` for an empty data set, and what ``engine.run`` raises.
    """
    total = measure.image_count(dataset, limit)
    tasks = [range(first, min(first + BATCH, total)) for first in range(0, total, BATCH)]
    found: dict[int, np.ndarray | str] = {}
    bar = tqdm(total=total, desc=dataset.name, unit="image", disable=not progress)
    with bar, closing(engine.run(partial(_counter, make_predict, dataset), tasks)) as done:
        for task in done:
            found |= dict.fromkeys(tasks[task.index], task.error) if task.error else task.result
            bar.update(len(tasks[task.index]))
    failed = {dataset.ids[index]: found[index] for index in range(total) if isinstance(found[index], str)}
    for name, error in failed.items():
        logger.warning("Image %s of %s could not be evaluated: %s", name, dataset.name, error)
    if failed:
        names = ", ".join(list(failed)[:NAMED]) + (" and others" if len(failed) > NAMED else "")
        raise OVDiffError(f"{len(failed)} of {total} images of {dataset.name} could not be evaluated ({names}), so"
                          f" there is no mIoU; the reason of the first: {next(iter(failed.values()))}")
    counts = Counts((1, *found[0].shape))
    for index in range(total):
        counts.add(found[index][None])
    return measure.results_of(dataset, counts, settings or {})[0]
