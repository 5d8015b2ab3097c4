"""Counted results on disk: finished evaluations are found again, interrupted ones go on where they stopped.

    folder/<data set>-<digest>.npz      key (JSON text), done, counts i64 (T, K, K), seconds

The digest is that of the key, everything the counts depend on; the key itself is in the file, so that a result is never another's.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib import keys
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic

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


def code_digest() -> str:
    """Hash (16 hex digits) of the package's code that can change a count: results of other code are not taken for this one's."""
    return keys.code_digest("ovdiff_lib.workbench.evaluation.rows", "ovdiff_lib.workbench.evaluation.study")
