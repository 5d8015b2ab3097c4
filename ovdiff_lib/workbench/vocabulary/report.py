"""What the vocabulary doctor says: limits, verdicts and reasons for each class, pairs that collide; as text or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ovdiff_lib.errors import InputError, counted
from ovdiff_lib.workbench.doctor import aligned
from ovdiff_lib.workbench.vocabulary.collisions import Collisions

VERDICTS = ("fine", "look", "bad")
SHOWN = 40
"""Pairs that the text lists."""

COLUMNS = (
    ("with_foreground", "drawings with", "foreground", "share"), ("foreground_area", "area", "", "share"),
    ("recognised", "read as", "itself", "share"), ("rival", "nearest rival", "", ""),
    ("lost", "lost", "to it", "share"), ("passes", "passes", "for it", "share"),
    ("highest", "highest", "cosine", "cosine"), ("mean", "mean", "cosine", "cosine"),
    ("background_rival", "background", "of", ""), ("sunk", "sunk", "in it", "share"), ("pieces", "pieces", "", ""),
)
"""Columns of the text: the value of a class, two lines of heading, and what it is (words or a number otherwise)."""


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
        """The limits with ``values`` replaced. ``InputError`` for an unknown one and for values that are no numbers."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise InputError(f"There is no limit {name!r}; choose one of {', '.join(known)}.")
            if type(value) not in (int, float) or not 0 <= value < math.inf:
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


@dataclass
class ClassReport:
    """One class: ``found``, (level, sentence) of what speaks against it, and the ``values`` that were measured (None
    where there was nothing to measure)."""

    name: str
    kind: str
    found: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, level: str, sentence: str) -> None:
        """A reason of ``level`` "look" or "bad"."""
        self.found.append((level, sentence))

    def measure(self, **values: Any) -> None:
        """Values as JSON holds them: NumPy's numbers as Python's, those that are not finite as None."""
        for name, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            self.values[name] = None if isinstance(value, float) and not math.isfinite(value) else value

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the class is not fine, in words, the worst first."""
        return tuple(f"{level}: {text}" for level, text in sorted(self.found, key=lambda one: -VERDICTS.index(one[0])))

    @property
    def verdict(self) -> str:
        """The worst level, of :data:`VERDICTS`."""
        return max((level for level, _ in self.found), key=VERDICTS.index, default="fine")


@dataclass(frozen=True)
class VocabularyReport:
    """``classes`` in vocabulary order, ``pairs`` that collide, the worst first, ``notes`` on the vocabulary as a whole,
    what was ``skipped`` and why; ``tables``: extractor -> ``Collisions`` of the classes ``built``; ``print`` it."""

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
        """Everything but the tables, which grow with the square of the vocabulary; what was not measured is null."""
        names = ("name", "kind", "verdict", "reasons", "values")
        table = {"profile": self.profile, "summary": self.summary(),
                 "classes": [{name: getattr(c, name) for name in names} for c in self.classes],
                 "pairs": [vars(pair) for pair in self.pairs], "limits": vars(self.limits), "skipped": self.skipped,
                 "notes": self.notes}
        return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def __str__(self) -> str:
        """A table of the classes, reasons for each that is not fine, the worst :data:`SHOWN` pairs and the summary."""
        forms = {"share": lambda value: f"{100 * value:.0f} %", "cosine": lambda value: f"{value:.2f}", "": str}
        rows = [("class", "verdict", *(column[1] for column in COLUMNS)), ("", "", *(column[2] for column in COLUMNS))]
        rows += [(c.name + " (stuff)" * (c.kind == "stuff"), c.verdict,
                  *("-" if c.values.get(key) is None else forms[form](c.values[key]) for key, _, _, form in COLUMNS))
                 for c in self.classes]
        lines = [f"Vocabulary of {counted(len(self.classes), 'class', 'classes')}, profile {self.profile}", "",
                 *aligned(rows)]
        for c in self.classes:
            lines += ["", f"{c.name}:", *(f"  {reason}" for reason in c.reasons)] if c.reasons else []
        if self.pairs:
            lines += ["", "Pairs that collide:", *(f"  {pair.level}: {pair}" for pair in self.pairs[:SHOWN])]
            lines += [f"  and {len(self.pairs) - SHOWN} more"] if len(self.pairs) > SHOWN else []
        lines += ["", *self.notes] if self.notes else []
        lines += ["", *(f"Not examined: {sentence}" for sentence in self.skipped)] if self.skipped else []
        return "\n".join([*lines, "", self.summary()])
