"""What flows between the steps: names are data, vocabularies are validated, banks restrict without copying mistakes."""

import dataclasses

import numpy as np
import pytest
from sentences import refused
from test_explain import rows

from ovdiff_lib.categories import MAX_NAME, Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.types import PrototypeBank

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
    assert Category("cat") == Category(" cat ") != Category("cat", kind="stuff")
    category = Category("mouse", "  computer   mouse ")
    assert (category.name, category.prompt) == ("mouse", "computer mouse")
    assert Category("mouse", "   ").prompt == "mouse"
    assert len(Category("x" * MAX_NAME + "   ").name) == MAX_NAME


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


def test_select_takes_the_same_rows_of_everything():
    chosen = [1, 3, 9]
    picked = rows().select(np.isin(np.arange(10), chosen))
    for name in ("vectors", "kind", "region", "image", "cluster"):
        assert np.array_equal(getattr(picked, name), getattr(rows(), name)[chosen])
    assert len(picked) == 3 and len(rows()) == 10 and np.array_equal(picked.assignment, rows().assignment)


def bank() -> PrototypeBank:
    made = tuple(dataclasses.replace(rows(), vectors=rows().vectors + 100 * i) for i in range(3))
    return PrototypeBank(Vocabulary.of("cat, dog, sofa"), {"sd": made, "clip-keys": made[::-1]})


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
            assert len(before) == 10 and set(after.region) == {"foreground"}
            assert np.array_equal(after.vectors, before.vectors[:5])
    assert bare.vocabulary is whole.vocabulary
