"""Thresholds on cosines, chosen on the split ``evaluation.tune``, each in the feature space of its extractor.

What a cosine of 0.85 means differs from space to space, so the candidates are quantiles of the cosines that occur, and
the highest mIoU on ``tune`` decides: for the constant without background prototypes on ``evaluation.voc``, then, with
that, for the "stuff" filter on ``evaluation.context``. One extractor at a time, with the bench's first seed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import yaml

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.schema import Profile, of_extractor
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.data.datasets import has_folder
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.rows import LEVELS, Row, Searched
from ovdiff_lib.workbench.tables.tables import IDLE, Cell

CONSTANT, STUFF = "matching.background_threshold", "filters.stuff_threshold"
IMAGES, DIGITS = 48, 5  # images of each data set that choose, and decimals of a candidate

KEPT = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Shares of things' background prototypes that candidates for the "stuff" filter keep; 0 would be another method."""


@dataclass(frozen=True)
class Tried:
    """Candidates for a ``field`` in an extractor's space, ascending, by quantile (``labels``), and mIoU in percent."""

    field: str
    extractor: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    miou: tuple[float, ...]

    best = property(lambda self: int(np.argmax(self.miou)))
    """The place of the candidate with the highest mIoU, of equals the first."""


def extractors_of(profile: Profile) -> list[str]:
    """The extractors whose thresholds a profile names, or, where one number is for all, those that it uses."""
    named = profile.filters.stuff_threshold
    used = [*profile.features.extractors, *profile.evaluation.extractors]
    return list(dict.fromkeys(named if isinstance(named, dict) else used))


def tune(bench: Bench) -> list[Tried]:
    """Both thresholds of every extractor of the profile; nothing where it names no split to choose on."""
    made = []
    for name in extractors_of(bench.profile) if bench.profile.evaluation.tune else ():
        made.append(_constants(bench, name))
        made.append(_stuff(bench, name, made[-1].values[made[-1].best]))
    return sorted(made, key=lambda tried: tried.field, reverse=True)


def _constants(bench: Bench, name: str) -> Tried:
    """Constant background scores without background prototypes: every quantile of the scores that a search tries."""
    row, source = Searched(name, {"features.extractors": [name], STUFF: 1.0}), bench.tune(bench.profile.evaluation.voc)
    constants, results = bench.search(row, source)
    labels = tuple(f"above {i / LEVELS:.0%} of the scores" for i in range(1, LEVELS))
    return Tried(CONSTANT, name, labels, tuple(round(float(c), DIGITS) for c in constants[1:]),
                 tuple(100 * result.miou for result in results[1:]))


def _stuff(bench: Bench, name: str, constant: float) -> Tried:
    settings = {"features.extractors": [name], CONSTANT: constant}
    source = bench.tune(bench.profile.evaluation.context)
    found = likeness(bench.ovdiff({**settings, STUFF: 1.0}).build(bench.dataset(source).vocabulary), name)
    values = [_keeping(share, found) for share in KEPT]
    rows = [Row(f"{share}", {**settings, STUFF: value}, seeds=1) for share, value in zip(KEPT, values, strict=True)]
    results = bench.measure(rows, source)
    labels = tuple(f"keeps {share:.0%} of the prototypes" for share in KEPT)
    return Tried(STUFF, name, labels, tuple(values), tuple(100 * results[row.label][0].miou for row in rows))


def same_share(bench: Bench, rows: Sequence[Row]) -> list[Row]:
    """Rows whose prototypes differ in kind or channels, with thresholds of the "stuff" filter that keep the first row's
    share of things' background prototypes on ``evaluation.context``, first seed; as they are without it or stuff."""
    source, shares, made = bench.profile.evaluation.context, {}, []
    ovdiffs = [bench.ovdiff(row.settings) for row in rows]
    words = bench.dataset(source).vocabulary if has_folder(source) else ()
    if not any(category.kind == "stuff" for category in words):
        return [*rows]
    for category, ovdiff in itertools.product(words, ovdiffs):
        ovdiff.build_class(category)  # class by class: rows share its features
    for row, ovdiff in zip(rows, ovdiffs, strict=True):
        bank = row.build(bench, bench.seeds[0], words) if row.build else ovdiff.build(words)
        own, found = ovdiff.profile.filters.stuff_threshold, {name: likeness(bank, name) for name in bank.extractors}
        shares = shares or {name: np.mean(one <= of_extractor(STUFF, own, name)) for name, one in found.items()}
        thresholds = {name: _keeping(shares[name], one) for name, one in found.items()}
        made.append(replace(row, settings={**row.settings, STUFF: thresholds}))
    return made


def _keeping(share: float, found: np.ndarray) -> float:
    """The threshold that keeps a share of the prototypes whose likeness was found."""
    return min(1.0, round(float(np.quantile(found, share, method="inverted_cdf")) + 10.0 ** -DIGITS, DIGITS))


def likeness(bank: PrototypeBank, extractor: str) -> np.ndarray:
    """Of every background prototype of a thing its highest cosine to a foreground prototype of stuff: what the "stuff"
    filter compares with its threshold. Raises ``InputError`` for a bank without stuff, things or background."""
    rows = list(zip(bank.vocabulary, bank.prototypes[extractor], strict=True))
    behind = [p.vectors[p.region == "background"] for c, p in rows if c.kind == "thing"]
    stuff = [p.vectors[p.region == "foreground"] for c, p in rows if c.kind == "stuff"]
    if not sum(map(len, behind)) or not stuff:
        raise InputError("The data set of evaluation.context shows no things with background beside stuff, so there is "
                         "nothing to choose filters.stuff_threshold by.")
    behind, stuff = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in map(np.concatenate, (behind, stuff)))
    return (behind @ stuff.T).max(1)


def cells_of(tried: Sequence[Tried], step: int = 10) -> list[Cell]:
    """A table of what was tried: of each extractor the candidates and their mIoU, of constants each ``step``-th, and
    the chosen one. Where nothing could be tried, a cell says so."""
    cells = [] if tried else [Cell("thresholds", "chosen", source=f"{IDLE}the data have no split to choose on")]
    for one in tried:
        shown = range(len(one.values)) if one.field == STUFF else range(step - 1, len(one.values), step)
        for label, i in [*((one.labels[i], i) for i in shown), ("chosen", one.best)]:
            row = f"{one.field}, {label}"
            found = {"value": one.values[i], "mIoU": one.miou[i]}
            cells += [Cell(row, f"{one.extractor}, {what}", number) for what, number in found.items()]
    return cells


def lines_of(tried: Sequence[Tried]) -> str:
    """The chosen values as the lines of a profile."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for one in tried:
        step, _, field = one.field.partition(".")
        table.setdefault(step, {}).setdefault(field, {})[one.extractor] = one.values[one.best]
    return yaml.safe_dump(table, sort_keys=False, default_flow_style=None, width=200)
