"""What flows between the steps of OVDiff: small frozen dataclasses, each the input of the next step.

Symbols used throughout the package: C categories, N support images a category, (H, W) image pixels, (h, w) feature
grid, D feature channels, P prototypes. Shapes are (H, W) everywhere; images are u8 RGB (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ovdiff_lib.categories import Category, Vocabulary

KINDS = ("class", "instance", "part")
REGIONS = ("foreground", "background")


@dataclass(frozen=True)
class SupportSet:
    """Support images of one category (Sec. 3.1) with the attribution of its class tokens (Sec. 3.2).

    ``images`` u8 (N, H, W, 3); ``attribution`` f32 (N, h, w) in [0, 1], or None of own pictures; ``seeds`` i64 (N,).
    """

    category: Category
    images: np.ndarray
    attribution: np.ndarray | None
    seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, chosen: Iterable[int]) -> SupportSet:
        """The support set of the images at the indices ``chosen`` alone, in that order."""
        index = list(chosen)
        attribution = None if self.attribution is None else self.attribution[index]
        return replace(self, images=self.images[index], attribution=attribution, seeds=self.seeds[index])

    def joined(self, other: SupportSet) -> SupportSet:
        """This support set followed by the images of another, of the same sizes; the category is this one's."""
        return replace(self, images=np.concatenate([self.images, other.images]),
                       attribution=np.concatenate([self.attribution, other.attribution]),
                       seeds=np.concatenate([self.seeds, other.seeds]))


@dataclass(frozen=True)
class ForegroundBackground:
    """Where the object is and is not in each support image: bool (N, H, W) each, disjoint; the rest is unused.

    ``source`` names for each image what made the masks ("threshold" or the segmenter's name).
    """

    foreground: np.ndarray
    background: np.ndarray
    source: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Prototypes of one category in one extractor's feature space (Eq. 2, 3).

    ``vectors`` f32 (P, D), raw; ``kind`` (P,) of :data:`KINDS`; ``region`` (P,) of :data:`REGIONS`; ``image`` i32 (P,)
    of an instance prototype, else -1; ``cluster`` i32 (P,) of a part and ``assignment`` i16 (N, h, w) of support
    features share a code: k is part k of the foreground, -k of the background, 0 none. Without parts a region is one.
    """

    vectors: np.ndarray
    kind: np.ndarray
    region: np.ndarray
    image: np.ndarray
    cluster: np.ndarray
    assignment: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    def cells(self, region: str) -> np.ndarray:
        """The support features that made the prototypes of a region: bool (N, h, w)."""
        return self.assignment > 0 if region == "foreground" else self.assignment < 0

    def cells_of(self, index: int) -> np.ndarray:
        """The support features whose mean prototype ``index`` is: bool (N, h, w). Of a part those of its cluster, of an
        instance those of its image's mask, of a class those of all masks."""
        if self.kind[index] == "part":
            return self.assignment == self.cluster[index]
        cells = self.cells(str(self.region[index]))
        if self.kind[index] == "instance":
            cells &= (np.arange(len(cells)) == self.image[index])[:, None, None]
        return cells

    def origin(self, index: int) -> dict[str, Any]:
        """Where prototype ``index`` comes from: ``kind``, ``region``, ``index``, the support ``images`` that it was
        made from, most cells first, and :meth:`cells_of` it in them, ``masks`` bool (len(images), h, w)."""
        cells = self.cells_of(index)
        count = cells.sum((1, 2))
        images = [int(n) for n in np.argsort(-count, kind="stable") if count[n]]
        return {"kind": str(self.kind[index]), "region": str(self.region[index]), "index": index,
                "images": tuple(images), "masks": cells[images]}

    def select(self, keep: np.ndarray) -> Prototypes:
        """The prototypes where ``keep`` (bool (P,)) holds; the assignment stays."""
        return Prototypes(self.vectors[keep], self.kind[keep], self.region[keep], self.image[keep], self.cluster[keep],
                          self.assignment)


@dataclass(frozen=True, eq=False)
class PrototypeBank:
    """Prototypes of every category: ``prototypes[extractor][i]`` belongs to ``vocabulary.categories[i]``."""

    vocabulary: Vocabulary
    prototypes: dict[str, tuple[Prototypes, ...]]

    @property
    def extractors(self) -> tuple[str, ...]:
        return tuple(self.prototypes)

    def counts(self, region: str) -> dict[str, tuple[int, ...]]:
        """How many prototypes of a region each category has here, by extractor: what filters left of them."""
        return {name: tuple(int((p.region == region).sum()) for p in rows) for name, rows in self.prototypes.items()}

    def restrict(self, kept: Iterable[int]) -> PrototypeBank:
        """The bank of the categories at the indices ``kept`` alone, in vocabulary order (pre-filter, Sec. 3.4)."""
        order = sorted(set(kept))
        vocabulary = Vocabulary(tuple(self.vocabulary.categories[i] for i in order))
        return PrototypeBank(vocabulary, {k: tuple(rows[i] for i in order) for k, rows in self.prototypes.items()})

    def without_background(self) -> PrototypeBank:
        """The bank with foreground prototypes only (the "w/o bg prototypes" row of Table 3)."""
        return self.map(lambda name, index, p: p.select(p.region == "foreground"))

    def map(self, function: Callable[[str, int, Prototypes], Prototypes]) -> PrototypeBank:
        """A bank of ``function(extractor, index, prototypes)`` of each category's prototypes."""
        return PrototypeBank(self.vocabulary, {
            name: tuple(function(name, i, p) for i, p in enumerate(rows)) for name, rows in self.prototypes.items()})
