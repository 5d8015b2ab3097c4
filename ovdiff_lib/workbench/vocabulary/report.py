"""What the vocabulary doctor says: limits, verdicts and reasons for each class, pairs that collide; as text and as JSON."""

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


@dataclass(frozen=True)
class Limits:
    """From which value on a measurement is worth a look or bad; shares are in [0, 1] of a class's support images.

    ``collide_*``: share that lies nearer to another class's foreground, or background, than to its own class, or would pass for an image
    of that class (``lost``, ``sunk`` and ``passes`` of :class:`~ovdiff_lib.workbench.vocabulary.collisions.Collisions`). ``recognised_*``: share that CLIP
    reads as the class; less is worth a look, or bad. ``foreground_bad``: share whose mask has any foreground; less is bad.
    ``masks_look``: share whose mask is empty or full, or fell back to thresholds. ``full``: area of the image from which on a
    foreground counts as full. ``pieces``: tokens that one word may be cut into. ``text_fence``: a cosine of two words is too high if it
    exceeds the upper quartile of the vocabulary's by so many times the distance between its quartiles.
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
        """The limits with ``values`` replaced. Raises ``InputError`` for an unknown one and for values that are no numbers."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise InputError(f"There is no limit {name!r}; choose one of {', '.join(known)}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(f"The limit {name} is {value!r}; give a number from 0 up.")
        return cls(**values)


@dataclass(frozen=True)
class Pair:
    """Two classes that collide. ``what`` "foreground": images of ``first`` lie nearer to ``second`` than to their own class ("lost"), or
    pass for images of it ("passes"); "background": they lie nearer to what ``second`` calls its background ("sunk"). ``share`` is how many,
    of the first two the larger, as the mean over extractors; ``level`` is "look" or "bad"; ``values`` holds by extractor what was
    measured, with the highest and the mean cosine."""

    first: str
    second: str
    what: str
    level: str
    share: float
    values: dict[str, dict[str, float]]

    def sentence(self) -> str:
        """The pair in words, with what was measured in each extractor."""
        measured = "; ".join(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in values.items())
                             for name, values in self.values.items())
        taken = "taken for" if self.what == "foreground" else "lost in the background of"
        return f"{100 * self.share:.0f} % of {self.first!r} {taken} {self.second!r} ({measured})"


@dataclass(frozen=True)
class ClassReport:
    """One class: ``verdict`` of :data:`VERDICTS`, its ``reasons`` in words, and the ``values`` that were measured (name -> number or text;
    None where there was nothing to measure)."""

    name: str
    kind: str
    verdict: str
    reasons: tuple[str, ...]
    values: dict[str, Any]


@dataclass(frozen=True)
class VocabularyReport:
    """All that :func:`~ovdiff_lib.workbench.vocabulary.examine.examine` found: ``classes`` in vocabulary order, ``pairs`` that collide, the worst first, the
    ``limits``, and a sentence for each check that was ``skipped`` and for each of the ``notes`` on the vocabulary as a whole. ``tables``:
    extractor -> :class:`~ovdiff_lib.workbench.vocabulary.collisions.Collisions` of the classes ``built``."""

    profile: str
    classes: tuple[ClassReport, ...]
    pairs: tuple[Pair, ...]
    limits: Limits
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    built: tuple[str, ...]
    tables: dict[str, Collisions] = field(repr=False)

    def summary(self) -> str:
        """One sentence: how many classes are fine, how many not, and how many pairs collide."""
        count = Counter(c.verdict for c in self.classes)
        said = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
        number = len({frozenset((pair.first, pair.second)) for pair in self.pairs})  # each may be listed from both sides
        pairs = f"{counted(number, 'pair')} of classes collide{'s' * (number == 1)}"
        return f"{len(self.classes)} class{'es' * (len(self.classes) != 1)}: {said}; {pairs if self.pairs else 'no classes collide'}."

    def to_json(self) -> str:
        """Everything but the full tables, which grow with the square of the vocabulary; numbers that are not there are null."""
        table = {"profile": self.profile, "summary": self.summary(), **{name: [dataclasses.asdict(row) for row in getattr(self, name)]
                                                                       for name in ("classes", "pairs")},
                 "limits": dataclasses.asdict(self.limits), "skipped": list(self.skipped), "notes": list(self.notes)}
        return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


class Findings:
    """Sentences and values by class of ``vocabulary``, while they are collected: ``values[i]`` is a table to be filled."""

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
            verdict = max((level for level, _ in reasons), key=VERDICTS.index, default="fine")
            ordered = sorted(reasons, key=lambda r: -VERDICTS.index(r[0]))
            made.append(ClassReport(category.name, category.kind, verdict, tuple(f"{level}: {text}" for level, text in ordered),
                                    {name: _plain(value) for name, value in values.items()}))
        return tuple(made)


def _plain(value: Any) -> Any:
    """A value as JSON holds it: NumPy's numbers as Python's, those that are not finite as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: VocabularyReport, pairs: int = 40) -> str:
    """The report as plain text: a table of the classes, reasons for each that is not fine, the worst ``pairs`` pairs and the summary."""
    rows = [("class", "verdict", "drawings with", "area", "read as", "nearest rival", "lost", "passes", "highest", "mean", "background",
             "sunk", "pieces"),
            ("", "", "foreground", "", "itself", "", "to it", "for it", "cosine", "cosine", "of", "in it", "")]
    for c in report.classes:
        v = c.values
        rows.append((c.name + " (stuff)" * (c.kind == "stuff"), c.verdict,
                     *(_percent(v, name) for name in ("with_foreground", "foreground_area", "recognised")),
                     v.get("rival") or "-", _percent(v, "lost"), _percent(v, "passes"), _number(v, "highest"), _number(v, "mean"),
                     v.get("background_rival") or "-", _percent(v, "sunk"), str(v["pieces"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"Vocabulary of {counted(len(report.classes), 'class', 'classes')}, profile {report.profile}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for c in report.classes:
        lines += ["", f"{c.name}:", *(f"  {reason}" for reason in c.reasons)] if c.reasons else []
    if report.pairs:
        lines += ["", "Pairs that collide:"]
        lines += [f"  {pair.level}: {pair.sentence()}" for pair in report.pairs[:pairs]]
        lines += [f"  and {len(report.pairs) - pairs} more"] if len(report.pairs) > pairs else []
    lines += ["", *report.notes] if report.notes else []
    lines += ["", *(f"Not examined: {sentence}" for sentence in report.skipped)] if report.skipped else []
    return "\n".join([*lines, "", report.summary()])


def _percent(values: dict[str, Any], name: str) -> str:
    return "-" if values.get(name) is None else f"{100 * values[name]:.0f} %"


def _number(values: dict[str, Any], name: str) -> str:
    return "-" if values.get(name) is None else f"{values[name]:.2f}"
