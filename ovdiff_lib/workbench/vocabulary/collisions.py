"""Which classes of a bank get in each other's way, from the prototypes alone, before any image is segmented.

Matching (Eq. 4) gives a pixel to the class of its nearest prototype, so two classes collide where images of one lie
nearer to the other's prototypes than to those of their own class, or as near as the other's own images do. Each support
image stands for an image the method has not seen, by its instance prototype, and its own class answers without it. That
needs no threshold on a cosine, which would differ from extractor to extractor.
"""

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
    """How C classes lie to each other in one extractor's space; f32 (C, C) each, row A, column B; nan on the diagonal
    and where a class has foreground in fewer than two images, or no background prototypes."""

    highest: np.ndarray  # cosine of the foreground prototypes of A and of B
    lost: np.ndarray  # share of A's images nearer to B (its class and instance prototypes) than to A without that image
    passes: np.ndarray  # share of A's images as near to B as half of B's own images are to B without them
    sunk: np.ndarray  # share of A's images nearer to a background prototype of B than to A without that image


def collide(prototypes: Sequence[Prototypes], device: str | torch.device = "cpu") -> Collisions:
    """Compare C >= 1 classes of one extractor, pair by pair. Parts of the foreground count in ``highest`` alone: they
    may hold cells of the image that is left out. ``InputError`` for a class without instance prototypes."""
    front, back = ([p.select(p.region == region) for p in prototypes] for region in ("foreground", "background"))
    if not all((p.kind == "instance").any() for p in front):
        raise InputError("Collisions are judged by instance prototypes; add instance to prototypes.kinds.")
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
    """How near each image of a class is to the class without it: f32 (n,) for the n images with foreground, the highest
    cosine of its foreground instance prototype to those of the other images and to the mean foreground feature of all
    of them; nan if there is no other image."""
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
