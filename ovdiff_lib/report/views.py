"""Numbers as the page shows them: tables with the paper's value and the difference to it, and the main comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ovdiff_lib.report.collect import Table
from ovdiff_lib.report.tables import Cell

METHOD = "OVDiff"
"""Row of the paper's Table 1 that is the method; rows that begin with it are its variants, all others rivals."""


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number with a true minus sign; "" for None."""
    if value is None:
        return ""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """"48 s", "3 min 12 s", "2 h 5 min"; "unknown" for None."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """A parameter or detail as short text: lists with commas, tables as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (list, tuple)) and not any(isinstance(v, (list, tuple, dict)) for v in value):
        return ", ".join(map(plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table_view(table: Table) -> dict[str, Any]:
    """A table for the template: ``columns`` (name, whether the paper has values beside it), and rows in two groups, ``measured`` and
    ``published``, which hold nothing but what the paper printed; ``runs`` is n where all measured cells share it, else None."""
    columns = list(dict.fromkeys(c.column for c in table.cells))
    compared = {column: any(_printed(c) for c in table.cells if c.column == column) for column in columns}
    counts = {c.n for c in table.cells if c.source != "published"}
    rows: dict[str, dict[str, Cell]] = {}
    for cell in table.cells:
        rows.setdefault(cell.row, {})[cell.column] = cell
    groups: dict[str, list[dict[str, Any]]] = {"measured": [], "published": []}
    for name, cells in rows.items():
        group = "published" if all(c.source == "published" for c in cells.values()) else "measured"
        shown = [_cell(cells.get(column), table.digits(column), compared[column], len(counts) > 1) for column in columns]
        if group == "published":  # the heading of the group says it once
            shown = [view | {"measured": ""} for view in shown]
        groups[group].append({"name": name, "cells": shown})
    return {"columns": [{"name": c, "compared": compared[c]} for c in columns], **groups,
            "runs": counts.pop() if len(counts) == 1 else None, "compared": any(compared.values())}


def _printed(cell: Cell) -> bool:
    return cell.paper is not None and (cell.paper.value is not None or cell.source == "published")


def _cell(cell: Cell | None, digits: int, compared: bool, with_runs: bool) -> dict[str, Any]:
    """``measured``, ``std``, ``runs``, ``printed`` (in the paper), ``difference`` as text, "" where there is none."""
    view = {"compared": compared, "predictions": False, **dict.fromkeys(("measured", "std", "runs", "values", "printed", "difference"), "")}
    if cell is None:
        return view
    if cell.source == "published":
        view["measured"] = "not measured"
    elif cell.idle:
        view["measured"] = cell.idle
    else:
        view |= {"measured": number(cell.measured, digits), "std": number(cell.std, digits), "predictions": cell.source == "predictions",
                 "runs": f"n = {cell.n}" if with_runs else "", "values": ", ".join(number(v, digits) for v in cell.values[:20])}
    if _printed(cell):
        spread = f" ± {number(cell.paper.std, digits)}" if cell.paper.std is not None else ""
        view["printed"] = "not reported" if cell.paper.value is None else number(cell.paper.value, digits) + spread
    if cell.measured is not None and cell.paper is not None and cell.paper.value is not None:
        view["difference"] = number(cell.measured - cell.paper.value, digits, sign=True)
    return view


def headline(tables: Iterable[Table]) -> dict[str, Any] | None:
    """The measured part of the paper's Table 1: ``columns``, ``rows`` (name, whether it is the method, one cell a column) and one
    ``sentences`` entry a column that says how the method stands to the best measured rival. None where nothing of it was measured.

    Of the tables that hold the method's own row the one with most such cells is taken.
    """
    found = [(t, [c for c in t.cells if c.paper and c.paper.table == "1" and c.measured is not None]) for t in tables]
    found = [(t, cells) for t, cells in found if any(c.paper.row == METHOD for c in cells)]
    if not found:
        return None
    table, cells = max(found, key=lambda pair: len(pair[1]))
    columns = list(dict.fromkeys(c.column for c in cells))
    best = {column: max(c.measured for c in cells if c.column == column) for column in columns}
    rows = []
    for row in dict.fromkeys(c.row for c in cells):
        own = {c.column: c for c in cells if c.row == row}
        shown = [None if own.get(column) is None else
                 {**_cell(own[column], table.digits(column), True, False), "best": own[column].measured == best[column],
                  "share": max(0.0, own[column].measured / best[column]) if best[column] > 0 else 0.0} for column in columns]
        rows.append({"name": row, "method": next(iter(own.values())).paper.row.startswith(METHOD), "cells": shown})
    return {"table": table.name, "title": table.record.get("title") or table.name, "columns": columns, "rows": rows,
            "sentences": [s for column in columns if (s := _standing(cells, column, table.digits(column)))]}


def _standing(cells: list[Cell], column: str, digits: int) -> str:
    here = [c for c in cells if c.column == column]
    method = next((c for c in here if c.paper.row == METHOD), None)
    rivals = [c for c in here if not c.paper.row.startswith(METHOD)]
    if method is None:
        return ""
    said = f"{column}: {METHOD} {number(method.measured, digits)}"
    if not rivals:
        return f"{said}; no rival was measured."
    rival = max(rivals, key=lambda c: c.measured)
    return f"{said}, the best measured rival ({rival.row}) {number(rival.measured, digits)}."
