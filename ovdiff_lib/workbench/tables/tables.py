"""Tables as data: one CSV row a cell, and beside it Markdown with the paper's values, JSON of what was run, counts."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.console import counted, write_json
from ovdiff_lib.workbench.tables.intervals import Runs, interval, write_runs
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_change

COLUMNS = ("table", "row", "column", "measured", "std", "low", "high", "n", "values", "source", "paper", "paper_std",
           "paper_table", "paper_row", "paper_column", "profile", "settings", "note")
IDLE, PAPER, NOT_EXERCISED = "idle: ", " (paper, its own data)", "not exercised"
BRACKETS = "In brackets 95 % intervals: other images, other seeds where there are several; constants stay as searched."
STAMP = "The paper's column is from its own data sets and models."


@dataclass(frozen=True)
class Cell:
    """One number of a table. ``InputError`` for a measured cell without one, another with one, one not finite."""

    row: str
    column: str
    measured: float | None = None  # the mean of n runs
    std: float | None = None  # their sample standard deviation, None when n = 1
    n: int = 1
    paper: PaperCell | None = None  # the published cell it is set beside, or without a value only its key
    values: tuple[float, ...] = ()  # the runs in the order of their seeds, where they were kept
    source: str = "measured"  # or "published" in the paper, or "idle: WORDS": what it is about does not act here
    note: str = ""  # a footnote
    low: float | None = None  # of an mIoU the 95 % interval
    high: float | None = None
    runs: Runs | None = field(default=None, compare=False, repr=False)  # of an mIoU, which comparisons need

    def __post_init__(self) -> None:
        known = self.source in ("measured", "published") or self.idle
        if not known or (self.measured is None) == (self.source == "measured"):
            raise InputError(f"The cell {self.row!r}, {self.column!r} of the source {self.source!r} has the number "
                             f"{self.measured}; measured ones have one, published ones and '{IDLE}why' none.")
        numbers = self.measured, self.std, self.low, self.high, *self.values
        if any(x is not None and not math.isfinite(x) for x in numbers):
            raise InputError(f"The cell {self.row!r}, {self.column!r} holds a number that is not finite; leave it out.")

    idle = property(lambda self: self.source.partition(IDLE)[2])
    """The words in place of a number where there is nothing to measure, "" elsewhere."""

    @classmethod
    def of(cls, row: str, column: str, values: Iterable[float], paper: PaperCell | None = None,
           runs: Runs | None = None) -> Self:
        """The cell of several runs: mean, sample standard deviation (n - 1 in the denominator; None for one run)."""
        values = tuple(map(float, values))
        std = statistics.stdev(values) if len(values) > 1 else None
        spread = runs is not None and runs.images > 1 and np.ptp(runs.draws) > 0  # of 0 % others are not known
        low, high = interval(runs.draws.clip(0, 100)) if spread else (None, None)
        mean = statistics.fmean(values)
        return cls(row, column, mean, std, len(values), paper, values, low=low, high=high, runs=runs)

    @classmethod
    def miou(cls, row: str, column: str, runs: Runs, paper: PaperCell | None = None) -> Self:
        """The cell of an mIoU in percent, with its interval."""
        return cls.of(row, column, runs.values, paper, runs)

    def against(self, base: Self, why: str = "") -> Self:
        """The difference to the mIoU ``base`` of as many seeds in "<column>, change", its interval from the same draws
        for both. Idle, "not exercised" and ``why``, where the two agree in every draw: their counts are the same."""
        column, draws = f"{self.column}, change", self.runs.draws - base.runs.draws
        paper = paper_change(self.paper)
        if not draws.any():
            return Cell(self.row, column, paper=paper, source=IDLE + NOT_EXERCISED + (f": {why}" if why else ""))
        made = Cell.of(self.row, column, [a - b for a, b in zip(self.values, base.values, strict=True)], paper)
        low, high = interval(draws) if self.runs.images > 1 else (None, None)
        return replace(made, low=low, high=high)


def write_table(path: str | Path, name: str, cells: list[Cell], profile: Profile, caption: str,
                digits: int | dict[str, int] = 1, *, title: str = "", details: dict[str, Any] | None = None) -> str:
    """Write ``path`` (.csv), and beside it the Markdown (.md), which is returned, what was run (.json), and the counts
    of cells that have some (.npz, :mod:`~ovdiff_lib.workbench.tables.intervals`).

    ``digits``: decimals shown in the Markdown, for all columns or by column ({"images": 0}; others get 1). ``title``:
    what it corresponds to ("Table 1"). ``details``: further facts for the JSON, such as {"images": {"voc": 211},
    "seeds": [0, 1]}, which the Markdown says at its head; {"volatile": True}: the numbers differ from run to run
    (times). Raises ``InputError`` when a cell comes twice.
    """
    path, rows, details = Path(path), _frame(name, cells := _twins(cells), profile), details or {}
    for row, column in rows.loc[rows.duplicated(["row", "column"]), ["row", "column"]].itertuples(index=False):
        raise InputError(f"The table {name} has the cell {row!r}, {column!r} twice; give rows names that differ.")
    # A notebook runs in its own folder: the longest stem there with which the table's name begins.
    notebook = max((p.stem for p in Path.cwd().glob("*.ipynb") if name.startswith(p.stem)), key=len, default="")
    record = {"name": name, "title": title, "caption": caption, "notebook": notebook, "profile": profile.name,
              "segmenter": profile.masks.segmenter, "settings": profile.digest(), "digits": digits, "details": details}
    write_json(path.with_suffix(".json"), record)
    described = f"`{profile.name}`" + (f" ({profile.description.rstrip('.')})" if profile.description else "")
    head = f"**{caption}** {_amount(details)}Profile {described}, settings `{profile.digest()}`."
    grid = _grid(cells, digits)
    head += f" {BRACKETS}" * any(c.low is not None for c in cells) + f" {STAMP}" * (PAPER in grid)
    markdown = f"{head}\n\n{grid}\n{_footnotes(cells)}"
    write_atomic(path, rows.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    write_atomic(path.with_suffix(".md"), markdown.encode())
    write_runs(path, {(c.row, c.column): c.runs for c in cells if c.runs})
    return markdown


def read_table(path: str | Path) -> list[Cell]:
    """The cells of a CSV that :func:`write_table` wrote, in its order. Raises ``InputError`` for any other file."""
    try:
        read = pandas.read_csv(path, dtype=str, keep_default_na=False)
        if tuple(read.columns) not in (COLUMNS, COLUMNS[:-1]):  # the notes came last
            raise ValueError("its columns are others")
        return [_cell(row) for row in read.reindex(columns=COLUMNS, fill_value="").itertuples(index=False)]
    except (InputError, OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a table ({reason}); run its notebook again.") from None


def read_record(path: str | Path) -> dict[str, Any]:
    """What was run (the .json beside the table ``path``); {} where there is no such file, ``InputError`` if broken."""
    path = Path(path).with_suffix(".json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError):
        raise InputError(f"The file {path} cannot be read as JSON; run its notebook again.") from None


def escape(text: str) -> str:
    """Text for a cell of a Markdown table: a class may be called anything, and a bar would open a new column."""
    return text.replace("|", "\\|")


def _twins(cells: list[Cell]) -> list[Cell]:
    """The cells, with a note on each whose counts are those of an earlier one: what tells the two apart did not act."""
    first: dict[tuple, Cell] = {}
    twins = [first.setdefault((c.runs.dataset, c.runs.counts.shape, c.runs.counts.tobytes()), c) if c.runs else c
             for c in cells]
    return [c if twin is c else replace(c, note=f"{c.note} Same counts in every image as {twin.row}"
                                        f"{f', {twin.column}' * (twin.column != c.column)}: {NOT_EXERCISED}.".strip())
            for c, twin in zip(cells, twins, strict=True)]


def _frame(name: str, cells: list[Cell], profile: Profile) -> pandas.DataFrame:
    """The CSV's rows."""
    rows = []
    for c in cells:
        paper, values = c.paper or PaperCell("", "", ""), " ".join(f"{v:.6g}" for v in c.values)
        rows.append((name, c.row, c.column, c.measured, c.std, c.low, c.high, c.n, values, c.source, paper.value,
                     paper.std, *paper.key, profile.name, profile.digest(), c.note))
    numbers = dict.fromkeys(("measured", "std", "low", "high", "paper", "paper_std"), float)
    return pandas.DataFrame(rows, columns=COLUMNS).astype(numbers)


def _cell(row: Any) -> Cell:
    key = row.paper_table, row.paper_row, row.paper_column
    read = row.measured, row.std, row.low, row.high, row.paper, row.paper_std
    measured, std, low, high, value, spread = (float(text) if text else None for text in read)
    paper = PaperCell(*key, value, spread) if any(key) else None
    values = tuple(map(float, row.values.split()))
    return Cell(row.row, row.column, measured, std, int(row.n), paper, values, row.source, row.note, low, high)


def _grid(cells: list[Cell], digits: int | dict[str, int]) -> str:
    """Rows by columns as Markdown; a column in which the paper says something has the paper's beside it."""
    texts: dict[str, dict[str, str]] = {}
    for column in dict.fromkeys(c.column for c in cells):
        here = [c for c in cells if c.column == column]
        places = digits.get(column, 1) if isinstance(digits, dict) else digits
        texts[column] = {
            c.row: _text(c.measured, c.std, places, escape(c.idle) or "published") if c.low is None else
            f"{c.measured:.{places}f} [{c.low:.{places}f}, {c.high:.{places}f}]" for c in here}
        paper = {c.row: _text(c.paper.value, c.paper.std, places, "not reported" * (c.source == "published"))
                 for c in here if c.paper}
        if any(paper.values()):
            texts[column + PAPER] = paper
    table = pandas.DataFrame(texts, index=list(dict.fromkeys(c.row for c in cells))).fillna("")
    head = [f"| | {' | '.join(map(escape, table.columns))} |", "|---|" + "---:|" * len(table.columns)]
    return "\n".join(head + [f"| {escape(row)} | {' | '.join(line)} |" for row, *line in table.itertuples(name=None)])


def _footnotes(cells: list[Cell]) -> str:
    """A paragraph for each note, with the rows that it is about by column."""
    said = ""
    for note in dict.fromkeys(c.note for c in cells if c.note):
        rows: dict[str, list[str]] = {}
        for c in (c for c in cells if c.note == note):
            rows.setdefault(c.column, []).append(c.row)
        said += "\n" + "; ".join(", ".join([column, *of]) for column, of in rows.items()) + f": {note}\n"
    return said


def _text(value: float | None, std: float | None, places: int, otherwise: str) -> str:
    """A number with its deviation, or what stands where there is none."""
    if value is None:
        return otherwise
    return f"{value:.{places}f}" + (f" ± {std:.{places}f}" if std is not None else "")


def _amount(details: dict[str, Any]) -> str:
    """Of how many images and which seeds a table is: "80 images of each data set, seeds 0 to 3. ", "" if unknown."""
    images, seeds, said = details.get("images") or {}, details.get("seeds"), []
    counts = images if isinstance(images, dict) else {"": images}
    if len(set(counts.values())) == 1:
        said = [counted(next(iter(counts.values())), "image") + " of each data set" * (len(counts) > 1)]
    elif counts:
        said = ["images: " + ", ".join(f"{number} of {source.partition(':')[0]}" for source, number in counts.items())]
    if seeds:
        run = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
        said.append("seed" + "s" * (len(seeds) > 1) + " "
                    + (f"{seeds[0]} to {seeds[-1]}" if run else ", ".join(map(str, seeds))))
    text = ", ".join(said)
    return f"{text[:1].upper()}{text[1:]}. " if text else ""
