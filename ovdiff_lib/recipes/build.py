"""Draw the data of the mini world: training scenes (not shipped), the val and wild splits, and an archive of scenes (both shipped).

Run as ``python -m ovdiff_lib.recipes.build --work DIR`` (``make mini-world`` does). Training arrays go to ``DIR/scenes``; splits and
the archive go to the package's ``mini/data``. Every array is a function of the seeds in :data:`SEEDS` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovdiff_lib import mini
from ovdiff_lib.mini.world import World, load_world
from ovdiff_lib.recipes.art import build_glyphs
from ovdiff_lib.recipes.scenes import Glyphs, Scene, draw_scene

SEEDS = {"train": 0, "eval": 1, "val": 2, "wild": 3, "frames": 4}
"""Stream of scenes each split is drawn from; no scene is in two splits."""

DATA = Path(mini.__file__).parent / "data"
"""The splits that ship."""

SHAPES = ((128, 160), (128, 192), (160, 128), (128, 144), (176, 128), (128, 176))
"""Shapes (H, W) of val and wild images, in turn; none is square."""

_state: dict = {}


def _start(glyphs: Glyphs) -> None:
    _state["world"], _state["glyphs"] = load_world(), glyphs


def _train_scene(index: int, seed: int, single: bool) -> Scene:
    world: World = _state["world"]
    noun = world.things[index % len(world.things)].name if single else None
    return draw_scene(world, _state["glyphs"], world.train_styles, seed, index, (64, 64), noun=noun, objects=1 if single else None)


def _stream(glyphs: Glyphs, seed: int, count: int, single: bool, workers: int, label: str):
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(glyphs,)) as pool:
        draw = partial(_train_scene, seed=seed, single=single)
        yield from tqdm(pool.map(draw, range(count), chunksize=200), total=count, desc=label, unit="scene")


def build_training(glyphs: Glyphs, folder: Path, count: int, evaluation: int, workers: int) -> None:
    """Write ``train_images.npy`` u8 (count, 64, 64, 3), ``train_captions.json``, ``eval_images.npy``, ``eval_labels.npy`` and
    ``nouns.json``."""
    world = load_world()
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(folder / "train_images.npy", "w+", np.uint8, (count, 64, 64, 3))
    captions = []
    for i, scene in enumerate(_stream(glyphs, SEEDS["train"], count, False, workers, "training scenes")):
        images[i] = scene.image
        captions.append(scene.captions)
    images.flush()
    (folder / "train_captions.json").write_text(json.dumps(captions))
    held_out = [scene.image for scene in _stream(glyphs, SEEDS["eval"], evaluation, True, workers, "held-out scenes")]
    np.save(folder / "eval_images.npy", np.stack(held_out))
    np.save(folder / "eval_labels.npy", np.arange(evaluation) % len(world.things))
    (folder / "nouns.json").write_text(json.dumps([t.name for t in world.things]))


def _frames(index: int) -> np.ndarray:
    world: World = _state["world"]
    rng = np.random.default_rng([SEEDS["frames"], index])
    thing, style = world.things[index % len(world.things)], world.train_styles[rng.integers(len(world.train_styles))]
    variants = _state["glyphs"][thing.name, style]
    one = {(thing.name, style): [variants[rng.integers(len(variants))]]}
    return np.stack([draw_scene(world, one, (style,), SEEDS["frames"], 2 * index + i, (64, 64), noun=thing.name, objects=1,
                                at_home=0).image for i in range(2)])


def build_frames(glyphs: Glyphs, folder: Path, count: int, workers: int) -> None:
    """Write ``frames.npy`` u8 (count, 2, 64, 64, 3): pairs of one object met in two places, as a video that follows it would show it.

    Pose, light, size and surroundings differ. No name goes with them; for self-supervised training.
    """
    target = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, (count, 2, 64, 64, 3))
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(glyphs,)) as pool:
        for i, pair in enumerate(tqdm(pool.map(_frames, range(count), chunksize=200), total=count, desc="frames", unit="pair")):
            target[i] = pair
    target.flush()


def build_archive(world: World, glyphs: Glyphs, folder: Path, count: int) -> None:
    """Write ``folder/archive``: ``count`` training scenes, 64 px, side by side in one picture (WebP), and ``sheet.json``, which says how.

    They come in the order of the training stream. A scene is left out while what it shows, its nouns or, without any, its stuff, is
    ahead of the rarest such word; no label or caption is written. ReCo retrieves from them (:mod:`ovdiff_lib.workbench.baselines.archive`).
    """
    _start(glyphs)
    shown, chosen = dict.fromkeys(world.names, 0), []
    for index in itertools.count():
        scene = _train_scene(index, SEEDS["train"], False)
        words = scene.nouns or scene.stuff
        if min(shown[word] for word in words) <= min(shown.values()) + 1:
            chosen.append(scene.image)
            shown.update({word: shown[word] + 1 for word in words})
        if len(chosen) == count:
            break
    columns = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
    sheet = np.stack(chosen).reshape(-1, columns, 64, 64, 3).swapaxes(1, 2).reshape(-1, columns * 64, 3)
    target = folder / "archive"
    target.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(target / "scenes.webp", quality=85, method=6)
    table = {"file": "scenes.webp", "images": count, "height": 64, "width": 64}
    (target / "sheet.json").write_text(json.dumps(table) + "\n")


def build_split(world: World, glyphs: Glyphs, folder: Path, split: str, count: int, styles: tuple[str, ...]) -> None:
    """Write ``count`` images (WebP) with label maps (PNG, world ids, 255 = ignored) and ``scenes.json`` below ``folder/split``."""
    target = folder / split
    shutil.rmtree(target, ignore_errors=True)
    (target / "images").mkdir(parents=True)
    (target / "labels").mkdir()
    # The first object of the scenes runs through the nouns, those of mini-voc twice as often.
    order = [t.name for t in world.things if t.voc] + [t.name for t in world.things]
    rows = []
    for i in tqdm(range(count), desc=split, unit="scene"):
        scene = draw_scene(world, glyphs, styles, SEEDS[split], i, SHAPES[i % len(SHAPES)],
                           noun=order[i % len(order)], objects=2 if i % 4 == 3 else 1)
        Image.fromarray(scene.image).save(target / "images" / f"{i:04d}.webp", quality=92, method=6)
        Image.fromarray(scene.labels).save(target / "labels" / f"{i:04d}.png", optimize=True)
        rows.append({"id": f"{i:04d}", "things": scene.nouns, "stuff": scene.stuff})
    (target / "scenes.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the art and the training scenes")
    parser.add_argument("--train", type=int, default=80_000, help="training scenes (default 80,000)")
    parser.add_argument("--evaluation", type=int, default=1_050, help="held-out single-object scenes at 64 px")
    parser.add_argument("--frames", type=int, default=24_000, help="pairs of frames of one object, for self-supervised training")
    parser.add_argument("--val", type=int, default=310)
    parser.add_argument("--wild", type=int, default=84)
    parser.add_argument("--archive", type=int, default=600, help="training scenes that ship without labels, for retrieval")
    arguments = parser.parse_args()
    world = load_world()
    glyphs = build_glyphs(world, arguments.work / "art")
    build_split(world, glyphs, DATA, "val", arguments.val, world.train_styles)
    build_split(world, glyphs, DATA, "wild", arguments.wild, world.wild_styles)
    build_archive(world, glyphs, DATA, arguments.archive)
    build_training(glyphs, arguments.work / "scenes", arguments.train, arguments.evaluation, os.cpu_count() or 1)
    build_frames(glyphs, arguments.work / "scenes", arguments.frames, os.cpu_count() or 1)


if __name__ == "__main__":
    main()
