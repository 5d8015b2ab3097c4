"""What the vocabulary doctor says: limits, verdicts and reasons for each class, pairs that collide; as text and as
JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError, counted
from ovdiff_lib.workbench.vocabulary.collisions import Collisions

VERDICTS = ("fine", "look", "bad")
SHOWN = 40
"""Pairs that the text lists."""


@dataclass(frozen=True)
class Limits:
    """From which value on a measurement is worth a look or bad; shares are in [0, 1] of a class's support images.

    ``collide_*``: share lost to, sunk in or passing for another class. ``recognised_*``: share that CLIP reads as the
    class; less is worth a look, or bad. ``foreground_bad``: share whose mask has any foreground; less is bad.
    ``masks_look``: share whose mask is empty or full, or fell back to thresholds. ``full``: area from which on a
    foreground counts as full. ``pieces``: tokens that one word may be cut into. ``text_fence``: a cosine of two words
    is too high if it exceeds the upper quartile of the vocabulary's by so many times the distance between its
    quartiles.
    """

    collide_look: float = 0.2
    collide_bad: float = 0.5
    recognised_look: float = 0.75
    recognised_bad: float = 0.5
    foreground_bad: float = 0.5
    masks_look: float = 0.5
    full: float = 0.95
    pieces: int = 2
    text_fence: float = 3.0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Limits:
        """The limits with ``values`` replaced. Raises ``InputError`` for an unknown one and for values that are no
        numbers."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise InputError(f"There is no limit {name!r}; choose one of {', '.join(known)}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(f"The limit {name} is {value!r}; give a number from 0 up.")
        return cls(**values)


@dataclass(frozen=True)
class CollidingPair:
    """Images of ``first`` that can be taken for ``second`` (``what`` "foreground") or be lost in its "background".

    ``share`` is how many, the mean over extractors; ``level`` is "look" or "bad"; ``values``: what each extractor
    measured.
    """

    first: str
    second: str
    what: str
    level: str
    share: float
    values: dict[str, dict[str, float]]

    def __str__(self) -> str:
        measured = "; ".join(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in values.items())
                             for name, values in self.values.items())
        taken = "taken for" if self.what == "foreground" else "lost in the background of"
        return f"{100 * self.share:.0f} % of {self.first!r} {taken} {self.second!r} ({measured})"


@dataclass(frozen=True)
class ClassReport:
    """One class: ``verdict`` of :data:`VERDICTS`, its ``reasons`` in words, and the ``values`` that were measured (None
    where there was nothing to measure)."""

    name: str
    kind: str
    verdict: str
    reasons: tuple[str, ...]
    values: dict[str, Any]


@dataclass(frozen=True)
class VocabularyReport:
    """``classes`` in vocabulary order, ``pairs`` that collide, the worst first, ``notes`` on the vocabulary as a whole,
    what was ``skipped`` and why; ``tables``: extractor -> ``Collisions`` of the classes ``built``. ``print`` shows it
    as text."""

    profile: str
    classes: tuple[ClassReport, ...]
    pairs: tuple[CollidingPair, ...]
    limits: Limits
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    built: tuple[str, ...]
    tables: dict[str, Collisions] = field(repr=False)

    def summary(self) -> str:
        """One sentence: how many classes are fine, how many not, and how many pairs collide."""
        count = Counter(c.verdict for c in self.classes)
        said = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
        number = len({frozenset((pair.first, pair.second)) for pair in self.pairs})  # some are listed from both sides
        pairs = f"{counted(number, 'pair')} of classes collide{'s' * (number == 1)}" if number else "no classes collide"
        return f"{counted(len(self.classes), 'class', 'classes')}: {said}; {pairs}."

    def to_json(self) -> str:
        """Everything but the tables, which grow with the square of the vocabulary; numbers that are not there are
        null."""
        rows = {name: [dataclasses.asdict(row) for row in getattr(self, name)] for name in ("classes", "pairs")}
        table = {"profile": self.profile, "summary": self.summary(), **rows, "limits": dataclasses.asdict(self.limits),
                 "skipped": list(self.skipped), "notes": list(self.notes)}
        return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def __str__(self) -> str:
        """A table of the classes, reasons for each that is not fine, the worst :data:`SHOWN` pairs and the summary."""
        rows = [("class", "verdict", "drawings with", "area", "read as", "nearest rival", "lost", "passes", "highest",
                 "mean", "background", "sunk", "pieces"),
                ("", "", "foreground", "", "itself", "", "to it", "for it", "cosine", "cosine", "of", "in it", "")]
        for c in self.classes:
            shown = {name: "-" if c.values.get(name) is None else f"{100 * c.values[name]:.0f} %"
                     for name in ("with_foreground", "foreground_area", "recognised", "lost", "passes", "sunk")}
            shown |= {name: "-" if c.values.get(name) is None else f"{c.values[name]:.2f}"
                      for name in ("highest", "mean")}
            rows.append((c.name + " (stuff)" * (c.kind == "stuff"), c.verdict, shown["with_foreground"],
                         shown["foreground_area"], shown["recognised"], c.values.get("rival") or "-", shown["lost"],
                         shown["passes"], shown["highest"], shown["mean"], c.values.get("background_rival") or "-",
                         shown["sunk"], str(c.values["pieces"])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"Vocabulary of {counted(len(self.classes), 'class', 'classes')}, profile {self.profile}", ""]
        for row in rows:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for c in self.classes:
            lines += ["", f"{c.name}:", *(f"  {reason}" for reason in c.reasons)] if c.reasons else []
        if self.pairs:
            lines += ["", "Pairs that collide:", *(f"  {pair.level}: {pair}" for pair in self.pairs[:SHOWN])]
            lines += [f"  and {len(self.pairs) - SHOWN} more"] if len(self.pairs) > SHOWN else []
        lines += ["", *self.notes] if self.notes else []
        lines += ["", *(f"Not examined: {sentence}" for sentence in self.skipped)] if self.skipped else []
        return "\n".join([*lines, "", self.summary()])


class Findings:
    """Sentences and values by class of ``vocabulary``, while they are collected: ``values[i]`` is a table to be
    filled."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.reasons: list[list[tuple[str, str]]] = [[] for _ in vocabulary]
        self.values: list[dict[str, Any]] = [{} for _ in vocabulary]

    def add(self, index: int, level: str, sentence: str) -> None:
        """A reason of ``level`` "look" or "bad" for class ``index``."""
        self.reasons[index].append((level, sentence))

    def report(self) -> tuple[ClassReport, ...]:
        """One report a class: the verdict is its worst reason's level, and the worst reasons come first."""
        made = []
        for category, reasons, values in zip(self.vocabulary, self.reasons, self.values, strict=True):
            ordered = sorted(reasons, key=lambda reason: -VERDICTS.index(reason[0]))
            made.append(ClassReport(category.name, category.kind, ordered[0][0] if ordered else "fine",
                                    tuple(f"{level}: {text}" for level, text in ordered),
                                    {name: _plain(value) for name, value in values.items()}))
        return tuple(made)


def _plain(value: Any) -> Any:
    """A value as JSON holds it: NumPy's numbers as Python's, those that are not finite as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
