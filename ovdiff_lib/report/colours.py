"""One colour for a class, by its name, in every figure, overlay, label map and page.

Names that the project's data sets use have a colour each, the most distinct ones for the names met most; any other name takes one by a hash
of it, and moves on to the next where that is another's in the same vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

BACKGROUND = (40, 40, 46)
"""Background is dark grey."""

SLOTS = 512
"""Colours that are told apart; vocabularies with more classes use them again."""


def colours_of(class_names: Sequence[str]) -> np.ndarray:
    """Colours u8 (n, 3) of the class names of a segmentation, background first.

    A name of the data sets has the same colour in every vocabulary; another has it wherever no name before it in the vocabulary took it.
    """
    known, colours = _known(), _slots()
    taken: set[int] = {known[name] for name in class_names[1:] if name in known}
    made = [BACKGROUND]
    for name in class_names[1:]:
        slot = known.get(name)
        if slot is None:
            slot = int.from_bytes(hashlib.sha256(name.casefold().encode()).digest()[:4], "big") % SLOTS
            while slot in taken and len(taken) < SLOTS:
                slot = (slot + 1) % SLOTS
            taken.add(slot)
        made.append(tuple(colours[slot % SLOTS]))
    return np.array(made, np.uint8)


@cache
def _known() -> dict[str, int]:
    from ovdiff_lib.evaluation.classes import class_table
    from ovdiff_lib.mini.world import load_world

    world = load_world()
    names = [*world.vocabulary("mini-context"), *world.names]
    for entry in class_table()["data_sets"].values():
        names += entry["classes"]
    return {name: slot % SLOTS for slot, name in enumerate(dict.fromkeys(names))}


@cache
def _slots() -> np.ndarray:
    """u8 (SLOTS, 3): each the colour farthest, in CIELAB, from all before it, from background, from white and from the greys."""
    from skimage.color import rgb2lab

    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = rgb2lab(candidates[None] / 255)[0]
    clear = (lab[:, 0] > 38) & (lab[:, 0] < 88) & (np.hypot(lab[:, 1], lab[:, 2]) > 28)
    candidates, lab = candidates[clear], lab[clear]
    avoided = np.array([BACKGROUND, (255, 255, 255), (128, 128, 128), (190, 190, 190)], np.uint8)
    nearest = np.linalg.norm(lab[:, None] - rgb2lab(avoided[None] / 255)[0], axis=2).min(1)
    chosen = []
    for _ in range(SLOTS):
        pick = int(nearest.argmax())
        chosen.append(candidates[pick])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[pick], axis=1))
        nearest[pick] = -1
    return np.array(chosen, np.uint8)
