"""The notebooks of an outputs folder as they ran, and where the report's numbers come from."""

from __future__ import annotations

import json
import os
import re
import shlex
import sysconfig
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ovdiff_lib.code import PACKAGE
from ovdiff_lib.workbench.reproduce import cells_of, read_json


@dataclass
class Run:
    """One notebook: its executed copy (None where there is none), the command that makes its results again, its wall
    ``time``, and as ``problem`` a sentence, "" if all is well. The report adds its tables and figures, and the address
    of its ``page``."""

    stem: str
    title: str
    notebook: Path | None = None
    command: str = ""
    time: str = ""
    finished: str = ""
    problem: str = ""
    page: str = ""
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)


def find_runs(folder: Path, sources: Path) -> list[Run]:
    """The notebooks that ran, or should have run (those in ``sources``), into an outputs folder, in order."""
    known = {p.stem: p for p in sources.glob("[0-9]*.ipynb")}
    here = {p.name.split(".")[0] for p in folder.glob("[0-9]*.ipynb")}
    return [_run(folder, stem, known.get(stem, Path())) for stem in sorted({*known, *here})]


def _run(folder: Path, stem: str, source: Path) -> Run:
    executed, failed = folder / f"{stem}.ipynb", folder / f"{stem}.failed.ipynb"
    stamp, ran = read_json(folder / f"{stem}.stamp.json"), cells_of(executed)
    texts = ("".join(c.get("source", "")) for c in ran or cells_of(source) if c.get("cell_type") == "markdown")
    headings = (re.match(r"#\s+(.+)", text) for text in texts)
    title = next((heading[1].strip() for heading in headings if heading), stem)
    problem = ""
    if failed.exists():
        problem = f"The last run of {stem} failed; its error stands in {failed.name}."
    elif executed.exists() and not ran:
        problem = f"The executed copy {executed.name} cannot be read as a notebook; run it again."
    elif not executed.exists():
        problem = (f"The notebook {stem} has not been run in this folder; tables and figures of it, if there are any, "
                   "are of an earlier run.")
    time = str(timedelta(seconds=round(stamp["seconds"]))) if "seconds" in stamp else "unknown"
    return Run(stem, title, executed if ran else None, command(stem, json.loads(stamp.get("parameters", "{}")), folder),
               time, stamp.get("finished", ""), problem)


def command(stem: str, given: dict[str, Any], folder: Path) -> str:
    """The command line that runs a notebook as ``given`` into ``folder`` again, to be given in the project's folder."""
    profile = str(given.get("profile", folder.name))
    words = ["ovdiff", "run", f"notebooks/{stem}.ipynb", "--profile",
             os.path.relpath(profile) if os.path.isabs(profile) else profile]
    own = {name: value for name, value in given.items() if name not in ("profile", "overrides", "output")}
    for option, values in (("--set", given.get("overrides") or {}), ("-p", own)):
        for name, value in values.items():
            words += [option, f"{name}={json.dumps(value, ensure_ascii=False)}"]
    parent = os.path.relpath(folder.parent)
    return shlex.join(words if parent == "outputs" else [*words, "--out", parent])


def hidden(text: str, folder: Path) -> str:
    """Text (or JSON) without the folders of this machine, since a report is sent to others: the outputs folder as
    notebooks write it, where Python keeps its packages, the checkout and the home folder by a name."""
    places = {folder.resolve(): f"../outputs/{folder.name}", Path(sysconfig.get_path("purelib")): "site-packages",
              PACKAGE.parent: "<project>", Path.home(): "~"}
    # Inner folders before those that hold them.
    for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):
        if len(place.parts) > 1:  # a home that is the root of the disk would take away every slash
            text = re.sub(re.escape(json.dumps(str(place))[1:-1]) + r"(?![\w.-])", lambda _, name=name: name, text)
    return text
