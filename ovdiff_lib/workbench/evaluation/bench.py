"""The bench: rows of a table as data, measured on data sets over seeds.

    bench = Bench("mini", library=folder, seeds=[0, 1, 2])
    cells = bench.cells([Row("full"), Row("without filter", {"filters.category": False})], {"VOC": "mini-voc"})

A row names the profile fields in which it differs; rows share networks and features, and results are kept in the
library's folder.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib.errors import InputError, ModelNotAvailable, ProfileError
from ovdiff_lib.keys import check_profile
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import EvaluationResult, Method, measure
from ovdiff_lib.workbench.evaluation.rows import Rival, Row
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell, paper_table
from ovdiff_lib.workbench.tables.tables import Cell


class Bench:
    """Measures rows on data sets.

    Args:
        profile, overrides: as for :class:`~ovdiff_lib.pipeline.OVDiff`; rows replace further fields.
        library: folder of support sets, prototypes and, below ``results``, of what was measured.
        seeds: a row is measured once for each (default: ``evaluation.seeds``, each plus ``first_seed``); a seed moves
            drawings and clustering, not the noise on test images, so that seeds share the features of these.
        images: the first so many images of each data set (default: ``evaluation.images``).

    Raises as :func:`~ovdiff_lib.keys.check_profile`, whatever rows replace later.
    """

    def __init__(self, profile: str | Path | Profile = "mini", overrides: Mapping[str, Any] | None = None, *,
                 library: str | Path, seeds: Sequence[int] | None = None, first_seed: int = 0,
                 images: int | None = None, progress: bool = True) -> None:
        self.profile = load_profile(profile, dict(overrides or {}))
        check_profile(self.profile)
        self.seeds = tuple(first_seed + s for s in self.profile.evaluation.seeds) if seeds is None else tuple(seeds)
        if not self.seeds:
            raise InputError("The list of seeds is empty; give at least one.")
        self.images = self.profile.evaluation.images if images is None else images
        self.library, self.progress, self.parts = Path(library), progress, SharedNetworks()
        self._datasets: dict[tuple[str, str], Dataset] = {}

    def ovdiff(self, settings: Mapping[str, Any] | None = None, seed: int | None = None) -> OVDiff:
        """OVDiff with the bench's profile, ``settings`` replaced and ``seed`` (default: the first)."""
        seed = self.seeds[0] if seed is None else seed
        profile = self.profile.override({"support.seed": seed, "prototypes.seed": seed, **(settings or {})})
        return OVDiff(profile, library=self.library, progress=self.progress, networks=self.parts)

    def dataset(self, source: str, names: str = "fixed") -> Dataset:
        """The data set of a source, as for :func:`load_dataset`."""
        if (source, names) not in self._datasets:
            self._datasets[source, names] = load_dataset(source, names=names)
        return self._datasets[source, names]

    def measure(self, rows: Sequence[Row], source: str) -> dict[str, tuple[EvaluationResult, ...]]:
        """For each row by label its results on the data set ``source``, one a seed; of a search the best."""
        if len({row.label for row in rows}) < len(rows):
            raise InputError("Two rows of the table have the same label; give each its own.")
        gc.collect()  # the OVDiffs of earlier rows hold themselves in a circle, and with them their prototypes
        found: dict[str, tuple[EvaluationResult, ...]] = {}
        for names in dict.fromkeys(row.names for row in rows):
            methods = {(row.label, seed): row.method(self, seed)
                       for row in rows if row.names == names for seed in self._seeds(row)}
            for (label, _), results in self._measure(methods, self.dataset(source, names)).items():
                found[label] = (*found.get(label, ()), max(results, key=lambda result: result.miou))
        return {row.label: found[row.label] for row in rows}

    def cells(self, rows: Sequence[Row], columns: Mapping[str, str], table: str = "") -> list[Cell]:
        """Cells of mIoU in percent, rows by data sets; ``columns`` maps the paper's column to the source of a data set.

        Cells carry their place in the paper's table ``table`` and, where it has one, its value.
        """
        measured = {column: self.measure(rows, source) for column, source in columns.items()}
        cells = [Cell.of(row.label, self.dataset(source).name, [100 * r.miou for r in measured[column][row.label]],
                         _published(table, row.paper or row.label, column) if table else None)
                 for row in rows for column, source in columns.items()]
        notes = [" ".join(dict.fromkeys(result.note for result in measured[column][row.label] if result.note))
                 for row in rows for column in columns]
        return [dataclasses.replace(cell, note=note) for cell, note in zip(cells, notes, strict=True)]

    def predictor(self, row: Row, source: str) -> Callable[[np.ndarray], np.ndarray]:
        """Image u8 (H, W, 3) -> labels int (H, W) of a row on the data set ``source``, with the first seed; of a
        search, with the constant that was measured to be best."""
        method, dataset, chosen = row.method(self, self.seeds[0]), self.dataset(source, row.names), 0
        predict = method.prepare(dataset)
        if method.variants > 1:
            chosen = int(np.argmax([r.miou for r in self._measure({row.label: method}, dataset)[row.label]]))
        return lambda image: predict(Sample("", image, np.zeros(image.shape[:2], np.uint8)))[chosen]

    @staticmethod
    def labelled(cells: Sequence[Cell], column: str) -> list[Cell]:
        """The cells with another label of their column; their place in the paper's table stays."""
        return [dataclasses.replace(cell, column=column) for cell in cells]

    def published(self, cells: Sequence[Cell], columns: Mapping[str, str], table: str) -> list[Cell]:
        """``cells`` and, after them, the rows of the paper's table that are not among them, with its numbers alone."""
        here = {cell.paper.row for cell in cells if cell.paper}
        return [*cells, *(Cell(p.row, self.dataset(columns[p.column]).name, paper=p, source="published")
                          for p in paper_table(table)
                          if p.row not in here and p.column in columns and p.value is not None)]

    def missing(self, rows: Sequence[Row]) -> dict[str, str]:
        """Why rows cannot be measured here, by label: a model that the profile does not name or that is not here."""
        reasons = {}
        for row in rows:
            try:
                row.needs(self)
            except (ModelNotAvailable, ProfileError) as error:
                reasons[row.label] = str(error)
        return reasons

    def _measure(self, methods: Mapping[Any, Method], dataset: Dataset) -> dict[Any, tuple[EvaluationResult, ...]]:
        return measure(methods, dataset, folder=self.library / "results", limit=self.images, progress=self.progress)

    def _seeds(self, row: Row) -> tuple[int, ...]:
        return self.seeds[:1] if isinstance(row, Rival) else self.seeds[: row.seeds]


def _published(table: str, row: str, column: str) -> PaperCell:
    """The paper's cell, or one of our own in its table."""
    try:
        return paper_cell(table, row, column)
    except InputError:
        return PaperCell.own(table, row, column)
