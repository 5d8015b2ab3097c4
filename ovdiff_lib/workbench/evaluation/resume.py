"""The state of a long evaluation on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic

SAVE_EVERY = 10.0
"""Seconds between two writings; what a killed run loses at most."""

logger = logging.getLogger(__name__)


class Progress:
    """Confusion matrix and number of images done of one evaluation: ``folder/<data set>-<digest>.npz``.

    ``key`` is everything the evaluation depends on; its digest is in the file's name and the key itself in the file, so that a run never
    goes on from the state of another.
    """

    def __init__(self, folder: str | Path, name: str, key: dict[str, Any]) -> None:
        """Raises ``InputError`` for a key that is not plain data."""
        try:
            self.key = json.dumps(key, sort_keys=True, allow_nan=True)
        except TypeError as error:
            raise InputError(f"The settings of an evaluation that can be resumed must be plain numbers, texts, lists and tables ({error})."
                             ) from None
        self.path = Path(folder).expanduser() / f"{name}-{hashlib.sha256(self.key.encode()).hexdigest()[:16]}.npz"
        self._written = time.monotonic()

    def load(self, classes: int, total: int) -> tuple[int, np.ndarray]:
        """(images done, counts i64 (K, K)) of an interrupted run of K ``classes`` on ``total`` images; zeros if there is none.

        A file that is torn or of another evaluation is reported in the log and not used.
        """
        fresh = 0, np.zeros((classes, classes), np.int64)
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                key, done, counts = str(stored["key"]), int(stored["done"]), stored["counts"]
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("The saved state %s cannot be read (%s); the evaluation starts afresh.", self.path, error)
            return fresh
        if key != self.key or counts.dtype != np.int64 or counts.shape != fresh[1].shape or not 0 < done <= total or (counts < 0).any():
            logger.warning("The saved state %s is not of this evaluation; the evaluation starts afresh.", self.path)
            return fresh
        logger.info("Going on after %d of %d images, from %s.", done, total, self.path)
        return done, counts

    def save(self, done: int, counts: np.ndarray, *, now: bool = False) -> None:
        """Keep the state, at most every :data:`SAVE_EVERY` seconds unless ``now``. The file is whole or not there."""
        if not done or (not now and time.monotonic() - self._written < SAVE_EVERY):
            return
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(self.key), done=np.int64(done), counts=counts)
        write_atomic(self.path, buffer.getvalue())
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the state of a run that is finished."""
        self.path.unlink(missing_ok=True)
