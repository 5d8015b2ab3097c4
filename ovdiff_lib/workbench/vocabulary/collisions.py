"""Which classes of a bank get in each other's way, from the prototypes alone, before any image is segmented.

Matching (Eq. 4) gives a pixel to the class of its nearest prototype, so two classes collide where images of one lie
nearer to the other's prototypes than to those of their own class, or as near as the other's own images do. Each support
image stands for an image the method has not seen, by its instance prototype, and its own class answers without it. That
needs no threshold on a cosine, which would differ from extractor to extractor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.types import Prototypes


@dataclass(frozen=True)
class Collisions:
    """How C classes lie to each other in one extractor's space; f32 (C, C) each, row A, column B, nan on the diagonal.

    ``highest``, ``mean``: cosine of the foreground prototypes of A and of B. ``lost``: share of A's images nearer to B
    (its class and instance prototypes) than to A without that image. ``passes``: share of A's images as near to B as
    half of B's own images are to B without them. ``background``: highest cosine of a background prototype of A and a
    foreground prototype of B. ``sunk``: share of A's images nearer to a background prototype of B than to A without
    that image. ``own`` f32 (C,): median similarity of A's images to A without them. nan where there is nothing to
    compare: a class with foreground in fewer than two images has no ``own``, one without background prototypes no
    ``background``.
    """

    highest: np.ndarray
    mean: np.ndarray
    lost: np.ndarray
    passes: np.ndarray
    background: np.ndarray
    sunk: np.ndarray
    own: np.ndarray


def collide(prototypes: Sequence[Prototypes], device: str | torch.device = "cpu") -> Collisions:
    """Compare C >= 1 classes of one extractor, one class with all at a time.

    A part of A may hold cells of the very image that is left out, so parts of the foreground count in ``highest`` and
    ``mean`` alone. Raises ``InputError`` for a class without instance prototypes of its foreground.
    """
    count = len(prototypes)
    front, back = ([np.flatnonzero(p.region == region) for p in prototypes] for region in ("foreground", "background"))
    kinds = [p.kind[rows] for p, rows in zip(prototypes, front, strict=True)]
    if not all((kind == "instance").any() for kind in kinds):
        raise InputError("A class has no instance prototypes of its foreground, by which collisions are judged; add "
                         "instance to prototypes.kinds.")
    own = [own_similarity(p) for p in prototypes]
    medians = np.array([np.median(similarity) for similarity in own], np.float32)
    foreground, owner = _stacked(prototypes, front, device)
    background, behind = _stacked(prototypes, back, device)
    whole, image = (torch.from_numpy(chosen).to(device) for chosen in
                    (np.concatenate(kinds) != "part", np.concatenate(kinds) == "instance"))
    filled = np.array([len(rows) > 0 for rows in back])
    names = ("highest", "mean", "lost", "passes", "background", "sunk")
    tables = {name: np.full((count, count), np.nan, np.float32) for name in names}
    centres = torch.stack([foreground[owner == a].mean(0) for a in range(count)])
    tables["mean"] = (centres @ centres.T).cpu().numpy()
    for a in range(count):
        mine, images = foreground[owner == a], foreground[(owner == a) & image]
        tables["highest"][a] = _by_class(mine @ foreground.T, owner, count).max(0)
        near = _by_class(images @ foreground[whole].T, owner[whole], count)
        if len(own[a]) > 1:
            sinks = _by_class(images @ background.T, behind, count)
            tables["lost"][a] = (near > own[a][:, None]).mean(0)
            tables["sunk"][a] = np.where(filled, (sinks > own[a][:, None]).mean(0), np.nan)
        tables["passes"][a] = np.where(np.isnan(medians), np.nan, (near >= medians).mean(0))
        if filled[a]:
            tables["background"][a] = _by_class(background[behind == a] @ foreground.T, owner, count).max(0)
    for table in tables.values():
        np.fill_diagonal(table, np.nan)
    return Collisions(**tables, own=medians)


def own_similarity(prototypes: Prototypes) -> np.ndarray:
    """How near each image of a class is to the class without it: f32 (n,) for the n images with foreground, in order.

    That is the highest cosine of the image's foreground instance prototype to the instance prototypes of the other
    images and to the mean foreground feature of the other images together; nan if there is no other image.
    """
    chosen = (prototypes.region == "foreground") & (prototypes.kind == "instance")
    vectors = torch.from_numpy(np.ascontiguousarray(prototypes.vectors[chosen], dtype=np.float32))
    if len(vectors) < 2:
        return np.full(len(vectors), np.nan, np.float32)
    cells = prototypes.cells("foreground").sum((1, 2))[prototypes.image[chosen]].astype(np.float32)
    unit, weighted = F.normalize(vectors, dim=1), vectors * torch.from_numpy(cells)[:, None]
    others = F.normalize(weighted.sum(0) - weighted, dim=1)  # a mean's length does not matter to a cosine
    pairs = (unit @ unit.T).fill_diagonal_(-1)
    return torch.maximum(pairs.amax(1), (unit * others).sum(1)).numpy()


def _by_class(similarity: torch.Tensor, owner: torch.Tensor, count: int) -> np.ndarray:
    """The highest of each row's columns by the class that owns them: f32 (n, count), -inf for a class without any."""
    highest = similarity.new_full((len(similarity), count), -torch.inf)
    return highest.scatter_reduce(1, owner.expand(len(similarity), -1), similarity, "amax").cpu().numpy()


def _stacked(prototypes: Sequence[Prototypes], rows: Sequence[np.ndarray],
             device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all classes, one after the other, L2-normalised: f32 (p, D), and the class of each, i64 (p,)."""
    vectors = np.concatenate([p.vectors[chosen] for p, chosen in zip(prototypes, rows, strict=True)])
    owner = np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows])
    return F.normalize(torch.from_numpy(vectors).float().to(device), dim=1), torch.from_numpy(owner).to(device)
