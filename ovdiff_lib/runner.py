"""Run notebooks headless: papermill with the checks it leaves out, and only those whose inputs changed.

A notebook is fresh when its source, its parameters, the package's code and data, and the tables and figures that its last good run
left are what they were; a fresh one is not run again.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.images import write_atomic

PACKAGE = Path(__file__).parent
CODE = (".py", ".yaml", ".json", ".safetensors", ".txt", ".webp", ".png")


def notebooks(folder: Path) -> list[Path]:
    """The numbered notebooks of a folder in order. Raises ``InputError`` when there is none."""
    found = sorted(folder.glob("[0-9]*.ipynb"))
    if not found:
        raise InputError(f"No notebook was found in {folder}; run the command from the project's folder or name one with --notebooks.")
    return found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise ``InputError`` for a parameter that the notebook's tagged cell does not define (papermill would only warn), and for a file
    that is no notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        known = [name for cell in cells if _is_tagged(cell) for name in _assigned("".join(cell["source"]))]
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


def run_notebook(notebook: Path, output: Path, parameters: dict[str, Any], *, force: bool = False, progress: bool = True) -> bool:
    """Execute ``notebook`` into ``output`` with ``parameters``; returns False when a fresh result was there already.

    Raises ``InputError`` for an unknown parameter, ``OVDiffError`` (one sentence, naming the cell's error) when a cell fails. The
    executed copy of a failed run stays beside the output as ``*.failed.ipynb``; ``output`` itself is replaced by good runs only.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    check_parameters(notebook, parameters)
    stamp = output.with_suffix(".stamp.json")
    state = _state(notebook, parameters)
    if not force and output.exists() and _is_fresh(stamp, {**state, "outputs": _outputs(output)}):
        return False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {output.parent} cannot be made ({error.strerror}); name another with --out.") from None
    failed = output.with_suffix(".failed.ipynb")
    started = time.time()
    try:
        papermill.execute_notebook(
            str(notebook), str(failed), parameters=parameters, cwd=str(notebook.parent), progress_bar=progress, kernel_name="python3",
            # Sockets in files: no port races between kernels and no warning about unencrypted TCP.
            # And a kernel that is interrupted only to be closed says nothing: an "ERROR" after a run that went well frightens people.
            config=Config({"KernelManager": {"transport": "ipc"}, "NotebookClient": {"extra_arguments": ["--log-level=CRITICAL"]}}))
    except papermill.PapermillExecutionError as error:
        raise OVDiffError(f"The notebook {notebook.name} failed in cell {error.exec_count}: {error.ename}: "
                          f"{_first_line(error.evalue)} (executed copy: {failed})") from None
    except DeadKernelError:
        raise OVDiffError(f"The notebook {notebook.name} lost its kernel, most often for want of memory; close other programs or use "
                          f"smaller settings (executed copy: {failed})") from None
    os.replace(failed, output)
    record = {**state, "outputs": _outputs(output), "seconds": round(time.time() - started, 1),
              "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomic(stamp, json.dumps(record, indent=1).encode())
    return True


def _is_tagged(cell: dict[str, Any]) -> bool:
    return "parameters" in cell.get("metadata", {}).get("tags", [])


def _assigned(source: str) -> list[str]:
    # Python's own parser: papermill's, one line at a time, loses a parameter whose comment holds "=".
    return [t.id for s in ast.parse(source).body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)]


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _outputs(output: Path) -> dict[str, str]:
    """Sums of the executed copy and of the tables and figures beside it that bear its name: a run's results, by the rule of names."""
    folders = [output.parent / "tables", output.parent / "figures"]
    found = [output, *(p for folder in folders for p in folder.glob("*") if p.name.startswith(output.stem))]
    return {p.relative_to(output.parent).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found) if p.is_file()}


def _state(notebook: Path, parameters: dict[str, Any]) -> dict[str, str]:
    cells = [c["source"] for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in CODE and "__pycache__" not in p.parts):
        digest.update(str(path.relative_to(PACKAGE)).encode())
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
