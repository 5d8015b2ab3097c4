"""Tables as data: one CSV row a cell, and beside it Markdown with the paper's value in its own column, and JSON with what was run."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.tables.paper import PaperCell

COLUMNS = ("table", "row", "column", "measured", "std", "n", "values", "source", "paper", "paper_std", "paper_table", "paper_row",
           "paper_column", "profile", "settings")
SOURCES, IDLE = ("measured", "published", "predictions"), "idle: "
STAMP = "The paper's column is from its own data sets and models."


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    ``measured`` is the mean of ``n`` runs with sample standard deviation ``std`` (None when n = 1) and ``values`` those runs in the order
    of their seeds, where they were kept: paired comparisons need them. ``paper`` is the published cell it is set beside, or with
    ``PaperCell.own`` only its key. ``source``: "measured" here by this code; "published": taken from the paper, not measured
    (``measured`` is None); "predictions": measured here from a folder of another program's label maps; "idle: WORDS": what the cell is
    about does not act here, so that a number would only repeat another; the words stand in its place (``measured`` is None).

    Raises ``InputError`` for a cell that contradicts itself and for numbers that are not finite.
    """

    row: str
    column: str
    measured: float | None = None
    std: float | None = None
    n: int = 1
    paper: PaperCell | None = None
    values: tuple[float, ...] = ()
    source: str = "measured"

    def __post_init__(self) -> None:
        where = f"The cell {self.row!r}, {self.column!r}"
        if self.source not in SOURCES and not self.idle:
            raise InputError(f"{where} has the source {self.source!r}; write one of {', '.join(SOURCES)}, or {IDLE}and why.")
        if self.paper is not None and not isinstance(self.paper, PaperCell):
            raise InputError(f"{where} has the paper's value {self.paper!r}; give it with its key: paper_cell(table, row, column).")
        if self.source == "published" and (self.measured is not None or self.paper is None):
            raise InputError(f"{where} is published; give it a paper_cell and no measured number.")
        if self.idle and self.measured is not None:
            raise InputError(f"{where} is idle and has a number; leave the number out.")
        if self.source != "published" and not self.idle and self.measured is None:
            raise InputError(f"{where} has no measured number; leave the cell out, or say source='published'.")
        if any(x is not None and not math.isfinite(x) for x in (self.measured, self.std, *self.values)):
            raise InputError(f"{where} holds a number that is not finite; leave the cell out and say why in the text.")
        if self.values and len(self.values) != self.n:
            raise InputError(f"{where} has {len(self.values)} values but n = {self.n}; use Cell.of(row, column, values).")

    @property
    def idle(self) -> str:
        """The words in place of a number where there is nothing to measure, "" elsewhere."""
        return self.source.removeprefix(IDLE) if self.source.startswith(IDLE) else ""

    @classmethod
    def of(cls, row: str, column: str, values: Iterable[float], paper: PaperCell | None = None, source: str = "measured") -> Cell:
        """The cell of several runs: mean, sample standard deviation (n - 1 in the denominator; None for one run), and the runs."""
        values = tuple(float(v) for v in values)
        if not values:
            raise InputError(f"The cell {row!r}, {column!r} has no values; give at least one.")
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(row, column, statistics.fmean(values), std, len(values), paper, values, source)


def write_table(path: str | Path, name: str, cells: list[Cell], profile: Profile, caption: str, digits: int | dict[str, int] = 1, *,
                title: str = "", details: dict[str, Any] | None = None) -> str:
    """Write ``path`` (.csv), and beside it the Markdown (.md), which is returned, and what was run (.json).

    ``digits``: decimals shown in the Markdown, for all columns or by column ({"images": 0}; others get 1); the CSV keeps six significant
    digits. ``title``: what it corresponds to ("Table 1"). ``details``: further facts of the run for the JSON, such as
    {"images": 211, "seeds": [0, 1, 2]}, which the Markdown says at its head ("images" of several data sets: {"voc": 211}).
    {"volatile": True} says that the numbers differ from run to run (times), {"volatile": ["seconds"]} that those of these columns do:
    :func:`~ovdiff_lib.workbench.tables.compare.compare_tables` passes them over. Raises ``InputError`` when a cell comes twice.
    """
    path = Path(path)
    by_place = {(c.row, c.column): c for c in cells}
    if len(by_place) != len(cells):
        twice = next((c.row, c.column) for i, c in enumerate(cells) if any((c.row, c.column) == (d.row, d.column) for d in cells[:i]))
        raise InputError(f"The table {name} has the cell {twice[0]!r}, {twice[1]!r} twice; give rows names that differ.")
    digest = profile.digest()
    record = {"name": name, "title": title, "caption": caption, "digits": digits, "notebook": _notebook(name), "profile": profile.name,
              "settings": digest, "details": details or {}}
    try:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"The details of the table {name} cannot be written as JSON ({error}); use plain numbers, text and lists."
                         ) from None
    write_atomic(path, _csv(name, cells, profile.name, digest).encode())
    write_atomic(path.with_suffix(".json"), (text + "\n").encode())
    markdown = _markdown(by_place, profile, caption, digits, _amount(details or {}))
    write_atomic(path.with_suffix(".md"), markdown.encode())
    return markdown


def read_table(path: str | Path) -> list[Cell]:
    """The cells of a CSV that :func:`write_table` wrote, in its order. Raises ``InputError`` for any other file."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InputError(f"The file {path} is not a table of this project (its columns differ); write it anew.")
            return [_cell(row) for row in reader]
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"The table {path} cannot be read ({str(error).splitlines()[0]}); run its notebook again.") from None


def read_record(path: str | Path) -> dict[str, Any]:
    """What was run (the .json beside the table ``path``); {} where there is no such file. Raises ``InputError`` if it is broken."""
    path = Path(path).with_suffix(".json")
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise InputError(f"The file {path} cannot be read as JSON; run its notebook again.")
    return record


def _csv(name: str, cells: list[Cell], profile: str, digest: str) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for c in cells:
        paper = c.paper or PaperCell("", "", "")
        writer.writerow([name, c.row, c.column, _text(c.measured), _text(c.std), c.n, " ".join(map(_text, c.values)), c.source,
                         _text(paper.value), _text(paper.std), *paper.key, profile, digest])
    return buffer.getvalue()


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def _cell(row: dict[str, str]) -> Cell:
    value, std, measured, spread = (float(row[k]) if row[k] else None for k in ("paper", "paper_std", "measured", "std"))
    key = row["paper_table"], row["paper_row"], row["paper_column"]
    paper = PaperCell(*key, value, std) if any(key) else None
    return Cell(row["row"], row["column"], measured, spread, int(row["n"]), paper, tuple(map(float, row["values"].split())), row["source"])


def _markdown(by_place: dict[tuple[str, str], Cell], profile: Profile, caption: str, digits: int | dict[str, int], amount: str) -> str:
    columns = list(dict.fromkeys(column for _, column in by_place))
    printed = {column: any(c.paper and (c.paper.value is not None or c.source == "published")
                           for c in by_place.values() if c.column == column) for column in columns}
    shown = [c for column in columns for c in (column, *([f"{column} (paper, its own data)"] if printed[column] else ()))]
    stamp = f" {STAMP}" if any(printed.values()) else ""
    description = f" ({profile.description.rstrip('.')})" if profile.description else ""
    lines = [f"**{caption}** {amount}Profile `{profile.name}`{description}, settings `{profile.digest()}`.{stamp}", "",
             "| |" + "".join(f" {_escape(c)} |" for c in shown), "|---|" + "---:|" * len(shown)]
    for row in dict.fromkeys(row for row, _ in by_place):
        texts = []
        for column in columns:
            places = digits.get(column, 1) if isinstance(digits, dict) else digits
            cell = by_place.get((row, column))
            texts.append(_measured(cell, places))
            if printed[column]:
                texts.append(_published(cell, places))
        lines.append(f"| {_escape(row)} |" + "".join(f" {t} |" for t in texts))
    return "\n".join(lines) + "\n"


def _amount(details: dict[str, Any]) -> str:
    """Of how many images and which seeds a table is: "80 images of each data set, seeds 0 to 3. ", "" where the details do not say."""
    images, seeds = details.get("images"), details.get("seeds")
    said = []
    if isinstance(images, dict) and len(set(images.values())) == 1:
        said.append(f"{next(iter(images.values()))} images" + " of each data set" * (len(images) > 1))
    elif isinstance(images, dict) and images:
        said.append("images: " + ", ".join(f"{number} of {source.partition(':')[0]}" for source, number in images.items()))
    elif isinstance(images, int):
        said.append(f"{images} image{'s' * (images != 1)}")
    if isinstance(seeds, (list, tuple)) and seeds:
        run = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
        said.append(f"seed{'s' * (len(seeds) > 1)} {f'{seeds[0]} to {seeds[-1]}' if run else ', '.join(map(str, seeds))}")
    text = ", ".join(said)
    return f"{text[0].upper()}{text[1:]}. " if text else ""


def _measured(cell: Cell | None, places: int) -> str:
    if cell is None:
        return ""
    if cell.source == "published" or cell.idle:
        return _escape(cell.idle) or "published"
    spread = f" ± {cell.std:.{places}f}" if cell.std is not None else ""
    return f"{cell.measured:.{places}f}{spread}" + " (from predictions)" * (cell.source == "predictions")


def _published(cell: Cell | None, places: int) -> str:
    if cell is None or cell.paper is None or (cell.paper.value is None and cell.source != "published"):
        return ""
    if cell.paper.value is None:
        return "not reported"
    return f"{cell.paper.value:.{places}f}" + (f" ± {cell.paper.std:.{places}f}" if cell.paper.std is not None else "")


def _escape(text: str) -> str:
    return text.replace("|", "\\|")  # a class may be called anything, and a bar would open a new column


def _notebook(name: str) -> str:
    """The notebook that writes the table, by the rule of names: the longest stem in the working folder that the name starts with.
    A notebook runs in its own folder; elsewhere there is none, and the answer is ""."""
    return max((p.stem for p in Path.cwd().glob("*.ipynb") if name.startswith(p.stem)), key=len, default="")
