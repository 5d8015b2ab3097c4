"""Many methods measured on the same images: each image is read once, every result is kept, an interrupted study goes on.

Beside :func:`~ovdiff_lib.workbench.evaluation.measure.evaluate`, which measures one segmenter, this is what the tables are made with: methods that
differ in one setting share the networks' features (:mod:`ovdiff_lib.workbench.evaluation.shared`), and what was measured before is not measured again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.data.metrics import IGNORE, ConfusionMatrix
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import EvaluationResult, count_sample, result_of
from ovdiff_lib.workbench.evaluation.results import Counted, ResultStore, code_digest

SAVE_EVERY = 20.0
"""Seconds between two writings of unfinished results; what a killed run loses at most."""


@dataclass(frozen=True)
class Sweep:
    """T label maps of one image, one for each of ``thresholds`` (ascending): a pixel has its ``category`` i64 (H, W), from 1, where
    ``best`` f32 (H, W) exceeds the threshold, else 0. They are counted from one histogram; ``maps()`` makes them."""

    best: np.ndarray
    category: np.ndarray
    thresholds: tuple[float, ...]

    def maps(self) -> np.ndarray:
        """i64 (T, H, W)."""
        return np.where(self.best > np.array(self.thresholds)[:, None, None], self.category, 0)

    def counts(self, dataset: Dataset, sample: Sample) -> np.ndarray:
        """Confusion of each map, i64 (T, K, K), as :func:`~ovdiff_lib.workbench.evaluation.measure.count_sample` counts it. Where the data set has
        no background all maps are that of the categories."""
        if not dataset.has_background:
            matrix = ConfusionMatrix(len(dataset.vocabulary))
            count_sample(matrix, dataset, self.category, sample)
            return np.repeat(matrix.counts[None], len(self.thresholds), 0)
        # Counted per number of thresholds below the pixel's score; a map has the pixels of all higher numbers.
        classes, steps = len(dataset.vocabulary) + 1, len(self.thresholds)
        passed = np.searchsorted(np.array(self.thresholds), self.best.astype(np.float64), side="left")
        matrices = [ConfusionMatrix(classes) for _ in range(steps + 1)]
        for number in np.unique(passed):
            chosen = passed == number
            part = dataclasses.replace(sample, labels=np.where(chosen, sample.labels, IGNORE))
            count_sample(matrices[number], dataset, self.category, part)
        counts = np.stack([m.counts for m in matrices])
        above = counts[::-1].cumsum(0)[::-1][1:]  # i: pixels that pass more than i thresholds
        above[:, :, 0] += counts.sum((0, 2)) - above.sum(2)
        return above


class Method(Protocol):
    """A way to label images. ``key`` holds, as plain data, everything its labels depend on beside the data set and the code; ``variants``
    is the number T of label maps it makes of an image (one for each threshold of a search, say)."""

    variants: int

    @property
    def key(self) -> dict[str, Any]: ...

    def prepare(self, dataset: Dataset) -> Callable[[np.ndarray], np.ndarray | Sweep]:
        """Whatever is needed before the first image; returns image u8 (H, W, 3) -> labels int (T, H, W) for the data set's vocabulary, or
        a :class:`Sweep` over T thresholds."""
        ...


def measure(methods: Mapping[str, Method], dataset: Dataset, *, folder: str | Path | None = None, limit: int | None = None,
            progress: bool = True) -> dict[str, tuple[EvaluationResult, ...]]:
    """T results for each method on the first ``limit`` images of ``dataset`` (default: all).

    With ``folder``, finished results found there are taken, and results are kept there, finished or not. Methods run side by side on each
    image, in the order given, so that what they share is computed once. Raises ``InputError`` for an empty data set and for labels of a
    wrong shape or range.
    """
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total < 1:
        raise InputError(f"There are no images to measure on in {dataset.name}; choose another split or a limit of at least 1.")
    classes = len(dataset.vocabulary) + dataset.has_background
    store = ResultStore(folder) if folder is not None else None
    keys = {name: _key(method, dataset, total) for name, method in methods.items()}
    states = {name: store.load(dataset.name, keys[name], (method.variants, classes, classes)) if store else
              Counted(0, np.zeros((method.variants, classes, classes), np.int64), 0.0) for name, method in methods.items()}
    pending = {name: method for name, method in methods.items() if states[name].done < total}

    def save(name: str) -> None:
        if store and states[name].done:
            store.save(dataset.name, keys[name], states[name])

    try:
        _count(pending, dataset, total, states, save, progress)
    finally:
        for name in pending:
            save(name)
    return {name: tuple(result_of(dataset, total, ConfusionMatrix.of(counts), {"seconds": states[name].seconds, **keys[name]["method"]})
                        for counts in states[name].counts) for name in methods}


def _count(pending: dict[str, Method], dataset: Dataset, total: int, states: dict[str, Counted], save: Callable[[str], None],
           progress: bool) -> None:
    if not pending:
        return
    predictors = {name: method.prepare(dataset) for name, method in pending.items()}
    first, saved = min(states[name].done for name in pending), time.monotonic()
    label = f"{dataset.name}, {len(pending)} method{'s' * (len(pending) > 1)}"
    for index in tqdm(range(first, total), initial=first, total=total, desc=label, unit="image", disable=not progress):
        sample = dataset[index]
        for name, method in pending.items():
            state = states[name]
            if state.done > index:
                continue
            started = time.perf_counter()
            labels = predictors[name](sample.image)
            spent = time.perf_counter() - started
            if isinstance(labels, Sweep):
                states[name] = Counted(index + 1, state.counts + labels.counts(dataset, sample), state.seconds + spent)
                continue
            labels = np.asarray(labels)
            if labels.ndim != 3 or len(labels) != method.variants:
                raise InputError(f"The method {name!r} made labels of shape {labels.shape}; they must be ({method.variants}, H, W).")
            counts = state.counts.copy()
            for one, matrix in zip(labels, counts, strict=True):
                count_sample(ConfusionMatrix.of(matrix), dataset, one, sample)
            # One assignment, so that an interruption finds the count and the matrices in step.
            states[name] = Counted(index + 1, counts, state.seconds + spent)
        if time.monotonic() - saved > SAVE_EVERY:
            for name in pending:
                save(name)
            saved = time.monotonic()


def _key(method: Method, dataset: Dataset, total: int) -> dict[str, Any]:
    categories = [[c.name, c.prompt, c.kind] for c in dataset.vocabulary]
    return {"method": method.key, "data set": dataset.name, "folder": str(getattr(dataset, "folder", "")), "categories": categories,
            "background": dataset.has_background, "ids": list(dataset.ids[:total]), "code": code_digest()}
