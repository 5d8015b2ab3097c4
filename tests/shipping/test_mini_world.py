"""The mini world: scenes that depend on (seed, index) alone, label maps that agree with what was drawn, and the data
that ships."""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import ovdiff_lib
from ovdiff_lib.mini.world import IGNORE, load_world
from ovdiff_lib.recipes import quality
from ovdiff_lib.recipes.art import PACKAGES, drawn_world
from ovdiff_lib.recipes.build import SEEDS, build_split, build_training
from ovdiff_lib.recipes.scenes import PALETTES, draw_scene, glyph_table

DATA = Path(ovdiff_lib.__file__).parent / "mini" / "data"
SPLITS = ("tune", "val", "wild")
WORLD = drawn_world()


@cache
def arrays(alpha: int = 255) -> dict:
    """Every glyph a filled magenta square, held ones green. The random stream sees its shape only, not its pixels."""
    colours = {f"{style}/{key}": (255, 0, 255) for t in WORLD.things for style, keys in t.glyphs.items() for key in keys}
    colours |= {ref: (0, 255, 0) for t in WORLD.things for ref in t.held}
    return {ref: np.full((96, 96, 4), (*colour, alpha), np.uint8) for ref, colour in colours.items()}


@cache
def squares(alpha: int = 255) -> dict:
    return glyph_table(WORLD, arrays(alpha), WORLD.train_styles)


def draw(index: int = 0, shape=(64, 96), seed: int = 5, alpha: int = 255, **options):
    return draw_scene(WORLD, squares(alpha), seed, index, shape, **options)


# ---- the table

def test_vocabularies_and_label_ids():
    world = load_world()
    sizes = {"mini-voc": 20, "mini-object": 42, "mini-context": 28}
    assert {k: len(world.vocabulary(k)) for k in sizes} == sizes
    assert set(world.vocabulary("mini-voc")) < set(world.vocabulary("mini-object"))
    assert world.vocabulary("mini-context") == world.vocabulary("mini-voc") + world.stuff
    assert len(set(world.names)) == len(world.names) == 42 + 8 < IGNORE
    assert [world.label(n) for n in world.names] == list(range(1, 51))
    assert set(world.stuff) == set(PALETTES) == {p for parts in world.contexts.values() for p in parts}


@pytest.mark.parametrize("world", [load_world(), drawn_world()], ids=["shipped", "drawn"])
def test_every_stuff_is_shared_and_every_noun_has_several_contexts(world):
    """So that no word can mean where its noun is found."""
    assert {c for t in world.things for c in t.contexts} == set(world.contexts)
    for thing in world.things:
        assert len(set(thing.contexts)) >= 2 and set(thing.contexts) <= set(world.contexts), thing
        assert thing.place in ("ground", "air", "any")
    for stuff in world.stuff:
        assert sum(any(stuff in world.contexts[c] for c in t.contexts) for t in world.things) >= 4, stuff


def test_the_drawn_world_adds_glyphs_and_one_rare_noun():
    shipped = load_world()
    assert [t.name for t in WORLD.things if not t.rare] == [t.name for t in shipped.things]
    assert sum(t.rare for t in WORLD.things) == 1 and WORLD.stuff == shipped.stuff
    assert WORLD.vocabulary("mini-voc") == shipped.vocabulary("mini-voc")
    assert not set(WORLD.train_styles) & set(WORLD.wild_styles)
    assert set(WORLD.train_styles) | set(WORLD.wild_styles) == set(PACKAGES)
    assert not any("openmoji" in package for package in PACKAGES.values())
    assert len(set(WORLD.train_styles.values())) == len(WORLD.train_styles)
    everything = [f"{style}/{key}" for t in WORLD.things for style, keys in t.glyphs.items() for key in keys]
    assert len(everything) == len(set(everything)) and set(WORLD.crops) <= set(everything)
    for thing in WORLD.things:
        trained = [f"{style}/{key}" for style in WORLD.train_styles for key in thing.glyphs.get(style, ())]
        assert 3 <= len(trained) <= 20 and thing.glyphs["twemoji"] and thing.held < set(trained), thing.name
        assert bool(thing.held) == (len(trained) > 3 and not thing.rare), thing.name
        assert len(thing.held) <= len(trained) / 3


# ---- scenes

@pytest.mark.parametrize("shape", [(64, 96), (80, 48)])
def test_a_scene_depends_on_seed_and_index_alone(shape):
    first = draw(3, shape)
    np.random.seed(1)
    draw(2, shape)
    again = draw(3, shape)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.labels, again.labels)
    assert (first.nouns, first.stuff, first.captions) == (again.nouns, again.stuff, again.captions)
    assert first.image.shape == (*shape, 3) and first.labels.shape == shape and first.image.dtype == first.labels.dtype == np.uint8
    assert not np.array_equal(first.image, draw(4, shape).image)
    assert not np.array_equal(first.image, draw(3, shape, seed=6).image)


def test_labels_and_captions_tell_what_is_seen_and_scenes_differ():
    scenes = [draw(i) for i in range(40)]
    assert len({s.image.tobytes() for s in scenes}) == 40
    assert len({s.nouns for s in scenes}) > 20 and len({s.stuff for s in scenes}) > 6
    for scene in scenes:
        ids, nouns = set(np.unique(scene.labels).tolist()) - {IGNORE}, {WORLD.label(n) for n in scene.nouns}
        assert nouns <= ids <= nouns | {WORLD.label(n) for n in scene.stuff}
        assert len(scene.captions) == 4 and len(scene.held) == len(scene.nouns)
        assert all(word in scene.captions[0] for word in scene.nouns + scene.stuff)
        assert all(any(n in c for c in scene.captions[1:]) for n in scene.nouns)


@pytest.mark.parametrize("shape", [(64, 96), (112, 64)])
def test_the_label_map_is_the_alpha_that_was_drawn(shape):
    """The same scene with a transparent glyph is the bare context, so the pixels that differ are the object."""
    seen = 0
    for i in range(40):
        scene, bare = draw(i, shape, objects=1), draw(i, shape, objects=1, alpha=0)
        if not scene.captions[1].startswith("a good") or not scene.nouns:
            continue  # others may be cut off, or stand behind something
        seen += 1
        label = WORLD.label(scene.nouns[0])
        assert label not in bare.labels and IGNORE not in bare.labels
        change = np.abs(scene.image.astype(int) - bare.image.astype(int)).sum(-1)
        inside, edge = scene.labels == label, scene.labels == IGNORE
        full = np.maximum(np.abs(np.median(scene.image[inside], axis=0) - bare.image).sum(-1), 1)
        cover = np.clip(change / full, 0, 1)
        assert inside.sum() > 50
        # A pixel at the image's border may be cut in half there: the drawing ends, the label does not.
        assert (cover[inside] > 0.45).all()  # every labelled pixel is mostly object
        outside = ~inside & ~edge
        assert (cover[outside] < 0.55).all()  # and no other is
        assert np.array_equal(scene.labels[outside], bare.labels[outside])
        # The ignored band is the object's edge: within two pixels of where the drawing stops.
        solid = cover > 0.5
        core = ndimage.binary_erosion(solid, iterations=2, border_value=1)
        assert edge.any() and (edge & ~(ndimage.binary_dilation(solid, iterations=2) & ~core)).sum() == 0
        assert ((change > 6) & ~ndimage.binary_dilation(inside | edge, iterations=2)).sum() == 0
    assert seen > 8


def test_held_glyphs_are_drawn_only_where_asked_for():
    def green(scene):
        return bool(((scene.image[..., 1] > 130) & (scene.image[..., 0::2] < 90).all(-1)).sum() > 60)

    assert not any(any(draw(i, noun="television", objects=1).held) for i in range(20))
    asked = [draw(i, noun="television", objects=1, held=0.5) for i in range(40)]
    assert 8 <= sum(any(scene.held) for scene in asked) <= 32
    walls = [scene for scene in asked if scene.nouns and "grass" not in scene.stuff]
    assert all(green(scene) == scene.held[0] for scene in walls if "good" in scene.captions[1])


def test_a_split_names_what_is_held(tmp_path):
    for name in ("one", "two"):
        build_split(WORLD, squares(), tmp_path / name, "tune", 24)
    rows = json.loads((tmp_path / "one" / "tune" / "scenes.json").read_text())
    assert len(rows) == 24 and all(set(row["held"]) <= set(row["things"]) for row in rows)
    assert 0.15 < sum(len(row["held"]) for row in rows) / sum(len(row["things"]) for row in rows) < 0.6
    for name in ("images/0003.webp", "labels/0003.png", "scenes.json"):
        assert (tmp_path / "one" / "tune" / name).read_bytes() == (tmp_path / "two" / "tune" / name).read_bytes()


# ---- the data that ships

@pytest.mark.parametrize("name", SPLITS)
def test_the_shipped_splits_are_complete_and_fit_their_images(name):
    world, folder, seen = load_world(), DATA / name, set()
    rows = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    ids = {row["id"] for row in rows}
    assert len(rows) == len(ids) >= {"tune": 120, "val": 200, "wild": 60}[name]
    assert {p.stem for p in (folder / "images").iterdir()} == ids == {p.stem for p in (folder / "labels").iterdir()}
    for row in rows:
        with Image.open(folder / "images" / f"{row['id']}.webp") as picture:
            size = picture.size
            assert picture.mode == "RGB" and min(size) == 128 and size[0] != size[1]
        with Image.open(folder / "labels" / f"{row['id']}.png") as picture:
            assert picture.mode == "L" and picture.size == size
            labels = np.asarray(picture)
        shown, things = set(np.unique(labels).tolist()) - {IGNORE}, {world.label(n) for n in row["things"]}
        assert things <= shown <= things | {world.label(n) for n in row["stuff"]}, row
        assert 0 < (labels == IGNORE).mean() < 0.25
        seen |= shown
    # Every class that is measured can be measured.
    assert {world.label(n) for n in world.vocabulary("mini-voc")} <= seen
    assert name == "wild" or seen == set(range(1, 51))
    assert {len(row["things"]) for row in rows} >= {1, 2}


def test_no_scene_is_in_two_splits_and_the_data_is_small():
    assert len(set(SEEDS.values())) == len(SEEDS) and set(SPLITS) < set(SEEDS)
    contents = [p.read_bytes() for s in SPLITS for p in (DATA / s / "images").iterdir()]
    assert len(set(contents)) == len(contents)
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= 10 * 2**20


# ---- what training reads, and what is counted on drawings

def test_training_arrays_are_a_function_of_the_seeds(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        build_training(WORLD, arrays(), tmp_path / name, 24, 5, 3, workers)
    one = tmp_path / "one"
    names = ["frames.npy", "nouns.json", "train_captions.json", "train_images.npy"]
    assert sorted(path.name for path in one.iterdir()) == names
    assert all((one / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    images, captions = np.load(one / "train_images.npy"), json.loads((one / "train_captions.json").read_text())
    scene = draw(3, (24, 24), SEEDS["train"])
    assert images.shape == (5, 24, 24, 3) and np.array_equal(images[3], scene.image)
    assert tuple(captions[3]) == scene.captions and np.load(one / "frames.npy").shape == (3, 2, 24, 24, 3)
    (one / "train_images.npy").write_bytes(b"kept")
    build_training(WORLD, arrays(), one, 24, 5, 3, 1)  # finished: nothing is drawn again
    assert (one / "train_images.npy").read_bytes() == b"kept"


@pytest.mark.parametrize(("sign", "iou", "inside"), [(1, 1.0, 1.0), (-1, 0.0, 0.0)])
def test_attribution_that_is_the_object_has_iou_one(tiny_profile, monkeypatch, sign, iou, inside):
    mask = np.zeros((32, 48), np.float32)
    mask[8:24, 12:30] = 1
    mask[7, :] = np.nan
    scenes = [(np.zeros((32, 48, 3), np.uint8), mask, "cat")] * 2

    @contextmanager
    def record(unet, positions, size, guided):
        yield SimpleNamespace(maps=lambda: sign * torch.from_numpy(np.nan_to_num(mask))[None])

    monkeypatch.setattr(quality, "record_attribution", record)
    measured = quality.attribution_iou(tiny_profile, scenes, steps=(500,))
    assert measured["inside"] == inside and measured["iou"] == pytest.approx(iou)
