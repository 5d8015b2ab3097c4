"""The report: all that an outputs folder holds on one page that opens from disk, and the executed notebooks beside it.

``<outputs>/report/index.html`` needs no server, no network and no other file; its content security policy forbids them.
Every text from data (class names are whatever a user typed) is escaped. Nothing here raises because a notebook failed,
was interrupted or never ran: a report of nine notebooks is better than none.
"""

import hashlib
import json
import logging
import re
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial, partialmethod
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbconvert
import nbformat
import yaml
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

from ovdiff_lib.code import PACKAGE
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.page.panel import base64_of, read_panel
from ovdiff_lib.workbench.reproduce import cells_of, read_json
from ovdiff_lib.workbench.tables import claims as claims_of
from ovdiff_lib.workbench.tables.tables import read_record

FOLDER = Path(__file__).parent
STAMP = "another data set and other models than the paper’s; compare directions, not values."


@dataclass
class Executed:
    """One notebook as it ran, and its tables and figures, which the report adds."""

    stem: str
    title: str
    notebook: Path | None = None  # its executed copy
    time: str = ""  # of the wall
    finished: str = ""
    problem: str = ""  # a sentence, "" if all is well
    page: str = ""  # its address
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)


def _run(folder: Path, stem: str, source: Path) -> Executed:
    """The notebook ``stem``, which ran, or should have run, into an outputs folder."""
    executed, failed = folder / f"{stem}.ipynb", folder / f"{stem}.failed.ipynb"
    stamp, ran = read_json(folder / f"{stem}.stamp.json"), cells_of(executed)
    texts = ("".join(c.get("source", "")) for c in ran or cells_of(source) if c.get("cell_type") == "markdown")
    title = next((found[1].strip() for text in texts if (found := re.match(r"#\s+(.+)", text))), stem)
    problem = ""
    if failed.exists():
        problem = f"The last run of {stem} failed; its error stands in {failed.name}."
    elif executed.exists() and not ran:
        problem = f"The executed copy {executed.name} cannot be read as a notebook; run it again."
    elif not executed.exists():
        problem = f"The notebook {stem} has not been run in this folder; what is here of it is of an earlier run."
    took = str(timedelta(seconds=round(stamp["seconds"]))) if "seconds" in stamp else "unknown"
    return Executed(stem, title, executed if ran else None, took, stamp.get("finished", ""), problem)


def hidden(text: str, folder: Path) -> str:
    """Text (or JSON) with names in place of this machine's folders, since a report is sent to others."""
    places = {folder.resolve(): f"../outputs/{folder.name}", Path(sysconfig.get_path("purelib")): "site-packages",
              PACKAGE.parent: "<project>", Path.home(): "~"}
    # Inner folders before those that hold them.
    for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):
        if len(place.parts) > 1:  # a home that is the root of the disk would take away every slash
            text = re.sub(re.escape(json.dumps(str(place))[1:-1]) + r"(?![\w.-])", lambda _, name=name: name, text)
    return text


def build_report(folder: Path, profile: Profile, notebooks: Path) -> Path:
    """Write ``folder``/report/index.html and ``folder``/report/notebooks/*.html; returns the page's path.

    ``folder`` is ``outputs/<profile>``; ``notebooks`` that of the stripped notebooks, of which those that have not run
    are named. What is missing, failed or broken is a sentence on the page. ``InputError`` if ``folder`` is not usable.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; run `ovdiff reproduce` first, or name another with --out.")
    stems = {path.name.split(".")[0] for place in (folder, notebooks) for path in place.glob("[0-9]*.ipynb")}
    runs = {stem: _run(folder, stem, notebooks / f"{stem}.ipynb") for stem in sorted(stems)}
    problems = [run.problem for run in runs.values() if run.problem]
    others = Executed("others", "Other tables and figures")

    def read(reader: Callable[[Path], Any], *paths: Path) -> list[Any]:
        """What is read of each path; what cannot be read is a problem."""
        found = []
        for path in paths:
            try:
                found.append(reader(path))
            except OVDiffError as error:
                problems.append(hidden(str(error), folder))
        return found

    def owner(name: str) -> Executed:
        """The notebook that a table or figure is of, by the rule of names."""
        return runs.get(max((stem for stem in runs if name.startswith(stem)), key=len, default=""), others)

    for table in read(_table, *sorted({*folder.glob("tables/*.csv")} - {folder / "tables" / f"{claims_of.NAME}.csv"})):
        owner(table["name"]).tables.append(table)
    for path in sorted(folder.glob("figures/*.png")):
        caption = read_json(path.with_suffix(".json")).get("caption", "This figure has no caption.")
        owner(path.stem).figures.append({"name": path.stem, "png": base64_of(path.read_bytes()), "caption": caption})
    judged = read(claims_of.judge, folder)
    # What a template must not escape: our own style and script, and HTML made of Markdown, which is safe.
    css, script = (Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    target = folder / "report"
    shutil.rmtree(target / "notebooks", ignore_errors=True)
    for run in (run for run in runs.values() if run.notebook):
        for body in read(partial(notebook_body, folder), run.notebook):
            run.page = f"notebooks/{run.stem}.html"
            page = _template("notebook.html", run=run, profile=profile.name, css=css, body=body)
            write_atomic(target / run.page, page.encode())
    page = _template(
        "page.html", profile=profile, css=css, script=script,
        script_hash=f"sha256-{base64_of(hashlib.sha256(script.encode()).digest())}",
        stamp=f"{profile.name}: {STAMP}" if profile.models.diffusion.startswith("package:") else "",  # models stand in
        claims=judged[0] if judged else [], counts=claims_of.counts, legend=claims_of.LEGEND,
        panels=read(read_panel, *sorted(folder.glob("explain/*.json"))), problems=list(dict.fromkeys(problems)),
        parts=[*runs.values(), *([others] if others.tables or others.figures else [])],
        facts={"settings hash": profile.digest(), "page written": time.strftime("%Y-%m-%d %H:%M:%S"),
               **{name: version(name) for name in ("ovdiff-lib", "torch", "diffusers", "transformers")}},
        settings=yaml.safe_dump(profile.to_dict(), sort_keys=False, allow_unicode=True))
    write_atomic(target / "index.html", page.encode())
    return target / "index.html"


def _table(path: Path) -> dict[str, Any]:
    """A table as its notebook showed it, its numbers to be downloaded, and which of them vary from run to run."""
    record = read_record(path)
    try:
        shown = html_of(path.with_suffix(".md").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"The table {path.name} has no Markdown beside it; run its notebook again.") from None
    return {"name": path.stem, "title": record.get("title") or path.stem, "shown": shown,
            "csv": base64_of(path.read_bytes()), "volatile": record.get("details", {}).get("volatile")}


def _template(name: str, **values: Any) -> str:
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name).render(**values)


class _Renderer(IPythonRenderer):
    """Formulas become MathML; raw HTML, which a class name in a table could be, stays text."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        try:
            return convert(body, display=display)
        except Exception:  # latex2mathml's have nothing in common
            return escape(f"${body}$")

    block_math = partialmethod(inline_math, display="block")


def html_of(markdown: str) -> Markup:
    """Markdown as HTML."""
    return Markup(MarkdownWithMath(_Renderer(escape=True, exclude_anchor_links=True)).render(markdown))


def notebook_body(folder: Path, path: Path) -> Markup:
    """The cells of an executed notebook as HTML, without nbconvert's page, which loads scripts from
    the net; those that a cell put out are forbidden by the page's policy. ``InputError`` for what is no notebook."""
    try:
        notebook = nbformat.reads(hidden(path.read_text(encoding="utf-8"), folder), 4)
        return Markup(_exporter().from_notebook_node(notebook)[0])
    except Exception as error:  # there are as many ways to be broken as JSON has, and three libraries' exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The executed notebook {path.name} cannot be shown ({reason}); run it again.") from None


@cache
def _exporter() -> nbconvert.HTMLExporter:
    shown = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]
    settle = "nbconvert.preprocessors.CoalesceStreamsPreprocessor"  # progress bars as a terminal shows them in the end
    exporter = nbconvert.HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": shown}, "HTMLExporter": {"preprocessors": [settle]}}),
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", html_of)
    exporter.log = logging.getLogger(__name__)
    exporter.log.setLevel(logging.ERROR)  # it would warn of pictures without a description
    return exporter
