"""The evaluation protocol on the workers of an engine: batches of images go out, pixel counts come back and are summed.

Counts are whole numbers and an image's prediction depends on no other, so the result is that of
:func:`~ovdiff_lib.workbench.evaluation.measure.evaluate`, whatever the order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import OVDiffError
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.samples import Dataset
from ovdiff_lib.workbench.engines.base import Engine, described
from ovdiff_lib.workbench.evaluation.measure import (
    EvaluationResult,
    Predict,
    count_sample,
    empty_matrix,
    image_count,
    label_predictor,
    result_of,
)

BATCH = 4
"""Images that go to a worker at a time."""

NAMED = 3
"""Failed images that the closing sentence names; the log names all."""

MakePredict = Callable[[Dataset], Predict]
"""Makes a worker's segmenter for a data set, its networks loaded. Can be pickled."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segmenter:
    """OVDiff with a profile and prototypes, made anew on each worker: a :data:`MakePredict`."""

    profile: Profile
    bank: PrototypeBank

    def __call__(self, dataset: Dataset) -> Predict:
        from ovdiff_lib.pipeline import OVDiff

        return label_predictor(OVDiff(self.profile, progress=False), self.bank, dataset)


class BatchCounter:
    """A worker that segments the images of a task and counts their pixels."""

    def __init__(self, make_predict: MakePredict, dataset: Dataset) -> None:
        self.dataset, self.predict = dataset, make_predict(dataset)

    def __call__(self, task: Sequence[int]) -> tuple[np.ndarray, dict[int, str]]:
        """Counts i64 (K, K) of the images whose numbers are given, and by number a sentence for each that failed and is not counted."""
        matrix, failed = empty_matrix(self.dataset), {}
        for index in task:
            try:
                sample = self.dataset[index]
                count_sample(matrix, self.dataset, self.predict(sample.image), sample)
            except OVDiffError as error:
                failed[index] = str(error)
            except Exception as error:  # whatever it is, the other images do not depend on it
                failed[index] = described(error)
        return matrix.counts, failed


def evaluate_on(engine: Engine, make_predict: MakePredict, dataset: Dataset, limit: int | None = None, progress: bool = True,
                settings: dict[str, Any] | None = None) -> EvaluationResult:
    """Segment every image of ``dataset`` (the first ``limit`` of them) on the workers of ``engine`` and compare with its label maps.

    The result is that of :func:`~ovdiff_lib.workbench.evaluation.measure.evaluate`. An image that fails does not stop the others; each is named in
    the log, and after all are done ``OVDiffError`` says how many failed and why: the mIoU of a part would pass for that of the whole.
    Raises ``InputError`` for an empty data set, and what :meth:`~ovdiff_lib.workbench.engines.base.Engine.run` raises.
    """
    total = image_count(dataset, limit)
    tasks = [range(first, min(first + BATCH, total)) for first in range(0, total, BATCH)]
    matrix, failed = empty_matrix(dataset), {}
    bar = tqdm(total=total, desc=dataset.name, unit="image", disable=not progress)
    with bar, closing(engine.run(partial(BatchCounter, make_predict, dataset), tasks)) as outcomes:
        for outcome in outcomes:
            task = tasks[outcome.index]
            counts, errors = (None, dict.fromkeys(task, outcome.error)) if outcome.error else outcome.result
            if counts is not None:
                matrix.counts += counts
            for index, error in errors.items():
                logger.warning("Image %s of %s could not be evaluated: %s", dataset.ids[index], dataset.name, error)
            failed |= errors
            bar.update(len(task))
    if failed:
        first = min(failed)
        names = ", ".join(dataset.ids[index] for index in sorted(failed)[:NAMED]) + (" and others" if len(failed) > NAMED else "")
        raise OVDiffError(f"{len(failed)} of {total} images of {dataset.name} could not be evaluated ({names}), so there is no mIoU; the"
                          f" reason of the first: {failed[first]}")
    return result_of(dataset, total, matrix, settings or {})
