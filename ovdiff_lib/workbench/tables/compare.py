"""Two sets of tables side by side: are regenerated tables those that were there before?"""

from __future__ import annotations

import math
from pathlib import Path

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.tables.claims import NAME
from ovdiff_lib.workbench.tables.tables import Cell, read_record, read_table


def compare_tables(a: str | Path, b: str | Path, tolerance: float) -> list[str]:
    """What differs between the tables in the folders ``a`` and ``b``, one sentence for each difference; [] = nothing.

    A folder is one of tables, or an outputs folder with a folder ``tables`` in it. Compared are which tables there are,
    their profile and settings, their cells by row and column, and of each cell where it is from, the number of runs,
    the paper's value (exactly), and the measured value and its standard deviation: equal within ``tolerance``, in the
    table's own unit. Of a table that says ``"volatile": True`` in its details (times) no measured number is compared,
    of one that names columns there (``"volatile": ["seconds"]``) none of these columns. Claims follow from the tables
    and are passed over. Raises ``InputError`` for a tolerance that is no number from 0 on, a folder without tables, a
    broken table.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"The tolerance must be a number from 0 on, not {tolerance}.")
    first, second = _tables(Path(a)), _tables(Path(b))
    found = [f"{name}: is only in {a if name in first else b}" for name in sorted(first.keys() ^ second.keys())]
    for name in sorted(first.keys() & second.keys()):
        found += [f"{name}: {text}" for text in _differences(first[name], second[name], tolerance)]
    return found


def _tables(folder: Path) -> dict[str, Path]:
    inner = folder / "tables"
    found = {p.stem: p for p in sorted((inner if inner.is_dir() else folder).glob("*.csv")) if p.stem != NAME}
    if not found:
        raise InputError(f"The folder {folder} holds no tables; name an outputs folder, or the folder of its tables.")
    return found


def _differences(first: Path, second: Path, tolerance: float) -> list[str]:
    records = read_record(first), read_record(second)
    volatile = [(record.get("details") or {}).get("volatile") or () for record in records]
    found = [f"{key}: {records[0].get(key)!r} against {records[1].get(key)!r}"
             for key in ("profile", "settings") if records[0].get(key) != records[1].get(key)]
    left, right = ({(c.row, c.column): c for c in read_table(path)} for path in (first, second))
    for row, column in dict.fromkeys([*left, *right]):
        a, b = left.get((row, column)), right.get((row, column))
        if a is None or b is None:
            texts = [f"is only in the {'first' if a else 'second'}"]
        else:
            texts = _cell_differences(a, b, math.inf if any(v is True or column in v for v in volatile) else tolerance)
        found += [f"{row} / {column}: {text}" for text in texts]
    return found


def _cell_differences(a: Cell, b: Cell, tolerance: float) -> list[str]:
    paper = [(c.paper.key, c.paper.value, c.paper.std) if c.paper else None for c in (a, b)]
    found = [(name, x, y) for name, x,
             y in (("source", a.source, b.source), ("runs", a.n, b.n), ("paper", *paper)) if x != y]
    for name, x, y in ("measured", a.measured, b.measured), ("std", a.std, b.std):
        near = x == y if x is None or y is None else abs(x - y) <= tolerance
        found += [] if near or tolerance == math.inf else [(name, x, y)]
    return [f"{name}: {x} against {y}" for name, x, y in found]
