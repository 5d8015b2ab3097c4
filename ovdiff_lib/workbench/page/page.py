"""The report: everything an outputs folder holds on one page that opens from disk, and the executed notebooks beside
it.

``<outputs>/report/index.html`` needs no server, no network and no other file; its content security policy forbids them.
Every text from data (class names are whatever a user typed) is escaped. Nothing here raises because a notebook failed,
was interrupted or never ran: a report of nine notebooks is better than none.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ovdiff_lib.errors import InputError, OVDiffError, ProfileError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.keys import PACKAGE
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.page.panel import read_panel
from ovdiff_lib.workbench.page.runs import Run, duration, find_runs, git_commit, hidden, plain, versions
from ovdiff_lib.workbench.reproduce import read_json
from ovdiff_lib.workbench.tables import claims as claims_of
from ovdiff_lib.workbench.tables.tables import Cell, read_record, read_table

FOLDER, NOTEBOOKS = Path(__file__).parent, PACKAGE.parent / "notebooks"
"""The templates; and where a checkout keeps the stripped notebooks (an installed package has none)."""

STAMP = "another data set and other models than the paper’s; compare directions, not values."
METHOD = "OVDiff"
"""Row of the paper's Table 1 that is the method; rows that begin with it are its variants, all others rivals."""


def build_report(folder: str | Path, profile: Profile, notebooks: str | Path | None = NOTEBOOKS) -> Path:
    """Write ``folder``/report/index.html and ``folder``/report/notebooks/*.html; returns the page's path.

    ``folder`` is ``outputs/<profile>``: tables, figures, executed notebooks, explain panels. ``profile`` is the one it
    was made with. ``notebooks`` is the folder of the stripped notebooks, or None: those that have not run are named on
    the page. What is missing, failed or broken is a sentence there. Raises ``InputError`` if ``folder`` does not exist
    or cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist; run the notebooks first (ovdiff reproduce), or name "
                         "another with --out.")
    runs = {run.stem: run for run in find_runs(folder, Path(notebooks) if notebooks else None)}
    others = Run("others", "Other tables and figures")
    problems, claims = [run.problem for run in runs.values() if run.problem], []
    try:
        claims = claims_of.judge(folder)
    except OVDiffError as error:
        problems.append(f"The claims could not be judged: {error}")

    def read(kind: str, pattern: str, reader: Callable[[Path], Any]) -> list[Any]:
        """What is read of each file; what cannot be read is a problem."""
        found = []
        for path in sorted((folder / kind).glob(pattern)):
            try:
                found += [reader(path)] if path.stem != claims_of.NAME else []
            except InputError as error:
                problems.append(str(error).replace(str(path), path.name))
        return found

    def owner(name: str) -> Run:
        """The notebook that a table or figure is of, by the rule of names."""
        return runs.get(max((stem for stem in runs if name.startswith(stem)), key=len, default=""), others)

    tables = read("tables", "*.csv", lambda path: (path, read_table(path), read_record(path)))
    panels = read("explain", "*.json", read_panel)
    for path, cells, record in tables:
        owner(path.stem).tables.append(_table(path, cells, record))
    for figure in read("figures", "*.png", _figure):
        owner(figure["name"]).figures.append(figure)
    target = folder / "report"
    # What a template must not escape: our own style and script, and data made safe before.
    css, script = (Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    for run in (run for run in runs.values() if run.notebook):
        try:
            body = Markup(notebook_body(run.notebook, lambda text: hidden(text, folder)))
            page = _template("notebook.html", run=run, profile=profile.name, css=css, body=body)
            write_atomic(target / "notebooks" / f"{run.stem}.html", page.encode())
            run.page = f"notebooks/{run.stem}.html"
        except InputError as error:
            problems.append(str(error))
    for old in (target / "notebooks").glob("*.html"):
        if not (old.stem in runs and runs[old.stem].page):
            old.unlink()  # of a notebook that is gone
    settings = shipped = profile.to_dict()
    with contextlib.suppress(ProfileError):  # no profile of that name ships
        shipped = load_profile(profile.name).to_dict()
    page = _template(
        "page.html", profile=profile, digest=profile.digest(), versions=versions(), commit=git_commit(), css=css,
        script=script, headline=headline([(path.stem, cells, record) for path, cells, record in tables]),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        settings=[(f"{section}.{name}", value, shipped[section][name]) for section, fields in settings.items()
                  if isinstance(fields, dict) for name, value in fields.items()],
        stamp=f"{profile.name}: {STAMP}" if profile.models.diffusion.startswith("package:") else "",  # models stand in
        claims=claims, verdicts=claims_of.counts(claims), legend=claims_of.LEGEND,
        problems=problems, hide=lambda text: hidden(text, folder),
        panels=[Markup(json.dumps(p, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
                for p in panels],
        parts=[*runs.values(), *([others] if others.tables or others.figures else [])],
        written=time.strftime("%Y-%m-%d %H:%M:%S"), total=duration(sum(run.seconds or 0 for run in runs.values())))
    write_atomic(target / "index.html", page.encode())
    return target / "index.html"


def _figure(path: Path) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            size = picture.size
        png = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        raise InputError(f"The figure {path.name} cannot be read; run its notebook again.") from None
    return {"name": path.stem, "png": png, "size": size, "caption": read_json(path.with_suffix(".json")).get("caption")}


def _table(path: Path, cells: Sequence[Cell], record: dict[str, Any]) -> dict[str, Any]:
    details = record.get("details") or {}
    facts = [("profile", record.get("profile", "")), ("settings hash", record.get("settings", ""))]
    facts += [(name, plain(value)) for name, value in details.items() if name != "volatile"]
    return {"name": path.stem, "title": record.get("title") or path.stem, "caption": record.get("caption", ""),
            "facts": facts, "csv": base64.b64encode(path.read_bytes()).decode(), "volatile": details.get("volatile"),
            "view": table_view(cells, record.get("digits", 1))}


# ---------------------------------------------------------------------- numbers as the page shows them

def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number with a true minus sign; "" for None."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def table_view(cells: Sequence[Cell], digits: Any) -> dict[str, Any]:
    """A table for the template: ``columns`` (name, whether the paper has values beside it), and rows in two groups,
    ``measured`` and ``published``, which hold nothing but what the paper printed."""
    columns = {column: any(c.printed for c in cells if c.column == column)
               for column in dict.fromkeys(c.column for c in cells)}
    places = digits if isinstance(digits, dict) else dict.fromkeys(columns, digits)
    view = {"columns": columns, "compared": any(columns.values()), "measured": [], "published": [],
            "width": 1 + len(columns) + 2 * sum(columns.values())}
    for row in dict.fromkeys(c.row for c in cells):
        own = {c.column: c for c in cells if c.row == row}
        group = "published" if all(c.source == "published" for c in own.values()) else "measured"
        shown = [{"compared": compared, **_cell(own.get(column), places.get(column, 1))}
                 for column, compared in columns.items()]
        view[group].append({"name": row, "cells": shown})
    return view


def _cell(cell: Cell | None, digits: int) -> dict[str, Any]:
    """What stands in a cell, as text: ``measured``, ``std``, ``runs``, ``printed`` (in the paper), ``difference``."""
    if cell is None:
        return {}
    paper, value = cell.paper, cell.paper.value if cell.paper else None
    printed = number(value, digits) + (f" ± {number(paper.std, digits)}" if value is not None and paper.std is not None
                                       else "")
    return {"std": number(cell.std, digits),
            "measured": number(cell.measured, digits) or cell.idle or "not measured",
            "runs": f"n = {cell.n}" if cell.n > 1 else "",
            "single": ", ".join(number(v, digits) for v in cell.values[:20]),
            "printed": (printed or "not reported") if cell.printed else "",
            "difference": "" if None in (value, cell.measured) else number(cell.measured - value, digits, sign=True)}


def headline(tables: Sequence[tuple[str, list[Cell], dict[str, Any]]]) -> dict[str, Any] | None:
    """The measured part of the paper's Table 1, of the table that holds most of it, and for each column how the method
    stands to the best measured rival; None where nothing of it was measured."""
    found = [(name, record, [c for c in cells if c.paper and c.paper.table == "1" and c.measured is not None])
             for name, cells, record in tables]
    found = [part for part in found if any(c.paper.row == METHOD for c in part[2])]
    if not found:
        return None
    name, record, cells = max(found, key=lambda part: len(part[2]))
    best = {column: max(c.measured for c in cells if c.column == column)
            for column in dict.fromkeys(c.column for c in cells)}
    rows, sentences = [], []
    for row in dict.fromkeys(c.row for c in cells):
        own = {c.column: c for c in cells if c.row == row}
        shown = [{**_cell(own[c], 1), "share": max(0.0, own[c].measured / (best[c] or 1))} if c in own else None
                 for c in best]
        rows.append({"name": row, "method": next(iter(own.values())).paper.row.startswith(METHOD), "cells": shown})
    for method in (c for c in cells if c.paper.row == METHOD):
        rivals = [c for c in cells if c.column == method.column and not c.paper.row.startswith(METHOD)]
        against = "; no rival was measured."
        if rival := max(rivals, key=lambda c: c.measured, default=None):
            against = f", the best measured rival ({rival.row}) {number(rival.measured, 1)}."
        sentences.append(f"{method.column}: {METHOD} {number(method.measured, 1)}{against}")
    return {"table": name, "title": record.get("title") or name, "columns": list(best), "rows": rows,
            "sentences": sentences}


# ---------------------------------------------------------------------- HTML

def _template(name: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = plain
    return environment.get_template(name).render(**values)


def notebook_body(path: Path, hide: Callable[[str], str] = str) -> str:
    """The cells of an executed notebook as HTML; ``InputError`` for a file that is no notebook.

    ``hide`` changes the file's text before it is read. Only nbconvert's cells are taken, not its page, which loads
    scripts from a content delivery network; scripts that a cell put out are left to the page's policy, which forbids
    them.
    """
    import nbformat

    try:
        return _exporter().from_notebook_node(nbformat.reads(hide(path.read_text(encoding="utf-8")), 4))[0]
    except Exception as error:  # there are as many ways to be broken as JSON has, and three libraries' exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The executed notebook {path.name} cannot be shown ({reason}); run it again.") from None


@functools.cache
def _exporter():
    import nbconvert
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from traitlets.config import Config

    class Renderer(IPythonRenderer):
        """Formulas become MathML; raw HTML, which a class name in a table could be, stays text."""

        def block_math(self, body: str) -> str:
            return convert(body, display="block")

        def inline_math(self, body: str) -> str:
            return convert(body)

    def html(source: str) -> str:
        return MarkdownWithMath(Renderer(escape=True, exclude_anchor_links=True)).render(source)

    shown = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]
    settle = "nbconvert.preprocessors.CoalesceStreamsPreprocessor"  # progress bars as a terminal shows them in the end
    exporter = nbconvert.HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": shown}, "HTMLExporter": {"preprocessors": [settle]}}),
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, filters={"markdown2html": html})
    exporter.log = logging.getLogger(__name__)
    exporter.log.setLevel(logging.ERROR)  # it would warn of pictures without a description
    return exporter
