"""The collection of images without labels that ReCo retrieves from, and its search by CLIP.

An archive is a folder of images, searched with its subfolders, or ``package:NAME``, one that ships in ``ovdiff_lib/mini/data/NAME``. A
folder with a file ``sheet.json`` holds images of one size side by side in a single picture: {"file", "images", "height", "width"}.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.filters.category import square_image
from ovdiff_lib.images import SUFFIXES, read_image
from ovdiff_lib.workbench.baselines.common import embed_images

if TYPE_CHECKING:
    from transformers import CLIPModel


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
    """Images u8 (H, W, 3) by number: ``archive[i]``, i from 0.

    ``source`` is how the user named it, ``identity`` a hash of what it holds; ``entries`` are files, read when asked for, or arrays.
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
        raise InputError("baselines.archive is not set, and ReCo needs images to retrieve from; name a folder of images (published: "
                         "ImageNet's training split).")
    folder = SHIPPED / source.removeprefix(PACKAGE) if source.startswith(PACKAGE) else Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(f"The archive {source!r} does not exist ({folder} is no folder); correct baselines.archive.")
    if (folder / SHEET).is_file():
        return _sheet(source, folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"The archive {source!r} holds no image ({', '.join(s[1:] for s in SUFFIXES)}); correct baselines.archive.")
    states = ((p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    digest = hashlib.sha256("\n".join(f"{name}\0{size}\0{time}" for name, size, time in states).encode())
    return Archive(source, digest.hexdigest(), files)


def _sheet(source: str, folder: Path) -> Archive:
    try:
        table = json.loads((folder / SHEET).read_text(encoding="utf-8"))
        count, height, width = (int(table[key]) for key in ("images", "height", "width"))
        path = folder / str(table["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The file {folder / SHEET} of the archive {source!r} cannot be read ({error!r}); restore it.") from None
    sheet = read_image(path)
    if min(count, height, width) < 1 or sheet.shape[0] % height or sheet.shape[1] % width or count > sheet.size // (3 * height * width):
        raise InputError(f"The picture {path} of {sheet.shape[0]} x {sheet.shape[1]} pixels cannot be {count} images of {height} x "
                         f"{width}; restore the archive.")
    tiles = sheet.reshape(sheet.shape[0] // height, height, sheet.shape[1] // width, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    return Archive(source, hashlib.sha256(path.read_bytes()).hexdigest(), list(tiles[:count]))


class ArchiveIndex:
    """CLIP embeddings of an archive's images: f32 ``embeddings`` (n, D), unit length, computed when first asked for.

    With ``cache``, a folder, they are kept there between runs, by what the archive holds and by ``model``, which identifies CLIP's
    weights and precision; a file there that does not hold n unit vectors is set right.
    """

    def __init__(self, archive: Archive, clip: CLIPModel, model: str = "", cache: Path | None = None) -> None:
        self.archive, self.clip = archive, clip
        key = hashlib.sha256(json.dumps([archive.identity, model]).encode()).hexdigest()[:32]
        self.path = cache / f"{key}.npy" if cache else None
        self._embeddings: Tensor | None = None

    def nearest(self, text: Tensor, count: int) -> list[int]:
        """Numbers of the ``count`` images (all, if there are fewer) most like a unit text embedding f32 (D,), best first."""
        order = torch.argsort(self.embeddings @ text, descending=True, stable=True)
        return order[:count].tolist()

    @property
    def embeddings(self) -> Tensor:
        """f32 (n, D), unit length, of each image's central square."""
        if self._embeddings is None:
            found = self._load()
            if found is None:
                found = self._embed()
                self._save(found)
            self._embeddings = found
        return self._embeddings

    def _embed(self) -> Tensor:
        side = self.clip.config.vision_config.image_size
        starts = range(0, len(self.archive), BATCH)
        bar = tqdm(starts, desc=f"embedding {self.archive.source}", unit="batch", disable=len(self.archive) < PROGRESS_FROM)
        return torch.cat([
            embed_images(self.clip, np.stack([square_image(self.archive[i], side, "centre")
                                              for i in range(start, min(start + BATCH, len(self.archive)))])) for start in bar])

    def _load(self) -> Tensor | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            array = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            logger.warning("The embeddings in %s cannot be read (%s) and are computed again.", self.path, error)
            return None
        shape = (len(self.archive), self.clip.config.projection_dim)
        if array.dtype != np.float32 or array.shape != shape or not (np.abs(np.linalg.norm(array, axis=1) - 1) < 1e-3).all():
            logger.warning("The file %s does not hold %d embeddings of %d values, which are computed again.", self.path, *shape)
            return None
        return torch.from_numpy(array)

    def _save(self, embeddings: Tensor) -> None:
        if self.path is not None:
            buffer = io.BytesIO()
            np.save(buffer, embeddings.numpy())
            write_atomic(self.path, buffer.getvalue())
