""""Stuff" filter (Sec. 3.4): background prototypes that show what another category calls its foreground; its variants
of App. A.2."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.types import PrototypeBank, Prototypes

BLOCK = 8192
"""Prototypes compared at a time."""


class StuffFilter:
    """:func:`filter_stuff` that remembers its last bank, since one bank segments many images."""

    def __init__(self, settings: Filters) -> None:
        self.settings = settings
        self._last: tuple[PrototypeBank, PrototypeBank] | None = None

    def __call__(self, bank: PrototypeBank) -> PrototypeBank:
        last = self._last
        if last is None or last[0] is not bank:
            last = self._last = bank, filter_stuff(bank, self.settings)
        return last[1]


@undisturbed()
def filter_stuff(bank: PrototypeBank, settings: Filters) -> PrototypeBank:
    """The bank without misleading background prototypes; every extractor is judged in its own space. Foreground
    prototypes stay.

    As published (``stuff_against`` "stuff"): a thing category loses each whose cosine to any foreground prototype of
    any stuff category exceeds ``stuff_threshold``; stuff categories lose all of them, or none with
    ``stuff_background``. With "all" every category loses each that is so similar to any foreground prototype of another
    category, whatever its kind.

    Without ``stuff_parts`` the part prototypes of stuff categories are taken away before. Raises ``InputError`` for
    a category that would be left without foreground prototypes.
    """
    stuff = {i for i, category in enumerate(bank.vocabulary) if category.kind == "stuff"}
    everyone = settings.stuff_against == "all"
    if not stuff and not everyone:
        return bank
    if stuff and not settings.stuff_parts:
        bank = bank.map(lambda name, i, p: _without_parts(p, bank.vocabulary.names[i]) if i in stuff else p)
    judges = range(len(bank.vocabulary)) if everyone else sorted(stuff)
    judged_by = {name: _Judges({i: _unit(rows[i], rows[i].region == "foreground") for i in judges})
                 for name, rows in bank.prototypes.items()}

    def keep(extractor: str, index: int, prototypes: Prototypes) -> Prototypes:
        background = prototypes.region == "background"
        if index in stuff and not everyone:
            return prototypes if settings.stuff_background else prototypes.select(~background)
        # App. A.2 (all background by all foreground prototypes) leaves open whether a category judges itself. It does not here: the
        # filter's reason (Sec. 3.4) is background of one class that coincides with the foreground of another.
        nearest = judged_by[extractor].nearest(_unit(prototypes, background), index)
        if not background.any() or nearest is None:
            return prototypes
        kept = np.ones(len(prototypes), dtype=bool)
        kept[background] = (nearest <= settings.stuff_threshold).numpy()
        return prototypes.select(kept)

    return bank.map(keep)


def _without_parts(prototypes: Prototypes, name: str) -> Prototypes:
    kept = prototypes.without_parts()
    if not (kept.region == "foreground").any():
        raise InputError(f"The stuff class {name!r} has part prototypes alone, which filters.stuff_parts takes away; set it to true, or "
                         "add class or instance to prototypes.kinds.")
    return kept


class _Judges:
    """Unit vectors of several categories, one below the other, so that a category is compared with all the others in a
    few products."""

    def __init__(self, vectors: dict[int, torch.Tensor]) -> None:
        self.stacked = torch.cat(list(vectors.values())) if vectors else torch.zeros(0, 1, dtype=torch.float32, device="cpu")
        ends = list(itertools.accumulate((len(v) for v in vectors.values()), initial=0))
        self.place = dict(zip(vectors, itertools.pairwise(ends), strict=True))

    def nearest(self, vectors: torch.Tensor, index: int) -> torch.Tensor | None:
        """Highest cosine f32 (p,) of each unit vector (p, D) to any of another category than ``index``; None where
        there is no other."""
        start, stop = self.place.get(index, (0, 0))
        others = [block for part in (self.stacked[:start], self.stacked[stop:]) for block in part.split(BLOCK) if len(block)]
        if not others:
            return None
        return torch.stack([(vectors @ block.T).amax(1) for block in others]).amax(0)


def _unit(prototypes: Prototypes, chosen: np.ndarray) -> torch.Tensor:
    """The chosen vectors, L2-normalised: f32 (p, D)."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(prototypes.vectors[chosen], dtype=np.float32)), dim=1)
