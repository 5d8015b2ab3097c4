"""Which classes of a bank get in each other's way, from the prototypes alone, before any image is segmented.

Matching (Eq. 4) gives a pixel to the class of its nearest prototype, so two classes collide where the images of one lie nearer to the
other's prototypes than to those of their own class, or as near to them as the other's own images do. That is asked here of the support
images: each stands for an image the method has not seen, by its instance prototype, and its own class answers without it. No threshold
on a cosine is needed, which would differ from extractor to extractor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.types import Prototypes

BLOCK = 4096
"""Prototypes compared with as many others at a time: 64 MiB of cosines, and two blocks of unit vectors."""


@dataclass(frozen=True)
class Collisions:
    """How C classes lie to each other in one extractor's space; f32 (C, C) each, row A, column B, nan on the diagonal.

    ``highest``: largest cosine of a foreground prototype of A and one of B. ``mean``: mean cosine over all such pairs.
    ``lost``: share of A's images whose instance prototype is nearer to the class or an instance prototype of B than to A without that image
    (:func:`own_similarity`). ``passes``: share of A's images that would pass for one of B, being as near to its class or an instance
    prototype as half of B's own images are to B without them. ``background``: largest cosine of a background prototype of A and a
    foreground prototype of B. ``sunk``: share of A's images whose instance prototype is nearer to a background prototype of B than to A
    without that image. ``own`` f32 (C,): median over A's images of their similarity to A without them.

    nan where there is nothing to compare: ``lost``, ``sunk`` and ``own`` of a class with foreground in fewer than two images and ``passes``
    for such a class, ``background`` of an A and ``sunk`` by a B without background prototypes.
    """

    highest: np.ndarray
    mean: np.ndarray
    lost: np.ndarray
    passes: np.ndarray
    background: np.ndarray
    sunk: np.ndarray
    own: np.ndarray


def collide(prototypes: Sequence[Prototypes], device: str | torch.device = "cpu", block: int = BLOCK) -> Collisions:
    """Compare C >= 1 classes of one extractor, on ``device``, ``block`` prototypes with ``block`` at a time.

    Parts of a foreground count in ``highest`` and ``mean`` alone: a part of A may hold cells of the very image that is left out, so parts
    would help A against B. Background parts count, since there is no such image of A among those of B.

    Raises ``InputError`` for a class without foreground or without instance prototypes.
    """
    for p in prototypes:
        if not (foreground := p.region == "foreground").any() or not (foreground & (p.kind == "instance")).any():
            raise InputError("A class has no instance prototypes of its foreground, by which collisions are judged; "
                             "add instance to prototypes.kinds.")
    count = len(prototypes)
    highest, lost, passes, background, sunk = (np.full((count, count), np.nan, np.float32) for _ in range(5))
    own = [own_similarity(p) for p in prototypes]
    medians = np.array([np.median(o) for o in own], np.float32)
    front = [_ordered(p) for p in prototypes]
    whole = [int((p.kind[rows] != "part").sum()) for p, rows in zip(prototypes, front, strict=True)]
    back = [np.flatnonzero(p.region == "background") for p in prototypes]
    for rows in _groups([len(f) for f in front], block):
        queries = _unit(prototypes, front, rows, device)
        sizes = [len(front[a]) for a in rows]
        images = [torch.from_numpy(np.flatnonzero(prototypes[a].kind[front[a]] == "instance")).to(device) for a in rows]
        for columns in _groups([len(f) for f in front], block):
            similarity = (queries @ _unit(prototypes, front, columns, device).T).split([len(front[b]) for b in columns], 1)
            nearest = torch.stack([s.amax(1) for s in similarity], 1).split(sizes)
            others = torch.stack([s[:, : whole[b]].amax(1) for s, b in zip(similarity, columns, strict=True)], 1).split(sizes)
            for a, n, o, image in zip(rows, nearest, others, images, strict=True):
                highest[a, columns] = n.amax(0).cpu().numpy()
                lost[a, columns] = _share(o[image], own[a])
                as_near = (o[image].cpu().numpy() >= medians[columns]).mean(0)
                passes[a, columns] = np.where(np.isnan(medians[columns]), np.nan, as_near)
        filled = [b for b in range(count) if len(back[b])]
        for group in _groups([len(back[b]) for b in filled], block):
            columns = [filled[g] for g in group]
            similarity = (queries @ _unit(prototypes, back, columns, device).T).split([len(back[b]) for b in columns], 1)
            for a, n, image in zip(rows, torch.stack([s.amax(1) for s in similarity], 1).split(sizes), images, strict=True):
                background[columns, a] = n.amax(0).cpu().numpy()
                sunk[a, columns] = _share(n[image], own[a])
    centres = torch.stack([_unit(prototypes, front, [a], device).mean(0) for a in range(count)])
    mean = (centres @ centres.T).cpu().numpy()
    for table in (highest, mean, lost, passes, background, sunk):
        np.fill_diagonal(table, np.nan)
    return Collisions(highest, mean, lost, passes, background, sunk, medians)


def own_similarity(prototypes: Prototypes) -> np.ndarray:
    """How near each image of a class is to the class without it: f32 (n,) for the n images with foreground, in order.

    That is the highest cosine of the image's foreground instance prototype to the instance prototypes of the other images and
    to the mean foreground feature of the other images together; nan if there is no other image.
    """
    chosen = (prototypes.region == "foreground") & (prototypes.kind == "instance")
    vectors = torch.from_numpy(np.ascontiguousarray(prototypes.vectors[chosen], dtype=np.float32))
    if len(vectors) < 2:
        return np.full(len(vectors), np.nan, np.float32)
    weighted = vectors * torch.from_numpy(prototypes.cells("foreground").sum((1, 2))[prototypes.image[chosen]].astype(np.float32))[:, None]
    unit = F.normalize(vectors, dim=1)
    others = F.normalize(weighted.sum(0) - weighted, dim=1)  # a mean's length does not matter to a cosine
    pairs = (unit @ unit.T).fill_diagonal_(-1)
    return torch.maximum(pairs.amax(1), (unit * others).sum(1)).numpy()


def _share(similarity: torch.Tensor, own: np.ndarray) -> np.ndarray:
    """Of the n rows of ``similarity`` (n, b), the share that exceeds ``own`` f32 (n,), by column: f32 (b,)."""
    if len(own) < 2:
        return np.full(similarity.shape[1], np.nan, np.float32)
    return (similarity.cpu().numpy() > own[:, None]).mean(0, dtype=np.float32)


def _ordered(prototypes: Prototypes) -> np.ndarray:
    """Indices of the foreground prototypes, parts last."""
    rows = np.flatnonzero(prototypes.region == "foreground")
    return rows[np.argsort(prototypes.kind[rows] == "part", kind="stable")]


def _groups(sizes: Sequence[int], block: int) -> Iterator[list[int]]:
    """Consecutive classes whose ``sizes`` add up to at most ``block``; a larger class is alone."""
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and sum(sizes[g] for g in group) + size > block:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _unit(prototypes: Sequence[Prototypes], rows: Sequence[np.ndarray], chosen: Sequence[int], device) -> torch.Tensor:
    """The rows of the chosen classes, one after the other, L2-normalised: f32 (p, D)."""
    stacked = np.concatenate([prototypes[i].vectors[rows[i]] for i in chosen]).astype(np.float32, copy=False)
    return F.normalize(torch.from_numpy(stacked).to(device), dim=1)
