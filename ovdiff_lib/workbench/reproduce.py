"""Run notebooks headless: papermill with the checks it leaves out, and only those whose inputs changed.

A notebook is fresh when its source, its parameters, the package's code and data, and the tables and figures that its
last good run left are what they were; a fresh one is not run again. Notebooks do not depend on each other: one that
fails stops no other.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from ovdiff_lib import keys
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import write_atomic

NOT_READ = ("cli", "recipes", "workbench/parallel.py")
"""Folders of the package that no notebook reads: a change in them leaves every result what it is."""

DATA = (".csv", ".json", ".yaml", ".safetensors", ".txt", ".webp", ".png")

EXECUTED = "tables/notebooks.json"
"""Below the outputs folder: stem -> {"code": sum of the notebook's code, "seconds": wall time} of the last good run of
every notebook. It is kept with the tables: it shows where notebooks changed since, and foretells how long they take."""

CLASSES = "classes"
"""Stands there for the drawing of the classes that notebooks share."""


def notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order; with ``only`` those of these numbers ("03", "3") or stems.

    Raises ``InputError`` when there is none, and for a number or stem that the folder does not have.
    """
    found = sorted(folder.glob("[0-9]*.ipynb"))
    if not found:
        raise InputError(f"No notebook was found in {folder}; run the command from the project's folder or name one "
                         "with --notebooks.")
    chosen = []
    for name in (n.strip().removesuffix(".ipynb") for n in only):
        match = [p for p in found if name == p.stem or (name.isdecimal() and name.zfill(2) == p.stem.split("_")[0])]
        if not match:
            raise InputError(f"There is no notebook {name!r} in {folder}; it has {', '.join(p.stem for p in found)}.")
        chosen += match
    return [p for p in found if p in chosen] if only else found


def parameters_of(notebook: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of the cell tagged ``parameters``.

    The type is the annotation (``images: int | None = None``), else that of the default; a default of None takes
    anything.
    """
    kinds = {"Any": Any, **{kind.__name__: kind for kind in (bool, int, float, str, list, dict)}}
    found: dict[str, tuple[Any, Any]] = {}
    try:
        cells = [c["source"] for c in _read(notebook)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
        for statement in ast.parse("".join(map("".join, cells))).body:
            name, default = ast.unparse(getattr(statement, "target", None)
                                        or statement.targets[0]), ast.literal_eval(statement.value)
            kind: Any = Any if default is None else type(default)
            if isinstance(statement, ast.AnnAssign):
                # of code that is about to be run
                kind = eval(ast.unparse(statement.annotation), {"__builtins__": {}}, kinds)
            elif kind is list and len({type(d) for d in default}) == 1:
                kind = list[type(default[0])]
            found[name] = kind, default
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, NameError) as error:
        raise InputError(f"{notebook} cannot be read as a notebook with literal parameters ({_first_line(error)}); "
                         "name a .ipynb file."
                         ) from None
    return found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise ``InputError`` for a parameter that the notebook's tagged cell does not define (papermill would only warn),
    for a value of another type than that has there, and for a file that is no notebook. A number with a point takes
    whole numbers too."""
    from pydantic import TypeAdapter, ValidationError

    known = parameters_of(notebook)
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(f"The notebook {notebook.name} has no parameter {name!r}; " + (
                f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}."))
        kind, default = known[name]
        try:
            json.dumps(value)
            TypeAdapter(kind).validate_python(value, strict=True)
        except (TypeError, ValidationError):
            said = kind.__name__ if type(kind) is type else kind
            raise InputError(f"The parameter {name!r} of {notebook.name} must be {said} like its default {default!r}, "
                             f"not {value!r}."
                             ) from None


def run_all(chosen: Sequence[Path], folder: Path, parameters: dict[str, Any], *, force: bool = False,
            say: Callable[[str], None] = print, workers: int = 1) -> list[str]:
    """Run notebooks into ``folder``, ``workers`` at a time, whatever becomes of the others; returns one sentence for
    each that failed.

    ``say`` is told of each notebook when it is through. Several at a time (:func:`in_turns`) share the processors
    evenly and show no progress bars. An interrupt (ctrl-C) ends it; what is finished stays.
    """
    failures, spawn = [], multiprocessing.get_context("spawn")
    for turn, together in in_turns(chosen, folder, workers):
        run = partial(_run_one, folder=folder, parameters=parameters, force=force, progress=together == 1)
        threads = max(1, len(os.sched_getaffinity(0)) // together)
        pool = ProcessPoolExecutor(together, spawn, _share_processors, (threads,)) if together > 1 else None
        try:
            done = (f.result() for f in as_completed([pool.submit(run, n) for n in turn])) if pool else map(run, turn)
            for stem, sentence, failure in done:
                note(folder, stem)
                say(f"{stem}: {sentence}")
                failures += [failure] if failure else []
        finally:
            if pool:
                pool.shutdown(wait=True, cancel_futures=True)
    return failures


def in_turns(chosen: Sequence[Path], folder: Path, workers: int) -> list[tuple[list[Path], int]]:
    """Which notebooks run in one go, and how many of them at a time: the longest begin first, so that no processor
    waits for them at the end; those whose parameters cell is tagged "alone" (they measure time) follow one by one."""
    alone, known = [n for n in chosen if has_tag(n, "alone")], _known(folder)
    others = sorted((n for n in chosen if n not in alone), key=lambda n: -known.get(n.stem, {}).get("seconds", 1e9))
    turns = [(list(chosen), 1)] if workers == 1 else [(others, workers), (alone, 1)]
    return [turn for turn in turns if turn[0]]


def expected_time(chosen: Sequence[Path], folder: Path, workers: int) -> str:
    """How long notebooks took when they last ran into ``folder``, ``workers`` at a time, as a sentence; "" where
    nothing is known.

    The classes that they share are counted too where the folder has no library yet.
    """
    known, total = _known(folder), 0.0
    for turn, together in in_turns(chosen, folder, workers):
        lanes = [0.0] * together
        for notebook in turn:
            lanes[lanes.index(min(lanes))] += known.get(notebook.stem, {}).get("seconds", 0)
        total += max(lanes)
    total += 0 if (folder / "cache").exists() else known.get(CLASSES, {}).get("seconds", 0)
    unknown = [n.stem for n in chosen if n.stem not in known]
    without = f", without {', '.join(unknown)}, which did not run there yet" if unknown else ""
    return f"{len(chosen)} to run, about {max(1, round(total / 60))} min as measured last{without}." if total else ""


def has_tag(notebook: Path, tag: str) -> bool:
    """Whether a cell of the notebook has the tag; a file that is no notebook has none, and running it will say so."""
    cells = _json(notebook).get("cells")
    return any(tag in c.get("metadata", {}).get("tags", []) for c in cells or [] if isinstance(c, dict))


def _share_processors(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the kernels inherit it


def _run_one(notebook: Path, folder: Path, parameters: dict[str, Any], force: bool,
             progress: bool) -> tuple[str, str, str]:
    """(stem, what became of it, a sentence if it failed)."""
    started, failure, ran = time.time(), "", False
    try:
        ran = run_notebook(notebook, folder / notebook.name, parameters, force=force, progress=progress)
    except OVDiffError as error:
        failure = str(error)
    except Exception as error:  # whatever it is, the notebooks that follow do not depend on it
        failure = f"The notebook {notebook.name} could not be run: {type(error).__name__}: {_first_line(error)}"
    took = f"{time.time() - started:.0f} s"
    sentence = f"FAILED after {took}" if failure else f"executed in {took}" if ran else "fresh, nothing to do"
    return notebook.stem, sentence, failure


def is_fresh(notebook: Path, output: Path, parameters: dict[str, Any]) -> bool:
    """Whether ``output`` is what running ``notebook`` with ``parameters`` would give again."""
    stamp = _json(output.with_suffix(".stamp.json"))
    return output.exists() and stamp.items() >= {**_state(notebook, parameters), "outputs": _outputs(output)}.items()


def run_notebook(notebook: Path, output: Path, parameters: dict[str, Any], *, force: bool = False,
                 progress: bool = True) -> bool:
    """Execute ``notebook`` into ``output`` with ``parameters``; returns False when a fresh result was there already.

    Raises ``InputError`` for an unknown parameter or one of the wrong type, ``OVDiffError`` (one sentence that names
    the cell and its error) when a cell fails. The copy that is being executed is ``*.partial.ipynb`` beside the output;
    that of a failed run stays as ``*.failed.ipynb``, and ``output`` itself is replaced by good runs only.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    check_parameters(notebook, parameters)
    # papermill does not know `int | None`, and would warn of parameters so annotated.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    failed, running = output.with_suffix(".failed.ipynb"), output.with_suffix(".partial.ipynb")
    state, fresh = _state(notebook, parameters), not force and is_fresh(notebook, output, parameters)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        failed.unlink(missing_ok=True)  # of an earlier run: it says nothing of this one
    except OSError as error:
        raise InputError(f"{output.parent} cannot be made ({error.strerror}); name another with --out.") from None
    if fresh:
        return False
    started = time.time()
    try:
        with tempfile.TemporaryDirectory(prefix="ovdiff-") as sockets:
            # Sockets in files: no port races and no warning about unencrypted TCP. In a folder of their own: by default
            # they lie in the working folder under one name, and two notebooks at a time would talk to each other's
            # kernels. And a kernel that is interrupted only to be closed says nothing: an "ERROR" after a run that went
            # well frightens people.
            quiet = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"},
                            "NotebookClient": {"extra_arguments": ["--log-level=CRITICAL"]}})
            papermill.execute_notebook(_literal(notebook), _literal(running), parameters=parameters, config=quiet,
                                       cwd=str(notebook.parent), progress_bar=progress, kernel_name="python3")
        os.replace(running, output)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        said = "lost its kernel, most often for want of memory; close other programs or use smaller settings"
        if isinstance(error, papermill.PapermillExecutionError):
            if error.ename == "KeyboardInterrupt":  # the interrupt reached the kernel first
                raise KeyboardInterrupt from None
            cell = next((c["id"] for c in _read(notebook)["cells"] if "".join(c["source"]) == error.source), "?")
            said = f"failed in its cell {cell!r}: {error.ename}: {_first_line(error.evalue)}"
        os.replace(running, failed)
        raise OVDiffError(f"The notebook {notebook.name} {said} (executed copy: {failed})") from None
    except OSError as error:  # papermill's writing of the executed copy; what cells raise came above
        raise InputError(f"The executed copy {running} cannot be written ({error.strerror or error}); free space or "
                         "choose another folder with --out.") from None
    finally:
        running.unlink(missing_ok=True)  # of a run that was interrupted
    record = {**state, "outputs": _outputs(output), "seconds": round(time.time() - started, 1),
              "code": code_sum(notebook), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomic(output.with_suffix(".stamp.json"), json.dumps(record, indent=1).encode())
    return True


def code_sum(notebook: Path) -> str:
    """SHA-256, in hexadecimal, of the sources of a notebook's code cells, as a JSON list of text."""
    sources = ["".join(c["source"]) for c in _read(notebook)["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def note(folder: Path, stem: str, record: dict[str, Any] | None = None) -> None:
    """Enter a record (default: that of the notebook's last good run, if there was one) into
    ``folder``/:data:`EXECUTED`."""
    known, stamp = _known(folder), _json(folder / f"{stem}.stamp.json")
    record = record or {key: stamp[key] for key in ("code", "seconds") if key in stamp}
    if record and record != known.get(stem):
        write_atomic(folder / EXECUTED, (json.dumps({**known, stem: record}, indent=1, sort_keys=True) + "\n").encode())


def _known(folder: Path) -> dict[str, Any]:
    return {stem: record for stem, record in _json(folder / EXECUTED).items() if isinstance(record, dict)}


def _read(notebook: Path) -> dict[str, Any]:
    return json.loads(notebook.read_text(encoding="utf-8"))


def _json(path: Path) -> dict[str, Any]:
    """A JSON table; {} where there is none, or a torn one, which proves nothing."""
    try:
        found = _read(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _literal(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill fills in parameters between braces


def _outputs(output: Path) -> dict[str, str]:
    """Sums of the executed copy and of the tables, figures and panels beside it that bear its name: a run's results."""
    folder = output.parent
    found = [output, *(p for kind in ("tables", "figures", "explain") for p in (folder / kind).glob(f"{output.stem}*"))]
    sums = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found) if p.is_file()}
    return {p.relative_to(folder).as_posix(): digest for p, digest in sums.items()}


def _state(notebook: Path, parameters: dict[str, Any]) -> dict[str, str]:
    cells = json.dumps([c["source"] for c in _read(notebook)["cells"]])
    return {"source": hashlib.sha256(cells.encode()).hexdigest(), "package": _package(),
            "parameters": json.dumps(parameters, sort_keys=True)}


@functools.cache
def _package() -> str:
    """Sum of the package's statements and data, but for :data:`NOT_READ`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in keys.PACKAGE.rglob("*") if p.suffix in (".py", *DATA)):
        name = path.relative_to(keys.PACKAGE)
        if not any(name.is_relative_to(folder) for folder in NOT_READ):
            code = keys.statements(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else b""
            digest.update(name.as_posix().encode() + b"\0" + (code or path.read_bytes()) + b"\0")
    return digest.hexdigest()
