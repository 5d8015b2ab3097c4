"""The explain panel's data: what it says of every pixel is what explain() says."""

import base64
import dataclasses
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.explain import BELOW, NOT_BEST
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import PrototypeBank, Prototypes, SupportSet
from ovdiff_lib.workbench.page.panel import FORMAT, MAX_SUPPORT, NONE, chosen_images, panel_data, read_panel, write_panel

CLASSES = ("cat", "dog", "sofa", "boat")


@pytest.fixture(scope="module")
def ovdiff(tiny_profile, tmp_path_factory):
    return OVDiff(tiny_profile, library=tmp_path_factory.mktemp("library"), progress=False)


@pytest.fixture(scope="module")
def results(ovdiff):
    """Two images of unlike shapes, neither square, by their title."""
    bank = ovdiff.build(CLASSES)
    rng = np.random.default_rng(0)
    smooth = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), rng.integers(0, 256, (9, 6, 3), dtype=np.uint8)]
    images = [np.asarray(Image.fromarray(s).resize((w, h), Image.BICUBIC)) for s, w, h in zip(smooth, (52, 33), (40, 47), strict=True)]
    return {f"image of {i.shape}": ovdiff.segment(i, bank) for i in images}


@pytest.fixture(scope="module")
def supports(ovdiff):
    return [ovdiff.support(name) for name in CLASSES]


@pytest.fixture(scope="module")
def data(results, supports, ovdiff):
    return panel_data(results, supports, ovdiff.profile.filters, caption="Two images.")


def unpacked(text, dtype, shape):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)


def maps(entry):
    """Labels, winners, runners-up and margins as a page would read them."""
    shape = entry["grid"]
    two = [unpacked(entry[name], "<u2", shape) for name in ("labels", "winner", "runner_up")]
    return *two, unpacked(entry["margin"], "u1", shape) * entry["step"]


def picture(text):
    head, _, body = text.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def mask(support, grid):
    bits = np.unpackbits(np.frombuffer(base64.b64decode(support["mask"]), np.uint8))
    return bits[: grid[0] * grid[1]].reshape(grid).astype(bool)


def check_pixel(data, entry, decoded, result, row, column, at=None):
    """One pixel of the panel, whose ``decoded`` maps are given, against explain(); ``at`` is its place in the panel's grid."""
    labels, winner, runner_up, margin = decoded
    at = at or (row, column)
    why = result.explain(row, column)
    assert entry["classes"][labels[at]] == why.class_name
    if why.runner_up is None:
        assert runner_up[at] == NONE
    else:
        assert entry["classes"][runner_up[at]] == why.runner_up
        assert margin[at] == pytest.approx(why.margin, abs=entry["step"] / 2 + 1e-6)
    if why.kind is None:
        assert winner[at] == NONE
        return
    found = data["prototypes"][winner[at]]
    for name in ("category", "kind", "region", "index", "extractor"):
        assert found[name] == getattr(why, name)
    assert found["images"] == len(why.images) and [s["image"] for s in found["support"]] == list(why.images[:MAX_SUPPORT])
    for shown, region in zip(found["support"], why.masks, strict=False):
        assert (mask(shown, found["grid"]) == region).all() and shown["features"] == region.sum()


def test_every_pixel_is_explained_as_explain_does(data, results):
    decided = set()
    for entry, (title, result) in zip(data["images"], results.items(), strict=True):
        assert entry["title"] == title and entry["size"] == entry["grid"] == list(result.labels.shape)
        decoded = maps(entry)
        for row, column in np.ndindex(*result.labels.shape):
            check_pixel(data, entry, decoded, result, row, column)
        _, winner, _, margin = decoded
        decided |= set(np.unique(winner))
        assert margin.max() > 0
    assert decided == set(range(len(data["prototypes"]))) and len(decided) > 3  # none is missing, and none is idle


def test_names_and_order_of_results_and_supports_do_not_matter(data, results, supports, ovdiff):
    by_name = {s.category.name: s for s in reversed(supports)}
    again = panel_data(list(results.values()), by_name, ovdiff.profile.filters, caption="Two images.")
    assert [entry.pop("title") for entry in again["images"]] == ["image 1", "image 2"]
    assert again["images"] == [{k: v for k, v in entry.items() if k != "title"} for entry in data["images"]]
    assert again["prototypes"] == data["prototypes"]


def test_pictures_are_small_and_show_images_and_support_images(data, results, supports):
    def close(shown, original, most):
        assert np.abs(np.asarray(shown.convert("RGB"), int) - np.asarray(original.resize(shown.size, Image.LANCZOS), int)).mean() < most

    sets = {s.category.name: s for s in supports}
    assert len(set(data["pictures"])) == len(data["pictures"])
    assert {s["picture"] for p in data["prototypes"] for s in p["support"]} == set(range(len(data["pictures"])))
    for prototype in data["prototypes"]:
        for shown in prototype["support"]:
            small = picture(data["pictures"][shown["picture"]])
            assert max(small.size) <= 64
            close(small, Image.fromarray(sets[prototype["category"]].images[shown["image"]]), 20)
    for entry, result in zip(data["images"], results.values(), strict=True):
        assert picture(entry["picture"]).size == result.image.shape[1::-1]
        close(picture(entry["picture"]), Image.fromarray(result.image), 10)
        assert entry["colours"] == colours_of(["background", *CLASSES]).tolist()
        assert entry["classes"] == ["background", *CLASSES]


def test_queried_classes_say_what_the_filter_did(data, results):
    for entry, result in zip(data["images"], results.values(), strict=True):
        queried = {c["name"]: c for c in entry["queried"]}
        assert set(queried) == set(CLASSES)
        assert [c["probability"] for c in entry["queried"]] == sorted((c["probability"] for c in entry["queried"]), reverse=True)
        for i, name in enumerate(CLASSES):
            assert queried[name]["kept"] == (i in result.kept) and queried[name]["label"] == i + 1
            assert queried[name]["probability"] == pytest.approx(float(result.filter_scores[i]), rel=1e-2)
            assert (queried[name]["reason"] == "") == (i in result.kept)
    reasons = {c["reason"] for entry in data["images"] for c in entry["queried"] if not c["kept"]}
    assert reasons <= {BELOW, NOT_BEST} and reasons  # eta is above the number of classes


def test_the_file_is_plain_json_and_six_images_stay_small(data, results, supports, ovdiff, tmp_path):
    path = write_panel(tmp_path / "explain" / "06_panel.json", data)
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(data)) == read_panel(path)
    assert read_panel(path)["format"] == FORMAT and read_panel(path)["caption"] == "Two images."
    write_panel(path, panel_data({f"{i}": result for i, result in enumerate([*results.values()] * 3)}, supports, ovdiff.profile.filters))
    assert path.stat().st_size < 1_500_000
    entries = read_panel(path)["images"]
    assert len(entries) == 6 and entries[0]["labels"] == entries[2]["labels"]
    for text in ("{", "[]", '{"format": "another"}', "", None):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(InputError, match=r"06_panel\.json"):
            read_panel(path)


# ---- by hand: what the pipeline gives seldom

def by_hand(shape=(3, 5), names="cat, dog", filtered=True):
    """Everything is background by a constant score, but for a row of cat that no other class was compared with."""
    assignment = np.array([[[1, 1, -1], [1, 0, -1]]], np.int16)
    rows = Prototypes(np.eye(2, 3, dtype=np.float32), np.array(["class", "class"]), np.array(["foreground", "background"]),
                      np.full(2, -1, np.int32), np.full(2, -1, np.int32), assignment)
    vocabulary = Vocabulary.of(names)
    kept = (0,) if filtered else (0, 1)
    labels, winner = np.zeros(shape, np.int32), np.full((2, *shape), -1, np.int32)
    scores = np.full((3, *shape), -np.inf, np.float32)
    scores[0] = 0.75
    labels[1], winner[:, 1], scores[0, 1], scores[1, 1] = 1, 0, -np.inf, 0.5
    probabilities = np.array([0.9, 0.1] if filtered else [np.nan, np.nan], np.float32)
    bank = PrototypeBank(vocabulary, {"sd": (rows, rows)}).restrict(kept)
    image = np.arange(shape[0] * shape[1] * 3, dtype=np.uint32).reshape(*shape, 3).astype(np.uint8)
    return Segmentation(image, labels, scores[[0, *(k + 1 for k in kept)]], winner, vocabulary, kept, probabilities, bank)


def support(name, count=1):
    return SupportSet(Category(name), np.zeros((count, 64, 96, 3), np.uint8), np.zeros((count, 2, 3), np.float32), np.arange(count))


def test_constant_background_and_classes_without_a_rival():
    result = by_hand()
    data = panel_data({"one": result}, [support("cat")])
    labels, winner, runner_up, _ = decoded = maps(data["images"][0])
    for row, column in np.ndindex(3, 5):
        check_pixel(data, data["images"][0], decoded, result, row, column)
    assert winner[0, 0] == NONE and (runner_up == NONE).all() and labels[1, 2] == 1 and winner[1, 2] == 0
    assert picture(data["pictures"][0]).size == (64, 43)  # 64 x 96 pixels, the long side at 64
    dropped = data["images"][0]["queried"][1]
    assert (dropped["name"], dropped["kept"], dropped["reason"]) == ("dog", False, BELOW)
    assert dropped["probability"] == pytest.approx(0.1)


def test_without_the_category_filter_nothing_is_called_dropped():
    queried = panel_data([by_hand(filtered=False)], [support("cat")])["images"][0]["queried"]
    assert [(c["name"], c["probability"], c["kept"], c["reason"]) for c in queried] == [("cat", None, True, ""), ("dog", None, True, "")]


def test_a_large_image_is_shown_by_evenly_spaced_pixels():
    result = by_hand((30, 100))
    result.labels[:], result.winner[:], result.kept_scores[:2] = 0, -1, [[[0.75]], [[0.5]]]
    result.labels[20:, 61:], result.winner[:, 20:, 61:], result.kept_scores[1, 20:, 61:] = 1, 0, 0.875
    data = panel_data([result], [support("cat")], longest=25)
    entry = data["images"][0]
    assert entry["size"] == [30, 100] and entry["grid"] == [8, 25] and picture(entry["picture"]).size == (25, 8)
    decoded = maps(entry)
    for i, j in np.ndindex(8, 25):
        row, column = int((i + 0.5) * 30 / 8), int((j + 0.5) * 100 / 25)  # the rule by which the page names the pixel
        check_pixel(data, entry, decoded, result, row, column, (i, j))
    assert {0, 1} == set(np.unique(decoded[0])) and {0, 1} == set(np.unique(decoded[2]))


def test_names_are_kept_as_they_are():
    names = "</script><script>alert(1)</script>, كلب 🐕 \"x\" 'y' & z"
    result = by_hand(names=names)
    data = panel_data({"<b>": result}, [support(result.vocabulary.names[0])])
    assert data["images"][0]["classes"][1:] == list(result.vocabulary.names)
    assert data["prototypes"][0]["category"] == "</script><script>alert(1)</script>"


def test_what_does_not_fit_is_one_sentence():
    bare = dataclasses.replace(by_hand(), bank=None)
    for result, given, words in ((by_hand(), support("dog"), "'cat'"), (by_hand(), support("cat", 0), "'cat'"),
                                 (bare, support("cat"), "without its prototypes")):
        with pytest.raises(InputError, match=words):
            panel_data([result], [given])


def test_settings_of_the_filter_tell_the_reason():
    result = by_hand()
    result.filter_scores[:] = (0.5, 0.5)
    (queried,) = [image["queried"] for image in panel_data([result], [support("cat")], load_profile("mini").filters)["images"]]
    assert queried[1]["reason"] == NOT_BEST


def test_the_panel_shows_every_class_and_one_that_was_dropped():
    shown = [["cat"], ["cat"], ["cat", "dog"], ["dog"], ["boat"], ["cow", "boat"], ["horse"]]
    kept = [["cat", "boat"], ["cat"], ["cat", "dog"], [], ["boat"], ["boat"], ["horse"]]
    assert chosen_images(shown, kept) == [0, 3, 4, 5, 6]  # 3 was dropped; 2 and 1 show nothing new
    assert chosen_images(shown, kept, dropped=2) == [0, 3, 5, 6]  # 5 shows the boat as well
    assert chosen_images(shown, kept, dropped=0, most=3) == [0, 2, 4]
    assert chosen_images(shown, shown) == [0, 2, 4, 5, 6] and chosen_images([], []) == []
