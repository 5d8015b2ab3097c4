"""The mini world: scenes that depend on (seed, index) alone, label maps that agree with what was drawn, and the data that ships."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import ovdiff_lib
from ovdiff_lib.mini.world import IGNORE, World, load_world
from ovdiff_lib.recipes.art import PACKAGES, drawn_world, trim
from ovdiff_lib.recipes.build import SEEDS, build_split, build_training
from ovdiff_lib.recipes.scenes import PALETTES, draw_scene, draw_stuff, glyph_table

DATA = Path(ovdiff_lib.__file__).parent / "mini" / "data"
SPLITS = ("val", "wild")


def square(world: World, alpha: int = 255, colour=(255, 0, 255), held=(0, 255, 0), side: int = 96) -> dict:
    """Every glyph a filled square whose mask is known, held ones green. The random stream sees its shape only, never its pixels."""
    glyphs = {}
    for thing in world.things:
        for ref in (f"{style}/{key}" for style, keys in thing.glyphs.items() for key in keys):
            glyphs[ref] = np.empty((side, side, 4), np.uint8)
            glyphs[ref][:] = (*(held if ref in thing.held else colour), alpha)
    return glyph_table(world, glyphs, world.train_styles)


@cache
def squares(alpha: int) -> dict:
    return square(drawn_world(), alpha)


def draw(index: int = 0, shape=(64, 96), seed: int = 5, alpha: int = 255, **options):
    return draw_scene(drawn_world(), squares(alpha), seed, index, shape, **options)


# ---------------------------------------------------------------------- the table

def test_vocabularies_have_their_sizes():
    world = load_world()
    sizes = {"mini-voc": 20, "mini-object": 42, "mini-context": 28}
    assert {k: len(world.vocabulary(k)) for k in sizes} == sizes
    assert set(world.vocabulary("mini-voc")) < set(world.vocabulary("mini-object"))
    assert world.vocabulary("mini-context") == world.vocabulary("mini-voc") + world.stuff
    with pytest.raises(ValueError, match="mini-voc"):
        world.vocabulary("voc")


@pytest.mark.parametrize("world", [load_world(), drawn_world()], ids=["shipped", "drawn"])
def test_every_stuff_is_shared_and_every_noun_has_several_contexts(world):
    """So that no word can mean where its noun is found."""
    assert {c for t in world.things for c in t.contexts} == set(world.contexts)
    for thing in world.things:
        assert len(set(thing.contexts)) >= 2 and set(thing.contexts) <= set(world.contexts), thing
        assert thing.place in ("ground", "air", "any")
    for stuff in world.stuff:
        assert sum(any(stuff in world.contexts[c] for c in t.contexts) for t in world.things) >= 4, stuff


def test_label_ids_are_one_to_one():
    world = load_world()
    assert len(set(world.names)) == len(world.names) == 42 + 8 < IGNORE
    assert [world.label(n) for n in world.names] == list(range(1, 51))
    assert set(world.stuff) == set(PALETTES) == {p for parts in world.contexts.values() for p in parts}


def test_the_drawn_world_adds_glyphs_and_one_rare_noun():
    shipped, drawn = load_world(), drawn_world()
    assert [t.name for t in drawn.things if not t.rare] == [t.name for t in shipped.things] and sum(t.rare for t in drawn.things) == 1
    assert drawn.vocabulary("mini-voc") == shipped.vocabulary("mini-voc") and drawn.stuff == shipped.stuff
    assert not set(drawn.train_styles) & set(drawn.wild_styles)
    assert set(drawn.train_styles) | set(drawn.wild_styles) == set(PACKAGES) and not any("openmoji" in p for p in PACKAGES.values())
    assert len(set(drawn.train_styles.values())) == len(drawn.train_styles)
    everything = [f"{style}/{key}" for t in drawn.things for style, keys in t.glyphs.items() for key in keys]
    assert len(everything) == len(set(everything)) and set(drawn.crops) <= set(everything)
    for thing in drawn.things:
        trained = [f"{style}/{key}" for style in drawn.train_styles for key in thing.glyphs.get(style, ())]
        assert 3 <= len(trained) <= 20 and thing.glyphs["twemoji"] and thing.held < set(trained), thing.name
        assert bool(thing.held) == (len(trained) > 3 and not thing.rare), thing.name
        assert len(thing.held) <= len(trained) / 3


def test_trimming_keeps_the_object_and_drops_what_lies_beside_it():
    canvas = np.zeros((60, 80, 4), np.uint8)
    canvas[10:40, 20:60] = (200, 0, 0, 255)
    canvas[50:55, 0:5] = (0, 0, 200, 255)  # a drop
    whole = trim(Image.fromarray(canvas))
    assert whole.shape == (96, 128, 4) and (whole[8:-8, 8:-8] == (200, 0, 0, 255)).all()
    assert trim(Image.fromarray(canvas), (0, 0, 0.5, 1)).shape == (128, 85, 4)  # 30 rows, 20 columns
    canvas[50:55, 0:5] = 0
    assert np.array_equal(trim(Image.fromarray(canvas)), whole)


# ---------------------------------------------------------------------- scenes

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


def test_scenes_differ_across_the_stream():
    scenes = [draw(i) for i in range(24)]
    assert len({s.image.tobytes() for s in scenes}) == 24
    assert len({s.nouns for s in scenes}) > 12 and len({s.stuff for s in scenes}) > 4
    assert {len(s.nouns) for s in scenes} >= {1, 2}


def test_labels_and_captions_tell_what_is_seen():
    world = drawn_world()
    for i in range(40):
        scene = draw(i)
        ids = set(np.unique(scene.labels).tolist()) - {IGNORE}
        assert ids <= {world.label(n) for n in scene.nouns + scene.stuff}
        assert {world.label(n) for n in scene.nouns} <= ids
        assert len(scene.captions) == 4 and all(isinstance(c, str) for c in scene.captions) and len(scene.held) == len(scene.nouns)
        for word in scene.nouns + scene.stuff:
            assert word in scene.captions[0]
        if scene.nouns:
            assert all(any(n in c for c in scene.captions[1:]) for n in scene.nouns)


def test_some_objects_are_out_of_place():
    world = drawn_world()
    usual = {frozenset(world.contexts[c]) for t in world.things if t.name == "fish" for c in t.contexts}
    seen = [frozenset(draw(i, (16, 24), objects=1, noun="fish").stuff) in usual for i in range(60)]
    assert 3 <= seen.count(False) <= 25  # 15 % draw from all contexts, some of which are usual


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_number_of_objects_can_be_fixed(count):
    for i in range(6):
        scene = draw(i, objects=count, noun="cat" if count else None)
        assert len(scene.nouns) == len(set(scene.nouns)) <= count
        assert len(scene.nouns) == count or count > 1  # one may hide another
        assert count != 1 or scene.nouns[0] == "cat"
        assert (IGNORE in scene.labels) == (count > 0)


@pytest.mark.parametrize("shape", [(64, 96), (112, 64)])
def test_the_label_map_is_the_alpha_that_was_drawn(shape):
    """The same scene with a transparent glyph is the bare context, so the pixels that differ are the object."""
    world, seen = drawn_world(), 0
    for i in range(40):
        scene, bare = draw(i, shape, objects=1), draw(i, shape, objects=1, alpha=0)
        if not scene.captions[1].startswith("a good") or not scene.nouns:
            continue  # others may be cut off, or stand behind something
        seen += 1
        label = world.label(scene.nouns[0])
        assert label not in bare.labels and IGNORE not in bare.labels
        change = np.abs(scene.image.astype(int) - bare.image.astype(int)).sum(-1)
        touched = change > 6
        cover = np.clip(change / np.maximum(np.abs(np.median(scene.image[scene.labels == label], axis=0) - bare.image).sum(-1), 1), 0, 1)
        inside = scene.labels == label
        assert inside.sum() > 50
        # A pixel at the image's border may be cut in half there: the drawing ends, the label does not.
        assert (cover[inside] > 0.45).all()  # every labelled pixel is mostly object
        outside = (scene.labels != label) & (scene.labels != IGNORE)
        assert (cover[outside] < 0.55).all()  # and no other is
        assert np.array_equal(scene.labels[outside], bare.labels[outside])
        # The ignored band is the object's edge: within two pixels of where the drawing stops.
        edge = scene.labels == IGNORE
        solid = cover > 0.5
        band = ndimage.binary_dilation(solid, iterations=2) & ~ndimage.binary_erosion(solid, iterations=2, border_value=1)
        assert edge.any() and (edge & ~band).sum() == 0
        assert (touched & ~ndimage.binary_dilation(inside | edge, iterations=2)).sum() == 0
    assert seen > 8


def test_objects_are_as_large_as_their_captions_say():
    """The longer side of what is drawn is 0.25 to 0.95 of the short side, 0.62 and more in a good picture, below 0.45 where it is small."""
    sizes = {"good": [], "small": [], "": []}
    for i in range(60):
        scene = draw(i, (64, 96), objects=1, noun="cat")
        rows, columns = np.nonzero(scene.labels == drawn_world().label("cat"))
        word = "good" if "good" in scene.captions[1] else "small" if "small" in scene.captions[1] else ""
        if len(rows):
            sizes[word].append((max(np.ptp(rows), np.ptp(columns)) + 3) / 64)  # with its two edge pixels
    assert 0.58 < min(sizes["good"]) and max(sizes["good"]) < 1 and max(sizes["small"]) < 0.49 and min(map(len, sizes.values())) > 5
    assert min(sizes["small"]) < 0.36


def test_the_lower_stuff_may_cover_feet():
    """Scenes in which the square's lowest row is neither whole nor at the border: what it stands on is in front of it."""
    world = drawn_world()
    tall = [draw(i, (64, 96), objects=1, noun="boat", at_home=1) for i in range(80)]
    ratios = []
    for scene in tall:
        rows, columns = np.nonzero(scene.labels == world.label("boat"))
        if len(rows) and 2 < columns.min() and columns.max() < 93:
            ratios.append((np.ptp(rows) + 3) / (np.ptp(columns) + 3))
    assert sum(ratio < 0.8 for ratio in ratios) >= 2 and sum(ratio > 0.8 for ratio in ratios) > 20


def test_held_glyphs_are_drawn_only_where_asked_for():
    def green(scene):
        return bool(((scene.image[..., 1] > 130) & (scene.image[..., 0] < 90) & (scene.image[..., 2] < 90)).sum() > 60)

    plain = [draw(i, noun="television", objects=1) for i in range(20)]
    assert not any(any(scene.held) for scene in plain)
    asked = [draw(i, noun="television", objects=1, held=0.5) for i in range(40)]
    assert 8 <= sum(any(scene.held) for scene in asked) <= 32
    walls = [scene for scene in asked if scene.nouns and "grass" not in scene.stuff]
    assert all(green(scene) == scene.held[0] for scene in walls if "good" in scene.captions[1])


def test_a_rare_noun_is_rare():
    rng_nouns = [noun for i in range(1500) for noun in draw(i, (8, 8)).nouns]
    assert rng_nouns.count("octopus") < 15


def test_a_split_names_what_is_held(tmp_path):
    world = drawn_world()
    build_split(world, squares(255), tmp_path, "tune", 24)
    rows = json.loads((tmp_path / "tune" / "scenes.json").read_text())
    assert len(rows) == 24 and all(set(row["held"]) <= set(row["things"]) for row in rows)
    things = sum(len(row["things"]) for row in rows)
    assert 0.15 < sum(len(row["held"]) for row in rows) / things < 0.6
    again = tmp_path / "again"
    build_split(world, squares(255), again, "tune", 24)
    for name in ("images/0003.webp", "labels/0003.png", "scenes.json"):
        assert (again / "tune" / name).read_bytes() == (tmp_path / "tune" / name).read_bytes()


def test_half_transparent_glyphs_are_no_objects():
    scene = draw(1, objects=1, alpha=100)
    assert scene.nouns == () and (scene.labels > len(drawn_world().things)).all()


@pytest.mark.parametrize("name", sorted(PALETTES))
def test_stuff_is_a_bounded_texture_of_more_than_one_look(name):
    pictures = [draw_stuff(np.random.default_rng(i), name, (40, 56)) for i in range(4)]
    for picture in pictures:
        assert picture.shape == (40, 56, 3) and picture.min() >= 0 and picture.max() <= 1 and np.isfinite(picture).all()
        assert picture.std((0, 1)).max() > 0.002
    assert np.array_equal(pictures[0], draw_stuff(np.random.default_rng(0), name, (40, 56)))
    assert len({tuple(p.mean((0, 1)).round(3)) for p in pictures}) == 4


# ---------------------------------------------------------------------- the data that ships

@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    folder = DATA / request.param
    return request.param, folder, json.loads((folder / "scenes.json").read_text(encoding="utf-8"))


def test_the_shipped_splits_are_complete(split):
    name, folder, rows = split
    assert len(rows) >= {"val": 200, "wild": 60}[name]
    ids = {row["id"] for row in rows}
    assert len(ids) == len(rows)
    assert {p.stem for p in (folder / "images").iterdir()} == ids == {p.stem for p in (folder / "labels").iterdir()}


def test_shipped_label_maps_fit_their_images(split):
    world = load_world()
    name, folder, rows = split
    seen = set()
    for row in rows:
        with Image.open(folder / "images" / f"{row['id']}.webp") as picture:
            width, height = picture.size
            assert picture.mode == "RGB"
        assert min(width, height) == 128 and width != height
        with Image.open(folder / "labels" / f"{row['id']}.png") as picture:
            assert picture.mode == "L" and picture.size == (width, height)
            labels = np.asarray(picture)
        ids = set(np.unique(labels).tolist()) - {IGNORE}
        named = {world.label(n) for n in row["things"] + row["stuff"]}
        assert ids <= named and 0 not in ids
        assert {world.label(n) for n in row["things"]} <= ids, row
        assert 0 < (labels == IGNORE).mean() < 0.25
        seen |= ids
    # Every class that is measured can be measured.
    assert {world.label(n) for n in world.vocabulary("mini-voc")} <= seen
    if name == "val":
        assert seen == set(range(1, 51))
    assert any(len(row["things"]) == 2 for row in rows) and any(len(row["things"]) == 1 for row in rows)


def test_no_scene_is_in_two_splits():
    assert len(set(SEEDS.values())) == len(SEEDS) and set(SPLITS) < set(SEEDS)
    contents = [p.read_bytes() for s in SPLITS for p in (DATA / s / "images").iterdir()]
    assert len(set(contents)) == len(contents)


def test_the_data_is_small():
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= 10 * 2**20


# ---------------------------------------------------------------------- what training reads, and what is counted on drawings

def test_training_arrays_are_a_function_of_the_seeds(tmp_path):
    world = drawn_world()
    arrays = {f"{style}/{key}": np.full((40, 30, 4), (255, 0, 255, 255), np.uint8) for thing in world.things
              for style, keys in thing.glyphs.items() for key in keys}
    for name in ("one", "two"):
        build_training(world, arrays, tmp_path / name, 24, 5, 3, 4, workers=1)
    names = ["eval_images.npy", "eval_labels.npy", "frames.npy", "nouns.json", "train_captions.json", "train_images.npy"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    images, captions = np.load(tmp_path / "one" / "train_images.npy"), json.loads((tmp_path / "one" / names[4]).read_text())
    scene = draw_scene(world, glyph_table(world, arrays, world.train_styles), SEEDS["train"], 3, (24, 24))
    assert images.shape == (5, 24, 24, 3) and np.array_equal(images[3], scene.image) and tuple(captions[3]) == scene.captions
    assert np.load(tmp_path / "one" / "frames.npy").shape == (3, 2, 24, 24, 3)
    (tmp_path / "one" / "train_images.npy").write_bytes(b"kept")
    build_training(world, arrays, tmp_path / "one", 24, 5, 3, 4, workers=1)  # finished: nothing is drawn again
    assert (tmp_path / "one" / "train_images.npy").read_bytes() == b"kept"


@pytest.mark.parametrize(("sign", "iou", "inside"), [(1, 1.0, 1.0), (-1, 0.0, 0.0)])
def test_attribution_that_is_the_object_has_iou_one(tiny_profile, monkeypatch, sign, iou, inside):
    from contextlib import contextmanager
    from types import SimpleNamespace

    import torch

    from ovdiff_lib.recipes import sheet

    mask = np.zeros((32, 48), np.float32)
    mask[8:24, 12:30] = 1
    mask[7, :] = np.nan
    scenes = [(np.zeros((32, 48, 3), np.uint8), mask, "cat")] * 2

    @contextmanager
    def record(unet, positions, size, guided):
        yield SimpleNamespace(maps=lambda: sign * torch.from_numpy(np.nan_to_num(mask))[None])

    monkeypatch.setattr(sheet, "record_attribution", record)
    measured = sheet.attribution_iou(tiny_profile, scenes, steps=(500,))
    assert measured["inside"] == inside and measured["iou"] == pytest.approx(iou)


def test_a_sheet_shows_every_drawing():
    from ovdiff_lib.recipes.sheet import sheet

    levels = {"cat": 40, "dog": 90, "hot dog": 140, "bird": 190}
    drawings = {name: np.full((2, 20, 20, 3), level, np.uint8) for name, level in levels.items()}
    page = np.asarray(sheet(drawings, side=24, columns=3))
    assert page.shape == (2 * 40, 3 * 60, 3)
    for level, (row, column) in {40: (0, 0), 90: (0, 1), 140: (0, 2), 190: (1, 0)}.items():
        assert (page[row * 40:row * 40 + 24, column * 60:column * 60 + 48] == level).all()
