"""The notebooks of an outputs folder as they ran, and where the report's numbers come from."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sysconfig
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ovdiff_lib.keys import PACKAGE
from ovdiff_lib.workbench.reproduce import assigned, cells_of, read_json

LIBRARIES = ("ovdiff-lib", "torch", "diffusers", "transformers", "open_clip_torch", "numpy")


@dataclass
class Run:
    """One notebook: the ``parameters`` it ran with, ``seconds`` of wall time, its executed copy (None where there is
    none), the command that makes its results again, and as ``problem`` a sentence, "" if all is well.

    The report adds its tables and figures, and the address of its ``page``.
    """

    stem: str
    title: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    finished: str = ""
    notebook: Path | None = None
    command: str = ""
    problem: str = ""
    page: str = ""
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def time(self) -> str:
        return duration(self.seconds)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What stands beside each of its tables and figures."""
        if not self.command:
            return [("notebook", "unknown: the name begins with no notebook's")]
        seed = self.parameters.get("seeds", self.parameters.get("seed", "not recorded"))
        return [("command", self.command), ("wall time of the notebook", self.time),
                ("finished", self.finished or "unknown"), ("seed of the notebook", plain(seed))]


def find_runs(folder: Path, sources: Path | None) -> list[Run]:
    """The notebooks that ran, or should have run (those in ``sources``), into an outputs folder, in order."""
    known = {p.stem: p for p in sources.glob("[0-9]*.ipynb")} if sources else {}
    here = {p.name.split(".")[0] for pattern in ("[0-9]*.ipynb", "[0-9]*.stamp.json") for p in folder.glob(pattern)}
    return [_run(folder, stem, known.get(stem)) for stem in sorted({*known, *here})]


def _run(folder: Path, stem: str, source: Path | None) -> Run:
    executed, failed = folder / f"{stem}.ipynb", folder / f"{stem}.failed.ipynb"
    stamp, ran, given = read_json(folder / f"{stem}.stamp.json"), cells_of(executed), {}
    text = ("".join(c.get("source", "")) for c in ran or (cells_of(source) if source else [])
            if c.get("cell_type") == "markdown")
    title = next((heading[1].strip() for heading in map(re.compile(r"#\s+(.+)").match, text) if heading), stem)
    problem = ""
    if failed.exists():
        outputs = [output for cell in cells_of(failed) for output in cell.get("outputs") or []]
        said = (f" failed: {o.get('ename')}: {(str(o.get('evalue')).splitlines() or [''])[0]}" for o in outputs
                if o.get("output_type") == "error")
        problem = f"The last run of {stem}{next(said, ' did not finish.')}"
    elif executed.exists() and not ran:
        problem = f"The executed copy {executed.name} cannot be read as a notebook; run it again."
    elif not executed.exists():
        left = any(path for kind in ("tables", "figures") for path in (folder / kind).glob(f"{stem}*"))
        problem = f"The notebook {stem} has not been run in this folder"
        problem += "; what it has here is of an earlier run." if left else "."
    with suppress(ValueError):
        given = json.loads(stamp.get("parameters", "{}"))
    parameters = {name: value for name, _, value in assigned(ran, "parameters", "injected-parameters")}
    return Run(stem, title, parameters | given, stamp.get("seconds"), str(stamp.get("finished", "")),
               executed if ran else None, command(stem, given, folder), problem)


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


def versions() -> dict[str, str]:
    """Versions of Python and the libraries here, read without importing them."""
    found = {"python": platform.python_version(), **dict.fromkeys(LIBRARIES, "not installed")}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit(package: Path = PACKAGE) -> str:
    """The commit that the code in ``package`` is at, marked where files differ from it; "" where git does not know its
    files: outside a checkout, and in a package installed within someone else's."""
    def git(*arguments: str) -> str:
        # --no-optional-locks: reading must not write to the index while someone else commits.
        words = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


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
