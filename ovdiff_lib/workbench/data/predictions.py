"""Predictions of any method, saved as label maps, to be scored under the same protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.workbench.data.samples import Sample, read_labels

OWN_ENDING = "_labels"
"""What ``ovdiff segment`` adds to an image's name; accepted beside the bare name."""


class SavedPredictions:
    """Label maps of a folder, one PNG an image (``<id>.png`` or ``<id>_labels.png``, 8-bit grey or palette), as segmenter of
    :func:`~ovdiff_lib.workbench.evaluation.measure.evaluate`.

    A pixel holds the label: 0 = background, i + 1 = category i of the data set; with ``zero_based`` i = category i, as methods without a
    background write them.
    """

    def __init__(self, folder: str | Path, zero_based: bool = False) -> None:
        self.folder, self.zero_based = Path(folder).expanduser(), zero_based
        if not self.folder.is_dir():
            raise InputError(f"The folder of predictions {self.folder} does not exist; give a folder with one PNG an image.")
        self._stored = {path.stem: path for path in self.folder.glob("*.png")}

    def check(self, ids: Sequence[str]) -> None:
        """``InputError`` naming the images of ``ids`` without a prediction."""
        missing = [i for i in ids if self._path(i) is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(f"The folder {self.folder} lacks {len(missing)} of {len(ids)} predictions:"
                             f" {', '.join(f'{i}.png' for i in missing[:3])}{more}; write one PNG an image, named by the image's id.")

    def __call__(self, sample: Sample) -> np.ndarray:
        """Labels i64 (H, W) of a sample; ``InputError`` for a label map of another size."""
        path = self._path(sample.id)
        if path is None:
            self.check([sample.id])
        labels = read_labels(path, sample.labels.shape).astype(np.int64)
        return labels + 1 if self.zero_based else labels

    def _path(self, identity: str) -> Path | None:
        return self._stored.get(identity) or self._stored.get(identity + OWN_ENDING)


def predictions_from(folder: str | Path, zero_based: bool = False) -> SavedPredictions:
    """The label maps in ``folder``, to be given to ``evaluate`` in place of a segmenter."""
    return SavedPredictions(folder, zero_based)
