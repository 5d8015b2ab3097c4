"""The report: everything an outputs folder holds on one page that opens from disk, and the executed notebooks beside
it.

``<outputs>/report/index.html`` needs no server, no network and no other file; its content security policy forbids them.
Every text from data (class names are whatever a user typed) is escaped. Nothing here raises because a notebook failed,
was interrupted or never ran: a report of nine notebooks is better than none.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, OVDiffError, ProfileError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.page.panel import read_panel
from ovdiff_lib.workbench.tables import claims as claims_of
from ovdiff_lib.workbench.tables.tables import Cell, read_record, read_table

FOLDER, PACKAGE = Path(__file__).parent, Path(__file__).parents[2]
NOTEBOOKS = PACKAGE.parent / "notebooks"
"""Where a checkout keeps the stripped notebooks; an installed package has none."""

STAMP = "another data set and other models than the paper’s; compare directions, not values."
METHOD = "OVDiff"
"""Row of the paper's Table 1 that is the method; rows that begin with it are its variants, all others rivals."""

LIBRARIES = ("ovdiff-lib", "torch", "diffusers", "transformers", "open_clip_torch", "numpy")


@dataclass(frozen=True)
class Run:
    """One notebook: the parameters it was called with (``given``) and all it ran with, ``seconds`` of wall time, its
    executed copy (None where there is none), and as ``problem`` a sentence, "" if all is well."""

    stem: str
    title: str
    given: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    finished: str = ""
    notebook: Path | None = None
    problem: str = ""


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
    problems, claims = [run.problem for run in runs.values() if run.problem], []
    try:
        claims = claims_of.judge(folder)
    except OVDiffError as error:
        problems.append(f"The claims could not be judged: {error}")
    tables = _each(lambda path: (path, read_table(path), read_record(path)),
                   [p for p in sorted((folder / "tables").glob("*.csv")) if p.stem != claims_of.NAME], problems)
    panels = _each(read_panel, sorted((folder / "explain").glob("*.json")), problems)
    parts = {stem: {"stem": stem, "title": run.title, "problem": hidden(run.problem, folder),
                    "time": duration(run.seconds),
                    "finished": run.finished, "page": "", "tables": [], "figures": []} for stem, run in runs.items()}
    parts[""] = {"stem": "others", "title": "Other tables and figures", "tables": [], "figures": []}
    for path, cells, record in tables:
        stem, details = _owner(path.stem, runs), record.get("details") or {}
        facts = [*_made(runs.get(stem), folder), ("profile", record.get("profile", "")), ("settings hash",
                                                                                          record.get("settings", ""))]
        facts += [(name, plain(value)) for name, value in details.items() if name != "volatile"]
        parts[stem]["tables"].append({
            "name": path.stem, "title": record.get("title") or path.stem, "caption": record.get("caption", ""),
            "facts": facts,
            "csv": base64.b64encode(path.read_bytes()).decode(), "volatile": details.get("volatile"),
            "view": table_view(cells, record.get("digits", 1))})
    for name, png, size, caption in _each(_figure, sorted((folder / "figures").glob("*.png")), problems):
        stem = _owner(name, runs)
        parts[stem]["figures"].append({"name": name, "png": png, "size": size, "caption": caption,
                                       "facts": _made(runs.get(stem), folder)})
    target, css, script = folder / "report", _own_file("page.css"), _own_file("page.js")
    for run in runs.values():
        if run.notebook is not None:
            try:
                body = _safe(notebook_body(run.notebook, lambda text: hidden(text, folder)))
                page = _template("notebook.html", run=run, profile=profile.name, css=css, body=body)
                write_atomic(target / "notebooks" / f"{run.stem}.html", page.encode())
                parts[run.stem]["page"] = f"notebooks/{run.stem}.html"
            except InputError as error:
                problems.append(str(error))
    for old in (target / "notebooks").glob("*.html"):
        if not parts.get(old.stem, {}).get("page"):
            old.unlink()  # of a notebook that is gone
    table = profile.to_dict()
    try:
        shipped = load_profile(profile.name).to_dict()
    except ProfileError:
        shipped = table  # no profile of that name ships
    page = _template(
        "page.html", profile=profile, digest=profile.digest(), versions=versions(), commit=git_commit(), css=css,
        script=script,
        settings=[(f"{section}.{name}", value, shipped[section][name])
                  for section, fields in table.items() if isinstance(fields, dict) for name, value in fields.items()],
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        stamp=f"{profile.name}: {STAMP}" if profile.models.diffusion.startswith("package:") else "",  # models stand in
        headline=headline([(path.stem, cells, record) for path, cells, record in tables]),
        claims=claims, verdicts=claims_of.counts(claims), legend=claims_of.LEGEND,
        problems=[hidden(problem, folder) for problem in problems],
        panels=[_safe(json.dumps(p, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
                for p in panels],
        parts=[part for stem, part in parts.items() if stem or part["tables"] or part["figures"]],
        runs=[(run, duration(run.seconds), command(run, folder)) for run in runs.values() if run.parameters],
        written=time.strftime("%Y-%m-%d %H:%M:%S"), total=duration(sum(run.seconds or 0 for run in runs.values())))
    write_atomic(target / "index.html", page.encode())
    return target / "index.html"


# ---------------------------------------------------------------------- what an outputs folder holds

def find_runs(folder: Path, sources: Path | None) -> list[Run]:
    """The notebooks that ran, or should have run, into an outputs folder, in order."""
    known = {p.stem: p for p in sorted(sources.glob("[0-9]*.ipynb"))} if sources else {}
    here = {p.name.split(".")[0] for pattern in ("[0-9]*.ipynb", "[0-9]*.stamp.json") for p in folder.glob(pattern)}
    return [_run(folder, stem, known.get(stem)) for stem in sorted({*known, *here})]


def _run(folder: Path, stem: str, source: Path | None) -> Run:
    executed, failed = folder / f"{stem}.ipynb", folder / f"{stem}.failed.ipynb"
    stamp, ran = _json(folder / f"{stem}.stamp.json"), _cells(executed)
    text = ("".join(c.get("source", "")) for c in ran or (_cells(source) if source else [])
            if c.get("cell_type") == "markdown")
    title = next((heading[1].strip() for heading in map(re.compile(r"#\s+(.+)").match, text) if heading), stem)
    problem = ""
    if failed.exists():
        errors = [o for c in _cells(failed) for o in c.get("outputs") or [] if o.get("output_type") == "error"]
        said = f"{errors[0].get('ename')}: {(str(errors[0].get('evalue')).splitlines() or [''])[0]}" if errors else ""
        problem = f"The last run of {stem} failed: {said}" if said else f"The last run of {stem} did not finish."
    elif executed.exists() and not ran:
        problem = f"The executed copy {executed.name} cannot be read as a notebook; run it again."
    elif not executed.exists():
        left = any(path for kind in ("tables", "figures") for path in (folder / kind).glob(f"{stem}*"))
        problem = f"The notebook {stem} has not been run in this folder" + ("; what it has here is of an earlier run."
                                                                            if left else ".")
    given = _json(stamp.get("parameters", "{}"))
    return Run(stem, title, given, _parameters(ran) | given, stamp.get("seconds"), str(stamp.get("finished", "")),
               executed if ran else None, problem)


def _parameters(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The literals of the cells tagged as parameters, those that papermill put in last."""
    found: dict[str, Any] = {}
    for cell in cells:
        if {"parameters", "injected-parameters"} & set(cell.get("metadata", {}).get("tags", [])):
            for statement in ast.parse("".join(cell.get("source", ""))).body:
                target = getattr(statement, "target", None) or statement.targets[0]
                # a notebook ran whose parameters are literals
                found[ast.unparse(target)] = ast.literal_eval(statement.value)
    return found


def _figure(path: Path) -> tuple[str, str, tuple[int, int], str]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            size = picture.size
        png = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        raise InputError(f"The figure {path.name} cannot be read; run its notebook again.") from None
    return path.stem, png, size, str(_json(path.with_suffix(".json")).get("caption", ""))


def _each(read: Callable[[Path], Any], paths: Sequence[Path], problems: list[str]) -> list[Any]:
    """What is read of each path; what cannot be read is a problem."""
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except InputError as error:
            problems.append(str(error).replace(str(path), path.name))
    return found


def _owner(name: str, stems: Sequence[str]) -> str:
    """The notebook that a table or figure is of, by the rule of names; "" if none."""
    return max((stem for stem in stems if name.startswith(stem)), key=len, default="")


def _cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook's file; [] where there is none or it is broken."""
    cells = _json(path).get("cells")
    return [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []


def _json(source: Path | str) -> dict[str, Any]:
    """A JSON table from a file or text; {} where there is none or it is broken."""
    try:
        table = json.loads(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


# ---------------------------------------------------------------------- where numbers come from

def versions() -> dict[str, str]:
    """Versions of Python and the libraries here, read without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(package: Path = PACKAGE) -> str:
    """The commit that the code in ``package`` is at, marked where files differ from it; "" where git does not know its
    files: outside a checkout, and in a package installed within someone else's."""
    def git(*arguments: str) -> str | None:
        try:
            # --no-optional-locks: reading must not write to the index while someone else commits.
            run = subprocess.run(["git", "--no-optional-locks", "-C", str(package), *arguments], capture_output=True,
                                 text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    return commit + (" with uncommitted changes" if git("status", "--porcelain", "--", ".") else "")


def command(run: Run, folder: Path) -> str:
    """The command line that makes a run's tables and figures again, to be given in the project's folder."""
    given = {name: value for name, value in run.given.items() if name not in ("profile", "overrides", "output")}
    profile = str(run.given.get("profile", folder.name))
    words = ["ovdiff", "run", f"notebooks/{run.stem}.ipynb", "--profile",
             os.path.relpath(profile) if os.path.isabs(profile) else profile]
    for option, values in (("--set", run.given.get("overrides") or {}), ("-p", given)):
        for name, value in values.items():
            words += [option, f"{name}={json.dumps(value, ensure_ascii=False)}"]
    parent = os.path.relpath(folder.parent)
    return shlex.join(words if parent == "outputs" else [*words, "--out", parent])


def hidden(text: str, folder: Path) -> str:
    """Text (or JSON) without the folders of this machine, since a report is sent to others: the outputs folder as
    notebooks write it, where Python keeps its packages, the checkout and the home folder by a name."""
    places = {folder.resolve(): f"../outputs/{folder.name}", Path(sysconfig.get_path("purelib")): "site-packages",
              PACKAGE.parent: "<project>", Path.home(): "~"}
    # inner folders before those that hold them
    for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):
        if len(place.parts) > 1:  # a home that is the root of the disk would take away every slash
            text = re.sub(re.escape(json.dumps(str(place))[1:-1]) + r"(?![\w.-])", lambda _, name=name: name, text)
    return text


def _made(run: Run | None, folder: Path) -> list[tuple[str, str]]:
    """Command and wall time of the notebook behind a table or figure, and when it was."""
    if run is None:
        return [("notebook", "unknown: the name begins with no notebook's")]
    seed = run.parameters.get("seeds", run.parameters.get("seed", "not recorded"))
    return [("command", command(run, folder)), ("wall time of the notebook", duration(run.seconds)),
            ("finished", run.finished or "unknown"), ("seed of the notebook", plain(seed))]


# ---------------------------------------------------------------------- numbers as the page shows them

def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number with a true minus sign; "" for None."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """"48 s", "3 min 12 s", "2 h 5 min"; "unknown" for None and 0."""
    if not seconds or seconds < 60:
        return f"{seconds:.3g} s" if seconds else "unknown"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """A parameter or detail as short text: lists with commas, tables as JSON."""
    if isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value):
        return ", ".join(map(plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table_view(cells: Sequence[Cell], digits: Any) -> dict[str, Any]:
    """A table for the template: ``columns`` (name, whether the paper has values beside it), and rows in two groups,
    ``measured`` and ``published``, which hold nothing but what the paper printed."""
    columns = list(dict.fromkeys(c.column for c in cells))
    compared = {column: any(c.printed for c in cells if c.column == column) for column in columns}
    places = digits if isinstance(digits, dict) else dict.fromkeys(columns, digits)
    view: dict[str, Any] = {"columns": [{"name": c, "compared": compared[c]} for c in columns], "measured": [],
                            "published": [],
                            "compared": any(compared.values()),
                            "width": 1 + sum(3 if compared[c] else 1 for c in columns)}
    for row in dict.fromkeys(c.row for c in cells):
        own = {c.column: c for c in cells if c.row == row}
        group = "published" if all(c.source == "published" for c in own.values()) else "measured"
        shown = [_cell(own.get(column), places.get(column, 1), compared[column]) for column in columns]
        view[group].append({"name": row, "cells": shown})
    return view


def _cell(cell: Cell | None, digits: int, compared: bool = True) -> dict[str, Any]:
    """What stands in a cell, as text: ``measured``, ``std``, ``runs``, ``printed`` (in the paper), ``difference``."""
    if cell is None:
        return {"compared": compared}
    paper, value = cell.paper, cell.paper.value if cell.paper else None
    return {"compared": compared, "predictions": cell.source == "predictions", "std": number(cell.std, digits),
            "measured": number(cell.measured, digits) or cell.idle or "not measured",
            "runs": f"n = {cell.n}" if cell.n > 1 else "",
            "values": ", ".join(number(v, digits) for v in cell.values[:20]),
            "printed": "" if not cell.printed else "not reported" if value is None else
            number(value, digits) + (f" ± {number(paper.std, digits)}" if paper.std is not None else ""),
            "difference": "" if None in (value, cell.measured) else number(cell.measured - value, digits, sign=True)}


def headline(tables: Sequence[tuple[str, list[Cell], dict[str, Any]]]) -> dict[str, Any] | None:
    """The measured part of the paper's Table 1, of the table that holds most of it, and for each column how the method
    stands to the best measured rival; None where nothing of it was measured."""
    found = [(name, record, [c for c in cells if c.paper and c.paper.table == "1" and c.measured is not None])
             for name, cells, record in tables]
    found = [(name, record, cells) for name, record, cells in found if any(c.paper.row == METHOD for c in cells)]
    if not found:
        return None
    name, record, cells = max(found, key=lambda part: len(part[2]))
    columns, rows, sentences = list(dict.fromkeys(c.column for c in cells)), [], []
    best = {column: max(c.measured for c in cells if c.column == column) for column in columns}
    for row in dict.fromkeys(c.row for c in cells):
        own = {c.column: c for c in cells if c.row == row}
        shown = [{**_cell(own[c], 1), "share": max(0.0, own[c].measured / (best[c] or 1))} if c in own else None
                 for c in columns]
        rows.append({"name": row, "method": next(iter(own.values())).paper.row.startswith(METHOD), "cells": shown})
    for column in columns:
        method = [c for c in cells if c.column == column and c.paper.row == METHOD]
        rivals = [c for c in cells if c.column == column and not c.paper.row.startswith(METHOD)]
        rival = max(rivals, key=lambda c: c.measured, default=None)
        against = "; no rival was measured."
        if rival:
            against = f", the best measured rival ({rival.row}) {number(rival.measured, 1)}."
        sentences += [f"{column}: {METHOD} {number(method[0].measured, 1)}{against}"] if method else []
    return {"table": name, "title": record.get("title") or name, "columns": columns, "rows": rows,
            "sentences": sentences}


# ---------------------------------------------------------------------- HTML

def _own_file(name: str):
    return _safe((FOLDER / name).read_text(encoding="utf-8"))


def _safe(text: str):
    """Text that a template must not escape: our own style and script, and data made safe before."""
    from markupsafe import Markup

    return Markup(text)


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
    # A notebook may be broken in as many ways as JSON can; nbformat, nbconvert and Jinja each have their own
    # exceptions.
    except Exception as error:
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

    class Exporter(nbconvert.HTMLExporter):
        def default_filters(self):
            yield from super().default_filters()
            yield "markdown2html", lambda source: MarkdownWithMath(Renderer(escape=True,
                                                                            exclude_anchor_links=True)).render(source)

    shown = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]
    settle = "nbconvert.preprocessors.CoalesceStreamsPreprocessor"  # progress bars as a terminal shows them in the end
    exporter = Exporter(config=Config({"NbConvertBase": {"display_data_priority": shown},
                                       "HTMLExporter": {"preprocessors": [settle]}}),
                        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.log = logging.getLogger(__name__)
    exporter.log.setLevel(logging.ERROR)  # it would warn of pictures without a description
    return exporter
