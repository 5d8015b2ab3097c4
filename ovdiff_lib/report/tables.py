"""Tables as data: one CSV row a cell, and Markdown beside it, with the paper's value in its own column."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from ovdiff_lib.images import write_atomic
from ovdiff_lib.profiles import Profile

COLUMNS = ("table", "row", "column", "measured", "std", "n", "paper", "profile", "settings")


@dataclass(frozen=True)
class Cell:
    """One measured number: ``measured`` is the mean of ``n`` runs with standard deviation ``std`` (None when n = 1); ``paper`` is
    the published value for the same cell, on the paper's data, or None."""

    row: str
    column: str
    measured: float
    std: float | None = None
    n: int = 1
    paper: float | None = None


def write_table(path: str | Path, name: str, cells: list[Cell], profile: Profile, caption: str, digits: int = 1) -> str:
    """Write ``path`` (.csv) and the Markdown beside it (.md); returns the Markdown."""
    path = Path(path)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    digest = profile.digest()
    for cell in cells:
        writer.writerow([name, cell.row, cell.column, f"{cell.measured:.6g}", "" if cell.std is None else f"{cell.std:.4g}", cell.n,
                         "" if cell.paper is None else cell.paper, profile.name, digest])
    write_atomic(path, buffer.getvalue().encode())
    columns = list(dict.fromkeys(c.column for c in cells))
    by_place = {(c.row, c.column): c for c in cells}
    shown = [c for column in columns for c in (column, *((f"{column} (paper, its own data)",) if _has_paper(cells, column) else ()))]
    lines = [f"**{caption}** Profile `{profile.name}`, settings `{digest}`.", "",
             "| |" + "".join(f" {_escape(c)} |" for c in shown), "|---|" + "---:|" * len(shown)]
    for row in dict.fromkeys(c.row for c in cells):
        texts = []
        for column in columns:
            cell = by_place.get((row, column))
            spread = f" ± {cell.std:.{digits}f}" if cell and cell.std is not None else ""
            texts.append(f"{cell.measured:.{digits}f}{spread}" if cell else "")
            if _has_paper(cells, column):
                texts.append("" if cell is None or cell.paper is None else f"{cell.paper:.{digits}f}")
        lines.append(f"| {_escape(row)} |" + "".join(f" {t} |" for t in texts))
    text = "\n".join(lines) + "\n"
    write_atomic(path.with_suffix(".md"), text.encode())
    return text


def _escape(text: str) -> str:
    return text.replace("|", "\\|")  # a class may be called anything, and a bar would open a new column


def _has_paper(cells: list[Cell], column: str) -> bool:
    return any(c.paper is not None for c in cells if c.column == column)
