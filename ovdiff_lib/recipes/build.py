"""Draw the data of the mini world: training scenes (not shipped), the splits and an archive of scenes (shipped).

:mod:`ovdiff_lib.recipes.rebuild` has it done. Every array is a function of :data:`SEEDS` alone.
"""

import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovdiff_lib.files import write_atomic
from ovdiff_lib.mini.world import World
from ovdiff_lib.recipes.scenes import Glyphs, draw_scene, glyph_table
from ovdiff_lib.workbench.data.datasets import MINI_DATA

SEEDS = {"train": 0, "val": 2, "wild": 3, "frames": 4, "tune": 5}
"""Stream of scenes each split is drawn from; no scene is in two splits."""

SHAPES = ((128, 160), (128, 192), (160, 128), (128, 144), (176, 128), (128, 176))
"""Shapes (H, W) of the images of a split, in turn; none is square."""

HELD = 0.36  # share of the objects of ``tune`` and ``val`` in held glyphs, for nouns that have any: a third of all

_work: list[Callable] = []


def _call(item: Any) -> Any:
    return _work[-1](item)


def forked_map(function: Callable, items: Iterable, workers: int, chunksize: int) -> Iterator:
    """``map(function, items)``, in order, by several processes; forked, so that nothing the function holds is sent."""
    if workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _work.append, (function,)) as pool:
        yield from pool.map(_call, items, chunksize=chunksize)


def build_training(world: World, arrays: dict[str, np.ndarray], folder: Path, size: int, count: int, frames: int,
                   workers: int | None = None) -> None:
    """Write the training arrays at ``size`` px: ``train_images.npy`` u8 (count, size, size, 3) with
    ``train_captions.json``; ``frames.npy`` u8 (frames, 2, size, size, 3), pairs of one glyph in two places, as a video
    that follows it shows it; last ``nouns.json``, which finishes it. ``workers``: processes (default: one a core)."""
    if (folder / "nouns.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    glyphs, nouns = glyph_table(world, arrays, world.train_styles), [t.name for t in world.things]

    def train(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        scene = draw_scene(world, glyphs, SEEDS["train"], index, (size, size))
        return scene.image, scene.captions

    def pair(index: int) -> tuple[np.ndarray, None]:
        noun, rng = nouns[index % len(nouns)], np.random.default_rng([SEEDS["frames"], index])
        seen = [glyph for glyph in glyphs[noun] if not glyph.held]
        one = {noun: [seen[rng.integers(len(seen))]]}
        return np.stack([draw_scene(world, one, SEEDS["frames"], 2 * index + i, (size, size), noun=noun, objects=1,
                                    at_home=0).image for i in range(2)]), None

    def fill(name: str, draw: Callable[[int], tuple], count: int, shape: tuple[int, ...]) -> list:
        out = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (count, *shape))
        drawn, rest = forked_map(draw, range(count), workers or len(os.sched_getaffinity(0)), chunksize=100), []
        for i, (image, about) in enumerate(tqdm(drawn, name, count, unit="scene", mininterval=5)):
            out[i] = image
            rest.append(about)
        out.flush()
        return rest

    captions = fill("train_images", train, count, (size, size, 3))
    (folder / "train_captions.json").write_text(json.dumps(captions), encoding="utf-8")
    fill("frames", pair, frames, (2, size, size, 3))
    write_atomic(folder / "nouns.json", json.dumps(nouns).encode())


def build_archive(world: World, arrays: dict[str, np.ndarray], folder: Path, count: int, size: int = 64) -> None:
    """Write ``folder/archive``: ``count`` training scenes side by side in one picture (WebP), and ``sheet.json``, which
    says how; ReCo retrieves from them (:mod:`ovdiff_lib.workbench.baselines.archive`). A scene is left out while what
    it shows, its nouns or, without any, its stuff, is ahead of the rarest such word."""
    glyphs, rare = glyph_table(world, arrays, world.train_styles), {t.name for t in world.things if t.rare}
    shown, chosen = dict.fromkeys((name for name in world.names if name not in rare), 0), []
    for index in itertools.count():
        scene = draw_scene(world, glyphs, SEEDS["train"], index, (size, size))
        words = [word for word in scene.nouns or scene.stuff if word in shown]
        if words and min(shown[word] for word in words) <= min(shown.values()) + 1:
            chosen.append(scene.image)
            shown.update({word: shown[word] + 1 for word in words})
        if len(chosen) == count:
            break
    columns = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
    sheet = np.stack(chosen).reshape(-1, columns, size, size, 3).swapaxes(1, 2).reshape(-1, columns * size, 3)
    target = folder / "archive"
    target.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(target / "scenes.webp", quality=85, method=6)
    table = {"file": "scenes.webp", "images": count, "height": size, "width": size}
    (target / "sheet.json").write_text(json.dumps(table) + "\n")


def build_split(world: World, glyphs: Glyphs, folder: Path, split: str, count: int) -> None:
    """Write ``count`` images (WebP) with label maps (PNG, world ids, 255 = ignored) and ``scenes.json``, which names
    what each shows and which of it is in held glyphs, below ``folder/split``."""
    target = folder / split
    shutil.rmtree(target, ignore_errors=True)
    (target / "images").mkdir(parents=True)
    (target / "labels").mkdir()
    # The first object of the scenes runs through the nouns, those of mini-voc twice as often.
    order = [t.name for t in world.things if t.voc] + [t.name for t in world.things]
    rows = []
    for i in tqdm(range(count), desc=split, unit="scene", mininterval=5):
        scene = draw_scene(world, glyphs, SEEDS[split], i, SHAPES[i % len(SHAPES)], noun=order[i % len(order)],
                           objects=(1, 1, 2, 1, 1, 1, 2, 3)[i % 8], held=HELD)
        Image.fromarray(scene.image).save(target / "images" / f"{i:04d}.webp", quality=92, method=6)
        Image.fromarray(scene.labels).save(target / "labels" / f"{i:04d}.png", optimize=True)
        rows.append({"id": f"{i:04d}", "things": scene.nouns, "stuff": scene.stuff,
                     "held": [noun for noun, held in zip(scene.nouns, scene.held, strict=True) if held]})
    (target / "scenes.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def build_shipped(world: World, arrays: dict[str, np.ndarray]) -> None:
    """Write the splits and the archive into the package's ``mini/data``, and the table of the world beside it."""
    # The ids in the label maps are places in this table.
    shutil.copyfile(Path(__file__).parent / "world.yaml", MINI_DATA.parent / "world.yaml")
    for split, count, styles in (("tune", 126, world.train_styles), ("val", 315, world.train_styles),
                                 ("wild", 126, world.wild_styles)):
        build_split(world, glyph_table(world, arrays, styles), MINI_DATA, split, count)
    build_archive(world, arrays, MINI_DATA, 600)
