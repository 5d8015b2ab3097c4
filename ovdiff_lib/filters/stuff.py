""""Stuff" filter (Sec. 3.4, variants: App. A.2): background prototypes that show another category's foreground."""

import logging

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Filters, of_extractor
from ovdiff_lib.types import PrototypeBank, Prototypes

logger = logging.getLogger(__name__)


@undisturbed()
def filter_stuff(bank: PrototypeBank, settings: Filters) -> PrototypeBank:
    """The bank without misleading background prototypes, each extractor judged in its own space; foreground stays.

    As published (``stuff_against`` "stuff"): a thing category loses each whose cosine to any foreground prototype of
    any stuff category exceeds the extractor's ``stuff_threshold`` (grass behind cows); stuff categories lose all, or
    none with ``stuff_background``. With "all" every category loses each so similar to a foreground of any other.

    Without ``stuff_parts`` the part prototypes of stuff categories are taken away before. What :func:`bare` says of the
    result is logged. Raises ``InputError`` for a category that would be left without foreground prototypes.
    """
    stuff = [i for i, category in enumerate(bank.vocabulary) if category.kind == "stuff"]
    everyone = settings.stuff_against == "all"
    if not stuff and not everyone:
        return bank
    if stuff and not settings.stuff_parts:
        bank = bank.map(lambda _, i, p: _without_parts(p, bank.vocabulary.names[i]) if i in stuff else p)
    judges = range(len(bank.vocabulary)) if everyone else stuff
    judged_by = {}  # of each extractor the unit vectors of all judges, one below the other, and whose each is
    for name, rows in bank.prototypes.items():
        units = [_unit(rows[i], "foreground") for i in judges]
        judged_by[name] = torch.cat(units), np.repeat(judges, [len(unit) for unit in units])

    def keep(extractor: str, index: int, prototypes: Prototypes) -> Prototypes:
        background = prototypes.region == "background"
        if index in stuff and not everyone:
            return prototypes if settings.stuff_background else prototypes.select(~background)
        # App. A.2 (all background by all foreground prototypes) leaves open whether a category judges itself. It does
        # not here: the filter's reason (Sec. 3.4) is background of one class that is the foreground of another.
        vectors, owners = judged_by[extractor]
        threshold = of_extractor("filters.stuff_threshold", settings.stuff_threshold, extractor)
        alike, dropped = _unit(prototypes, "background") @ vectors.T > threshold, background.copy()
        dropped[background] = alike[:, torch.from_numpy(owners != index)].any(1)
        return prototypes.select(~dropped)

    left = bank.map(keep)
    for sentence in bare(bank, left, settings):
        logger.warning(sentence)
    return left


def without_background(bank: PrototypeBank, left: PrototypeBank, settings: Filters) -> dict[str, list[str]]:
    """By extractor the categories of ``bank`` of whose background prototypes the filter left none, though it should:
    stuff is meant to lose them, but where all judge all."""
    had, has, everyone = bank.counts("background"), left.counts("background"), settings.stuff_against == "all"
    return {name: [category.name for category, before, after in zip(bank.vocabulary, had[name], has[name], strict=True)
                   if before and not after and (everyone or category.kind == "thing")] for name in bank.extractors}


def bare(bank: PrototypeBank, left: PrototypeBank, settings: Filters) -> list[str]:
    """A sentence for each extractor in which the filter left nothing of the background prototypes of ``bank``, or of
    those of some categories (:func:`without_background`)."""
    said = []
    for name, lost in without_background(bank, left, settings).items():
        had, counts = (b.counts("background")[name] for b in (bank, left))
        if any(had) and not any(counts):
            said.append(f'The "stuff" filter left none of the {sum(had)} background prototypes of {name}: raise '
                        "filters.stuff_threshold, or name everything that images show.")
        elif lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            said.append(f'The "stuff" filter left {sum(counts)} of {sum(had)} background prototypes of {name}; without '
                        f"any: {', '.join(lost[:3])}{more}.")
    return said


def _without_parts(prototypes: Prototypes, name: str) -> Prototypes:
    kept = prototypes.select(prototypes.kind != "part")
    if not (kept.region == "foreground").any():
        raise InputError(f"The stuff class {name!r} has part prototypes alone, which filters.stuff_parts takes away; "
                         "set it to true, or add class or instance to prototypes.kinds.")
    return kept


def _unit(prototypes: Prototypes, region: str) -> torch.Tensor:
    """The vectors of a region, L2-normalised: f32 (p, D)."""
    chosen = prototypes.vectors[prototypes.region == region]
    return F.normalize(torch.from_numpy(np.ascontiguousarray(chosen, dtype=np.float32)), dim=1)
