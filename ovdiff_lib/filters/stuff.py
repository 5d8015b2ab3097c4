""""Stuff" filter (Sec. 3.4): background prototypes that show what another category calls its foreground."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.types import PrototypeBank, Prototypes

BLOCK = 4096
"""Background prototypes compared at a time."""


def filter_stuff(bank: PrototypeBank, threshold: float = 0.85) -> PrototypeBank:
    """The bank without misleading background prototypes.

    Stuff categories lose all of theirs. A thing category loses each whose cosine similarity to any foreground prototype of any stuff
    category of the bank exceeds ``threshold``; every extractor is judged in its own space. Foreground prototypes stay, and a bank
    without stuff is returned as it is.
    """
    stuff = [i for i, category in enumerate(bank.vocabulary) if category.kind == "stuff"]
    if not stuff:
        return bank
    reference = {name: torch.cat([_unit(rows[i], rows[i].region == "foreground") for i in stuff]) for name, rows in bank.prototypes.items()}

    def keep(extractor: str, index: int, prototypes: Prototypes) -> Prototypes:
        background = prototypes.region == "background"
        if index in stuff:
            return prototypes.select(~background)
        if not background.any() or not len(reference[extractor]):
            return prototypes
        nearest = torch.cat([(part @ reference[extractor].T).amax(1) for part in _unit(prototypes, background).split(BLOCK)])
        kept = np.ones(len(prototypes), dtype=bool)
        kept[background] = (nearest <= threshold).numpy()
        return prototypes.select(kept)

    return bank.map(keep)


def _unit(prototypes: Prototypes, chosen: np.ndarray) -> torch.Tensor:
    """The chosen vectors, L2-normalised: f32 (p, D)."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(prototypes.vectors[chosen], dtype=np.float32)), dim=1)
