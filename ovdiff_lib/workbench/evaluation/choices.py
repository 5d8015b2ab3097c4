"""Choices that the paper leaves open or that the released code makes otherwise, each a row that switches it alone.

Every one is a field of the profile; a row takes the alternative to what the profile has, so the same list serves
profiles that follow the paper and those that follow the code. A switch that nothing in a run depends on gives the same
label maps as its base: it was not exercised, and that is said instead of a difference of zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.evaluation.rows import Row
from ovdiff_lib.workbench.tables.tables import Cell

FULL, CLIP, THRESHOLDS, PAMR = "full", "full, CLIP keys", "full, thresholds alone", "full + PAMR"
"""Labels of the rows that changes are measured against."""

BASES: dict[str, dict[str, Any]] = {FULL: {}, CLIP: {"features.extractors": ["clip-keys"]},
                                    THRESHOLDS: {"masks.segmenter": "threshold"}, PAMR: {"matching.refine": "pamr"}}
"""Settings of those rows."""

NOT_SWITCHED = (
    "Not switched: MAE's variant (the released code's weights are another model; Table 2 has MAE as the profile has "
    "it), and the restarts of k-means (the code's n_init \"auto\" is one start with k-means++, as here where all "
    "points are clustered and not a sample).")
"""Choices of the released code without a row, and why."""


@dataclass(frozen=True)
class Choice:
    """Two ways, each (label, settings): ``paper`` and ``code``, as ``choices.yaml`` explains, which lists them all."""

    paper: tuple[str, dict[str, Any]]
    code: tuple[str, dict[str, Any]]
    base: str = FULL
    idle: str = ""

    def other(self, profile: Profile) -> tuple[str, dict[str, Any]]:
        """The way that ``profile``, with the settings of the base, does not go."""
        own = profile.override(BASES[self.base])
        return self.paper if own.override(self.code[1]) == own else self.code


CHOICES = tuple(Choice(**row) for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_bytes()))


def rows_of_choices(profile: Profile) -> list[Row]:
    """The base rows, and one row for each choice with the way that ``profile`` does not go."""
    ways = [(BASES[choice.base], *choice.other(profile)) for choice in CHOICES]
    return [*(Row(label, settings) for label, settings in BASES.items()),
            *(Row(label, {**base, **settings}) for base, label, settings in ways)]


def changes(cells: Sequence[Cell]) -> list[Cell]:
    """For each measured cell of :func:`rows_of_choices` but the bases, the difference to its base in the same column
    (:meth:`Cell.against`), with the reason why a switch is not exercised where one is known."""
    of = {label: choice for choice in CHOICES for label, _ in (choice.paper, choice.code)}
    measured = {(cell.row, cell.column): cell for cell in cells}
    return [cell.against(measured[choice.base, cell.column], choice.idle)
            for cell in cells if (choice := of.get(cell.row))]
