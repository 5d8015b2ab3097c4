"""Scenes of the mini world: glyphs composed over procedural context, with exact label maps and captions.

A scene depends on ``(seed, index)`` alone. Everything is drawn in units of the short side, so that scenes of any size
come from the same distribution. Shapes are (H, W); images are u8 (H, W, 3).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from ovdiff_lib.mini.world import IGNORE, Thing, World

LEVELS = (128, 64, 32)  # longer sides that a glyph is kept at; objects are drawn from the smallest that is not smaller

# Mean colours (RGB, 0..1) each stuff is drawn from; several of each, so that no stuff is one hue.
PALETTES = {
    "sky": [(0.53, 0.77, 0.95), (0.40, 0.64, 0.92), (0.72, 0.86, 0.96), (0.96, 0.76, 0.62), (0.35, 0.45, 0.72)],
    "grass": [(0.36, 0.62, 0.24), (0.50, 0.70, 0.30), (0.24, 0.50, 0.22), (0.62, 0.68, 0.32)],
    "water": [(0.12, 0.42, 0.66), (0.10, 0.52, 0.62), (0.16, 0.34, 0.58), (0.20, 0.58, 0.70)],
    "road": [(0.38, 0.38, 0.40), (0.30, 0.30, 0.33), (0.48, 0.47, 0.46)],
    "sand": [(0.90, 0.80, 0.56), (0.84, 0.70, 0.46), (0.94, 0.86, 0.66)],
    "snow": [(0.94, 0.96, 0.99), (0.88, 0.92, 0.97)],
    "wall": [(0.86, 0.82, 0.74), (0.70, 0.78, 0.76), (0.80, 0.70, 0.72), (0.66, 0.68, 0.80), (0.88, 0.86, 0.84)],
    "floor": [(0.62, 0.44, 0.28), (0.50, 0.34, 0.22), (0.72, 0.56, 0.38), (0.45, 0.42, 0.42)]}


@dataclass(frozen=True)
class Glyph:
    """A drawing of a noun: its style, whether models train on it, premultiplied pictures of it at :data:`LEVELS`."""

    style: str
    held: bool
    pictures: tuple[Image.Image, ...]


Glyphs = dict[str, list[Glyph]]


def glyph_table(world: World, arrays: dict[str, np.ndarray], styles: dict[str, str]) -> Glyphs:
    """Noun -> its glyphs in ``styles``, from straight-alpha arrays u8 (H, W, 4) named "style/key"."""
    def levels(array: np.ndarray) -> tuple[Image.Image, ...]:
        picture = Image.fromarray(array).convert("RGBa")
        factors = [side / max(picture.size) for side in LEVELS]
        return tuple(picture.resize([max(1, round(f * side)) for side in picture.size], Image.BOX) for f in factors)

    return {t.name: [Glyph(style, f"{style}/{key}" in t.held, levels(arrays[f"{style}/{key}"]))
                     for style, keys in t.glyphs.items() if style in styles for key in keys] for t in world.things}


@dataclass(frozen=True)
class Scene:
    """One drawn scene: ``image`` u8 (H, W, 3), ``labels`` u8 (H, W) in world ids with 255 on object edges, nouns and
    stuff seen, whether a noun's glyph is held, ``captions``: with its context, the paper's template, bare, short."""

    image: np.ndarray
    labels: np.ndarray
    nouns: tuple[str, ...]
    held: tuple[bool, ...]
    stuff: tuple[str, ...]
    captions: tuple[str, ...]


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: float, aspect: float = 1.0) -> np.ndarray:
    """Smooth noise f32 (H, W) in about [-1, 1], ``cells`` bumps a short side, stretched sideways by ``aspect``."""
    (height, width), short = shape, min(shape)
    grid = (max(2, round(cells * height / short) + 1), max(2, round(cells * width / short / aspect) + 1))
    coarse = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.BICUBIC))


def draw_stuff(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> np.ndarray:
    """A texture f32 (H, W, 3) in [0, 1] of one stuff, in its own colours, structure and lighting."""
    (height, width), short = shape, min(shape)
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
    return np.clip((base + shade[..., None]) * (1 - tint) + second * tint, 0, 1)


def _context(rng: np.random.Generator, parts: tuple[str, ...], shape: tuple[int, int]
             ) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Texture f32 (H, W, 3), each pixel's part u8 (H, W), the horizon as a share of the height, the lower texture."""
    if len(parts) == 1:
        image = draw_stuff(rng, parts[0], shape)
        return image, np.zeros(shape, np.uint8), 0.0, image
    height = shape[0]
    horizon = rng.uniform(0.35, 0.62)
    wobble = 0.004 if {"wall", "road", "floor", "water"} & set(parts) else 0.03
    line = horizon * height + wobble * min(shape) * _noise(rng, shape, 4)[0]
    below = np.clip(np.arange(height, dtype=np.float32)[:, None] + 1 - line[None, :], 0, 1)  # the edge is antialiased
    lower = draw_stuff(rng, parts[1], shape)
    upper = draw_stuff(rng, parts[0], shape)
    return upper + (lower - upper) * below[..., None], (below > 0.5).astype(np.uint8), horizon, lower


def _placed(rng: np.random.Generator, glyph: Glyph, size: float) -> np.ndarray:
    """A glyph mirrored, turned, sheared, seen slightly from the side: premultiplied f32 (h, w, 4), ``size`` long."""
    fitting = [p for p, side in zip(glyph.pictures, LEVELS, strict=True) if side >= size]
    picture = fitting[-1] if fitting else glyph.pictures[0]
    width, height = picture.size
    angle, shear, stretch = rng.normal(0, 0.09), rng.normal(0, 0.05), np.exp(rng.normal(0, 0.08))
    mirror = -1 if rng.uniform() < 0.5 else 1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = np.eye(3)
    forward[:2, :2] = turn @ np.array([[mirror * stretch, shear], [0, 1 / stretch]])
    forward[2, :2] = rng.normal(0, 0.12, 2) / max(width, height)  # perspective
    corners = forward @ np.array([[-width, width, width, -width], [-height, -height, height, height], [2, 2, 2, 2]]) / 2
    corners = corners[:2] / corners[2]
    low, high = corners.min(1), corners.max(1)
    scale = size / (high - low).max()
    # From the middles of the patch's pixels back to those of the picture.
    patch = np.maximum(3, np.ceil((high - low) * scale)).astype(int)
    to_patch = np.array([[scale, 0, -low[0] * scale], [0, scale, -low[1] * scale], [0, 0, 1]])
    centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    back = centre @ np.linalg.inv(to_patch @ forward)
    back /= back[2, 2]
    drawn = picture.transform(tuple(patch), Image.PERSPECTIVE, tuple(back.ravel()[:8]), Image.BILINEAR)
    return np.asarray(drawn, np.float32) / 255


def _lit(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """Mild hue, saturation and lightness changes and light from one side, so that not one hue carries the class."""
    angle, saturation = rng.normal(0, 0.13), rng.uniform(0.75, 1.15)
    c, s = np.cos(angle), np.sin(angle) / np.sqrt(3)
    k = (1 - c) / 3  # rotation of the colour about the grey axis
    rotate = np.array([[c + k, k - s, k + s], [k + s, c + k, k - s], [k - s, k + s, c + k]])
    grey = np.full((3, 3), 1 / 3)
    change = (saturation * rotate @ (np.eye(3) - grey) + grey) * rng.uniform(0.85, 1.12)
    side, lift = rng.normal(0, 0.12, 2), rng.uniform(-0.04, 0.04)
    rows, columns = np.linspace(-1, 1, patch.shape[0]), np.linspace(-1, 1, patch.shape[1])
    light = (1 + side[0] * rows[:, None] + side[1] * columns).astype(np.float32)
    alpha = patch[..., 3:]
    colour = (patch[..., :3] @ change.T.astype(np.float32)) * light[..., None] + np.float32(lift) * alpha
    return np.concatenate([np.minimum(np.maximum(colour, 0), alpha), alpha], -1)


def _paste(image: np.ndarray, patch: np.ndarray, top: int, left: int) -> np.ndarray:
    """Composite a premultiplied patch in place, cut off at the image's border; returns its alpha f32 (H, W)."""
    height, width = image.shape[:2]
    cover = np.zeros((height, width), np.float32)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + patch.shape[0], height), min(left + patch.shape[1], width)
    if y0 < y1 and x0 < x1:
        piece = patch[y0 - top : y1 - top, x0 - left : x1 - left]
        image[y0:y1, x0:x1] = piece[..., :3] + image[y0:y1, x0:x1] * (1 - piece[..., 3:])
        cover[y0:y1, x0:x1] = piece[..., 3]
    return cover


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels on both sides of a mask's edge, bool (H, W)."""
    return ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask, border_value=1)


def _top(rng: np.random.Generator, place: str, horizon: float, height: int, patch_height: int) -> int:
    """Row of the top edge of an object: standing on the lower stuff, floating above it, or anywhere."""
    free = max(height - patch_height, 0)
    if place == "ground":
        foot = rng.uniform(max(horizon + 0.12, 0.55), 0.98) * height
        return int(np.clip(foot - patch_height, -0.04 * height, free + 0.03 * height))
    if place == "air":
        return int(rng.uniform(0, free * 0.6 + 1))
    return int(rng.uniform(0, free + 1))


def _captions(rng: np.random.Generator, nouns: tuple[str, ...], stuff: tuple[str, ...], style: str, size: str
              ) -> tuple[str, ...]:
    """``style``: the word for how the first object is drawn, "" for none; ``size``: "good", "small", "" (between)."""
    where = " and ".join(stuff)
    if not nouns:
        return (f"a picture of {where}", f"a picture of {where}", where, where)
    what = " and a ".join(nouns)
    what = f"small {what}" if size == "small" else what
    words = ["good"] * (size == "good") + [style] * (rng.uniform() < 0.25)
    styled, short = (" ".join(filter(None, [*before, "picture"])) for before in ([style], words))
    return (f"a {styled} of a {what} with {where}", f"a {short} of a {what}", " and ".join(nouns),
            f"a {what} and {where}")


def _chosen(rng: np.random.Generator, world: World, objects: int, noun: str | None) -> list[Thing]:
    """Different nouns for the objects of a scene, the first given or not; a rare one once in a few hundred objects."""
    weights = np.array([0.1 if t.rare else 1.0 for t in world.things])
    chosen = [t for t in world.things if t.name == noun][:objects]
    while len(chosen) < objects:
        thing = world.things[rng.choice(len(world.things), p=weights / weights.sum())]
        if thing not in chosen:
            chosen.append(thing)
    return chosen


def draw_scene(world: World, glyphs: Glyphs, seed: int, index: int, shape: tuple[int, int], *, noun: str | None = None,
               objects: int | None = None, at_home: float = 0.85, held: float = 0.0) -> Scene:
    """Draw scene ``index`` of the stream ``seed`` at ``shape`` = (H, W).

    ``noun`` fixes the first object (default: random); ``objects`` how many (0 to 3, default random); ``at_home`` is how
    often the context is one of the first object's own; ``held`` the share of objects in glyphs that no model is trained
    on, where the noun has any. In one scene of ten the lower stuff covers the feet of what stands on it.
    """
    rng = np.random.default_rng([seed, index])
    if objects is None:
        objects = int(rng.choice(4, p=[0.05, 0.67, 0.21, 0.07]))
    chosen = _chosen(rng, world, objects, noun)
    # Some scenes are out of place: backgrounds then vary independently of objects.
    names = list(world.contexts)
    at_home = chosen and rng.uniform() < at_home
    context = str(rng.choice(chosen[0].contexts)) if at_home else names[rng.integers(len(names))]
    parts = world.contexts[context]
    image, part, horizon, lower = _context(rng, parts, shape)
    image = image.copy()
    height, width = shape
    labels = np.array([world.label(p) for p in parts], np.uint8)[part]
    edges, drawn, stands = np.zeros(shape, bool), [], []
    # "A good picture" shows one thing, large, in the middle and whole; half of the pictures of one thing are good.
    size, composed = 0.0, objects == 1 and rng.uniform() < 0.55
    for thing, slot in zip(chosen, rng.permutation(objects), strict=True):
        kinds = [[g for g in glyphs[thing.name] if g.held], [g for g in glyphs[thing.name] if not g.held]]
        pool = kinds[0] if kinds[0] and (rng.uniform() < held or not kinds[1]) else kinds[1]
        glyph = pool[rng.integers(len(pool))]
        low, high = (0.62, 0.95) if composed else ((0.25, 0.9), (0.3, 0.6), (0.25, 0.5))[objects - 1]
        size = rng.uniform(low, high)
        patch = _lit(rng, _placed(rng, glyph, size * min(shape)))
        top = _top(rng, thing.place, horizon, height, patch.shape[0])
        centre = (slot + rng.uniform(0, 1)) / objects * width
        if composed:
            centre = rng.normal(0.5, 0.04) * width
            top = int(rng.normal(0.5, 0.04) * height - patch.shape[0] / 2)
        left = int(np.clip(centre - patch.shape[1] / 2, -0.12 * patch.shape[1], width - 0.88 * patch.shape[1]))
        mask = _paste(image, patch, top, left) > 0.5
        labels[mask] = world.label(thing.name)
        edges = (edges & ~mask) | _outline(mask)
        drawn.append(glyph)
        if thing.place == "ground":
            stands.append((top + patch.shape[0], patch.shape[0]))
    soft = len(parts) == 2 and parts[1] not in ("road", "floor")
    if stands and not composed and soft and rng.uniform() < 0.2:  # covered by what the lowest of them stands on
        line = max(stands)[0] - rng.uniform(0.1, 0.25) * max(stands)[1] + 0.02 * min(shape) * _noise(rng, shape, 6)[0]
        below = np.clip(np.arange(height, dtype=np.float32)[:, None] + 1 - line[None, :], 0, 1)
        image += (lower * np.float32(rng.uniform(0.9, 1.08)) - image) * below[..., None]
        hidden = below > 0.5
        things = labels <= len(world.things)
        edges = (edges & ~hidden) | (_outline(hidden) & ndimage.binary_dilation(things & ~hidden))
        labels[hidden] = world.label(parts[1])
    visible = [int((labels == world.label(t.name)).sum()) >= 0.004 * min(shape) ** 2 for t in chosen]
    labels[edges] = IGNORE
    light = rng.uniform(0.88, 1.1) * (1 + rng.normal(0, 0.03, 3))
    u8 = (np.clip(image * light.astype(np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)
    nouns = tuple(t.name for t, seen in zip(chosen, visible, strict=True) if seen)
    word = "" if objects != 1 else "good" if composed else "small" if size < 0.45 else ""
    style = {**world.train_styles, **world.wild_styles}.get(drawn[0].style, "") if drawn and rng.uniform() < 0.5 else ""
    return Scene(u8, labels, nouns, tuple(g.held for g, seen in zip(drawn, visible, strict=True) if seen), parts,
                 _captions(rng, nouns, parts, style, word))
