"""Pseudo-masks of unlabelled scenes, and the mini detector's training views that are made from them (CutLER, Wang et
al., 2023)."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.recipes.build import forked_map

PASTE_RATIO = (0.3, 1.0)  # CutLER's COPY_PASTE_MIN_RATIO, COPY_PASTE_MAX_RATIO
ZOOM = 1.6  # a view shows at least 1 / ZOOM of a scene's sides
LEAST_AREA = 16  # pixels of a view; a mask with less left is no object any more


class PseudoMasks:
    """Masks of numbered scenes of one size, in memory as packed bits and on disk as one compressed file.

    ``key`` says what made them; a file with another key is refused, so that two settings never mix.
    """

    def __init__(self, path: Path, key: str, size: tuple[int, int]) -> None:
        self.path, self.key, self.size = path, key, size
        self.scenes: list[int] = []
        self.packed: list[np.ndarray] = []  # u8 (M, H, ceil(W / 8)) a scene

    @classmethod
    def load(cls, path: Path) -> PseudoMasks:
        """Raises ``InputError`` for a file that is missing or not of this kind."""
        try:
            with np.load(path) as file:
                store = cls(path, str(file["key"]), tuple(file["size"].tolist()))
                store.scenes = [int(name) for name in file.files if name.isdigit()]
                store.packed = [file[str(scene)] for scene in store.scenes]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"The pseudo-masks {path} cannot be read ({error}); delete the file.") from None
        return store

    def save(self) -> None:
        """Replace the file as a whole."""
        buffer, by_scene = io.BytesIO(), zip(map(str, self.scenes), self.packed, strict=False)
        np.savez_compressed(buffer, key=np.array(self.key), size=np.array(self.size), **dict(by_scene))
        write_atomic(self.path, buffer.getvalue())

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, position: int) -> np.ndarray:
        """Masks of the scene ``scenes[position]``, bool (M, H, W)."""
        return np.unpackbits(self.packed[position], axis=2, count=self.size[1]).astype(bool)

    def gather(self, scenes: Iterable[int], propose: Callable[[int], np.ndarray], every: int = 200, workers: int = 1
               ) -> PseudoMasks:
        """Fill the store with ``propose(scene)``, bool (M, H, W), of every scene it lacks, in this process or several;
        saved every so many, and whenever it ends.

        Begins with what the file holds, if there is one. Raises ``InputError`` if that was made with another key.
        """
        if self.path.exists():
            old = self.load(self.path)
            if (old.key, old.size) != (self.key, self.size):
                raise InputError(f"The pseudo-masks {self.path} were made with other settings; delete the file.")
            self.scenes, self.packed = old.scenes, old.packed
        known = set(self.scenes)
        missing = [scene for scene in scenes if scene not in known]
        bar = tqdm(missing, desc="pseudo-masks", mininterval=10, dynamic_ncols=True)
        found = forked_map(propose, missing, workers, chunksize=8)
        try:
            for done, (scene, masks) in enumerate(zip(bar, found, strict=True), 1):
                self.packed.append(np.packbits(masks, axis=2))
                self.scenes.append(scene)
                if done % every == 0:
                    self.save()
        finally:  # also where it is paused or interrupted
            if missing:
                self.save()
        return self


def boxes_of(masks: Tensor) -> Tensor:
    """(x0, y0, x1, y1) f32 (M, 4) of bool or u8 (M, H, W), none empty: outer edges, so that a mask of one pixel has
    a box of side 1."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0], device=masks.device)


def views(images: np.ndarray | Tensor, masks: list[np.ndarray], canvas: int, paste: float, generator: torch.Generator
          ) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Augmented images f32 (B, 3, canvas, canvas) and torchvision's targets, of u8 (B, H, W, 3) and bool (M, H, W), M
    >= 1, each; where the generator is.

    Every scene is zoomed into around one of its objects and mirrored half the time. With probability ``paste`` some
    objects of the next scene of the batch, shrunk by a ratio of :data:`PASTE_RATIO`, are pasted over it at a random
    place (CutLER's copy-paste).
    """
    (count, height, width, _), most, device = images.shape, max(len(m) for m in masks), generator.device
    pixels = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 255
    layers = torch.zeros(count, most, height, width, device=device)
    for i, found in enumerate(masks):
        layers[i, :len(found)] = torch.from_numpy(found).to(device)
    numbers, everyone = torch.tensor([len(m) for m in masks], device=device), torch.arange(count, device=device)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    def warp(x: Tensor, scale: Tensor, mirror: Tensor, centre: Tensor) -> Tensor:
        """Pixel p of the canvas, in [-1, 1], shows p * scale + centre of the scene."""
        theta = torch.zeros(count, 2, 3, device=device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, centre
        grid = F.affine_grid(theta, [count, x.shape[1], canvas, canvas], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def mirrored() -> Tensor:
        return torch.where(draw(0, 1) < 0.5, -1.0, 1.0)

    boxes = boxes_of(layers[everyone, (draw(0, 1) * numbers).long()])
    middle = (boxes[:, :2] + boxes[:, 2:]) / torch.tensor([width, height], device=device) - 1
    scale, mirror = 1 / draw(1, ZOOM), mirrored()
    low = torch.maximum(scale[:, None] - 1, middle - scale[:, None])
    high = torch.minimum(1 - scale[:, None], middle + scale[:, None])
    centre = low + (high - low) * draw(0, 1, 2)
    # The middle of a hollow or bent object need not belong to it: a view that lost all masks shows the whole scene
    # instead.
    lost = ((warp(layers, scale, mirror, centre) > 0.5).sum((2, 3)) < LEAST_AREA).all(1)
    scale, centre = torch.where(lost, 1.0, scale), torch.where(lost[:, None], 0.0, centre)
    shown, shown_masks = warp(pixels, scale, mirror, centre), warp(layers, scale, mirror, centre)

    ratio = draw(*PASTE_RATIO)
    # Some of the next scene's masks: the first of a random order, at least one.
    order = torch.rand(count, most, generator=generator, device=device)
    partner = numbers.roll(-1, 0)
    order[torch.arange(most, device=device) >= partner[:, None]] = 2  # none is there
    some = order.argsort(1).argsort(1) < 1 + (draw(0, 1) * partner).long()[:, None]
    picked = layers.roll(-1, 0) * some[:, :, None, None]
    # The shrunken scene covers the canvas from place - ratio to place + ratio.
    place, mirror = draw(-1, 1, 2) * (1 - ratio[:, None]), mirrored()
    toward = -place / ratio[:, None] * torch.stack([mirror, torch.ones_like(mirror)], dim=1)
    added = warp(picked, 1 / ratio, mirror, toward) * (draw(0, 1) < paste)[:, None, None, None]
    cover = added.amax(1, keepdim=True)
    shown = torch.lerp(shown, warp(pixels.roll(-1, 0), 1 / ratio, mirror, toward), cover)
    binary = torch.cat([(shown_masks > 0.5) & (cover <= 0.5), added > 0.5], dim=1)
    return shown, [as_target(layer, whole) for layer, whole in zip(binary, shown_masks > 0.5, strict=True)]


def as_target(masks: Tensor, otherwise: Tensor) -> dict[str, Tensor]:
    """Boxes, labels and masks of those bool (M, H, W) that have at least :data:`LEAST_AREA` pixels; of ``otherwise``
    if none has."""
    kept = masks[masks.sum((1, 2)) >= LEAST_AREA]
    if not len(kept):
        kept = otherwise[otherwise.any((1, 2))]
    labels = torch.ones(len(kept), dtype=torch.int64, device=masks.device)
    return {"boxes": boxes_of(kept), "labels": labels, "masks": kept.to(torch.uint8)}
