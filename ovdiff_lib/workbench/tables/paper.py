"""The numbers that the paper prints, as data: every cell of its tables by the key (table, row, column)."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

import pandas

from ovdiff_lib.errors import InputError

PATH = Path(__file__).with_name("paper_results.csv")


@dataclass(frozen=True)
class PaperCell:
    """One cell of one of the paper's tables.

    ``table``, ``row`` and ``column`` are its key, as written in ``paper_results.csv``: "1", "A.4", "fig5", "timing",
    ... ``value`` is in the table's unit (mIoU in percent for nearly all; ``note`` says it), ``std`` the spread over
    seeds where the paper gives one. ``value`` is None where the paper prints none: a method that did not report the
    data set, or a cell of our own (see :meth:`own`).
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
        """The key of a measured cell that the paper does not have, so that claims find it: a rival it lists without a
        number, N = 4 in Fig. 5, ... Nothing is looked up."""
        return cls(table, row, column, note="not in the paper")


def paper_cell(table: str, row: str, column: str) -> PaperCell:
    """The published cell, for example ``paper_cell("1", "OVDiff", "VOC").value == 66.3``.

    Raises ``InputError``, with the nearest legal names, for a cell that the paper does not have.
    """
    given = table, row, column
    if given in _cells():
        return _cells()[given]
    place = next(n for n in range(3) if not any(key[: n + 1] == given[: n + 1] for key in _cells()))
    legal = sorted({key[place] for key in _cells() if key[:place] == given[:place]})
    near = difflib.get_close_matches(str(given[place]), legal, 1) or legal
    raise InputError(f"The paper has no {('table', 'row', 'column')[place]} {given[place]!r} (asked for {given}); "
                     "write "
                     f"{' or '.join(map(repr, near))}, or use PaperCell.own for a cell that the paper does not have.")


def paper_table(table: str) -> tuple[PaperCell, ...]:
    """All published cells of a table in the paper's order, those without a value too; ``InputError`` for an unknown
    one."""
    cells = tuple(cell for cell in _cells().values() if cell.table == table)
    if not cells:
        raise InputError(f"There is no table {table!r}; write one of "
                         f"{', '.join(dict.fromkeys(k[0] for k in _cells()))}.")
    return cells


@functools.cache
def _cells() -> dict[tuple[str, str, str], PaperCell]:
    read = pandas.read_csv(PATH, dtype=str, keep_default_na=False).replace({"value": {"n/a": ""}, "std": {"n/a": ""}})
    cells = [PaperCell(*key, float(value) if value else None, float(std) if std else None, note)
             for *key, value, std,
             note in read[["table", "row", "column", "value", "std", "note"]].itertuples(index=False)]
    return {cell.key: cell for cell in cells}
