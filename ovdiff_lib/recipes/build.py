"""Draw the data of the mini world: training scenes (not shipped), the splits and an archive of scenes (shipped).

``python -m ovdiff_lib.recipes.build --work DIR`` (``make mini-world`` does) puts the training arrays into ``DIR/scenes``, ``--ship`` the
splits and the archive into the package's ``mini/data``. Every array is a function of the seeds in :data:`SEEDS` alone.
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
from ovdiff_lib.files import write_atomic
from ovdiff_lib.mini.world import World
from ovdiff_lib.recipes.art import build_glyphs, drawn_world
from ovdiff_lib.recipes.scenes import Glyphs, Scene, draw_scene, glyph_table

SEEDS = {"train": 0, "eval": 1, "val": 2, "wild": 3, "frames": 4, "tune": 5}
"""Stream of scenes each split is drawn from; no scene is in two splits."""

DATA = Path(mini.__file__).parent / "data"
"""The splits that ship."""

SHAPES = ((128, 160), (128, 192), (160, 128), (128, 144), (176, 128), (128, 176))
"""Shapes (H, W) of the images of a split, in turn; none is square."""

HELD = 0.36
"""Share of the objects of ``tune`` and ``val`` in held glyphs, for nouns that have any: a third of all."""

_state: dict = {}


def _start(world: World, arrays: dict[str, np.ndarray]) -> None:
    _state["world"], _state["glyphs"] = world, glyph_table(world, arrays, world.train_styles)


def _train_scene(index: int, seed: int, size: int, single: bool) -> Scene:
    world: World = _state["world"]
    noun = world.things[index % len(world.things)].name if single else None
    return draw_scene(world, _state["glyphs"], seed, index, (size, size), noun=noun, objects=1 if single else None)


def _frames(index: int, size: int) -> np.ndarray:
    world: World = _state["world"]
    rng = np.random.default_rng([SEEDS["frames"], index])
    thing = world.things[index % len(world.things)]
    seen = [glyph for glyph in _state["glyphs"][thing.name] if not glyph.held]
    one = {thing.name: [seen[rng.integers(len(seen))]]}
    return np.stack([draw_scene(world, one, SEEDS["frames"], 2 * index + i, (size, size), noun=thing.name, objects=1, at_home=0).image
                     for i in range(2)])


def _stream(pool: ProcessPoolExecutor, draw, count: int, label: str):
    yield from tqdm(pool.map(draw, range(count), chunksize=100), total=count, desc=label, unit="scene", mininterval=5)


def build_training(world: World, arrays: dict[str, np.ndarray], folder: Path, size: int, count: int, frames: int, evaluation: int,
                   workers: int) -> None:
    """Write the training arrays at ``size`` px: ``train_images.npy`` u8 (count, size, size, 3) with
    ``train_captions.json``; ``frames.npy`` u8 (frames, 2, size, size, 3), pairs of one object met in two places, as a
    video that follows it would show it, for self-supervised training; ``eval_images.npy`` and ``eval_labels.npy``,
    scenes of one object; ``nouns.json``.

    What is there already is kept: a folder is finished when it has ``nouns.json``, which is written last.
    """
    if (folder / "nouns.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(world, arrays)) as pool:
        images = np.lib.format.open_memmap(folder / "train_images.npy", "w+", np.uint8, (count, size, size, 3))
        captions = []
        for i, scene in enumerate(_stream(pool, partial(_train_scene, seed=SEEDS["train"], size=size, single=False), count, "training")):
            images[i] = scene.image
            captions.append(scene.captions)
        pairs = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, (frames, 2, size, size, 3))
        for i, pair in enumerate(_stream(pool, partial(_frames, size=size), frames, "frames")):
            pairs[i] = pair
        single = partial(_train_scene, seed=SEEDS["eval"], size=size, single=True)
        held_out = [scene.image for scene in _stream(pool, single, evaluation, "evaluation")]
    images.flush()
    pairs.flush()
    (folder / "train_captions.json").write_text(json.dumps(captions), encoding="utf-8")
    np.save(folder / "eval_images.npy", np.stack(held_out))
    np.save(folder / "eval_labels.npy", np.arange(evaluation) % len(world.things))
    write_atomic(folder / "nouns.json", json.dumps([t.name for t in world.things]).encode())


def build_archive(world: World, arrays: dict[str, np.ndarray], folder: Path, count: int, size: int = 64) -> None:
    """Write ``folder/archive``: ``count`` training scenes side by side in one picture (WebP), and ``sheet.json``, which
    says how.

    They come in the order of the training stream. A scene is left out while what it shows, its nouns or, without any,
    its stuff, is ahead of the rarest such word; no label or caption is written. ReCo retrieves from them
    (:mod:`ovdiff_lib.workbench.baselines.archive`).
    """
    _start(world, arrays)
    shown, chosen = dict.fromkeys((name for name in world.names if name not in {t.name for t in world.things if t.rare}), 0), []
    for index in itertools.count():
        scene = _train_scene(index, SEEDS["train"], size, False)
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
    """Write ``count`` images (WebP) with label maps (PNG, world ids, 255 = ignored) and ``scenes.json`` below
    ``folder/split``.

    A row of ``scenes.json`` names an image's things and stuff, and which of the things are in held glyphs.
    """
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


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the art and the training scenes")
    parser.add_argument("--size", type=int, default=128, help="side of a training scene in pixels")
    parser.add_argument("--train", type=int, default=100_000, help="training scenes")
    parser.add_argument("--frames", type=int, default=30_000, help="pairs of frames of one object")
    parser.add_argument("--evaluation", type=int, default=1_032, help="held-out scenes of one object")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that draw")
    parser.add_argument("--ship", action="store_true", help="also draw the splits and the archive, into mini/data")
    arguments = parser.parse_args(argv)
    world = drawn_world()
    arrays = build_glyphs(world, arguments.work)
    build_training(world, arrays, arguments.work / "scenes", arguments.size, arguments.train, arguments.frames, arguments.evaluation,
                   arguments.workers)
    if arguments.ship:
        # The ids in the label maps are places in this table.
        shutil.copyfile(Path(__file__).parent / "world.yaml", DATA.parent / "world.yaml")
        glyphs = glyph_table(world, arrays, world.train_styles)
        for split, count in (("tune", 126), ("val", 315)):
            build_split(world, glyphs, DATA, split, count)
        build_split(world, glyph_table(world, arrays, world.wild_styles), DATA, "wild", 126)
        build_archive(world, arrays, DATA, 600)


if __name__ == "__main__":
    main()
