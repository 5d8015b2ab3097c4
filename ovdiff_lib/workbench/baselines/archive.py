"""The images without labels that ReCo retrieves from, and CLIP's embeddings of them.

An archive is a folder of images, searched with its subfolders, or ``package:NAME``, one of ``ovdiff_lib/mini/data``. A
folder with ``sheet.json`` holds images of one size side by side in a picture: {"file", "images", "height", "width"}.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from ovdiff_lib.networks.instruments import batches
from ovdiff_lib.workbench.baselines.common import embed_images

PACKAGE = "package:"
SHIPPED = Path(__file__).parents[2] / "mini" / "data"
SHEET = "sheet.json"

BATCH = 64
"""Images embedded at a time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """Images u8 (H, W, 3): files, read when asked for, or arrays. ``identity`` is a hash of what it holds."""

    identity: str
    images: Sequence[Path | np.ndarray]

    def squares(self, numbers: Iterable[int], side: int) -> np.ndarray:
        """The central squares u8 (n, side, side, 3) of some of the images."""
        return np.stack([square_image(read_image(self.images[i]), side, "centre") for i in numbers])


def load_archive(source: str | Path) -> Archive:
    """The archive at a folder or ``package:NAME``. Raises ``InputError`` if there is none."""
    source = str(source)
    if not source:
        raise InputError("baselines.archive is not set; name a folder of images for ReCo to retrieve from.")
    folder = Path(source).expanduser()
    if source.startswith(PACKAGE):
        folder = SHIPPED / source.removeprefix(PACKAGE)
    if (folder / SHEET).is_file():
        return _sheet(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"The archive {source!r} is no folder with images ({', '.join(SUFFIXES)}); correct "
                         "baselines.archive.")
    states = ((p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    text = "\n".join(f"{name}\0{size}\0{time}" for name, size, time in states)
    return Archive(hashlib.sha256(text.encode()).hexdigest(), files)


def _sheet(folder: Path) -> Archive:
    try:
        table = json.loads((folder / SHEET).read_text(encoding="utf-8"))
        path, height, width = folder / table["file"], table["height"], table["width"]
        sheet = read_image(path)
        tiles = sheet.reshape(len(sheet) // height, height, -1, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
        return Archive(hashlib.sha256(path.read_bytes()).hexdigest(), list(tiles[:table["images"]]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The archive's file {folder / SHEET} cannot be read ({error!r}); restore it.") from None


def embed_archive(archive: Archive, clip: Any, model: str = "", cache: Path | None = None) -> Tensor:
    """CLIP's embeddings f32 (n, D), unit length, of each image's central square.

    With ``cache``, a folder, they are kept there between runs, by what the archive holds and by ``model``, which
    identifies CLIP's weights and precision; a file there that does not hold them is set right.
    """
    key = hashlib.sha256(json.dumps([archive.identity, model]).encode()).hexdigest()[:32]
    path, shape = cache / f"{key}.npy" if cache else None, (len(archive.images), clip.config.projection_dim)
    if path and path.exists():
        try:
            kept = np.load(path, allow_pickle=False)
            if kept.shape != shape or kept.dtype != np.float32 or (abs(np.linalg.norm(kept, axis=1) - 1) > 1e-3).any():
                raise ValueError(f"it does not hold {shape[0]} embeddings of {shape[1]} values")
            return torch.from_numpy(kept)
        except (OSError, ValueError, EOFError) as error:
            logger.warning("The file %s cannot be used (%s); its embeddings are computed again.", path, error)
    parts, side = [*batches(shape[0], BATCH)], clip.config.vision_config.image_size
    found = torch.cat([embed_images(clip, archive.squares(range(*part), side))
                       for part in tqdm(parts, "embedding the archive", unit="batch", delay=5)])
    if path:
        buffer = io.BytesIO()
        np.save(buffer, found.numpy())
        write_atomic(path, buffer.getvalue())
    return found
