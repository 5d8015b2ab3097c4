"""The explain panel's data: what it says of every pixel is what explain() says."""

import base64
import dataclasses
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image
from test_explain import many

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.explain import BELOW, NOT_BEST
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.types import SupportSet
from ovdiff_lib.workbench.page.panel import MOST_REGIONS, NONE, chosen_images, panel_data, read_panel, write_panel

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
    return {name: ovdiff.support(name) for name in CLASSES}


@pytest.fixture(scope="module")
def data(results, supports, ovdiff):
    return json.loads(json.dumps(panel_data(results, supports.values(), ovdiff.profile.filters, "Two images.")))


def picture(text):
    head, _, body = text.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def mask(support, grid):
    bits = np.unpackbits(np.frombuffer(base64.b64decode(support["mask"]), np.uint8))
    return bits[: grid[0] * grid[1]].reshape(grid).astype(bool)


def check_every_pixel(data, results):
    """The maps as a page would read them, against explain(); returns the winners that occur."""
    decided = set()
    for entry, (title, result) in zip(data["images"], results.items(), strict=True):
        assert entry["title"] == title and entry["size"] == list(result.labels.shape)
        labels, winner, runner_up, margin = (
            np.frombuffer(zlib.decompress(base64.b64decode(entry[name])), "<u2").reshape(entry["size"])
            for name in ("labels", "winner", "runner_up", "margin"))
        decided |= set(winner.flat)
        for at in np.ndindex(*result.labels.shape):
            why = result.explain(*at)
            assert entry["classes"][labels[at]] == why.class_name
            if why.runner_up is None:
                assert runner_up[at] == NONE
            else:
                assert entry["classes"][runner_up[at]] == why.runner_up
                assert margin[at] / 1000 == pytest.approx(why.margin, abs=0.5e-3 + 1e-6)
            if why.kind is None:
                assert winner[at] == NONE
                continue
            found = data["prototypes"][winner[at]]
            for name in ("category", "kind", "region", "index", "extractor"):
                assert found[name] == getattr(why, name)
            assert found["images"] == len(why.images) and [s["image"] for s in found["support"]] == list(why.images[:MOST_REGIONS])
            for shown, region in zip(found["support"], why.masks, strict=False):
                assert (mask(shown, found["grid"]) == region).all() and shown["features"] == region.sum()
    return decided


def test_every_pixel_is_explained_as_explain_does(data, results):
    decided = check_every_pixel(data, results)
    assert decided == set(range(len(data["prototypes"]))) and len(decided) > 3  # none is missing, and none is idle


def test_pictures_are_small_and_show_images_and_support_images(data, results, supports):
    def close(shown, original, most):
        assert np.abs(np.asarray(shown.convert("RGB"), int) - np.asarray(original.resize(shown.size, Image.LANCZOS), int)).mean() < most

    assert len(set(data["pictures"])) == len(data["pictures"])
    assert {s["picture"] for p in data["prototypes"] for s in p["support"]} == set(range(len(data["pictures"])))
    for prototype in data["prototypes"]:
        for shown in prototype["support"]:
            small = picture(data["pictures"][shown["picture"]])
            assert max(small.size) <= 64
            close(small, Image.fromarray(supports[prototype["category"]].images[shown["image"]]), 20)
    for entry, result in zip(data["images"], results.values(), strict=True):
        assert picture(entry["picture"]).size == result.image.shape[1::-1]
        close(picture(entry["picture"]), Image.fromarray(result.image), 10)
        assert entry["colours"] == colours_of(["background", *CLASSES]).tolist()


def test_queried_classes_say_what_the_filter_did(data, results):
    reasons = set()
    for entry, result in zip(data["images"], results.values(), strict=True):
        queried = {c["name"]: c for c in entry["queried"]}
        assert set(queried) == set(CLASSES)
        assert [c["probability"] for c in entry["queried"]] == sorted((c["probability"] for c in entry["queried"]), reverse=True)
        for i, name in enumerate(CLASSES):
            assert queried[name]["label"] == i + 1 and (queried[name]["reason"] == "") == (i in result.kept)
            assert queried[name]["probability"] == pytest.approx(float(result.filter_scores[i]), rel=1e-2)
            reasons.add(queried[name]["reason"])
    assert {""} < reasons <= {"", BELOW, NOT_BEST}  # eta is above the number of classes


def test_a_panel_reads_back_and_another_file_is_one_sentence(data, tmp_path):
    path = tmp_path / "explain" / "06_panel.json"
    write_panel(path, data)
    assert read_panel(path) == data and data["caption"] == "Two images."
    assert path.stat().st_size < 250_000 * len(data["images"])
    for text in ("{", "[]", '{"format": "another"}', "", None):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(InputError, match=r"06_panel\.json"):
            read_panel(path)


# ---- by hand: what the pipeline gives seldom

def support(name, count=2):
    return SupportSet(Category(name), np.zeros((count, 64, 96, 3), np.uint8), np.zeros((count, 2, 3), np.float32), np.arange(count))


def panel_of(result, *supports):
    found = panel_data({"<one>": result}, supports or [support("cat"), support("sofa")], Filters(), "")
    return json.loads(json.dumps(found))


def test_constant_background_and_pixels_without_a_rival():
    result, _ = many()
    result.kept_scores[:] = np.where(result.kept_scores == 2, 2, -np.inf)
    result.kept_scores[:, 2:] = many()[0].kept_scores[:, 2:]
    data = panel_of(result)
    assert {NONE, 0} < check_every_pixel(data, {"<one>": result})
    assert picture(data["pictures"][0]).size == (64, 43)  # 64 x 96 pixels, the long side at 64


def test_without_the_category_filter_nothing_is_called_dropped():
    result = dataclasses.replace(many()[0], filter_scores=np.full(3, np.nan, np.float32), kept=(0, 1, 2))
    result = dataclasses.replace(result, kept_scores=np.insert(result.kept_scores, 2, 0, 0))
    queried = panel_of(result)["images"][0]["queried"]
    assert [(c["name"], c["probability"], c["reason"]) for c in queried] == [(name, None, "") for name in ("cat", "dog", "sofa")]


def test_what_does_not_fit_is_one_sentence():
    result, _ = many()
    for supports in ([support("sofa")], [support("cat", 0), support("sofa")]):
        with pytest.raises(InputError, match="'cat'"):
            panel_of(result, *supports)


def test_the_panel_shows_every_class_and_one_that_was_dropped():
    shown = [["cat"], ["cat"], ["cat", "dog"], ["dog"], ["boat"], ["cow", "boat"], ["horse"]]
    kept = [["cat", "boat"], ["cat"], ["cat", "dog"], [], ["boat"], ["boat"], ["horse"]]
    assert chosen_images(shown, kept) == [0, 3, 4, 5, 6]  # 3 was dropped; 2 and 1 show nothing new
    assert chosen_images(shown, shown) == [0, 2, 4, 5, 6] and chosen_images([], []) == []
