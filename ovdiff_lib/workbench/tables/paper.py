"""The numbers that the paper prints, as data: every cell of its tables by the key (table, row, column)."""

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

import pandas

from ovdiff_lib.errors import InputError


@dataclass(frozen=True)
class PaperCell:
    """One cell of one of the paper's tables: its key, as in ``paper_results.csv``, its ``value`` in the table's unit
    (the file's ``note`` says it; None where the paper prints none, as of cells of ours that it does not have, which
    claims find by their key), and the spread over seeds where there is one."""

    table: str
    row: str
    column: str
    value: float | None = None
    std: float | None = None

    key = property(lambda self: (self.table, self.row, self.column))


def paper_cell(table: str, row: str, column: str) -> PaperCell:
    """The published cell, for example ``paper_cell("1", "OVDiff", "VOC").value == 66.3``.

    Raises ``InputError``, with the nearest legal names, for a cell that the paper does not have.
    """
    cells, given = _cells(), (table, row, column)
    if given not in cells:
        near = difflib.get_close_matches(str(given), map(str, cells), 3, 0)
        raise InputError(f"The paper has no cell {given}; nearest are {', '.join(near)} (PaperCell for others).")
    return cells[given]


def paper_change(cell: PaperCell | None) -> PaperCell | None:
    """The published difference of a cell to the full method (Table 3), if the paper prints one."""
    return _cells().get((cell.table, cell.row, f"{cell.column} delta")) if cell else None


def paper_table(table: str) -> tuple[PaperCell, ...]:
    """All published cells of a table in the paper's order, those without a value too; ``InputError`` if unknown."""
    tables = dict.fromkeys(key[0] for key in _cells())
    if table not in tables:
        raise InputError(f"There is no table {table!r}; write one of {', '.join(tables)}.")
    return tuple(cell for cell in _cells().values() if cell.table == table)


@functools.cache
def _cells() -> dict[tuple[str, str, str], PaperCell]:
    numbers = dict.fromkeys(("value", "std"), lambda text: None if text in ("", "n/a") else float(text))
    read = pandas.read_csv(Path(__file__).with_name("paper_results.csv"), dtype=dict.fromkeys(("table", "row"), str),
                           converters=numbers, keep_default_na=False).drop(columns="note").astype(object)
    cells = (PaperCell(**row) for row in read.where(read.notna(), None).to_dict("records"))
    return {cell.key: cell for cell in cells}
