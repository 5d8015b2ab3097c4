"""What flows between the steps of OVDiff: small frozen dataclasses, each the input of the next step.

Symbols used throughout the package: C categories, N support images a category, (H, W) image pixels, (h, w) feature grid,
D feature channels, P prototypes. Shapes are (H, W) everywhere; images are u8 RGB (H, W, 3).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any

import numpy as np

from ovdiff_lib.errors import InputError

BACKGROUND = "background"
"""Name of class 0 of every segmentation; its positives are the background prototypes of the kept categories."""

MAX_NAME = 80
"""Longest category name, in characters."""

KINDS = ("class", "instance", "part")
REGIONS = ("foreground", "background")


@dataclass(frozen=True)
class Category:
    """One class of a vocabulary.

    ``name`` is what the user calls it, ``prompt`` the words given to the networks (default: the name), ``kind`` whether it is a
    countable "thing" or a region of "stuff" (Sec. 3.4, "stuff" filtering).
    """

    name: str
    prompt: str = ""
    kind: str = "thing"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.prompt, str):
            wrong = self.prompt if isinstance(self.name, str) else self.name
            raise InputError(f"A class name and its prompt must be text, not {' '.join(repr(wrong).split())[:60]}.")
        name = unicodedata.normalize("NFC", " ".join(self.name.split()))
        # Separators, control and format characters alone cannot be seen; within emoji and scripts format characters are legal.
        if not _unreadable(name) and all(unicodedata.category(c)[0] in "CZ" for c in name):
            raise InputError("A class name is empty: give each class at least one visible character.")
        if len(name) > MAX_NAME:
            raise InputError(f"The class name {name[:30]!r}... has {len(name)} characters; use at most {MAX_NAME}.")
        for what, text in (("name", name), ("prompt", " ".join(self.prompt.split()))):
            if _unreadable(text):
                raise InputError(f"The class {what} {text[:MAX_NAME]!r} holds a control character or a broken one; remove it.")
        if self.kind not in ("thing", "stuff"):
            raise InputError(f"The kind of class {name!r} is {self.kind!r}; it must be 'thing' or 'stuff'.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "prompt", " ".join(self.prompt.split()) or name)


def _unreadable(text: str) -> bool:
    """Whether the text holds control characters or lone surrogates (what undecodable bytes on a command line become)."""
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


@dataclass(frozen=True)
class Vocabulary:
    """Ordered, validated categories: at least one, no two of one name (compared without case), none called "background"."""

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        if not self.categories:
            raise InputError("The vocabulary has no class: name at least one, for example --classes \"cat, sofa\".")
        seen: dict[str, str] = {}
        for category in self.categories:
            key = category.name.casefold()
            if key == BACKGROUND:
                raise InputError("The class 'background' is added by the method itself; leave it out of the vocabulary.")
            if key in seen:
                raise InputError(f"The class {category.name!r} is named twice in the vocabulary; name it once.")
            seen[key] = category.name

    @classmethod
    def of(cls, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] | str = ()) -> Vocabulary:
        """A vocabulary from names ("cat, sofa" or ["cat", "sofa"]) or categories; names in ``stuff``, written alike, become stuff."""
        if isinstance(classes, Vocabulary):
            return classes
        if isinstance(classes, str):
            classes = classes.split(",")
        if not isinstance(classes, Iterable):
            raise InputError(f'Classes are names, as in "cat, sofa" or ["cat", "sofa"], or a Vocabulary, not {shorten(repr(classes), 40)}.')
        stuff = [s for s in stuff.split(",") if s.strip()] if isinstance(stuff, str) else stuff
        marked = {Category(s).name.casefold() for s in stuff}
        made = []
        for entry in classes:
            if not isinstance(entry, Category):
                entry = Category(entry)
                if entry.name.casefold() in marked:
                    entry = Category(entry.name, entry.prompt, "stuff")
            made.append(entry)
        return cls(tuple(made))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.categories)

    def __len__(self) -> int:
        return len(self.categories)

    def __iter__(self) -> Iterator[Category]:
        return iter(self.categories)


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


@dataclass(frozen=True)
class Segmentation:
    """A segmented image.

    ``image`` u8 (H, W, 3); ``labels`` i32 (H, W), 0 = background, i + 1 = ``vocabulary.categories[i]``; ``kept_scores`` f32
    (1 + len(kept), H, W) cosine similarities of background and of the categories in ``kept``; ``winner`` i32 (H, W) index of the
    prototype that decided the pixel within the winning class (of the first extractor), -1 where none; ``kept`` indices of the categories
    the pre-filter kept; ``filter_scores`` f32 (C,) its class probabilities; ``bank`` the prototypes it was matched with, after
    the filters.
    """

    image: np.ndarray
    labels: np.ndarray
    kept_scores: np.ndarray
    winner: np.ndarray
    vocabulary: Vocabulary
    kept: tuple[int, ...]
    filter_scores: np.ndarray
    bank: PrototypeBank | None = field(default=None, repr=False, compare=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label id, "background" first."""
        return (BACKGROUND, *self.vocabulary.names)

    @property
    def scores(self) -> np.ndarray:
        """Scores of the whole vocabulary, f32 (C + 1, H, W), -inf for categories that the pre-filter dropped; made at each call, as large
        as the vocabulary."""
        full = np.full((len(self.vocabulary) + 1, *self.labels.shape), -np.inf, np.float32)
        full[[0, *(k + 1 for k in self.kept)]] = self.kept_scores
        return full

    def scores_at(self, row: int, column: int) -> np.ndarray:
        """Scores f32 (C + 1,) of one pixel, -inf for categories that the pre-filter dropped."""
        full = np.full(len(self.vocabulary) + 1, -np.inf, np.float32)
        full[[0, *(k + 1 for k in self.kept)]] = self.kept_scores[:, row, column]
        return full

    def overlay(self, alpha: float = 0.6):
        """The image with its labels painted over it and a legend, as a PIL image."""
        from ovdiff_lib.report.figures import draw_overlay

        return draw_overlay(self, alpha)

    def explain(self, row: int, column: int):
        """Why the pixel at (row, column) got its label: an :class:`~ovdiff_lib.explain.Explanation` (Sec. 4.4)."""
        from ovdiff_lib.explain import explain

        if self.bank is None:
            raise InputError("This segmentation was made without its prototypes, so it cannot be explained; segment the image with OVDiff.")
        return explain(self, self.bank, row, column)
