"""Two sets of tables side by side: are regenerated tables those that were there before?"""

import math
from pathlib import Path

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.tables.claims import NAME
from ovdiff_lib.workbench.tables.tables import Cell, read_record, read_table


def compare_tables(a: str | Path, b: str | Path, tolerance: float) -> list[str]:
    """What differs between the tables of two folders (or of their folders ``tables``), one sentence each; [] = nothing.

    Compared are profile and settings, and of each cell its source, runs, the paper's value and, within ``tolerance`` in
    the table's unit, its numbers: not those of a volatile table, nor claims, which follow from the tables. Raises
    ``InputError`` for a tolerance that is no number from 0 on, a folder without tables, a broken table.
    """
    if not 0 <= tolerance < math.inf:
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
    found = [f"{key}: {x!r} against {y!r}" for key in ("profile", "settings")
             if (x := records[0].get(key)) != (y := records[1].get(key))]
    if any((record.get("details") or {}).get("volatile") for record in records):
        tolerance = math.inf
    left, right = ({(c.row, c.column): c for c in read_table(path)} for path in (first, second))
    for place in dict.fromkeys([*left, *right]):
        both = place in left and place in right
        texts = (_cell_differences(left[place], right[place], tolerance) if both
                 else [f"is only in the {'first' if place in left else 'second'}"])
        found += [f"{' / '.join(place)}: {text}" for text in texts]
    return found


def _cell_differences(a: Cell, b: Cell, tolerance: float) -> list[str]:
    found = [name for name in ("source", "n", "paper") if getattr(a, name) != getattr(b, name)]
    for name in ("measured", "std", "low", "high"):
        x, y = getattr(a, name), getattr(b, name)
        near = x == y or (None not in (x, y) and abs(x - y) <= tolerance)
        found += [] if near or tolerance == math.inf else [name]
    return [f"{name}: {getattr(a, name)} against {getattr(b, name)}" for name in found]
