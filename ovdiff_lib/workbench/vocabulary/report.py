"""What the vocabulary doctor says: limits, and of each class what was measured, reasons against it and a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ovdiff_lib.workbench.vocabulary.collisions import Collisions

VERDICTS = ("fine", "look", "bad")

COLUMNS = {
    "with_foreground": "with foreground", "foreground_area": "area", "recognised": "read as itself",
    "rival": "nearest rival", "lost": "lost to it", "passes": "passes for it", "highest": "highest cosine",
    "background_rival": "background of", "sunk": "sunk in it", "pieces": "pieces"}
"""Value of a class -> its heading in the table."""


@dataclass(frozen=True)
class Limits:
    """From which value on a measurement is worth a look or bad; shares are in [0, 1] of a class's support images.

    ``collide_*``: share lost to, sunk in or passing for another class. ``recognised_*``: share that CLIP reads as the
    class; less is worth a look, or bad. ``foreground_bad``: share whose mask has any foreground; less is bad.
    ``masks_look``: share whose mask is empty or full, or fell back to thresholds. ``full``: area from which on a
    foreground counts as full. ``pieces``: tokens that one word may be cut into.
    """

    collide_look: float = 0.2
    collide_bad: float = 0.5
    recognised_look: float = 0.75
    recognised_bad: float = 0.5
    foreground_bad: float = 0.5
    masks_look: float = 0.5
    full: float = 0.95
    pieces: int = 2


@dataclass
class ClassReport:
    """One class: what speaks against it, ``found`` as (verdict, sentence), and the ``values`` that were measured."""

    name: str
    kind: str
    found: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, verdict: str, sentence: str) -> None:
        """A reason for "look" or "bad"."""
        self.found.append((verdict, sentence))

    def measure(self, **values: Any) -> None:
        """Keep values, but for numbers that are not finite, where there was nothing to measure."""
        plain = {name: np.asarray(value).item() for name, value in values.items()}
        self.values |= {name: value for name, value in plain.items() if isinstance(value, str) or np.isfinite(value)}

    @property
    def verdict(self) -> str:
        """The worst of its reasons, of :data:`VERDICTS`."""
        return max((verdict for verdict, _ in self.found), key=VERDICTS.index, default="fine")


@dataclass(frozen=True)
class VocabularyReport:
    """``classes`` in vocabulary order, ``notes`` on the vocabulary as a whole and on what was not examined; ``tables``:
    extractor -> ``Collisions`` of the classes ``built``; ``print`` it."""

    classes: tuple[ClassReport, ...]
    limits: Limits
    notes: tuple[str, ...]
    built: tuple[str, ...]
    tables: dict[str, Collisions] = field(repr=False)

    def __str__(self) -> str:
        """A table, a row a class; reasons for each that is not fine, the worst first; notes; how many are fine."""
        names = [f"{c.name} (stuff)" if c.kind == "stuff" else c.name for c in self.classes]
        rows = [{"verdict": c.verdict, **c.values} for c in self.classes]
        table = pd.DataFrame(rows, names, ["verdict", *COLUMNS]).rename(columns=COLUMNS).dropna(axis=1, how="all")
        lines = [table.to_string(float_format="{:.2f}".format, na_rep="-"), ""]
        for c in self.classes:
            worst_first = sorted(c.found, key=lambda reason: -VERDICTS.index(reason[0]))
            lines += [f"{c.name}:", *(f"  {verdict}: {why}" for verdict, why in worst_first), ""] if c.found else []
        said = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
        return "\n".join([*lines, *self.notes, f"Of {len(names)} classes: {said}."])
