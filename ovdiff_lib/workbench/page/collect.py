"""What an outputs folder holds: runs of notebooks, their tables, figures and panels; and what is missing, one sentence each.

Nothing here raises because a notebook failed, was interrupted or never ran: a report of nine notebooks is better than none.
"""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sysconfig
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.page.panel import read_panel
from ovdiff_lib.workbench.tables.claims import NAME as CLAIMS
from ovdiff_lib.workbench.tables.tables import Cell, read_record, read_table


@dataclass(frozen=True)
class Run:
    """One notebook: what it was run with and how that went.

    ``given`` are the parameters it was called with, ``parameters`` all that it ran with; ``seconds`` wall time, ``finished`` local time,
    ``package`` the sum of the code and data it ran on ("" where unknown); ``notebook`` its executed copy, None where there is none;
    ``problem`` a sentence, "" if all is well.
    """

    stem: str
    title: str
    given: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    finished: str = ""
    package: str = ""
    python: str = ""
    notebook: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """One table: its cells (``Cell``), its record (title, caption, digits, profile, settings, details) and its CSV as written."""

    name: str
    cells: tuple[Cell, ...]
    record: dict[str, Any]
    csv: bytes

    def digits(self, column: str) -> int:
        """Decimals shown in a column."""
        digits = self.record.get("digits", 1)
        digits = digits.get(column, 1) if isinstance(digits, dict) else digits
        return digits if isinstance(digits, int) and 0 <= digits <= 9 else 1


@dataclass(frozen=True)
class Figure:
    """One figure: PNG bytes, size (width, height) in pixels, caption."""

    name: str
    png: bytes
    size: tuple[int, int]
    caption: str


@dataclass(frozen=True)
class Collected:
    """All of it. ``owner`` says by name which run a table or figure belongs to ("" where no notebook is known)."""

    runs: tuple[Run, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    panels: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]

    def owner(self, name: str) -> str:
        """The run whose stem the name starts with, by the rule of names; the longest if several."""
        return max((run.stem for run in self.runs if name.startswith(run.stem)), key=len, default="")


def collect(folder: Path, sources: Path | None = None) -> Collected:
    """Read an outputs folder. ``sources`` is the folder of the stripped notebooks: those of them that have not run are named.

    Raises ``InputError`` if ``folder`` does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist; run the notebooks first (ovdiff reproduce), or name another with --out.")
    problems: list[str] = []
    known = sorted(sources.glob("[0-9]*.ipynb")) if sources else []
    stems = {p.stem for p in known} | {p.name.split(".")[0] for p in [*folder.glob("[0-9]*.ipynb"), *folder.glob("[0-9]*.stamp.json")]}
    by_stem = {p.stem: p for p in known}
    runs = tuple(_run(folder, stem, by_stem.get(stem)) for stem in sorted(stems))
    tables = tuple(_each(_table, [p for p in sorted((folder / "tables").glob("*.csv")) if p.stem != CLAIMS], problems))
    figures = tuple(_each(_figure, sorted((folder / "figures").glob("*.png")), problems))
    panels = tuple(_each(read_panel, sorted((folder / "explain").glob("*.json")), problems))
    return Collected(runs, tables, figures, panels, tuple(problems))


def command(run: Run, folder: Path) -> str:
    """The command line that makes a run's tables and figures again, to be given in the project's folder."""
    given = dict(run.given)
    profile, overrides = str(given.pop("profile", folder.name)), given.pop("overrides", {}) or {}
    given.pop("output", None)
    if os.path.isabs(profile):
        profile = os.path.relpath(profile)
    words = ["ovdiff", "run", f"notebooks/{run.stem}.ipynb", "--profile", profile]
    for option, values in (("--set", overrides), ("-p", given)):
        for name, value in values.items():
            words += [option, f"{name}={json.dumps(value, ensure_ascii=False)}"]
    parent = os.path.relpath(folder.parent)
    return shlex.join(words if parent == "outputs" else [*words, "--out", parent])


def _each(read, paths: list[Path], problems: list[str]):
    for path in paths:
        try:
            yield read(path)
        except InputError as error:
            problems.append(str(error).replace(str(path), path.name))


def _table(path: Path) -> Table:
    record = read_record(path)
    return Table(path.stem, tuple(read_table(path)), record | {"details": _table_of(record, "details")}, path.read_bytes())


def _figure(path: Path) -> Figure:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            size = picture.size
        png = path.read_bytes()
    except OSError:
        raise InputError(f"The figure {path.name} cannot be read; run its notebook again.") from None
    return Figure(path.stem, png, size, str(_json(path.with_suffix(".json")).get("caption", "")))


def _run(folder: Path, stem: str, source: Path | None) -> Run:
    executed, failed = folder / f"{stem}.ipynb", folder / f"{stem}.failed.ipynb"
    stamp, notebook = _json(folder / f"{stem}.stamp.json"), _json(executed)
    whole = isinstance(notebook.get("cells"), list)
    papermill = _table_of(_table_of(notebook, "metadata"), "papermill")
    title = _title(notebook) or (_title(_json(source)) if source else "") or stem
    problem = ""
    if failed.exists():
        problem = _failure(stem, _json(failed))
    elif executed.exists() and not whole:
        problem = f"The executed copy {executed.name} cannot be read as a notebook; run it again."
    elif not executed.exists():
        problem = f"The notebook {stem} has not been run in this folder."
        if any(p.name.startswith(stem) for kind in ("tables", "figures") for p in (folder / kind).glob("*")):
            problem = f"No executed copy of {stem} is in this folder; the tables and figures below come from an earlier run of it."
    given, seconds = _parsed(stamp.get("parameters")) or _table_of(papermill, "parameters"), stamp.get("seconds", papermill.get("duration"))
    seconds = float(seconds) if isinstance(seconds, (int, float)) and math.isfinite(seconds) else None
    python = str(_table_of(_table_of(notebook, "metadata"), "language_info").get("version", ""))
    return Run(stem, title, given, _parameters(notebook) | given, seconds, str(stamp.get("finished", "")), str(stamp.get("package", "")),
               python, executed if whole else None, problem)


def _failure(stem: str, notebook: dict[str, Any]) -> str:
    """What stopped a run whose copy was left as ``*.failed.ipynb``."""
    for cell in _cells(notebook):
        for output in cell.get("outputs") or []:
            if output.get("output_type") == "error":
                reason = (str(output.get("evalue", "")).strip().splitlines() or ["no message"])[0]
                return f"The last run of {stem} failed: {output.get('ename', 'Error')}: {reason}"
    return f"The last run of {stem} did not finish: it was interrupted, or is going on."


def _parameters(notebook: dict[str, Any]) -> dict[str, Any]:
    """The literals of the cells tagged as parameters, those that papermill put in last."""
    found: dict[str, Any] = {}
    for cell in _cells(notebook):
        if {"parameters", "injected-parameters"} & set(cell.get("metadata", {}).get("tags", [])):
            try:
                for statement in ast.parse("".join(cell["source"])).body:
                    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                        found[statement.targets[0].id] = ast.literal_eval(statement.value)
            except (SyntaxError, ValueError, KeyError, TypeError):
                continue  # what is not a literal is not a parameter that could be shown
    return found


def _title(notebook: dict[str, Any]) -> str:
    for cell in _cells(notebook):
        heading = re.match(r"#\s+(.+)", "".join(cell.get("source", "")))
        if cell.get("cell_type") == "markdown" and heading:
            return heading[1].strip()
    return ""


def _cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    cells = notebook.get("cells")
    return [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []


def _json(path: Path) -> dict[str, Any]:
    """A JSON table from a file; {} where there is none or it is broken."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parsed(text: Any) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return table if isinstance(table, dict) else {}


def _table_of(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key)
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------ Where numbers come from: versions of the libraries, the git commit of the code, the settings of the profile.

PACKAGE = Path(__file__).parents[2]

LIBRARIES = {"ovdiff_lib": "ovdiff-lib", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers",
             "open_clip": "open_clip_torch", "numpy": "numpy"}
"""Shown name -> the distribution's."""


def versions() -> dict[str, str]:
    """Versions of Python and the libraries here, read without importing them; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for name, distribution in LIBRARIES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(package: Path = PACKAGE) -> str:
    """The commit that the code in ``package`` is at, marked where files differ from it; "" outside a checkout or without git.

    A package installed into someone else's checkout (a virtual environment within a project) is not that project's: git must know its
    files.
    """
    def git(*arguments: str) -> str | None:
        try:
            # --no-optional-locks: reading must not write to the index while someone else commits.
            run = subprocess.run(["git", "--no-optional-locks", "-C", str(package), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    return commit + (" with uncommitted changes" if git("status", "--porcelain", "--", ".") else "")


def hidden(text: str, folder: Path) -> str:
    """Text without the folders of this machine, since a report is sent to others: the outputs folder as notebooks write it, where Python
    keeps its packages, the checkout and the home folder by a name. ``text`` may be JSON."""
    places = {folder.resolve(): f"../outputs/{folder.name}", Path(sysconfig.get_path("purelib")): "site-packages",
              PACKAGE.parent: "<project>", Path.home(): "~"}
    for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):  # inner folders before those that hold them
        if len(place.parts) > 1:  # a home that is the root of the disk would take away every slash
            text = re.sub(re.escape(json.dumps(str(place))[1:-1]) + r"(?![\w.-])", lambda _, name=name: name, text)
    return text


def settings(profile: Profile) -> list[tuple[str, Any, Any]]:
    """Every field of the profile as (section.field, value, shipped value): the last differs from the value where it was overridden, and
    equals it where no profile of that name ships."""
    table = profile.to_dict()
    try:
        shipped = load_profile(profile.name).to_dict()
    except ProfileError:
        shipped = table
    return [(f"{section}.{name}", value, shipped[section][name])
            for section, fields in table.items() if isinstance(fields, dict) for name, value in fields.items()]


def stands_in(profile: Profile) -> bool:
    """Whether the profile runs models that ship with the package instead of the paper's, so that its numbers are not the paper's."""
    return profile.models.diffusion.startswith("package:")
