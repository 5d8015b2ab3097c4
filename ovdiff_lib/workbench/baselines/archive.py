"""The images without labels that ReCo retrieves from, and their search by CLIP.

An archive is a folder of images, searched with its subfolders, or ``package:NAME``, one of ``ovdiff_lib/mini/data``. A
folder with ``sheet.json`` holds images of one size side by side in a picture: {"file", "images", "height", "width"}.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.filters.category import square_image
from ovdiff_lib.images import SUFFIXES, read_image
from ovdiff_lib.workbench.baselines.common import embed_images

PACKAGE = "package:"
SHIPPED = Path(__file__).parents[2] / "mini" / "data"
SHEET = "sheet.json"

BATCH = 64
"""Images embedded at a time."""

PROGRESS_FROM = 2000
"""Archives of at least so many images show a progress bar while they are embedded."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """Images u8 (H, W, 3) by number, ``archive[i]``: files, read when asked for, or arrays.

    ``source`` is how the user named it, ``identity`` a hash of what it holds.
    """

    source: str
    identity: str
    entries: Sequence[Path | np.ndarray]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.entries[index])


def load_archive(source: str | Path) -> Archive:
    """The archive at a folder or ``package:NAME``. Raises ``InputError`` if there is none or it cannot be read."""
    source = str(source)
    if not source:
        raise InputError("baselines.archive is not set; name a folder of images for ReCo to retrieve from.")
    folder = Path(source).expanduser()
    if source.startswith(PACKAGE):
        folder = SHIPPED / source.removeprefix(PACKAGE)
    if not folder.is_dir():
        raise InputError(f"The archive {source!r} does not exist ({folder} is no folder); correct baselines.archive.")
    if (folder / SHEET).is_file():
        return _sheet(source, folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"The archive {source!r} holds no image ({', '.join(SUFFIXES)}); correct baselines.archive.")
    states = ((p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    text = "\n".join(f"{name}\0{size}\0{time}" for name, size, time in states)
    return Archive(source, hashlib.sha256(text.encode()).hexdigest(), files)


def _sheet(source: str, folder: Path) -> Archive:
    try:
        table = json.loads((folder / SHEET).read_text(encoding="utf-8"))
        count, height, width = (int(table[key]) for key in ("images", "height", "width"))
        path = folder / str(table["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The archive's file {folder / SHEET} cannot be read ({error!r}); restore it.") from None
    sheet = read_image(path)
    tall, wide = sheet.shape[:2]
    if min(count, height, width) < 1 or tall % height or wide % width or count > tall * wide // (height * width):
        raise InputError(f"{path} of {tall} x {wide} pixels is not {count} images of {height} x {width}; restore it.")
    tiles = sheet.reshape(tall // height, height, wide // width, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    return Archive(source, hashlib.sha256(path.read_bytes()).hexdigest(), list(tiles[:count]))


class ArchiveIndex:
    """CLIP embeddings of an archive's images, computed when first asked for.

    With ``cache``, a folder, they are kept there between runs, by what the archive holds and by ``model``, which
    identifies CLIP's weights and precision; a file there that does not hold them is set right.
    """

    def __init__(self, archive: Archive, clip: Any, model: str = "", cache: Path | None = None) -> None:
        self.archive, self.clip = archive, clip
        key = hashlib.sha256(json.dumps([archive.identity, model]).encode()).hexdigest()[:32]
        self.path = cache / f"{key}.npy" if cache else None

    def nearest(self, text: Tensor, count: int) -> list[int]:
        """Numbers of the ``count`` images, or all, most like a unit text embedding f32 (D,), best first."""
        order = torch.argsort(self.embeddings @ text, descending=True, stable=True)
        return order[:count].tolist()

    @cached_property
    def embeddings(self) -> Tensor:
        """f32 (n, D), unit length, of each image's central square."""
        if self.path is not None and self.path.exists():
            try:
                array = np.load(self.path, allow_pickle=False)
                shape = (len(self.archive), self.clip.config.projection_dim)
                unit = array.shape == shape and (np.abs(np.linalg.norm(array, axis=1) - 1) < 1e-3).all()
                if array.dtype != np.float32 or not unit:
                    raise ValueError(f"it does not hold {shape[0]} embeddings of {shape[1]} values")
                return torch.from_numpy(array)
            except (OSError, ValueError, EOFError) as error:
                logger.warning("The file %s cannot be used (%s); its embeddings are computed again.", self.path, error)
        found = self._embed()
        if self.path is not None:
            buffer = io.BytesIO()
            np.save(buffer, found.numpy())
            write_atomic(self.path, buffer.getvalue())
        return found

    def _embed(self) -> Tensor:
        archive, side = self.archive, self.clip.config.vision_config.image_size
        parts = [range(start, min(start + BATCH, len(archive))) for start in range(0, len(archive), BATCH)]
        bar = tqdm(parts, f"embedding {archive.source}", unit="batch", disable=len(archive) < PROGRESS_FROM)
        return torch.cat([embed_images(self.clip, np.stack([square_image(archive[i], side, "centre") for i in part]))
                          for part in bar])
