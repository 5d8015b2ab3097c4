"""The report: everything an outputs folder holds on one page that opens from disk, and the executed notebooks beside it.

``<outputs>/report/index.html`` needs no server, no network and no other file. Its content security policy forbids all three, and
every text from data (class names are whatever a user typed) is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.page.collect import Collected, Run, Table, collect, command, git_commit, hidden, settings, stands_in, versions
from ovdiff_lib.workbench.page.notebook_html import notebook_body
from ovdiff_lib.workbench.tables import claims as claims_of
from ovdiff_lib.workbench.tables.tables import Cell

FOLDER = Path(__file__).parent
NOTEBOOKS = FOLDER.parent.parent / "notebooks"
"""Where a checkout keeps the stripped notebooks; an installed package has none."""

STAMP = "another data set and other models than the paper’s; compare directions, not values."
OTHERS = "Other tables and figures"


def build_report(folder: str | Path, profile: Profile, notebooks: str | Path | None = NOTEBOOKS) -> Path:
    """Write ``folder``/report/index.html and ``folder``/report/notebooks/*.html; returns the page's path.

    ``folder`` is ``outputs/<profile>``: tables, figures, executed notebooks, explain panels. ``profile`` is the one it was made with.
    ``notebooks`` is the folder of the stripped notebooks, or None: those of them that have not run are named on the page. What is missing,
    failed or broken is a sentence on the page. Raises ``InputError`` if ``folder`` does not exist or cannot be written.
    """
    folder, sources = Path(folder), Path(notebooks) if notebooks is not None and Path(notebooks).is_dir() else None
    found = collect(folder, sources)
    problems = [run.problem for run in found.runs if run.problem] + list(found.problems)
    try:
        claims = claims_of.judge(folder)
    except OVDiffError as error:
        claims = []
        problems.append(f"The claims could not be judged: {error}")
    target = folder / "report"
    pages = _notebook_pages(found.runs, folder, target, profile, problems)
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    stamp = f"{profile.name}: {STAMP}" if stands_in(profile) else ""
    page = _environment().get_template("page.html").render(
        profile=profile, digest=profile.digest(), settings=settings(profile), versions=versions(), commit=git_commit(),
        css=_safe((FOLDER / "page.css").read_text(encoding="utf-8")), script=_safe(script), script_hash=_hash(script), stamp=stamp,
        headline=headline(found.tables), claims=claims, verdicts=claims_of.counts(claims), legend=claims_of.LEGEND,
        problems=[hidden(problem, folder) for problem in problems],
        panels=[_safe(json.dumps(panel, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")) for panel in found.panels],
        parts=_parts(found, folder, pages), runs=[_run_row(run, folder) for run in found.runs if run.parameters],
        written=time.strftime("%Y-%m-%d %H:%M:%S"), total=_total(found.runs), seeds=_seeds(found), packages=_packages(found.runs),
        kernels=", ".join(sorted({run.python for run in found.runs if run.python})))
    write_atomic(target / "index.html", page.encode())
    return target / "index.html"


def _environment():
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = plain
    return environment


def _safe(text: str):
    """Text that the template must not escape: our own style and script, and data made safe before."""
    from markupsafe import Markup

    return Markup(text)


def _hash(script: str) -> str:
    """The source expression by which the content security policy knows our script, and refuses every other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _notebook_pages(runs: tuple[Run, ...], folder: Path, target: Path, profile: Profile, problems: list[str]) -> dict[str, str]:
    """Write a page of every executed notebook; its address relative to the report by stem. Pages of notebooks that are gone go too."""
    pages: dict[str, str] = {}
    css = _safe((FOLDER / "page.css").read_text(encoding="utf-8"))
    for run in runs:
        if run.notebook is None:
            continue
        try:
            body = notebook_body(run.notebook, lambda text: hidden(text, folder))
        except InputError as error:
            problems.append(str(error))
            continue
        page = _environment().get_template("notebook.html").render(
            title=run.title, stem=run.stem, finished=run.finished, profile=profile.name, css=css, body=_safe(body))
        write_atomic(target / "notebooks" / f"{run.stem}.html", page.encode())
        pages[run.stem] = f"notebooks/{run.stem}.html"
    for old in (target / "notebooks").glob("*.html"):
        if old.stem not in pages:
            old.unlink()
    return pages


def _parts(found: Collected, folder: Path, pages: dict[str, str]) -> list[dict[str, Any]]:
    """The sections of the page: one a notebook, and one for tables and figures that no notebook is known for."""
    runs = {run.stem: run for run in found.runs}
    parts = {stem: {"stem": stem, "title": run.title, "problem": hidden(run.problem, folder), "page": pages.get(stem),
                    "time": duration(run.seconds), "finished": run.finished, "tables": [], "figures": []} for stem, run in runs.items()}
    parts[""] = {"stem": "others", "title": OTHERS, "problem": "", "page": None, "tables": [], "figures": []}
    for table in found.tables:
        owner, record = found.owner(table.name), table.record
        view, details = table_view(table), record["details"]
        facts = [*_made(runs.get(owner), folder, details), ("profile", str(record.get("profile", ""))),
                 ("settings hash", str(record.get("settings", "")))]
        facts += [(str(name), plain(value)) for name, value in details.items() if name not in ("seeds", "volatile")]
        parts[owner]["tables"].append({
            "name": table.name, "title": record.get("title") or table.name, "caption": record.get("caption", ""), "view": view,
            "width": 1 + sum(3 if column["compared"] else 1 for column in view["columns"]), "volatile": _volatile(details.get("volatile")),
            "csv": base64.b64encode(table.csv).decode(), "facts": [fact for fact in facts if fact[1]]})
    for figure in found.figures:
        owner = found.owner(figure.name)
        parts[owner]["figures"].append({"name": figure.name, "png": base64.b64encode(figure.png).decode(), "size": figure.size,
                                        "caption": figure.caption, "facts": _made(runs.get(owner), folder, {})})
    return [part for stem, part in parts.items() if stem or part["tables"] or part["figures"]]


def _made(run: Run | None, folder: Path, details: dict[str, Any]) -> list[tuple[str, str]]:
    """Command, wall time, seeds of the notebook behind a table or figure."""
    if run is None:
        return [("notebook", "unknown: the name begins with no notebook's")]
    seeds = details.get("seeds", run.parameters.get("seeds", run.parameters.get("seed")))
    wall = [("wall time of the notebook", duration(run.seconds))] if run.seconds is not None else []
    finished = [("finished", run.finished)] if run.finished else []
    return [("command", command(run, folder)), *wall, *finished, *([("seeds", plain(seeds))] if seeds is not None else [])]


def _volatile(columns: Any) -> str:
    """What a table's record says of numbers that no two runs share (times): all of them, those of some columns, or none."""
    return f"{plain(columns)}: these vary from run to run." if isinstance(columns, list) else \
        "These numbers vary from run to run." if columns else ""


def _run_row(run: Run, folder: Path) -> dict[str, str]:
    shown = {name: value for name, value in run.parameters.items() if name not in ("output", "profile")}
    return {"stem": run.stem, "time": duration(run.seconds), "finished": run.finished, "command": command(run, folder),
            "parameters": "; ".join(f"{name} = {plain(value)}" for name, value in shown.items())}


def _seeds(found: Collected) -> str:
    """Every seed that some table or notebook names."""
    named = [t.record["details"].get("seeds") for t in found.tables]
    named += [value for run in found.runs for value in (run.parameters.get("seed"), run.parameters.get("seeds"))]
    flat = {seed for value in named for seed in (value if isinstance(value, list) else [value]) if isinstance(seed, int)}
    return ", ".join(map(str, sorted(flat)))


def _total(runs: tuple[Run, ...]) -> str:
    times = [run.seconds for run in runs if run.seconds is not None]
    return f"{duration(sum(times))} ({len(times)} notebook{'s' * (len(times) > 1)})" if times else "unknown"


def _packages(runs: tuple[Run, ...]) -> str:
    """Whether all notebooks ran on the same code and data, by the sums that the runner noted."""
    sums: dict[str, list[str]] = {}
    for run in runs:
        if run.package:
            sums.setdefault(run.package[:12], []).append(run.stem)
    if len(sums) == 1:
        return f"{next(iter(sums))}, the same for all"
    return "; ".join(f"{digest}: {', '.join(stems)}" for digest, stems in sums.items())


# ------------------------------------------------------------------ Numbers as the page shows them: tables with the paper's value and the difference to it, and the main comparison.

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
