"""Counted results on disk: finished evaluations are found again, interrupted ones go on where they stopped.

    folder/<data set>-<digest>.npz      key (JSON text), lengths i64 (images,), places i32 (n,), values i32 (n,)

The key is everything the counts depend on. It is in the file, so that a result is never another's.
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
from ovdiff_lib.files import write_atomic

logger = logging.getLogger(__name__)


class Counts:
    """Confusion matrices of T label maps, i64 (T, K, K) for each image that was counted; what is zero is not kept."""

    def __init__(self, shape: tuple[int, int, int], path: Path | None = None, key: str = "") -> None:
        """``path``, if there is one, is the file that :meth:`save` writes, with the JSON text ``key``."""
        self.shape, self.path, self.key = tuple(shape), path, key
        self.images: list[tuple[np.ndarray, np.ndarray]] = []  # an image: places in (T, K, K), what is there, i32 (n,)

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

    def save(self) -> None:
        """Write the counts, if there are some, to their file. Raises ``InputError`` where that cannot be written."""
        if self.path is not None and self.images:
            places, values = map(np.concatenate, zip(*self.images, strict=True))
            lengths, buffer = [len(places) for places, _ in self.images], io.BytesIO()
            np.savez_compressed(buffer, key=np.array(self.key), lengths=lengths, places=places, values=values)
            write_atomic(self.path, buffer.getvalue())


def stored(folder: str | Path, name: str, key: dict[str, Any], shape: tuple[int, int, int], images: int) -> Counts:
    """What ``folder`` holds of the evaluation ``key`` on at most ``images`` images of the data set ``name``; of a file
    that cannot be used nothing, with a warning."""
    text = json.dumps(key, sort_keys=True)
    path = Path(folder).expanduser() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"
    found = Counts(shape, path, text)
    if not path.exists():
        return found
    try:
        with np.load(path, allow_pickle=False) as file:
            known, lengths, places, values = (file[part] for part in ("key", "lengths", "places", "values"))
        whole = len(lengths) <= images and len(places) == len(values) == lengths.sum() and (lengths >= 0).all()
        inside = not len(places) or (0 <= places.min() <= places.max() < np.prod(shape) and values.min() > 0)
        if str(known) != text or not whole or not inside:
            raise ValueError("it is not of this evaluation")
        parts = (np.split(part.astype(np.int32), np.cumsum(lengths)[:-1]) for part in (places, values))
        found.images = list(zip(*parts, strict=True))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("The stored result %s cannot be used (%s); it is measured again.", path, error)
    return found


def code_digest() -> str:
    """Hash (16 hex digits) of the package's code that can change a count."""
    return keys.code_digest(*(f"ovdiff_lib.workbench.{name}" for name in (
        "evaluation.rows", "evaluation.measure", "evaluation.banks", "data.datasets")))
