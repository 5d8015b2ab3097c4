"""Label maps as pictures: one colour a class, painted over an image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ovdiff_lib.segmentation import Segmentation

if TYPE_CHECKING:
    pass


# ------------------------------------------------------------------ One colour for a class, by its name, in every figure, overlay, label map and page.

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
    from ovdiff_lib.mini.world import load_world
    from ovdiff_lib.workbench.data.classes import class_table

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


FADED = 0.65
"""How far the colours of an image fade to grey under the colour of a class, which they would change."""


def paint(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], alpha: float = 0.6) -> np.ndarray:
    """The image u8 (H, W, 3) with labels (H, W) painted over it; background (0) is only dimmed. ``class_names``, background first."""
    colours = colours_of(class_names)[labels].astype(np.float32)
    weight = np.where(labels == 0, 0.45, alpha)[..., None]
    faded = np.where(labels == 0, 0, FADED)[..., None]
    below = image.astype(np.float32) * (1 - faded) + image.mean(-1, keepdims=True, dtype=np.float32) * faded
    mixed = below * (1 - weight) + colours * weight
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    mixed[edge] = 255
    return mixed.round().astype(np.uint8)


def draw_overlay(result: Segmentation, alpha: float = 0.6) -> Image.Image:
    """Overlay with a legend of the classes found and the share of pixels of each; small images are enlarged to be readable."""
    from PIL import ImageDraw, ImageFont

    height, width = result.labels.shape
    factor = max(1, round(512 / max(height, width)))
    picture = Image.fromarray(result.image).resize((width * factor, height * factor), Image.BICUBIC)
    labels = np.kron(result.labels, np.ones((factor, factor), result.labels.dtype))
    picture = Image.fromarray(paint(np.asarray(picture), labels, result.class_names, alpha))
    found, counts = np.unique(result.labels, return_counts=True)
    order = [int(i) for i in found[np.argsort(-counts)] if i > 0]
    size = max(13, picture.width // 28)
    font = ImageFont.load_default(size)
    share = dict(zip(found.tolist(), counts / labels.size * factor**2, strict=True))
    entries = [(i, f"{result.class_names[i]}  {100 * share[i]:.0f} %") for i in order] or [(0, "no class found: background")]
    # The legend wraps into rows below the picture.
    x, y, pad, places = size // 2, size // 2, size // 2, []
    for index, text in entries:
        length = int(font.getlength(text)) + size + 2 * pad
        if x + length > picture.width and x > size // 2:
            x, y = size // 2, y + size + pad
        places.append((x, y, index, text))
        x += length
    # A long name under a narrow picture widens the sheet rather than being cut.
    widest = max(x + size + pad // 2 + int(font.getlength(text)) + pad for x, _, _, text in places)
    sheet = Image.new("RGB", (max(picture.width, widest), picture.height + y + size + pad), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    colours = colours_of(result.class_names)
    for x, y, index, text in places:
        top = picture.height + y
        draw.rectangle([x, top + 1, x + size - 2, top + size - 1], fill=tuple(colours[index].tolist()))
        draw.text((x + size + pad // 2, top), text, fill="black", font=font, anchor="la")
    return sheet
