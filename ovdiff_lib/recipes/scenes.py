"""Scenes of the mini world: glyphs composed over procedural context, with exact label maps and captions.

A scene depends on ``(seed, index)`` alone. Everything is drawn in units of the short side, so that a 64-pixel training scene and a
128-pixel validation scene come from the same distribution. Shapes are (H, W); images are u8 (H, W, 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from ovdiff_lib.mini.world import IGNORE, Thing, World

Glyphs = dict[tuple[str, str], list[np.ndarray]]

# Mean colours (RGB, 0..1) each stuff is drawn from; several of each, so that no stuff is one hue.
PALETTES = {
    "sky": [(0.53, 0.77, 0.95), (0.40, 0.64, 0.92), (0.72, 0.86, 0.96), (0.96, 0.76, 0.62), (0.35, 0.45, 0.72)],
    "grass": [(0.36, 0.62, 0.24), (0.50, 0.70, 0.30), (0.24, 0.50, 0.22), (0.62, 0.68, 0.32)],
    "water": [(0.12, 0.42, 0.66), (0.10, 0.52, 0.62), (0.16, 0.34, 0.58), (0.20, 0.58, 0.70)],
    "road": [(0.38, 0.38, 0.40), (0.30, 0.30, 0.33), (0.48, 0.47, 0.46)],
    "sand": [(0.90, 0.80, 0.56), (0.84, 0.70, 0.46), (0.94, 0.86, 0.66)],
    "snow": [(0.94, 0.96, 0.99), (0.88, 0.92, 0.97)],
    "wall": [(0.86, 0.82, 0.74), (0.70, 0.78, 0.76), (0.80, 0.70, 0.72), (0.66, 0.68, 0.80), (0.88, 0.86, 0.84)],
    "floor": [(0.62, 0.44, 0.28), (0.50, 0.34, 0.22), (0.72, 0.56, 0.38), (0.45, 0.42, 0.42)],
}


@dataclass(frozen=True)
class Scene:
    """One drawn scene: ``image`` u8 (H, W, 3), ``labels`` u8 (H, W) in world ids with 255 on object edges, the nouns and stuff
    seen, and equivalent ``captions`` from the longest to the shortest."""

    image: np.ndarray
    labels: np.ndarray
    nouns: tuple[str, ...]
    stuff: tuple[str, ...]
    captions: tuple[str, ...]


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: float, aspect: float = 1.0) -> np.ndarray:
    """Smooth noise f32 (H, W) in about [-1, 1] with ``cells`` bumps a short side; ``aspect`` > 1 stretches bumps sideways."""
    height, width = shape
    short = min(shape)
    grid = (max(2, round(cells * height / short) + 1), max(2, round(cells * width / short / aspect) + 1))
    coarse = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.BICUBIC))


def draw_stuff(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> np.ndarray:
    """A texture f32 (H, W, 3) in [0, 1] of one stuff, in its own colours, structure and lighting."""
    height, width = shape
    short = min(shape)
    rows = np.arange(height, dtype=np.float32)[:, None] / short
    columns = np.arange(width, dtype=np.float32)[None, :] / short
    palette = PALETTES[name]
    base = np.array(palette[rng.integers(len(palette))], np.float32) + rng.normal(0, 0.03, 3).astype(np.float32)
    shade = 0.05 * _noise(rng, shape, 2) + rng.uniform(-0.08, 0.08) * (rows - 0.5)  # broad light
    tint = np.zeros((height, width, 1), np.float32)  # how much of a second colour
    second = np.ones(3, np.float32)
    if name == "sky":
        tint[..., 0] = np.clip(rng.uniform(0.4, 1.2) * (_noise(rng, shape, rng.uniform(3, 5), 2.0) - 0.25), 0, 0.75)
        shade = shade + 0.10 * (rows - 0.5)
    elif name == "grass":
        shade = shade + 0.05 * _noise(rng, shape, 14, 0.4) + 0.05 * _noise(rng, shape, 6)
    elif name == "water":
        phase = 2 * np.pi * (rng.uniform(7, 11) * rows + 0.35 * _noise(rng, shape, 4, 2.0))
        shade = shade + 0.06 * np.sin(phase) * (0.6 + 0.4 * _noise(rng, shape, 5, 2.0))
    elif name == "road":
        shade = shade + 0.02 * _noise(rng, shape, 24)
        level = rng.uniform(0.5, 0.9)
        dash = (np.abs(rows - level * height / short) < 0.015) & (np.mod(columns + rng.uniform(), 0.28) < 0.17)
        tint[..., 0] = 0.8 * dash * (rng.uniform() < 0.7)
    elif name == "sand":
        phase = 2 * np.pi * (rng.uniform(3, 5) * rows + 0.6 * _noise(rng, shape, 3, 1.5))
        shade = shade + 0.025 * np.sin(phase) + 0.03 * _noise(rng, shape, 20)
    elif name == "snow":
        tint[..., 0] = np.clip(0.55 * _noise(rng, shape, 3, 2.0) - 0.05, 0, 0.5)
        second = np.array([0.70, 0.80, 0.93], np.float32)
    elif name == "wall":
        kind = rng.integers(3)  # plain, stripes, bricks
        if kind == 1:
            shade = shade + 0.05 * (np.mod(columns * rng.uniform(4, 7) + rng.uniform(), 1) < 0.5)
        elif kind == 2:
            course = np.floor(rows * 7)
            joint = (np.mod(rows * 7, 1) < 0.16) | (np.mod(columns * 3.5 + 0.5 * np.mod(course, 2), 1) < 0.08)
            shade = shade - 0.07 * joint
    elif name == "floor":
        plank = np.floor(rows * rng.uniform(6, 9))
        tone = rng.normal(0, 0.035, int(plank.max()) + 1).astype(np.float32)
        shade = shade + tone[plank.astype(int)] + 0.03 * _noise(rng, shape, 10, 4.0)
    colour = base + shade[..., None]
    return np.clip(colour * (1 - tint) + second * tint, 0, 1)


def _context(rng: np.random.Generator, parts: tuple[str, ...], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Texture f32 (H, W, 3), index of the part at each pixel u8 (H, W), and the horizon as a fraction of the height."""
    if len(parts) == 1:
        return draw_stuff(rng, parts[0], shape), np.zeros(shape, np.uint8), 0.0
    height = shape[0]
    horizon = rng.uniform(0.35, 0.62)
    flat = {"wall", "road", "floor", "water"} & set(parts)
    wobble = 0.004 if flat else 0.03
    line = horizon * height + wobble * min(shape) * _noise(rng, shape, 4)[0]
    below = np.clip(np.arange(height, dtype=np.float32)[:, None] + 1 - line[None, :], 0, 1)  # the edge is antialiased
    image = draw_stuff(rng, parts[0], shape) * (1 - below[..., None]) + draw_stuff(rng, parts[1], shape) * below[..., None]
    return image, (below > 0.5).astype(np.uint8), horizon


def _recolour(rng: np.random.Generator, glyph: np.ndarray) -> np.ndarray:
    """Mild hue, saturation and lightness jitter of a straight-alpha glyph, so that shape and not one hue carries the class."""
    rgb = glyph[..., :3].astype(np.float32) / 255
    angle = rng.normal(0, np.deg2rad(7))
    grey = rgb.mean(-1, keepdims=True)
    c, s = np.cos(angle), np.sin(angle) / np.sqrt(3)
    k = (1 - c) / 3  # rotation of the colour about the grey axis
    rotate = np.array([[c + k, k - s, k + s], [k + s, c + k, k - s], [k - s, k + s, c + k]], np.float32)
    rgb = (rgb - grey) @ rotate.T * rng.uniform(0.8, 1.15) + grey
    rgb = np.clip(rgb * rng.uniform(0.88, 1.12) + rng.uniform(-0.04, 0.04), 0, 1)
    return np.concatenate([rgb * 255, glyph[..., 3:].astype(np.float32)], -1).astype(np.uint8)


def _draw_object(rng: np.random.Generator, glyph: np.ndarray, size: float) -> np.ndarray:
    """A glyph flipped, turned, recoloured and resized so that its longer side is ``size`` pixels; premultiplied f32 (h, w, 4) in [0, 1]."""
    if rng.uniform() < 0.5:
        glyph = glyph[:, ::-1]
    picture = Image.fromarray(_recolour(rng, glyph)).convert("RGBa")
    picture = picture.rotate(rng.normal(0, 4), Image.BILINEAR, expand=True)
    scale = size / max(picture.size)
    stretch = np.exp(rng.normal(0, 0.06))
    width = max(3, round(picture.width * scale * min(stretch, 1.0)))
    height = max(3, round(picture.height * scale / max(stretch, 1.0)))
    return np.asarray(picture.resize((width, height), Image.BOX if scale < 0.5 else Image.BILINEAR), np.float32) / 255


def _paste(image: np.ndarray, cover: np.ndarray, patch: np.ndarray, top: int, left: int) -> None:
    """Composite a premultiplied patch in place and write its alpha into ``cover`` f32 (H, W); parts outside are cut off."""
    height, width = cover.shape
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + patch.shape[0], height), min(left + patch.shape[1], width)
    if y0 >= y1 or x0 >= x1:
        return
    piece = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    image[y0:y1, x0:x1] = piece[..., :3] + image[y0:y1, x0:x1] * (1 - piece[..., 3:])
    cover[y0:y1, x0:x1] = piece[..., 3]


def _top(rng: np.random.Generator, place: str, horizon: float, height: int, patch_height: int) -> int:
    """Row of the top edge of an object: standing on the lower stuff, floating above it, or anywhere."""
    free = max(height - patch_height, 0)
    if place == "ground":
        foot = rng.uniform(max(horizon + 0.12, 0.55), 0.98) * height
        return int(np.clip(foot - patch_height, -0.04 * height, free + 0.03 * height))
    if place == "air":
        return int(rng.uniform(0, free * 0.6 + 1))
    return int(rng.uniform(0, free + 1))


def _captions(rng: np.random.Generator, nouns: tuple[str, ...], stuff: tuple[str, ...]) -> tuple[str, ...]:
    where = " and ".join(stuff)
    if not nouns:
        return (f"a picture of {where}", f"a good picture of a {where}", where)
    what = " and a ".join(nouns)
    return (f"a picture of a {what} with {where}", f"a good picture of a {what}", " and ".join(nouns), f"a {what} and {where}")


def draw_scene(world: World, glyphs: Glyphs, styles: tuple[str, ...], seed: int, index: int, shape: tuple[int, int], *,
               noun: str | None = None, objects: int | None = None, at_home: float = 0.85) -> Scene:
    """Draw scene ``index`` of the stream ``seed`` at ``shape`` = (H, W).

    ``noun`` fixes the first object (default: random, nouns of mini-voc twice as often); ``objects`` fixes how many (0, 1 or 2;
    default: 6 % none, 70 % one, 24 % two); ``at_home`` is how often the context is one of the first object's own. Objects are 0.5 to 0.9
    of the short side (0.42 to 0.60 when there are two).
    """
    rng = np.random.default_rng([seed, index])
    if objects is None:
        objects = int(rng.choice(3, p=[0.06, 0.70, 0.24]))
    weights = np.array([2.0 if t.voc else 1.0 for t in world.things])
    pick = lambda: world.things[rng.choice(len(world.things), p=weights / weights.sum())]  # noqa: E731
    chosen: list[Thing] = []
    while len(chosen) < objects:
        thing = next(t for t in world.things if t.name == noun) if noun and not chosen else pick()
        if thing not in chosen:
            chosen.append(thing)
    # Some scenes are out of place: backgrounds then vary independently of objects.
    names = list(world.contexts)
    context = str(rng.choice(chosen[0].contexts)) if chosen and rng.uniform() < at_home else names[rng.integers(len(names))]
    parts = world.contexts[context]
    image, part, horizon = _context(rng, parts, shape)
    height, width = shape
    short = min(shape)
    labels = np.array([world.label(p) for p in parts], np.uint8)[part]
    slots = [(0.0, 1.0)] if objects < 2 else [(0.0, 0.5), (0.5, 1.0)]
    edges = np.zeros(shape, bool)
    for thing, (start, stop) in zip(chosen, [slots[i] for i in rng.permutation(len(slots))], strict=False):
        style = styles[rng.integers(len(styles))]
        variants = glyphs[thing.name, style]
        low, high = (0.5, 0.9) if objects == 1 else (0.42, 0.60)
        size = rng.uniform(low, high) * short
        if thing.name in {"person", "giraffe", "bottle"}:  # thin figures are drawn taller
            size = min(size * 1.15, 0.95 * short)
        patch = _draw_object(rng, variants[rng.integers(len(variants))], size)
        top = _top(rng, thing.place, horizon, height, patch.shape[0])
        centre = rng.uniform(start, stop) * width if objects == 1 else rng.uniform(start + 0.2, stop - 0.2) * width
        left = int(np.clip(centre - patch.shape[1] / 2, -0.05 * width, width - 0.95 * patch.shape[1]))
        cover = np.zeros(shape, np.float32)
        _paste(image, cover, patch, top, left)
        labels = np.where(cover > 0.5, world.label(thing.name), labels).astype(np.uint8)
        mask = cover > 0.5
        edges = (edges & ~mask) | (ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask, border_value=1))
    labels[edges] = IGNORE
    nouns = tuple(t.name for t in chosen)
    u8 = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(u8, labels, nouns, parts, _captions(rng, nouns, parts))
