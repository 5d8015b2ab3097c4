"""What flows between the steps of OVDiff: small frozen dataclasses, each the input of the next step.

Symbols used throughout the package: C categories, N support images a category, (H, W) image pixels, (h, w) feature grid,
D feature channels, P prototypes. Shapes are (H, W) everywhere; images are u8 RGB (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError

KINDS = ("class", "instance", "part")
REGIONS = ("foreground", "background")


@dataclass(frozen=True)
class SupportSet:
    """Support images of one category (Sec. 3.1) with the attribution of its class tokens (Sec. 3.2).

    ``images`` u8 (N, H, W, 3); ``attribution`` f32 (N, h, w), each map min-max scaled to [0, 1]; ``seeds`` i64 (N,);
    ``provenance`` says with which model and settings they were drawn.
    """

    category: Category
    images: np.ndarray
    attribution: np.ndarray
    seeds: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, chosen: Iterable[int]) -> SupportSet:
        """The support set of the images at the indices ``chosen`` alone, in that order."""
        index = list(chosen)
        return replace(self, images=self.images[index], attribution=self.attribution[index], seeds=self.seeds[index])

    def joined(self, other: SupportSet) -> SupportSet:
        """This support set followed by the images of another of the same image and map size; category and provenance are this one's."""
        if self.images.shape[1:] != other.images.shape[1:] or self.attribution.shape[1:] != other.attribution.shape[1:]:
            raise InputError(f"Support images of {self.images.shape[1:3]} and {other.images.shape[1:3]} pixels cannot be joined; draw both "
                             "with the same support.image_size.")
        return replace(self, images=np.concatenate([self.images, other.images]), seeds=np.concatenate([self.seeds, other.seeds]),
                       attribution=np.concatenate([self.attribution, other.attribution]))


@dataclass(frozen=True)
class ForegroundBackground:
    """Where the object is and is not in each support image: bool (N, H, W) each, disjoint; pixels in neither are unused.

    ``source`` names for each image what made the masks ("threshold" or the segmenter's name).
    """

    foreground: np.ndarray
    background: np.ndarray
    source: tuple[str, ...]


@dataclass(frozen=True)
class Prototypes:
    """Prototypes of one category in one extractor's feature space (Eq. 2, 3).

    ``vectors`` f32 (P, D), raw; ``kind`` (P,) of :data:`KINDS`; ``region`` (P,) of :data:`REGIONS`; ``image`` i32 (P,) support image
    of an instance prototype, else -1; ``cluster`` i32 (P,) part code of a part prototype, else -1; ``assignment`` i16
    (N, h, w) part code of every support feature: part k of the foreground is k, of the background K + k, unused is -1.
    """

    vectors: np.ndarray
    kind: np.ndarray
    region: np.ndarray
    image: np.ndarray
    cluster: np.ndarray
    assignment: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    def part_assignment(self, region: str) -> np.ndarray:
        """Part code of every support feature that belongs to a part of ``region``, i16 (N, h, w); -1 elsewhere."""
        parts = self.cluster[(self.region == region) & (self.kind == "part")]
        return np.where(np.isin(self.assignment, parts), self.assignment, -1).astype(np.int16)

    def select(self, keep: np.ndarray) -> Prototypes:
        """The prototypes where ``keep`` (bool (P,)) holds; the assignment stays."""
        return Prototypes(self.vectors[keep], self.kind[keep], self.region[keep], self.image[keep], self.cluster[keep], self.assignment)


@dataclass(frozen=True)
class PrototypeBank:
    """Prototypes of every category: ``prototypes[extractor][i]`` belongs to ``vocabulary.categories[i]``."""

    vocabulary: Vocabulary
    prototypes: dict[str, tuple[Prototypes, ...]]

    @property
    def extractors(self) -> tuple[str, ...]:
        return tuple(self.prototypes)

    def restrict(self, kept: Iterable[int]) -> PrototypeBank:
        """The bank of the categories at the indices ``kept`` alone, in vocabulary order (category pre-filter, Sec. 3.4)."""
        order = sorted(set(kept))
        vocabulary = Vocabulary(tuple(self.vocabulary.categories[i] for i in order))
        return PrototypeBank(vocabulary, {name: tuple(rows[i] for i in order) for name, rows in self.prototypes.items()})

    def without_background(self) -> PrototypeBank:
        """The bank with foreground prototypes only (the "w/o bg prototypes" row of Table 3)."""
        return self.map(lambda name, index, p: p.select(p.region == "foreground"))

    def map(self, function) -> PrototypeBank:
        """A bank with ``function(extractor, index, prototypes) -> Prototypes`` applied to each category's prototypes."""
        return PrototypeBank(self.vocabulary, {
            name: tuple(function(name, i, p) for i, p in enumerate(rows)) for name, rows in self.prototypes.items()})


def origin(prototypes: Prototypes, index: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Support images that prototype ``index`` was made from, most pixels first, and its pixels in them: bool (len(images), h, w).

    A part prototype comes from the features assigned to its cluster, an instance prototype from the masked features of its image, the
    class prototype from those of all images.
    """
    kind, region = prototypes.kind[index], prototypes.region[index]
    if kind == "part":
        pixels = prototypes.assignment == prototypes.cluster[index]
    else:
        pixels = region_mask(prototypes, str(region))
        if kind == "instance":
            pixels = pixels & (np.arange(len(pixels)) == prototypes.image[index])[:, None, None]
    count = pixels.sum((1, 2))
    images = [int(n) for n in np.argsort(-count, kind="stable") if count[n]]
    return tuple(images), pixels[images]


def region_mask(prototypes: Prototypes, region: str) -> np.ndarray:
    """bool (N, h, w): the support features that made the prototypes of ``region``.

    Foreground codes of the assignment are those of the foreground part prototypes, or 0 in a set built without parts. A set whose
    parts were taken away afterwards no longer says which codes are which: ``InputError``.
    """
    codes = prototypes.cluster[(prototypes.kind == "part") & (prototypes.region == "foreground")]
    if not len(codes):
        if len(np.unique(prototypes.assignment[prototypes.assignment >= 0])) > 2:
            raise InputError("The part prototypes were taken out of this bank, so it cannot be explained; set prototypes.kinds and build "
                             "it again.")
        codes = np.zeros(1, np.int32)
    foreground = np.isin(prototypes.assignment, codes)
    return foreground if region == "foreground" else (prototypes.assignment >= 0) & ~foreground
