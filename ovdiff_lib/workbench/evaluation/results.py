"""Counted results on disk: finished evaluations are found again, interrupted ones go on where they stopped.

    folder/<data set>-<digest>.npz      a sparse matrix with a row for each image

The digest is of everything the counts depend on, so that a result is never another's.
"""

import hashlib
import io
import json
import logging
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array, load_npz, save_npz, vstack

from ovdiff_lib import code
from ovdiff_lib.files import write_atomic

NOTE = "note.txt"
"""Where a file of counts has its note."""

logger = logging.getLogger(__name__)


class Counts:
    """Confusion matrices of T label maps, i64 (T, K, K) a counted image, without zeros; ``note`` is for a footnote."""

    def __init__(self, shape: tuple[int, int, int], path: Path | None = None) -> None:
        """``path``, if there is one, is the file that :meth:`save` writes."""
        self.shape, self.path = tuple(shape), path
        self.note = ""
        self.rows = [csr_array((0, math.prod(shape)), dtype=np.int32)]

    def __len__(self) -> int:
        return sum(rows.shape[0] for rows in self.rows)

    def add(self, counts: np.ndarray) -> None:
        """Take in the next image's counts i64 (T, K, K)."""
        self.rows.append(csr_array(counts.reshape(1, -1).astype(np.int32)))

    def images(self) -> csr_array:
        """A row for each image, i32 (images, T * K * K)."""
        self.rows = [vstack(self.rows, format="csr")]
        return self.rows[0]

    def total(self) -> np.ndarray:
        """The sum over the images, i64 (T, K, K)."""
        return self.images().sum(0, dtype=np.int64).reshape(self.shape)

    def by_image(self, variant: int = 0) -> np.ndarray:
        """The matrices of one of the T label maps, i64 (images, K, K)."""
        size = self.shape[1] * self.shape[2]
        own = self.images()[:, variant * size:(variant + 1) * size]
        return own.toarray().astype(np.int64).reshape(-1, *self.shape[1:])

    def save(self) -> None:
        """Write the counts, if there are some, to their file. Raises ``InputError`` where that cannot be written."""
        if self.path is not None and len(self):
            buffer = io.BytesIO()
            save_npz(buffer, self.images())
            with zipfile.ZipFile(buffer, "a") as whole:
                whole.writestr(NOTE, self.note)
            write_atomic(self.path, buffer.getvalue())


def stored(folder: str | Path, name: str, key: dict[str, Any], shape: tuple[int, int, int], images: int) -> Counts:
    """What ``folder`` has of evaluation ``key``, at most ``images`` images of data set ``name``; warns of bad files."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    found = Counts(shape, Path(folder).expanduser() / f"{name}-{digest}.npz")
    if not found.path.exists():
        return found
    try:
        rows = csr_array(load_npz(found.path), dtype=np.int32)
        rows.check_format(full_check=True)
        if rows.shape[1] != math.prod(shape) or rows.shape[0] > images or (rows.data <= 0).any():
            raise ValueError("it is not of this evaluation")
        with zipfile.ZipFile(found.path) as whole:
            found.note = whole.read(NOTE).decode()
        found.rows = [rows]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("The stored result %s cannot be used (%s); it is measured again.", found.path, error)
    return found


def code_digest() -> str:
    """Hash (16 hex digits) of the package's code that can change a count."""
    return code.code_digest(*(f"ovdiff_lib.workbench.{name}" for name in (
        "evaluation.rows", "evaluation.measure", "evaluation.banks", "evaluation.shared", "data.datasets")))
