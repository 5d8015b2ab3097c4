"""The bench: rows of a table as data, measured on data sets over seeds.

    bench = Bench("mini", library=folder, seeds=[0, 1, 2])
    cells = bench.cells([Row("full"), Row("without filter", {"filters.category": False})], {"VOC": "mini-voc"})

A row names the profile fields in which it differs; rows share networks and features, and results are kept in the
library's folder.
"""

import dataclasses
import gc
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib.errors import InputError, ModelNotAvailable, ProfileError
from ovdiff_lib.keys import check_profile
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.console import write_json
from ovdiff_lib.workbench.data.datasets import UNMEASURED, has_folder, load_dataset
from ovdiff_lib.workbench.data.samples import Dataset, Sample
from ovdiff_lib.workbench.evaluation.measure import EvaluationResult, measure_all
from ovdiff_lib.workbench.evaluation.results import code_digest
from ovdiff_lib.workbench.evaluation.rows import LEVELS, SAMPLED, Row, quantiles
from ovdiff_lib.workbench.evaluation.shared import SharedLibrary, SharedNetworks
from ovdiff_lib.workbench.tables.intervals import Runs
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
        self.library, self.progress = Path(library), progress
        self.parts = SharedNetworks(self.profile.features.sd_layers)
        self.shelf = SharedLibrary(self.library)
        self._datasets: dict[tuple[str, str], Dataset] = {}
        self._quantiles: dict[str, np.ndarray] = {}

    def ovdiff(self, settings: Mapping[str, Any] | None = None, seed: int | None = None) -> OVDiff:
        """OVDiff with the bench's profile, ``settings`` replaced and ``seed`` (default: the first)."""
        seed = self.seeds[0] if seed is None else seed
        profile = self.profile.override({"support.seed": seed, "prototypes.seed": seed, **(settings or {})})
        ovdiff = OVDiff(profile, library=self.library, progress=self.progress, networks=self.parts)
        ovdiff.library = self.shelf
        return ovdiff

    def dataset(self, source: str, names: str = "fixed") -> Dataset:
        """The data set of a source, as for :func:`load_dataset`."""
        if (source, names) not in self._datasets:
            self._datasets[source, names] = load_dataset(source, names=names)
        return self._datasets[source, names]

    def tune(self, source: str) -> str:
        """The split of the data set ``source`` on which constants are chosen, as a source; "" if there is none."""
        head, colon, within = source.partition(":")
        split = self.profile.evaluation.tune
        return f"{head.partition('/')[0]}/{split}{colon}{within}" if split else ""

    def quantiles_of(self, source: str, names: str) -> dict[str, Any]:
        """Of what the constants of a search on the data set ``source`` are the quantiles, as plain data."""
        data = self.dataset(self.tune(source) or source)
        return {"levels": LEVELS, "data set": data.name, "split": data.split, "folder": str(data.folder),
                "ids": list(data.ids[:SAMPLED]), "words": [c.prompt for c in self.dataset(source, names).vocabulary]}

    def quantiles(self, key: Mapping[str, Any], source: str, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The constants f32 (LEVELS,) that a search on ``source`` tries for the method ``key``, which scores images by
        ``score``; kept beside the counts."""
        data, place = self.dataset(self.tune(source) or source), _place(key)
        path = self.library / "results" / f"constants-{place}.json"
        with suppress(OSError, ValueError):
            self._quantiles[place] = np.array(json.loads(path.read_text()), np.float32)
        if place not in self._quantiles:
            images = (data[i].image for i in range(min(SAMPLED, len(data))))
            self._quantiles[place] = quantiles(map(score, images))
            write_json(path, self._quantiles[place].tolist())
        return self._quantiles[place]

    def search(self, row: Row, source: str) -> tuple[np.ndarray, tuple[EvaluationResult, ...]]:
        """The constants f32 (LEVELS,) that a row's search on the data set ``source`` tries, and what each gives; with
        the first seed."""
        (results, _), = self._measure([(row, self.seeds[0], source)])
        method = row.method(self, self.seeds[0], source)
        method.prepare(self.dataset(source, row.names))  # which finds the constants
        return self._quantiles[_place(method.key)], results

    def measure(self, rows: Sequence[Row], source: str) -> dict[str, tuple[EvaluationResult, ...]]:
        """For each row by label its results on the data set ``source``, one a seed; of a search the best, or of a
        ``tuned`` row the one whose constant is best on the split ``evaluation.tune``."""
        return self._measured(rows, [source])[source]

    def cells(self, rows: Sequence[Row], columns: Mapping[str, str], table: str = "") -> list[Cell]:
        """Cells of mIoU in percent, rows by data sets; ``columns`` maps the paper's column to the source of a data set.

        Cells carry their place in the paper's table ``table`` and, where it has one, its value. Of its columns those
        whose data set has no folder are left out, for :meth:`published`, and a line says so.
        """
        for column in [column for column, source in columns.items() if table and not has_folder(source)]:
            print(f"{column}: {UNMEASURED} ({columns[column]}).")
            columns = {name: source for name, source in columns.items() if name != column}
        measured = self._measured(rows, columns.values())
        return [self.cell(row.label, measured[source][row.label],
                          _published(table, row.paper or row.label, column) if table else None)
                for row in rows for column, source in columns.items()]

    @staticmethod
    def cell(row: str, results: Sequence[EvaluationResult], paper: PaperCell | None = None) -> Cell:
        """The cell of mIoU in percent, with its interval, of a row's ``results`` on a data set, one a seed."""
        runs = Runs.of(results[0].dataset, [result.by_image() for result in results])
        note = " ".join(dict.fromkeys(result.note for result in results if result.note))
        return dataclasses.replace(Cell.miou(row, runs.dataset, runs, paper), note=note)

    def predictor(self, row: Row, source: str) -> Callable[[np.ndarray], np.ndarray]:
        """Image u8 (H, W, 3) -> labels int (H, W) of a row on the data set ``source``, with the first seed; of a
        search, with the constant that counts in :meth:`measure`."""
        dataset, method = self.dataset(source, row.names), row.method(self, self.seeds[0], source)
        predict, chosen = method.prepare(dataset), 0
        if method.variants > 1:
            (_, chosen), = self._measure([(row, self.seeds[0], source)])
        return lambda image: predict(Sample("", image, np.zeros(image.shape[:2], np.uint8)))[chosen]

    @staticmethod
    def labelled(cells: Sequence[Cell], column: str) -> list[Cell]:
        """The cells with another label of their column; their place in the paper's table stays."""
        return [dataclasses.replace(cell, column=column) for cell in cells]

    @staticmethod
    def published(cells: Sequence[Cell], table: str) -> list[Cell]:
        """``cells`` and, after them, all else that the paper's table has, with its numbers alone."""
        places = {cell.paper.key: cell for cell in cells if cell.paper}
        rows, columns = ({getattr(cell.paper, name): getattr(cell, name) for cell in places.values()}
                         for name in ("row", "column"))
        return [*cells, *(Cell(rows.get(p.row, p.row), columns.get(p.column, p.column), paper=p, source="published")
                          for p in paper_table(table) if p.key not in places and p.value is not None)]

    def missing(self, rows: Sequence[Row]) -> dict[str, str]:
        """Why rows cannot be measured here, by label: a model that the profile does not name or that is not here."""
        reasons = {}
        for row in rows:
            try:
                row.needs(self)
            except (ModelNotAvailable, ProfileError) as error:
                reasons[row.label] = str(error)
        return reasons

    def _measured(self, rows: Sequence[Row], sources: Collection[str]) -> dict[str, dict[str, tuple]]:
        """:meth:`measure` on each of several data sets."""
        if len({row.label for row in rows}) < len(rows):
            raise InputError("Two rows of the table have the same label; give each its own.")
        gc.collect()  # the OVDiffs of earlier rows hold themselves in a circle, and with them their prototypes
        seeds = [(row, seed) for row in rows for seed in self.seeds[: row.seeds]]
        tasks = [(*one, source) for source in dict.fromkeys(sources) for one in seeds]
        found: dict[str, dict[str, tuple]] = {source: {row.label: () for row in rows} for source in sources}
        for (row, _, source), (results, best) in zip(tasks, self._measure(tasks), strict=True):
            found[source][row.label] += (results[best],)
        return found

    def _measure(self, tasks: Sequence[tuple[Row, int, str]]) -> list[tuple[tuple[EvaluationResult, ...], int]]:
        """For each row, seed and data set the results, one a constant, and which of them counts."""
        results = self._results(tasks)
        tuned = [i for i, (row, _, _) in enumerate(tasks) if row.tuned and len(results[i]) > 1]
        splits = [(row, seed, self.tune(source)) for row, seed, source in (tasks[i] for i in tuned)]
        if not all(split for _, _, split in splits):
            raise InputError("A row takes its constant from the split evaluation.tune, which is empty; name one.")
        judges = dict(enumerate(results)) | dict(zip(tuned, self._results(splits), strict=True))
        return [(own, int(np.argmax([one.miou for one in judges[i]]))) for i, own in enumerate(results)]

    def _results(self, tasks: Sequence[tuple[Row, int, str]]) -> list[tuple[EvaluationResult, ...]]:
        """Rows that read one search in two ways share its counts."""
        places, studies = [], {}
        for row, seed, source in tasks:
            method = row.method(self, seed, source)
            places.append(((source, row.names), json.dumps(method.key, sort_keys=True)))
            studies.setdefault(places[-1][0], {})[places[-1][1]] = method
        found = measure_all([(methods, self.dataset(*data)) for data, methods in studies.items()],
                            folder=self.library / "results", limit=self.images, progress=self.progress)
        by_data = dict(zip(studies, found, strict=True))
        return [by_data[data][key] for data, key in places]


def _place(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, code_digest()], sort_keys=True).encode()).hexdigest()[:20]


def _published(table: str, row: str, column: str) -> PaperCell:
    """The paper's cell, or one of our own in its table."""
    try:
        return paper_cell(table, row, column)
    except InputError:
        return PaperCell(table, row, column)
