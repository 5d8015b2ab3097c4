"""Run notebooks headless: papermill with the checks it leaves out, and only those whose inputs changed.

A notebook is fresh when its source, its parameters, the package's code and data, and the tables and figures that its
last good run left are what they were; a fresh one is not run again. None depends on another: one that fails stops none.
"""

import ast
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ovdiff_lib.code import PACKAGE, parsed
from ovdiff_lib.errors import InputError, OVDiffError, legal
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.workbench.console import FEATURES, check_output, described, end_with_parent

NOT_READ = ("cli", "recipes", "workbench/parallel.py")
"""Folders of the package that no notebook reads: a change in them leaves every result what it is."""

DATA = (".csv", ".json", ".yaml", ".safetensors", ".txt", ".webp", ".png")

EXECUTED = "tables/notebooks.json"
"""Below the outputs folder, kept with the tables: of every notebook's last good run the sum of its "code", to see where
it changed since, and its wall time in "seconds", by which runs are planned."""

CLASSES = "classes"  # stands there for the drawing of the classes that notebooks share


def notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order; with ``only`` those of these numbers ("03") or stems. Raises
    ``InputError`` when there is none, and for a number or stem that the folder does not have."""
    found = sorted(folder.glob("[0-9]*.ipynb"))
    if not found:
        raise InputError(f"No notebook was found in {folder}; name the project's folder of them with --notebooks.")
    called = {name: path for path in found for name in (path.stem, path.stem.split("_")[0])}
    names = {name.strip() for name in only}
    if lost := names - called.keys():
        raise InputError(f"There is no notebook {min(lost)!r} in {folder}; it has {', '.join(p.stem for p in found)}.")
    return sorted({called[name] for name in names}) if only else found


def parameters_of(notebook: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of the cell tagged ``parameters``; a type is the annotation, else that of the default."""
    kinds = {"__builtins__": {}, **{kind.__name__: kind for kind in (bool, int, float, str, list, dict)}}
    found: dict[str, tuple[Any, Any]] = {}
    try:
        cells = json.loads(notebook.read_bytes())["cells"]
        tagged = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        for statement in ast.parse("\n".join(tagged)).body:
            target = getattr(statement, "target", None) or statement.targets[0]
            annotation, default = getattr(statement, "annotation", None), ast.literal_eval(statement.value)
            # The code that is evaluated is about to be run.
            kind = eval(ast.unparse(annotation), kinds) if annotation else type(default)
            found[ast.unparse(target)] = kind, default
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, NameError) as error:
        raise InputError(f"{notebook} cannot be read as a notebook with literal parameters ({described(error)}); name "
                         "a .ipynb file.") from None
    return found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise ``InputError`` for a parameter that the notebook does not define (papermill would only warn), a value of
    another type than the parameter has there (a float takes whole numbers too), and a file that is no notebook."""
    from pydantic import TypeAdapter, ValidationError

    known = parameters_of(notebook)
    for name, value in parameters.items():
        if name not in known:
            others = legal(name, known or ["none"])
            raise InputError(f"The notebook {notebook.name} has no parameter {name!r}; {others}")
        kind, default = known[name]
        try:
            json.dumps(value)
            TypeAdapter(kind).validate_python(value, strict=True)
        except (TypeError, ValidationError):
            said = kind.__name__ if type(kind) is type else kind
            raise InputError(f"The parameter {name!r} of {notebook.name} must be {said} like its default {default!r}, "
                             f"not {value!r}.") from None


def own_data(notebook: Path, parameters: dict[str, Any]) -> dict[str, str]:
    """The profile's data set for a notebook whose own is the mini world's, unless ``parameters`` name one."""
    if "dataset" not in parameters_of(notebook) or "dataset" in parameters or "profile" not in parameters:
        return {}
    return {"dataset": load_profile(parameters["profile"], parameters.get("overrides")).evaluation.voc}


def run_all(chosen: Sequence[Path], folder: Path, parameters: dict[str, Any], *, force: bool = False,
            workers: int = 1) -> list[str]:
    """Run notebooks into ``folder``, at most ``workers`` at a time, whatever becomes of the others; returns a sentence
    for each that failed. What became of each is printed. Ctrl-C ends it; what is finished stays."""
    run, failures = partial(_run_one, folder=folder, parameters=parameters, force=force), []
    os.environ[FEATURES] = str(features := folder / "cache" / "features")  # the kernels inherit it
    shutil.rmtree(features, ignore_errors=True)  # of a run that was killed, and of other code perhaps
    try:
        runs = map(run, chosen) if workers == 1 else _side_by_side(run, chosen, folder, workers)
        for stem, sentence, failure in runs:
            note(folder, stem)
            print(f"{stem}: {sentence}", flush=True)
            failures += [failure] if failure else []
    finally:
        del os.environ[FEATURES]
        shutil.rmtree(features, ignore_errors=True)
    return failures


def _side_by_side(run: Callable[..., Any], chosen: Sequence[Path], folder: Path, workers: int) -> Iterator[Any]:
    """What :func:`_run_one` says of each: the longest first, so that no processor waits at the end; those tagged
    "alone" (they measure time) come last, one by one, with all processors, which the others share evenly."""
    known, processors = read_json(folder / EXECUTED), len(os.sched_getaffinity(0))
    longest_first = sorted(chosen, key=lambda notebook: -_seconds(notebook, known, 1e9))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent, max_tasks_per_child=1)
    try:
        for future in as_completed([pool.submit(run, notebook, threads=max(1, processors // workers))
                                    for notebook in longest_first if not has_tag(notebook, "alone")]):
            yield future.result()
        for notebook in (notebook for notebook in longest_first if has_tag(notebook, "alone")):
            yield pool.submit(run, notebook, threads=processors).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def expected_time(chosen: Sequence[Path], folder: Path, workers: int) -> str:
    """How many notebooks there are to run and, as a sentence, how long they take about, ``workers`` at a time, by their
    last runs into ``folder``. The classes that they share are counted too where the folder has no library yet."""
    known = read_json(folder / EXECUTED)
    total = sum(_seconds(one, known) / (1 if has_tag(one, "alone") else workers) for one in chosen)
    total += 0 if (folder / "cache").exists() else _seconds(Path(CLASSES), known)
    return f"{len(chosen)} to run" + (f", about {max(1, round(total / 60))} min as measured last." if total else ".")


def has_tag(notebook: Path, tag: str) -> bool:
    """Whether a cell of the notebook has the tag; a file that is no notebook has none, and running it will say so."""
    return any(tag in cell.get("metadata", {}).get("tags", []) for cell in cells_of(notebook))


def _seconds(notebook: Path, known: dict[str, Any], unknown: float = 0.0) -> float:
    return known.get(notebook.stem, {}).get("seconds", unknown)


def _run_one(notebook: Path, folder: Path, parameters: dict[str, Any], force: bool,
             threads: int | None = None) -> tuple[str, str, str]:
    """(stem, what became of it, a sentence if it failed); with ``threads`` in a process for this notebook alone."""
    if threads:
        # The kernel inherits both. Of glibc's heap what is freed in the middle stays; larger arrays lie outside of it.
        os.environ.update({"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": str(2**20)})
    started, failure = time.time(), ""
    try:
        ran = run_notebook(notebook, folder / notebook.name, parameters, force=force, progress=not threads)
        sentence = f"executed in {time.time() - started:.0f} s" if ran else "fresh, nothing to do"
    except Exception as error:  # whatever it is, the notebooks that follow do not depend on it
        own = isinstance(error, OVDiffError)
        failure = str(error) if own else f"The notebook {notebook.name} could not be run: {described(error)}"
        sentence = f"FAILED after {time.time() - started:.0f} s"
    return notebook.stem, sentence, failure


def is_fresh(notebook: Path, output: Path, parameters: dict[str, Any]) -> bool:
    """Whether ``output`` is what running ``notebook`` with ``parameters`` would give again."""
    stamp = read_json(output.with_suffix(".stamp.json"))
    return output.exists() and stamp.items() >= {**_state(notebook, parameters), "outputs": _outputs(output)}.items()


def run_notebook(notebook: Path, output: Path, parameters: dict[str, Any], *, force: bool = False,
                 progress: bool = True) -> bool:
    """Execute ``notebook`` into ``output`` with ``parameters``; returns False when a fresh result was there already.

    Raises ``InputError`` as :func:`check_parameters`, ``OVDiffError`` (which names the cell and its error) when a cell
    fails. The copy that is being executed is ``*.partial.ipynb`` beside the output; that of a failed run stays as
    ``*.failed.ipynb``, and ``output`` itself is replaced by good runs only.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    check_parameters(notebook, parameters)
    given = parameters | own_data(notebook, parameters)
    # papermill does not know `int | None`, and would warn of parameters so annotated.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    failed, running = output.with_suffix(".failed.ipynb"), output.with_suffix(".partial.ipynb")
    state, fresh, started = _state(notebook, parameters), is_fresh(notebook, output, parameters), time.time()
    check_output(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)  # of an earlier run: it says nothing of this one
    if fresh and not force:
        return False
    try:
        with tempfile.TemporaryDirectory(prefix="ovdiff-") as sockets:
            # Sockets in files: no port races and no warning about unencrypted TCP. In a folder of their own: in the
            # working folder two notebooks at a time would talk to each other's kernels. And a kernel that is
            # interrupted only to be closed says nothing: an "ERROR" after a run that went well frightens people.
            quiet = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"},
                            "NotebookClient": {"extra_arguments": ["--log-level=CRITICAL"]}})
            papermill.execute_notebook(str(notebook), str(running), parameters=given, config=quiet,
                                       cwd=str(notebook.parent), progress_bar=progress, kernel_name="python3")
        os.replace(running, output)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        said = "lost its kernel, most often for want of memory; close other programs or use smaller settings"
        if isinstance(error, papermill.PapermillExecutionError):
            if error.ename == "KeyboardInterrupt":  # the interrupt reached the kernel first
                raise KeyboardInterrupt from None
            cell = next((c["id"] for c in cells_of(notebook) if "".join(c["source"]) == error.source), "?")
            said = f"failed in its cell {cell!r}: {error.ename}: {error.evalue.strip().partition(chr(10))[0]}"
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


def code_sum(notebook: Path, kinds: Sequence[str] = ("code",)) -> str:
    """SHA-256 of the sources of a notebook's code cells, or cells of other ``kinds``, as a JSON list of text."""
    sources = ["".join(c["source"]) for c in cells_of(notebook) if c.get("cell_type") in kinds]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def note(folder: Path, stem: str, record: dict[str, Any] | None = None) -> None:
    """Enter a record (default: that of the notebook's last good run, if any) into ``folder``/:data:`EXECUTED`."""
    known, stamp = read_json(folder / EXECUTED), read_json(folder / f"{stem}.stamp.json")
    record = record or {key: stamp[key] for key in ("code", "seconds") if key in stamp}
    if record and record != known.get(stem):
        write_atomic(folder / EXECUTED, (json.dumps({**known, stem: record}, indent=1, sort_keys=True) + "\n").encode())


def _outputs(output: Path) -> dict[str, str]:
    """Sums of the executed copy and of the tables, figures and panels beside it that bear its name: a run's results."""
    folder = output.parent
    found = [output, *(p for kind in ("tables", "figures", "explain") for p in (folder / kind).glob(f"{output.stem}*"))]
    sums = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found) if p.is_file()}
    return {p.relative_to(folder).as_posix(): digest for p, digest in sums.items()}


def _state(notebook: Path, parameters: dict[str, Any]) -> dict[str, str]:
    return {"source": code_sum(notebook, ("code", "markdown", "raw")), "package": _package(),
            "parameters": json.dumps(parameters, sort_keys=True)}


@functools.cache
def _package() -> str:
    """Sum of the package's statements and data, but for :data:`NOT_READ`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", *DATA)):
        name = path.relative_to(PACKAGE)
        if not any(name.is_relative_to(folder) for folder in NOT_READ):
            code = parsed(path.read_text(encoding="utf-8"))[0].encode() if path.suffix == ".py" else b""
            digest.update(name.as_posix().encode() + b"\0" + (code or path.read_bytes()) + b"\0")
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table; {} where there is none, or a torn one, which proves nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a notebook's file; [] where there is none or it is broken."""
    cells = read_json(notebook).get("cells")
    return [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
