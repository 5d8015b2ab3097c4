"""Which classes of a bank get in each other's way, from the prototypes alone, before any image is segmented.

Matching (Eq. 4) gives a pixel to the class of its nearest prototype, so two classes collide where images of one lie
nearer to the other's prototypes than to those of their own class, or as near as the other's own images do. Each support
image stands for an image the method has not seen, by its instance prototype, and its own class answers without it. That
needs no threshold on a cosine, which would differ from extractor to extractor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.types import Prototypes


@dataclass(frozen=True)
class Collisions:
    """How C classes lie to each other in one extractor's space; f32 (C, C) each, row A, column B.

    ``highest``: highest cosine of the foreground prototypes of A and of B. ``lost``: share of A's images nearer to B
    (its class and instance prototypes) than to A without that image. ``passes``: share of A's images as near to B as
    half of B's own images are to B without them. ``sunk``: share of A's images nearer to a background prototype of B
    than to A without that image. nan on the diagonal, and where there is nothing to compare: a class with foreground in
    fewer than two images, one without background prototypes.
    """

    highest: np.ndarray
    lost: np.ndarray
    passes: np.ndarray
    sunk: np.ndarray


def collide(prototypes: Sequence[Prototypes], device: str | torch.device = "cpu") -> Collisions:
    """Compare C >= 1 classes of one extractor, pair by pair.

    A part of A may hold cells of the very image that is left out, so parts of the foreground count in ``highest``
    alone. Raises ``InputError`` for a class without instance prototypes of its foreground.
    """
    front, back = ([p.select(p.region == region) for p in prototypes] for region in ("foreground", "background"))
    if not all((p.kind == "instance").any() for p in front):
        raise InputError("A class has no instance prototypes of its foreground, by which collisions are judged; add "
                         "instance to prototypes.kinds.")
    own = [own_similarity(p).to(device) for p in prototypes]
    half = [similarity.quantile(0.5) for similarity in own]
    everything, behind = ([_unit(p, device) for p in chosen] for chosen in (front, back))
    whole, images = ([_unit(p.select(keep(p.kind)), device) for p in front] for keep in (
        lambda kind: kind != "part", lambda kind: kind == "instance"))
    highest, lost, passes, sunk = tables = torch.full((4, len(front), len(front)), torch.nan)
    for a, b in itertools.permutations(range(len(front)), 2):
        highest[a, b] = (everything[a] @ everything[b].T).max()
        near = (images[a] @ whole[b].T).amax(1)
        if len(own[b]) > 1:
            passes[a, b] = (near >= half[b]).float().mean()
        if len(own[a]) > 1:
            lost[a, b] = (near > own[a]).float().mean()
        if len(own[a]) > 1 and len(behind[b]):
            sunk[a, b] = ((images[a] @ behind[b].T).amax(1) > own[a]).float().mean()
    return Collisions(*tables.numpy())


def own_similarity(prototypes: Prototypes) -> torch.Tensor:
    """How near each image of a class is to the class without it: f32 (n,) for the n images with foreground, in order.

    That is the highest cosine of the image's foreground instance prototype to the instance prototypes of the other
    images and to the mean foreground feature of the other images together; nan if there is no other image.
    """
    chosen = prototypes.select((prototypes.region == "foreground") & (prototypes.kind == "instance"))
    if len(chosen) < 2:
        return torch.full((len(chosen),), torch.nan)
    cells = torch.from_numpy(prototypes.cells("foreground").sum((1, 2))[chosen.image]).float()
    unit, weighted = _unit(chosen), torch.from_numpy(chosen.vectors).float() * cells[:, None]
    others = F.normalize(weighted.sum(0) - weighted, dim=1)  # a mean's length does not matter to a cosine
    pairs = (unit @ unit.T).fill_diagonal_(-1)
    return torch.maximum(pairs.amax(1), (unit * others).sum(1))


def _unit(prototypes: Prototypes, device: str | torch.device = "cpu") -> torch.Tensor:
    """The prototypes as unit vectors f32 (p, D)."""
    return F.normalize(torch.from_numpy(prototypes.vectors).float().to(device), dim=1)
