"""What flows between the steps: names are data, vocabularies are validated, banks restrict without copying mistakes."""

import dataclasses

import numpy as np
import pytest
from sentences import refused

from ovdiff_lib.categories import MAX_NAME, Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import PrototypeBank, Prototypes

LEGAL = ["cat", "Cat", "chest of drawers", "🐈", "👩‍🚀", "café",
         "ソファ", "كلب", "../../etc/passwd", "/", "C:\\x", "a/b", "'; drop--", "%s {name}", "0", "x" * MAX_NAME]


def test_any_readable_name_is_kept_as_it_is():
    for name in LEGAL:
        category = Category(name)
        assert (category.name, category.prompt, category.kind) == (name, name, "thing")


@pytest.mark.parametrize("fields", [*({"name": name} for name in (
    "", " ", "\t\n", "\u200b", " \u200d ", "x" * (MAX_NAME + 1), "a\0b", "a\x1bb", "a\x7f", "\udc80", None, 3, b"cat")),
    {"prompt": "a\0"}, {"prompt": "\ud800"}, {"prompt": None}, {"kind": "Stuff"}, {"kind": ""}, {"kind": None}])
def test_what_is_no_category_is_refused_in_one_sentence(fields):
    with refused(InputError):
        Category(**{"name": "cat", **fields})
    assert issubclass(InputError, (OVDiffError, ValueError))


def test_spaces_and_unicode_forms_are_made_one():
    assert Category("  chest \t of\n drawers ").name == "chest of drawers"
    assert Category("cafe\u0301").name == "caf\u00e9"
    category = Category("mouse", "  computer   mouse ")
    assert (category.name, category.prompt) == ("mouse", "computer mouse")
    assert Category("mouse", "   ").prompt == "mouse"
    assert len(Category("x" * MAX_NAME + "   ").name) == MAX_NAME


def test_categories_are_values():
    assert Category("cat") == Category(" cat ") != Category("cat", kind="stuff")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Category("cat").name = "dog"


@pytest.mark.parametrize("classes, word", [
    ([], "no class"), ("", "empty"), ("cat,,dog", "empty"), ("cat, ", "empty"), (["cat", "dog", "cat"], "'cat'"), (["cat", "CAT"], "'CAT'"),
    (["Straße", "STRASSE"], "twice"), (["caf\u00e9", "cafe\u0301"], "twice"), (["cat", "background"], "background"),
    ([" BackGround "], "BackGround"), (None, "None"), (5, "5"), (object(), "object")])
def test_bad_vocabularies_are_refused(classes, word):
    with refused(InputError, word):
        Vocabulary.of(classes)


def test_a_vocabulary_keeps_order_and_kinds():
    vocabulary = Vocabulary.of(" sofa , cat,Grass", stuff=["grass ", "sky"])
    assert vocabulary.names == ("sofa", "cat", "Grass") and len(vocabulary) == 3
    assert [c.kind for c in vocabulary] == ["thing", "thing", "stuff"]
    assert Vocabulary.of(vocabulary) is vocabulary
    assert Vocabulary.of("sofa, cat, Grass", stuff="grass, sky") == vocabulary
    mouse = Category("mouse", "computer mouse")
    assert Vocabulary.of(["cat", mouse]).categories == (Category("cat"), mouse)
    assert Vocabulary.of(name for name in ("b", "a")).names == ("b", "a")


def prototypes(offset: float = 0.0) -> Prototypes:
    """Seven prototypes of N = 2 support images on a 2 x 3 grid with K = 2 parts a region; vectors are the row number plus ``offset``."""
    kind = np.array(["class", "instance", "part", "part", "class", "part", "part"])
    region = np.array(["foreground"] * 4 + ["background"] * 3)
    cluster = np.array([-1, -1, 0, 1, -1, 2, 3], np.int32)
    image = np.array([-1, 1, -1, -1, -1, -1, -1], np.int32)
    assignment = np.array([[[0, 1, -1], [2, 3, 3]], [[-1, -1, 2], [1, 1, 0]]], np.int16)
    vectors = np.arange(7, dtype=np.float32)[:, None] + np.full((1, 4), offset, np.float32)
    return Prototypes(vectors, kind, region, image, cluster, assignment)


def test_part_assignment_splits_the_codes_by_region():
    made = prototypes()
    foreground, background = made.part_assignment("foreground"), made.part_assignment("background")
    assert foreground.tolist() == [[[0, 1, -1], [-1, -1, -1]], [[-1, -1, -1], [1, 1, 0]]]
    assert background.tolist() == [[[-1, -1, -1], [2, 3, 3]], [[-1, -1, 2], [-1, -1, -1]]]
    assert foreground.dtype == np.int16


def test_select_takes_the_same_rows_of_everything():
    made = prototypes()
    picked = made.select(np.array([False, True, True, False, False, False, True]))
    assert len(picked) == 3 and len(made) == 7
    assert picked.vectors[:, 0].tolist() == [1, 2, 6]
    assert picked.kind.tolist() == ["instance", "part", "part"]
    assert picked.region.tolist() == ["foreground", "foreground", "background"]
    assert picked.image.tolist() == [1, -1, -1] and picked.cluster.tolist() == [-1, 0, 3]
    assert np.array_equal(picked.assignment, made.assignment)
    assert picked.part_assignment("background").max() == 3 and (picked.part_assignment("background") == 2).sum() == 0


def bank() -> PrototypeBank:
    rows = tuple(prototypes(100.0 * i) for i in range(3))
    return PrototypeBank(Vocabulary.of("cat, dog, sofa"), {"sd": rows, "clip-keys": tuple(reversed(rows))})


def test_restrict_follows_the_vocabulary_for_every_extractor():
    whole = bank()
    for kept, names in (((2, 0), ("cat", "sofa")), ([1], ("dog",)), ((0, 0, 1), ("cat", "dog")), (range(3), ("cat", "dog", "sofa"))):
        part = whole.restrict(kept)
        assert part.vocabulary.names == names and part.extractors == ("sd", "clip-keys")
        for extractor in whole.extractors:
            own = [whole.prototypes[extractor][whole.vocabulary.names.index(name)] for name in names]
            assert list(map(id, part.prototypes[extractor])) == list(map(id, own))
    with pytest.raises(InputError):
        whole.restrict([])


def test_without_background_leaves_the_foreground_alone():
    whole = bank()
    bare = whole.without_background()
    for extractor in whole.extractors:
        for before, after in zip(whole.prototypes[extractor], bare.prototypes[extractor], strict=True):
            assert len(before) == 7 and set(after.region) == {"foreground"}
            assert np.array_equal(after.vectors, before.vectors[:4])
    assert bare.vocabulary is whole.vocabulary


def test_map_names_extractor_and_index():
    seen = []
    bank().map(lambda extractor, index, own: seen.append((extractor, index, float(own.vectors[0, 0]))) or own)
    assert seen == [("sd", 0, 0), ("sd", 1, 100), ("sd", 2, 200), ("clip-keys", 0, 200), ("clip-keys", 1, 100), ("clip-keys", 2, 0)]


def test_class_names_of_a_segmentation_start_with_background():
    shape = (3, 5)
    result = Segmentation(np.zeros((*shape, 3), np.uint8), np.ones(shape, np.int32), np.zeros((3, *shape), np.float32),
                          np.zeros((2, *shape), np.int32), Vocabulary.of("cat, dog"), (0, 1), np.array([0.5, 0.5], np.float32))
    assert result.class_names == ("background", "cat", "dog")
    assert result.class_names[int(result.labels[0, 0])] == "cat"
