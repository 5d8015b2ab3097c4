"""Counted results on disk: finished evaluations are found again, interrupted ones go on where they stopped.

    folder/<data set>-<digest>.npz      key (JSON text), done, counts i64 (T, K, K), seconds

The digest is that of the key, everything the counts depend on; the key itself is in the file, so that a result is never another's.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import logging
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic

PACKAGE = Path(__file__).parents[2]

NOT_METHOD = ("cli", "recipes", "mini", "workbench/analysis", "workbench/cost", "workbench/engines", "workbench/figures",
              "workbench/page", "workbench/tables", "workbench/vocabulary")
"""Folders of the package in which nothing can change a label."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counted:
    """State of an evaluation: images ``done``, ``counts`` i64 (T, K, K) of T label maps an image, ``seconds`` spent."""

    done: int
    counts: np.ndarray
    seconds: float


class ResultStore:
    """The counted results in ``folder``. A file is whole or not there; one that cannot be read is reported and counted anew."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def load(self, name: str, key: dict[str, Any], shape: tuple[int, int, int]) -> Counted:
        """The state of the evaluation ``key`` on the data set ``name``; an empty one of (T, K, K) = ``shape`` if there is none."""
        empty = Counted(0, np.zeros(shape, np.int64), 0.0)
        path, text = self._path(name, key)
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = str(stored["key"]), Counted(int(stored["done"]), stored["counts"], float(stored["seconds"]))
        except FileNotFoundError:
            return empty
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("The stored result %s cannot be read (%s); it is measured again.", path, error)
            return empty
        state = found[1]
        if found[0] != text or state.counts.shape != shape or state.counts.dtype != np.int64 or state.done < 0:
            logger.warning("The stored result %s is not of this evaluation; it is measured again.", path)
            return empty
        return state

    def save(self, name: str, key: dict[str, Any], state: Counted) -> None:
        """Keep a state. Raises ``InputError`` where the folder cannot be written."""
        path, text = self._path(name, key)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, key=np.array(text), done=np.int64(state.done), counts=state.counts, seconds=np.float64(state.seconds))
        write_atomic(path, buffer.getvalue())

    def _path(self, name: str, key: dict[str, Any]) -> tuple[Path, str]:
        try:
            text = json.dumps(key, sort_keys=True)
        except TypeError as error:
            raise InputError(f"What a stored result depends on must be plain numbers, texts, lists and tables ({error}).") from None
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz", text


def _statements(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@cache
def code_digest(leave_out: tuple[str, ...] = NOT_METHOD) -> str:
    """Hash (16 hex digits) of the package's files, but for those in the folders ``leave_out``: by default of those that can change a label
    map, so that results of other code are not taken for this one's.

    Of Python files the statements count, not comments, docstrings and layout.
    """
    names = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".csv", ".json"))
    chosen = [PACKAGE / name for name in names if not any(name.is_relative_to(folder) for folder in leave_out)]
    digest = hashlib.sha256()
    for path in sorted(chosen):
        content = _statements(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:16]
