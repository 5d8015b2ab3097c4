"""The mini world: scenes that depend on (seed, index) alone, label maps that agree with what was drawn, and the data that ships."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import ovdiff_lib
from ovdiff_lib.mini.world import IGNORE, World, load_world
from ovdiff_lib.recipes.build import SEEDS
from ovdiff_lib.recipes.scenes import PALETTES, draw_scene, draw_stuff

DATA = Path(ovdiff_lib.__file__).parent / "mini" / "data"
SPLITS = ("val", "wild")


def square(world: World, style: str = "square", alpha: int = 255, colour=(255, 0, 255), side: int = 96) -> dict:
    """One glyph for every noun: a filled square whose mask is known. The random stream sees its shape only, never its pixels."""
    glyph = np.empty((side, side, 4), np.uint8)
    glyph[:] = (*colour, alpha)
    return {(thing.name, style): [glyph] for thing in world.things}


def draw(index: int = 0, shape=(64, 96), seed: int = 5, alpha: int = 255, **options):
    world = load_world()
    return draw_scene(world, square(world, alpha=alpha), ("square",), seed, index, shape, **options)


# ---------------------------------------------------------------------- the table

def test_vocabularies_have_their_sizes():
    world = load_world()
    sizes = {"mini-voc": 20, "mini-object": 42, "mini-context": 28}
    assert {k: len(world.vocabulary(k)) for k in sizes} == sizes
    assert set(world.vocabulary("mini-voc")) < set(world.vocabulary("mini-object"))
    assert world.vocabulary("mini-context") == world.vocabulary("mini-voc") + world.stuff
    with pytest.raises(ValueError, match="mini-voc"):
        world.vocabulary("voc")


def test_every_stuff_is_shared_and_every_noun_has_several_contexts():
    """So that no word can mean where its noun is found."""
    world = load_world()
    assert {c for t in world.things for c in t.contexts} == set(world.contexts)
    for thing in world.things:
        assert len(set(thing.contexts)) >= 2 and set(thing.contexts) <= set(world.contexts), thing
        assert thing.place in ("ground", "air", "any") and thing.codes
    for stuff in world.stuff:
        assert sum(any(stuff in world.contexts[c] for c in t.contexts) for t in world.things) >= 4, stuff


def test_label_ids_are_one_to_one():
    world = load_world()
    assert len(set(world.names)) == len(world.names) == 42 + 8 < IGNORE
    assert [world.label(n) for n in world.names] == list(range(1, 51))
    assert set(world.stuff) == set(PALETTES) == {p for parts in world.contexts.values() for p in parts}
    assert not set(world.train_styles) & set(world.wild_styles)


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
    world = load_world()
    for i in range(24):
        scene = draw(i)
        ids = set(np.unique(scene.labels).tolist()) - {IGNORE}
        assert ids <= {world.label(n) for n in scene.nouns + scene.stuff}
        assert {world.label(n) for n in scene.nouns} <= ids
        assert len(scene.captions) >= 3 and all(isinstance(c, str) for c in scene.captions)
        for word in scene.nouns + scene.stuff:
            assert word in scene.captions[0]
        if scene.nouns:
            assert all(any(n in c for c in scene.captions[1:]) for n in scene.nouns)


def test_some_objects_are_out_of_place():
    world = load_world()
    usual = {frozenset(world.contexts[c]) for t in world.things if t.name == "fish" for c in t.contexts}
    seen = [frozenset(draw(i, (16, 24), objects=1, noun="fish").stuff) in usual for i in range(60)]
    assert 3 <= seen.count(False) <= 25  # 15 % draw from all contexts, some of which are usual


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_number_of_objects_can_be_fixed(count):
    for i in range(6):
        scene = draw(i, objects=count, noun="cat" if count else None)
        assert len(scene.nouns) == count == len(set(scene.nouns))
        assert count == 0 or scene.nouns[0] == "cat"
        assert (IGNORE in scene.labels) == (count > 0)


@pytest.mark.parametrize("shape", [(64, 96), (112, 64)])
def test_the_label_map_is_the_alpha_that_was_drawn(shape):
    """The same scene with a transparent glyph is the bare context, so the pixels that differ are the object."""
    world = load_world()
    for i in range(10):
        scene, bare = draw(i, shape, objects=1), draw(i, shape, objects=1, alpha=0)
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


def test_objects_are_as_large_as_promised():
    """One object is 0.5 to 0.9 of the short side, its longer side measured; the tilt of the square makes room for a little more or less."""
    for i in range(12):
        shape = (64, 96)
        scene = draw(i, shape, objects=1, noun="cat")
        rows, columns = np.nonzero(scene.labels == load_world().label("cat"))
        longer = max(np.ptp(rows), np.ptp(columns)) + 3  # with its two edge pixels
        assert 0.38 * 64 <= longer <= 0.95 * 64, i


def test_half_transparent_glyphs_are_no_objects():
    scene = draw(1, objects=1, alpha=100)
    assert load_world().label(scene.nouns[0]) not in scene.labels


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
