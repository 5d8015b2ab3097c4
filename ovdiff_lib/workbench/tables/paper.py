"""The numbers that the paper prints, as data: every cell of its tables by the key (table, row, column)."""

from __future__ import annotations

import csv
import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

from ovdiff_lib.errors import InputError

PATH = Path(__file__).with_name("paper_results.csv")

NO_VALUE = ("", "n/a")
"""What the data file writes where the paper prints no number."""


@dataclass(frozen=True)
class PaperCell:
    """One cell of one of the paper's tables.

    ``table``, ``row`` and ``column`` are its key, as written in ``paper_results.csv``: "1", "A.4", "fig5", "timing", ... ``value`` is in
    the table's unit (mIoU in percent for nearly all; ``note`` says it), ``std`` the spread over seeds where the paper gives one. ``value``
    is None where the paper prints none: a method that did not report the data set, or a cell of our own (see :meth:`own`).
    """

    table: str
    row: str
    column: str
    value: float | None = None
    std: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.table, self.row, self.column

    @classmethod
    def own(cls, table: str, row: str, column: str) -> PaperCell:
        """The key of a measured cell that the paper does not have, so that claims find it: a rival it lists without a number, N = 4 in
        Fig. 5, ... Nothing is looked up."""
        return cls(table, row, column, note="not in the paper")


def paper_cell(table: str, row: str, column: str) -> PaperCell:
    """The published cell, for example ``paper_cell("1", "OVDiff", "VOC").value == 66.3``.

    Raises ``InputError``, with the nearest legal names, for a cell that the paper does not have.
    """
    found = _cells().get((table, row, column))
    if found is not None:
        return found
    for given, name, legal in (
            (table, "table", {key[0] for key in _cells()}),
            (row, f"row of the paper's table {table}", {key[1] for key in _cells() if key[0] == table}),
            (column, f"column of the row {row!r} in the paper's table {table}", {key[2] for key in _cells() if key[:2] == (table, row)})):
        if given not in legal:
            near = difflib.get_close_matches(str(given), legal, 1) or sorted(legal)
            raise InputError(f"{given!r} is no {name}; write {' or '.join(map(repr, near))}, or use PaperCell.own for a cell "
                             "that the paper does not have.")
    raise AssertionError("unreachable: all three names are legal")


def paper_table(table: str) -> tuple[PaperCell, ...]:
    """All published cells of a table in the paper's order, those without a value too. Raises ``InputError`` for an unknown table."""
    cells = tuple(cell for cell in _cells().values() if cell.table == table)
    if not cells:
        raise InputError(f"There is no table {table!r}; write one of {', '.join(dict.fromkeys(key[0] for key in _cells()))}.")
    return cells


@functools.cache
def _cells() -> dict[tuple[str, str, str], PaperCell]:
    with open(PATH, encoding="utf-8", newline="") as file:
        cells = [PaperCell(r["table"], r["row"], r["column"], _number(r["value"]), _number(r["std"]), r["note"])
                 for r in csv.DictReader(file)]
    return {cell.key: cell for cell in cells}


def _number(text: str) -> float | None:
    return None if text in NO_VALUE else float(text)
