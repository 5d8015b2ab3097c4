"""Own pictures as support: read, framed, masked, kept in the library under all they were made from, and explained."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentences import refused

from ovdiff_lib import InputError, OVDiff, keys
from ovdiff_lib.categories import Category
from ovdiff_lib.library import own as module
from ovdiff_lib.library.own import OwnPictures, choose_mask, square_around
from ovdiff_lib.library.sharing import export_entries, import_archive
from ovdiff_lib.library.store import Library

SHAPES = ((40, 72), (90, 33), (64, 64))


def rectangle(shape: tuple[int, int], at: int = 6, side: int = 20) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[at : at + side, at : at + side] = True
    return mask


PICTURES = [np.random.default_rng(n).integers(0, 256, (*shape, 3), dtype=np.uint8) for n, shape in enumerate(SHAPES)]
MASKS = [rectangle(shape) for shape in SHAPES]


class Rectangles:
    """Proposes two squares of a picture, or in dark ones nothing."""

    name = "rectangles"

    def propose(self, image, words):
        shape = image.shape[:2]
        return np.stack([rectangle(shape), rectangle(shape, 0, 8)]) if image.any() else np.zeros((0, *shape), bool)


@pytest.fixture
def ovdiff(tiny_profile, tmp_path) -> OVDiff:
    return OVDiff(tiny_profile, {"filters.category": False}, library=tmp_path / "library", progress=False)


def folder_of(path: Path) -> Path:
    path.mkdir()
    for n, (image, mask) in enumerate(zip(PICTURES, MASKS, strict=True)):
        Image.fromarray(image).save(path / f"{n}.png")
        Image.fromarray(mask).save(path / f"{n}_mask.png")
    return path


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_own_pictures_and_words_make_one_bank(ovdiff, monkeypatch):
    drawn = ovdiff.build(["sofa", "dog"])
    bank = ovdiff.build_from({"my cat": PICTURES, "sofa": "sofa", "pet": "dog"}, masks={"my cat": MASKS}, stuff=["sofa"])
    assert [(c.name, c.prompt, c.kind, bool(c.pictures)) for c in bank.vocabulary] == [
        ("my cat", "my cat", "thing", True), ("sofa", "sofa", "stuff", False), ("pet", "dog", "thing", False)]
    for extractor, (_, *words) in bank.prototypes.items():  # classes of words are those that they are without own ones beside
        assert all(same(a, b) for a, b in zip(words, drawn.prototypes[extractor], strict=True))
    own = bank.vocabulary.categories[0]
    support, masks = ovdiff.support(own), ovdiff.masks_of(own)
    assert support.attribution is None and support.category == own and support.images.shape == (3, 64, 64, 3)
    assert support.take([1, 0]).attribution is None and set(masks.source) == {"given"}
    with refused(InputError, "attribution", "masks_of"):
        ovdiff.masks(support)
    monkeypatch.setattr(module, "own_support", lambda *_: 1 / 0)  # all is in the library, whatever the pictures come from
    again = ovdiff.build_from({"my cat": [Image.fromarray(one) for one in PICTURES], "sofa": "sofa", "pet": "dog"},
                              masks={"my cat": [255 * mask.astype(np.uint8) for mask in MASKS]}, stuff=["sofa"])
    assert again.vocabulary == bank.vocabulary and same(ovdiff.build([own]).prototypes["sd"][0], bank.prototypes["sd"][0])


def test_an_explanation_leads_to_the_users_picture(ovdiff):
    bank = ovdiff.build_from({"cat": PICTURES}, masks={"cat": MASKS})
    result = ovdiff.segment(PICTURES[0], bank)
    told = result.explain(12, 12)
    assert told.own and "own pictures" in str(told)
    shown = ovdiff.support(bank.vocabulary.categories[0]).images[told.images[0]]
    top, left, side, _ = square_around(MASKS[told.images[0]])
    cut = Image.fromarray(PICTURES[told.images[0]][top : top + side, left : left + side]).resize((64, 64), Image.BILINEAR)
    assert np.array_equal(shown, np.asarray(cut))


def test_without_masks_clip_chooses_among_proposals(ovdiff, monkeypatch):
    judged = []

    def embed(image):
        judged.append(image)
        return np.array([(image == 127).all(2).mean(), 1.0])  # the more grey is around the object, the better

    judge = ovdiff.category_filter
    monkeypatch.setattr(judge, "text", lambda texts: np.array([[1.0, 0.0]]) if len(texts) == 1 and "cat" in texts[0] else None)
    monkeypatch.setattr(judge, "embed_image", embed)
    found = choose_mask(PICTURES[0], "cat", 64, Rectangles(), judge)
    best = np.argmax([(one == 127).all(2).mean() for one in judged])
    assert (found == [MASKS[0], rectangle(SHAPES[0], 0, 8)][best]).all()
    large = np.kron(PICTURES[0], np.ones((8, 8, 1), np.uint8))  # looked at in 128 x 230 pixels
    assert choose_mask(large, "cat", 64, Rectangles(), judge).shape == large.shape[:2]
    monkeypatch.setattr(OVDiff, "segmenter", Rectangles())
    with pytest.warns(UserWarning, match="no mask in picture 1 of 'cat', which is left out"):
        bank = ovdiff.build_from({"cat": [PICTURES[0], np.zeros_like(PICTURES[1]), PICTURES[2]]})
    assert ovdiff.masks_of(bank.vocabulary.categories[0]).source == ("rectangles", "rectangles")
    with refused(InputError, "'rectangles'", "any picture of 'dog'"), warnings.catch_warnings(action="ignore"):
        ovdiff.build_from({"dog": [np.zeros_like(PICTURES[1])]})


def test_a_picture_twice_counts_twice(ovdiff):
    bank = ovdiff.build_from({"cat": [PICTURES[0]] * 2}, masks={"cat": [MASKS[0], rectangle(SHAPES[0], 12, 14)]})
    rows = bank.prototypes["sd"][0]
    assert sorted(rows.image[(rows.kind == "instance") & (rows.region == "foreground")]) == [0, 1]


def test_a_key_is_of_pixels_masks_words_and_what_chooses_masks(tiny_profile, tmp_path):
    def key(words="cat", pictures=PICTURES, masks=MASKS, **changes):
        return keys.for_pictures(tiny_profile.override(changes), OwnPictures.of(Category(words), pictures, masks))[0]

    first = key()
    assert key(pictures=folder_of(tmp_path / "cats"), masks=None) == first == key(**{"masks.segmenter": "maskcut", "support.seed": 3})
    others = [key("dog"), key(pictures=PICTURES[::-1], masks=MASKS[::-1]), key(masks=[*MASKS[:2], ~MASKS[2]]), key(masks=None),
              key(masks=None, **{"masks.segmenter": "maskcut"}), key(**{"support.image_size": 32})]
    assert len({first, *others}) == 7
    assert keys.made_from(tiny_profile, "sd", own=True) == keys.made_from(tiny_profile.override({"support.steps": 9}), "sd", own=True)


def test_own_classes_are_verified_exported_and_imported(ovdiff, tiny_profile, tmp_path):
    bank = ovdiff.build_from({"cat": PICTURES}, masks={"cat": MASKS})
    assert [e.kind for e in ovdiff.library.entries()] == ["support", "masks", "prototypes"] and ovdiff.library.verify() == []
    export_entries(ovdiff.library.entries(), tmp_path / "cats.tar")
    there = OVDiff(tiny_profile, library=tmp_path / "there", progress=False)
    own = bank.vocabulary.categories[0]
    with refused(InputError, own.pictures, "'cat'"):
        there.build([own])
    assert import_archive(Library(tmp_path / "there"), tmp_path / "cats.tar")[True] == 3
    assert same(there.build([own]).prototypes["sd"][0], bank.prototypes["sd"][0])
    assert np.array_equal(there.support(own).images, ovdiff.support(own).images) and len(there.library.entries()) == 3


@pytest.mark.parametrize("pictures, masks, words", [
    ([], None, ["no picture of 'cat'", "words"]), (PICTURES, MASKS[:2], ["2 masks of 3 pictures", "'cat'"]),
    (PICTURES[0], None, ["'cat'", "a list"]), (Image.fromarray(PICTURES[0]), None, ["a list"]), (7, None, ["a list"]),
    (PICTURES, [*MASKS[:2], MASKS[0]], ["picture 2 of 'cat'", "40 x 72", "64 x 64"]),
    (PICTURES, [MASKS[0], 0 * MASKS[1], MASKS[2]], ["picture 1 of 'cat'", "0 everywhere"]),
    (PICTURES, [mask * 1.0 for mask in MASKS], ["float64"]), (["nowhere.png"], None, ["nowhere.png"]),
    (Path("nowhere"), None, ["nowhere", "does not exist"])])
def test_what_cannot_be_support_is_refused_in_one_sentence(ovdiff, pictures, masks, words):
    with refused(InputError, *words):
        ovdiff.build_from({"cat": pictures}, masks={} if masks is None else {"cat": masks})


def test_folders_hold_masks_beside_their_pictures_or_none(ovdiff, tmp_path):
    cats = folder_of(tmp_path / "cats")
    own = OwnPictures.of(Category("cat"), cats)
    assert len(own.pictures) == 3 and all((mask == true).all() for (_, mask), true in zip(own, MASKS, strict=True))
    (cats / "1_mask.png").unlink()
    with refused(InputError, "1_mask.png"):
        ovdiff.build_from({"cat": cats})
    (cats / "0_mask.png").unlink(), (cats / "2_mask.png").unlink()
    assert OwnPictures.of(Category("cat"), cats).masks is None
    (cats / "2.png").write_bytes(b"no image")
    with refused(InputError, "2.png"):
        ovdiff.build_from({"cat": [cats / "2.png"]})
    with refused(InputError, "masks of 'sofa'"):
        ovdiff.build_from({"sofa": "sofa"}, masks={"sofa": MASKS})
