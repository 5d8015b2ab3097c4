"""Banks that no profile describes, each a ``build`` of a :class:`~ovdiff_lib.workbench.evaluation.rows.Row`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING

import numpy as np

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.types import PrototypeBank, SupportSet
from ovdiff_lib.workbench.data.samples import Dataset
from ovdiff_lib.workbench.data.things import with_kinds
from ovdiff_lib.workbench.evaluation.rows import Row

if TYPE_CHECKING:  # counts know the code that a bank runs; how tables are written is none of it
    from ovdiff_lib.workbench.evaluation.bench import Bench

Build = Callable[["Bench", int, Vocabulary], PrototypeBank]


def rows_of_sizes(bench: Bench, sizes: Sequence[int]) -> list[Row]:
    """One row for each support size N (Fig. 5), measured on as many disjoint support sets as the bench's seeds hold.

    Up to ``support.size`` each seed gives one set, its first N images. A larger one joins those of several seeds: with
    5 seeds of 16 images N = 32 is measured twice and N = 64 once. Raises ``InputError`` for other sizes.
    """
    rows, drawn = [], bench.profile.support.size
    for size in sizes:
        joined = -(-size // drawn)
        if size < 1 or joined > len(bench.seeds) or (joined > 1 and size % drawn):
            raise InputError(f"A support set of {size} images cannot be made of {len(bench.seeds)} seeds with {drawn}"
                             f" each; use 1 to {drawn}, or a multiple of it up to {drawn * len(bench.seeds)}.")
        build = partial(_pooled, joined=joined) if joined > 1 else None
        settings = {"support.size": min(size, drawn)}
        rows.append(Row(f"N={size}", settings, build=build, seeds=len(bench.seeds) // joined))
    return rows


def _pooled(bench: Bench, seed: int, vocabulary: Vocabulary, *, joined: int) -> PrototypeBank:
    """Of the support sets of ``joined`` seeds: the first ones for the bench's first seed, the next for its second."""
    first = bench.seeds.index(seed) * joined
    parts = [bench.ovdiff(seed=s) for s in bench.seeds[first : first + joined]]
    return _bank(parts[0], vocabulary, lambda category: [part.support(category) for part in parts])


def of_kinds(kinds: Sequence[str]) -> Build:
    """Prototypes of these kinds alone (Table A.6), from the full bank: what ``prototypes.kinds`` would build again."""
    return lambda bench, seed, vocabulary: bench.ovdiff(seed=seed).build(vocabulary).map(
        lambda extractor, index, prototypes: prototypes.select(np.isin(prototypes.kind, list(kinds))))


def of_labels(source: str) -> Build:
    """The same classes as things and stuff by ``source`` (:func:`~ovdiff_lib.workbench.data.things.with_kinds`),
    what it does not name a thing; the data set's own labels have no say."""
    return lambda bench, seed, vocabulary: bench.ovdiff(seed=seed).build(with_kinds(vocabulary, source, "thing"))


def with_words(words: Mapping[str, Sequence[str]], settings: Mapping | None = None) -> Build:
    """A class whose name or prompt is in ``words`` is drawn with each of these words (synonyms, subclasses),
    ``support.size`` images in all (App. A.1, "Prompt template")."""
    def build(bench: Bench, seed: int, vocabulary: Vocabulary) -> PrototypeBank:
        ovdiff = bench.ovdiff(settings, seed)
        size = ovdiff.profile.support.size

        def supports(category: Category) -> list[SupportSet]:
            prompts = words.get(category.name) or words.get(category.prompt) or [category.prompt]
            share = [size // len(prompts) + (i < size % len(prompts)) for i in range(len(prompts))]
            return [ovdiff.replaced({"support.size": count}).support(dataclasses.replace(category, prompt=prompt))
                    for prompt, count in zip(prompts, share, strict=True) if count]

        return _bank(ovdiff, vocabulary, supports)

    return build


def of_scenes(scenes: Dataset, chosen: Sequence[Sequence[int]], masked: bool) -> Build:
    """Own pictures in place of drawings: of each class its ``chosen`` ``scenes``, with true masks if ``masked``."""
    def build(bench: Bench, seed: int, vocabulary: Vocabulary) -> PrototypeBank:
        shown = {one: [scenes[i] for i in indices] for one, indices in zip(vocabulary, chosen, strict=True)}
        masks = {one: [sample.labels == label for sample in shown[one]] for label, one in enumerate(vocabulary, 1)}
        pictures = {one: [sample.image for sample in samples] for one, samples in shown.items()}
        return bench.ovdiff(seed=seed).build_from(pictures, masks if masked else {})

    return build


def _bank(ovdiff: OVDiff, vocabulary: Vocabulary, supports: Callable[[Category], list[SupportSet]]) -> PrototypeBank:
    """The bank of classes whose support sets are joined from several."""
    made = []
    for category in vocabulary:
        whole = dataclasses.replace(reduce(SupportSet.joined, supports(category)), category=category)
        made.append(ovdiff.prototypes(whole, ovdiff.masks(whole)))
    return PrototypeBank(vocabulary, {name: tuple(one[name] for one in made) for name in made[0]})
