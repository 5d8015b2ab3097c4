"""Building many classes and segmenting many images on the workers of an engine, with the results of one process."""

import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from scipy.sparse import csr_array
from tqdm import tqdm

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.console import check_output
from ovdiff_lib.workbench.data.samples import Dataset
from ovdiff_lib.workbench.evaluation import measure
from ovdiff_lib.workbench.evaluation.measure import EvaluationResult
from ovdiff_lib.workbench.evaluation.results import Counts
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks
from ovdiff_lib.workbench.parallel import Engine


def build_classes(engine: Engine, profile: Profile, categories: Iterable[Category], seeds: Sequence[int] | None,
                  library: str | Path, progress: bool = True, also: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Build the prototypes of every category for every seed (None: the profile's) into ``library``, a folder all
    machines of ``engine`` see, then those with each settings of ``also``, while its features are remembered; returns a
    sentence for each class that failed. Raises as ``run``, ``InputError`` where the library cannot be written."""
    # The library knows a class by its words and pictures.
    words = {(category.prompt, category.pictures): category for category in categories}.values()
    tasks = [(category, seed) for seed in ([None] if seeds is None else seeds) for category in words]
    failures, root = [], Path(library).expanduser().absolute()
    check_output(root)
    root.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(prefix=".shared-", dir=root) as mark:
        with closing(engine.run(partial(ClassBuilder, profile, root, Path(mark.name), also), tasks)) as done:
            for task in tqdm(done, "building classes", len(tasks), unit="class", disable=not progress):
                category, seed = tasks[task.index]
                of_seed = "" if seed is None else f" (seed {seed})"
                if task.error:
                    failures.append(f"The class {category.name!r}{of_seed} could not be built: {task.error}")
    return failures


class ClassBuilder:
    """A worker that builds the class and seed of a task into the library; networks are loaded once for all seeds.

    ``InputError`` where the library lacks the file ``mark``: another folder than the one of this name elsewhere.
    """

    def __init__(self, profile: Profile, root: Path, mark: Path, also: Sequence[dict[str, Any]] = ()) -> None:
        if not mark.exists():
            raise InputError(f"The folder {root} on the machine {platform.node()} is not the library that is built; put"
                             " it on a file system that all machines share and name it with --library.")
        self.profile, self.root, self.parts, self.settings = profile, root, SharedNetworks(), [{}, *also]

    def __call__(self, task: tuple[Category, int | None]) -> None:
        category, seed = task
        seeds = {} if seed is None else {"support.seed": seed, "prototypes.seed": seed}
        for one in self.settings:
            ovdiff = OVDiff(self.profile, seeds | one, library=self.root, progress=False, networks=self.parts)
            ovdiff.build_class(category)


def _counter(profile: Profile, bank: PrototypeBank, dataset: Dataset) -> Callable[[int], csr_array]:
    """A worker: number of an image -> its confusion (K, K), most of it zero."""
    predict = measure.label_predictor(OVDiff(profile, progress=False), bank, dataset)
    return lambda index: csr_array(measure.confusion(dataset, predict((sample := dataset[index]).image), sample))


def evaluate_on(engine: Engine, profile: Profile, bank: PrototypeBank, dataset: Dataset, limit: int | None = None,
                progress: bool = True) -> EvaluationResult:
    """:func:`~ovdiff_lib.workbench.evaluation.measure.evaluate` of OVDiff with ``profile`` and ``bank``, by an engine.
    Raises ``OVDiffError`` for the first image that fails, ``InputError`` for an empty data set, and as ``run``."""
    found, total = {}, measure.image_count(dataset, limit)
    with closing(engine.run(partial(_counter, profile, bank, dataset), range(total))) as done:
        for image in tqdm(done, dataset.name, total, unit="image", disable=not progress):
            if image.error:
                name = f"Image {dataset.ids[image.index]} of {dataset.name}"
                raise OVDiffError(f"{name} could not be evaluated, so there is no mIoU: {image.error}")
            found[image.index] = image.result
    counts = Counts((1, *found[0].shape))
    for index in range(total):
        counts.add(found[index].toarray())
    return measure.results_of(dataset, counts)[0]
