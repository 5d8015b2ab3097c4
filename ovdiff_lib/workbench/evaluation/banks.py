"""Banks that no profile describes: support sets pooled over seeds (Fig. 5), classes drawn with several words (App. A.1).

Each function makes what a :class:`~ovdiff_lib.workbench.evaluation.bench.Row` takes as ``build``: (bench, seed, vocabulary) -> bank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import PrototypeBank, SupportSet
from ovdiff_lib.workbench.data.things import with_kinds
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.rows import Row

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff


def rows_of_sizes(bench: Bench, sizes: Sequence[int], settings: Mapping | None = None) -> list[Row]:
    """One row for each support size N (Fig. 5), measured on as many disjoint support sets as the bench's seeds hold.

    Up to ``support.size`` images each seed gives one set, its first N images. A larger set joins those of several seeds, so that with
    5 seeds of 16 images N = 32 is measured twice and N = 64 once, and nothing more is drawn. Raises ``InputError`` for a
    size that is not positive, and one above ``support.size`` that is no multiple of it or more than all seeds hold.
    """
    drawn = bench.profile.override(dict(settings or {})).support.size
    rows = []
    for size in sizes:
        joined = -(-size // drawn)
        if size < 1 or joined > len(bench.seeds) or (joined > 1 and size % drawn):
            raise InputError(f"A support set of {size} images cannot be made of {len(bench.seeds)} seeds with {drawn} each; use a size "
                             f"from 1 to {drawn} or a multiple of {drawn} up to {drawn * len(bench.seeds)}.")
        own = {**(settings or {}), "support.size": size}
        if joined == 1:
            rows.append(Row(f"N={size}", own))
        else:
            pooled = functools.partial(_pooled, joined=joined, drawn=drawn, settings=own)
            rows.append(Row(f"N={size}", {**own, "support.size": drawn}, build=pooled, seeds=len(bench.seeds) // joined))
    return rows


def _pooled(bench: Bench, seed: int, vocabulary: Vocabulary, *, joined: int, drawn: int, settings: Mapping) -> PrototypeBank:
    """The bank of the support sets of ``joined`` seeds: the first of the bench's for its first seed, the next ones for its second."""
    first = bench.seeds.index(seed) * joined
    parts = [bench.ovdiff({**settings, "support.size": drawn}, s) for s in bench.seeds[first : first + joined]]
    return _bank(parts[0], vocabulary, lambda category: [part.support(category) for part in parts])


def of_kinds(kinds: Sequence[str], settings: Mapping | None = None) -> Callable[[Bench, int, Vocabulary], PrototypeBank]:
    """Prototypes of these kinds alone (Table A.6), chosen from the full bank: what ``prototypes.kinds`` would build again."""

    def build(bench: Bench, seed: int, vocabulary: Vocabulary) -> PrototypeBank:
        bank = bench.ovdiff(settings, seed).build(vocabulary)
        return bank.map(lambda extractor, index, prototypes: prototypes.select(np.isin(prototypes.kind, list(kinds))))

    return build


def of_labels(source: str, settings: Mapping | None = None) -> Callable[[Bench, int, Vocabulary], PrototypeBank]:
    """The bank of the same classes as things and stuff by ``source`` (:func:`~ovdiff_lib.workbench.data.things.kinds`), what it does not
    name a thing; the data set's own labels have no say."""
    return lambda bench, seed, vocabulary: bench.ovdiff(settings, seed).build(with_kinds(vocabulary, source, "thing"))


def with_words(words: Mapping[str, Sequence[str]], settings: Mapping | None = None) -> Callable[[Bench, int, Vocabulary], PrototypeBank]:
    """A class whose name or prompt is in ``words`` is drawn with each of these words (synonyms, subclasses), ``support.size`` images in all
    (App. A.1, "Prompt template")."""

    def build(bench: Bench, seed: int, vocabulary: Vocabulary) -> PrototypeBank:
        ovdiff = bench.ovdiff(settings, seed)
        size = ovdiff.profile.support.size

        def supports(category: Category) -> list[SupportSet]:
            prompts = words.get(category.name) or words.get(category.prompt) or [category.prompt]
            share = [size // len(prompts) + (i < size % len(prompts)) for i in range(len(prompts))]
            return [bench.ovdiff({**(settings or {}), "support.size": count}, seed).support(dataclasses.replace(category, prompt=prompt))
                    for prompt, count in zip(prompts, share, strict=True) if count]

        return _bank(ovdiff, vocabulary, supports)

    return build


def _bank(ovdiff: OVDiff, vocabulary: Vocabulary, supports: Callable[[Category], list[SupportSet]]) -> PrototypeBank:
    rows: dict[str, list] = {name: [] for name in ovdiff.profile.features.extractors}
    for category in vocabulary:
        whole = dataclasses.replace(functools.reduce(SupportSet.joined, supports(category)), category=category)
        for name, prototypes in ovdiff.prototypes(whole, ovdiff.masks(whole)).items():
            rows[name].append(prototypes)
    return PrototypeBank(vocabulary, {name: tuple(made) for name, made in rows.items()})
