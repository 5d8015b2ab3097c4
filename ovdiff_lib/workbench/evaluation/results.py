"""Counted results on disk: finished evaluations are found again, interrupted ones go on where they stopped.

    folder/<data set>-<digest>.npz      key (JSON text), lengths i64 (images,), places i32 (n,), values i32 (n,)

The digest is that of the key, everything the counts depend on; the key itself is in the file, so that a result is never another's.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib import keys
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic

logger = logging.getLogger(__name__)


class Counts:
    """Confusion matrices of T label maps, i64 (T, K, K) for each image that was counted, of which only what is not zero is kept."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = tuple(shape)
        self.images: list[tuple[np.ndarray, np.ndarray]] = []  # for each image places in the (T, K, K) and what is there, i32 (n,)

    def __len__(self) -> int:
        return len(self.images)

    def add(self, counts: np.ndarray) -> None:
        """Take in the next image's counts i64 (T, K, K)."""
        places = np.flatnonzero(counts)
        self.images.append((places.astype(np.int32), counts.ravel()[places].astype(np.int32)))

    def total(self) -> np.ndarray:
        """The sum over the images, i64 (T, K, K)."""
        total = np.zeros(int(np.prod(self.shape)), np.int64)
        for places, values in self.images:
            total[places] += values
        return total.reshape(self.shape)

    def by_image(self, variant: int = 0) -> np.ndarray:
        """The matrices of one of the T label maps, i64 (images, K, K)."""
        size = self.shape[1] * self.shape[2]
        made = np.zeros((len(self), size), np.int64)
        for row, (places, values) in zip(made, self.images, strict=True):
            own = places // size == variant
            row[places[own] % size] = values[own]
        return made.reshape(len(self), *self.shape[1:])


class ResultStore:
    """The counted results in ``folder``. A file is whole or not there; one that cannot be read is reported and counted anew."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def load(self, name: str, key: dict[str, Any], shape: tuple[int, int, int], images: int) -> Counts:
        """The counts of the evaluation ``key`` on at most ``images`` images of the data set ``name``; none where there is no such file."""
        found, (path, text) = Counts(shape), self._path(name, key)
        try:
            with np.load(path, allow_pickle=False) as stored:
                known, lengths, places, values = (stored[part] for part in ("key", "lengths", "places", "values"))
            if str(known) != text or len(lengths) > images or not len(places) == len(values) == lengths.sum() or (lengths < 0).any() or (
                    len(places) and not (0 <= places.min() <= places.max() < np.prod(shape) and values.min() > 0)):
                raise ValueError("it is not of this evaluation")
            ends = np.cumsum(lengths)[:-1]
            found.images = list(zip(np.split(places.astype(np.int32), ends), np.split(values.astype(np.int32), ends), strict=True))
        except FileNotFoundError:
            return found
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("The stored result %s cannot be used (%s); it is measured again.", path, error)
        return found

    def save(self, name: str, key: dict[str, Any], counts: Counts) -> None:
        """Keep the counts of at least one image. Raises ``InputError`` where the folder cannot be written."""
        path, text = self._path(name, key)
        places, values = (np.concatenate(part) for part in zip(*counts.images, strict=True))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, key=np.array(text), lengths=[len(places) for places, _ in counts.images], places=places, values=values)
        write_atomic(path, buffer.getvalue())

    def _path(self, name: str, key: dict[str, Any]) -> tuple[Path, str]:
        try:
            text = json.dumps(key, sort_keys=True)
        except TypeError as error:
            raise InputError(f"What a stored result depends on must be plain numbers, texts, lists and tables ({error}).") from None
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz", text


def code_digest() -> str:
    """Hash (16 hex digits) of the package's code that can change a count: results of other code are not taken for this one's."""
    return keys.code_digest(*(f"ovdiff_lib.workbench.{name}" for name in (
        "evaluation.rows", "evaluation.measure", "evaluation.banks", "data.datasets")))
