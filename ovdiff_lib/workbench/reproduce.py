"""Run notebooks headless: papermill with the checks it leaves out, and only those whose inputs changed.

A notebook is fresh when its source, its parameters, the package's code and data, and the tables and figures that its last good run
left are what they were; a fresh one is not run again. Notebooks do not depend on each other: one that fails stops no other.
"""

from __future__ import annotations

import ast
import difflib
import fcntl
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import write_atomic

PACKAGE = Path(__file__).parents[1]
CODE = (".py", ".yaml", ".json", ".csv", ".safetensors", ".txt", ".webp", ".png")

NOT_READ = ("cli/*", "recipes/*", "workbench/engines/*", "workbench/doctor.py", "workbench/tables/claims.py",
            "workbench/tables/relations.py", "workbench/tables/compare.py", "workbench/tables/claims.csv",
            "workbench/tables/explanations.csv", "workbench/page/page.*", "workbench/page/collect.py",
            "workbench/page/notebook*")
"""Files of the package, as patterns, that no notebook reads: a change in them leaves every result what it is."""

FOLDERS = ("tables", "figures", "explain")
"""Where notebooks write, below the outputs folder."""

EXECUTED = "tables/notebooks.json"
"""Below the outputs folder: stem -> sum of the code (:func:`code_sum`) of every notebook whose last good run wrote there. It is kept with
the tables, so that it shows where notebooks have changed since they made them."""


def notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order; with ``only`` those of these numbers ("03", "3") or stems.

    Raises ``InputError`` when there is none, and for a number or stem that the folder does not have.
    """
    found = sorted(folder.glob("[0-9]*.ipynb"))
    if not found:
        raise InputError(f"No notebook was found in {folder}; run the command from the project's folder or name one with --notebooks.")
    chosen = []
    for name in only:
        stem = name.strip().removesuffix(".ipynb")
        match = [p for p in found if stem == p.stem or (stem.isdecimal() and int(stem) == _number(p))]
        if not match:
            raise InputError(f"There is no notebook {name.strip()!r} in {folder}; it has {', '.join(p.stem for p in found)}.")
        chosen += match
    return [p for p in found if p in chosen] if only else found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise ``InputError`` for a parameter that the notebook's tagged cell does not define (papermill would only warn), for a value of
    another type than the default there, and for a file that is no notebook.

    A default of None takes anything, a number with a point takes whole numbers too, and a default whose comment speaks of None takes None.
    """
    try:
        known = _parameters(notebook)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise InputError(f"{notebook} cannot be read as a notebook ({_first_line(error)}); name a .ipynb file.") from None
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}."
            raise InputError(f"The notebook {notebook.name} has no parameter {name!r}; {hint}")
        try:
            json.dumps(value)
        except TypeError:
            raise InputError(f"The parameter {name!r} is a {type(value).__name__}; use plain numbers, strings, lists or tables.") from None
        default, takes_none = known[name]
        if not _same_kind(value, default) and not (takes_none and value is None):
            raise InputError(f"The parameter {name!r} of {notebook.name} must be {_kind(default)}, as its default {default!r} is, "
                             f"not {value!r}.")


def run_all(chosen: Sequence[Path], folder: Path, parameters: dict[str, Any], *, force: bool = False,
            say: Callable[[str], None] = print, workers: int = 1) -> list[str]:
    """Run notebooks into ``folder``, ``workers`` at a time, whatever becomes of the others; returns one sentence for each that failed.

    ``say`` is told of each notebook when it is through. Several at a time share the processors evenly and show no progress bars; those
    whose parameters cell is tagged "long" begin first, so that no processor waits for them at the end, and those tagged "alone" (they
    measure time) follow one by one. An interrupt (ctrl-C) ends it; what is finished stays.
    """
    if workers > 1:
        alone = [notebook for notebook in chosen if has_tag(notebook, "alone")]
        others = sorted((n for n in chosen if n not in alone), key=lambda n: not has_tag(n, "long"))
        return [*(_run_all(others, folder, parameters, force, say, workers) if others else ()),
                *_run_all(alone, folder, parameters, force, say, 1)]
    return _run_all(chosen, folder, parameters, force, say, 1)


def has_tag(notebook: Path, tag: str) -> bool:
    """Whether a cell of the notebook has the tag."""
    try:
        return any(tag in cell["metadata"].get("tags", []) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # running it will say what is wrong


def _run_all(chosen: Sequence[Path], folder: Path, parameters: dict[str, Any], force: bool, say: Callable[[str], None],
             workers: int) -> list[str]:
    failures = []
    run = partial(_run_one, folder=folder, parameters=parameters, force=force, progress=workers == 1)
    if workers == 1:
        outcomes = map(run, chosen)
    else:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _share_processors, (threads,))
        outcomes = (future.result() for future in as_completed([pool.submit(run, notebook) for notebook in chosen]))
    try:
        for stem, sentence, failure in outcomes:
            say(f"{stem}: {sentence}")
            if failure:
                failures.append(failure)
    finally:
        if workers > 1:
            pool.shutdown(wait=True, cancel_futures=True)
    return failures


def _share_processors(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the kernels inherit it


def _run_one(notebook: Path, folder: Path, parameters: dict[str, Any], force: bool, progress: bool) -> tuple[str, str, str]:
    """(stem, what became of it, a sentence if it failed)."""
    started = time.time()
    try:
        ran = run_notebook(notebook, folder / notebook.name, parameters, force=force, progress=progress)
    except OVDiffError as error:
        failure = str(error)
    except Exception as error:  # whatever it is, the notebooks that follow do not depend on it
        failure = f"The notebook {notebook.name} could not be run: {type(error).__name__}: {_first_line(error)}"
    else:
        return notebook.stem, f"executed in {time.time() - started:.0f} s" if ran else "fresh, nothing to do", ""
    return notebook.stem, f"FAILED after {time.time() - started:.0f} s", failure


def is_fresh(notebook: Path, output: Path, parameters: dict[str, Any]) -> bool:
    """Whether ``output`` is what running ``notebook`` with ``parameters`` would give again."""
    return output.exists() and _is_fresh(output.with_suffix(".stamp.json"), {**_state(notebook, parameters), "outputs": _outputs(output)})


def run_notebook(notebook: Path, output: Path, parameters: dict[str, Any], *, force: bool = False, progress: bool = True) -> bool:
    """Execute ``notebook`` into ``output`` with ``parameters``; returns False when a fresh result was there already.

    Raises ``InputError`` for an unknown parameter or one of the wrong type, ``OVDiffError`` (one sentence, naming the cell by its id and
    its place in the notebook, and its error) when a cell fails. The copy that is being executed is ``*.partial.ipynb`` beside the output;
    that of a failed run stays as ``*.failed.ipynb``, and ``output`` itself is replaced by good runs only. What ran is noted in
    :data:`EXECUTED`.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    check_parameters(notebook, parameters)
    stamp = output.with_suffix(".stamp.json")
    failed, partial_copy = output.with_suffix(".failed.ipynb"), output.with_suffix(".partial.ipynb")
    state = _state(notebook, parameters)
    if not force and is_fresh(notebook, output, parameters):
        failed.unlink(missing_ok=True)  # of a run with other settings or code: it says nothing of this result
        _note(notebook, output.parent)
        return False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {output.parent} cannot be made ({error.strerror}); name another with --out.") from None
    failed.unlink(missing_ok=True)  # of an earlier run
    started = time.time()
    try:
        with tempfile.TemporaryDirectory(prefix="ovdiff-") as sockets:
            # Sockets in files: no port races and no warning about unencrypted TCP. In a folder of their own: by default they lie in
            # the working folder under one name, and two notebooks at a time would talk to each other's kernels.
            # And a kernel that is interrupted only to be closed says nothing: an "ERROR" after a run that went well frightens people.
            quiet = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"},
                            "NotebookClient": {"extra_arguments": ["--log-level=CRITICAL"]}})
            papermill.execute_notebook(_literal(notebook), _literal(partial_copy), parameters=parameters, cwd=str(notebook.parent),
                                       progress_bar=progress, kernel_name="python3", config=quiet)
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":  # the interrupt reached the kernel first
            raise KeyboardInterrupt from None
        os.replace(partial_copy, failed)
        raise OVDiffError(f"The notebook {notebook.name} failed in {_last_cell(failed, notebook)}: {error.ename}: "
                          f"{_first_line(error.evalue)} (executed copy: {failed})") from None
    except OSError as error:  # papermill's writing of the executed copy; what cells raise came above
        raise InputError(f"The executed copy {partial_copy} cannot be written ({error.strerror or error}); free space or choose another "
                         "folder with --out.") from None
    except DeadKernelError:
        os.replace(partial_copy, failed)
        raise OVDiffError(f"The notebook {notebook.name} lost its kernel in {_last_cell(failed, notebook)}, most often for want of memory; "
                          f"close other programs or use smaller settings (executed copy: {failed})") from None
    else:
        os.replace(partial_copy, output)
    finally:
        partial_copy.unlink(missing_ok=True)  # of a run that was interrupted
    record = {**state, "outputs": _outputs(output), "seconds": round(time.time() - started, 1),
              "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomic(stamp, json.dumps(record, indent=1).encode())
    _note(notebook, output.parent)
    return True


def code_sum(notebook: Path) -> str:
    """SHA-256, in hexadecimal, of the sources of a notebook's code cells, as a JSON list of text."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256(json.dumps(["".join(c["source"]) for c in cells if c["cell_type"] == "code"]).encode()).hexdigest()


def _note(notebook: Path, folder: Path) -> None:
    """Enter the notebook into ``folder``/:data:`EXECUTED`; several processes may do so at a time."""
    path = folder / EXECUTED
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)  # the folder itself, so that no lock file is left among the tables
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            known = {}  # a torn file proves nothing
        noted = {**(known if isinstance(known, dict) else {}), notebook.stem: code_sum(notebook)}
        if noted != known:
            write_atomic(path, (json.dumps(noted, indent=1, sort_keys=True) + "\n").encode())
    finally:
        os.close(lock)


def _number(notebook: Path) -> int:
    digits = notebook.stem.split("_")[0]
    return int(digits) if digits.isdecimal() else -1


def _parameters(notebook: Path) -> dict[str, tuple[Any, bool]]:
    """Name -> (default, whether its comment speaks of None) of the cell tagged ``parameters``. A default that is no literal, which takes
    anything, comes as None."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = {}
    for source in ("".join(cell["source"]) for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])):
        lines = source.splitlines()
        # Python's own parser: papermill's, one line at a time, loses a parameter whose comment holds "=".
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign):
                try:
                    default = ast.literal_eval(statement.value)
                except ValueError:
                    default = None
                comment = lines[statement.end_lineno - 1].encode()[statement.end_col_offset:].decode()
                found |= {t.id: (default, "None" in comment) for t in statement.targets if isinstance(t, ast.Name)}
    return found


def _same_kind(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, (list, tuple)):
        kinds = {type(d) for d in default}
        return isinstance(value, (list, tuple)) and (len(kinds) != 1 or all(_same_kind(v, default[0]) for v in value))
    if type(default) is float:
        return type(value) in (int, float)
    return type(value) is type(default)


def _kind(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return "a list" + (f" in which each element is {_kind(default[0])}" if len({type(d) for d in default}) == 1 else "")
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a table"}[type(default)]


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _literal(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill fills in parameters between braces


def _last_cell(executed: Path, notebook: Path) -> str:
    """The cell that an unfinished run was in: its id, and its place in the notebook, counted from 1 over all cells."""
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        begun = [c["id"] for c in cells if c["metadata"].get("papermill", {}).get("start_time")]
        ids = [c.get("id") for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "a cell that is not known, since its executed copy cannot be read"
    if not begun:
        return "no cell, before the first began"
    return f"cell {begun[-1]!r}" + (f" (number {ids.index(begun[-1]) + 1} of {len(ids)})" if begun[-1] in ids else "")


def _outputs(output: Path) -> dict[str, str]:
    """Sums of the executed copy and of what lies in :data:`FOLDERS` beside it and bears its name: a run's results, by the rule of names."""
    found = [output, *(p for folder in FOLDERS for p in (output.parent / folder).glob("*") if p.name.startswith(output.stem))]
    return {p.relative_to(output.parent).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found) if p.is_file()}


def _state(notebook: Path, parameters: dict[str, Any]) -> dict[str, str]:
    cells = [c["source"] for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in CODE and "__pycache__" not in p.parts):
        name = path.relative_to(PACKAGE).as_posix()
        if not any(fnmatch(name, pattern) for pattern in NOT_READ):
            digest.update(name.encode())
            digest.update(path.read_bytes())
    return {"source": hashlib.sha256(json.dumps(cells).encode()).hexdigest(), "package": digest.hexdigest(),
            "parameters": json.dumps(parameters, sort_keys=True)}


def _is_fresh(stamp: Path, state: dict[str, Any]) -> bool:
    if not stamp.exists():
        return False
    try:
        recorded = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:
        recorded = None
    # A torn stamp proves nothing.
    return isinstance(recorded, dict) and all(recorded.get(key) == value for key, value in state.items())
