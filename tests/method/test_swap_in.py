"""A new extractor and a new segmenter: one class and one line in a registry each, then everything that the package has works with them."""

import functools
import importlib
import itertools
import linecache
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_features import check_contract as check_extractor
from test_segmenters import check_contract as check_segmenter

from ovdiff_lib import OVDiff, ProfileError, pipeline
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.keys import for_words, made_from, of_labels, of_part
from ovdiff_lib.masks import SEGMENTERS, build_segmenter
from ovdiff_lib.prototypes.build import resize_masks
from ovdiff_lib.registry import Part
from ovdiff_lib.workbench.doctor import uses


class ColourAndPlace:
    """Mean colour and position of each patch of 8 x 8 pixels, all from 0 to 1. It has no settings and loads nothing."""

    name, channels = "colour", 5

    def __init__(self, profile):
        pass

    def __call__(self, images, seeds):
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(seeds):
            raise ValueError("expected u8 (n, H, W, 3) images and n seeds")
        h, w = (-(-side // 8) for side in images.shape[1:3])
        colour = F.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, (h, w))
        place = torch.stack(torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij"))
        return torch.cat([colour, place.expand(len(images), -1, -1, -1)], dim=1).permute(0, 2, 3, 1)


class Bright:
    """What is brighter than the image on average, and what is darker than half of that."""

    name = "bright"

    def __init__(self, profile):
        pass

    def propose(self, image, words):
        grey = image.mean(axis=2)
        masks = np.stack([grey > grey.mean(), grey < grey.mean() / 2])
        return masks[masks.any(axis=(1, 2))]


@pytest.fixture
def registered(monkeypatch):
    """The shortest lines that register a part."""
    monkeypatch.setitem(EXTRACTORS, "colour", Part(ColourAndPlace))
    monkeypatch.setitem(SEGMENTERS, "bright", Part(Bright))


@pytest.fixture
def ovdiff(tiny_profile, registered, tmp_path):
    fields = {"features.extractors": ["colour", "sd"], "masks.segmenter": "bright", "filters.category": False}
    return OVDiff(tiny_profile, fields, library=tmp_path, progress=False)


def test_both_keep_the_contracts_that_every_registered_part_is_held_to(tiny_profile, registered):
    check_extractor(tiny_profile, "colour")
    check_segmenter(build_segmenter(tiny_profile.override({"masks.segmenter": "bright"})), "bright")


# ---- the whole method

def test_both_run_through_the_whole_method(ovdiff, tiny_profile, monkeypatch):
    bank = ovdiff.build("cat, dog")
    assert bank.extractors == ("colour", "sd")
    for category, prototypes in zip(bank.vocabulary, bank.prototypes["colour"], strict=True):
        support, masks = ovdiff.support(category), ovdiff.masks_of(category)
        assert masks.source == ("bright",) * len(support)
        colours = support.images.reshape(len(support), 8, 8, 8, 8, 3).mean((2, 4)) / 255
        inside = resize_masks(masks.foreground, (8, 8)).numpy()
        own = prototypes.region == "foreground"
        assert prototypes.vectors.shape[1] == 5
        np.testing.assert_allclose(prototypes.vectors[own & (prototypes.kind == "class")][0, :3], colours[inside].mean(0), atol=1e-5)
    image = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    found = ovdiff.segment(image, bank)
    assert found.labels.shape == (40, 72) and found.scores.shape == (3, 40, 72) and np.isfinite(found.scores).all()
    assert set(np.unique(found.labels)) <= {0, 1, 2} and (found.winner >= 0).all()
    told = found.explain(20, 50)
    assert told.extractor == "colour" and told.class_name == found.class_names[found.labels[20, 50]]
    # It is found again, and the other extractor has its say.
    monkeypatch.setattr(pipeline, "sample_support", lambda *arguments, **options: pytest.fail("drawn again"))
    monkeypatch.setattr(Bright, "propose", lambda *arguments: pytest.fail("proposed again"))
    both = found.scores
    alone = OVDiff(tiny_profile, {"features.extractors": ["colour"], "masks.segmenter": "bright", "filters.category": False},
                   library=ovdiff.library.root, progress=False).segment(image, "cat, dog").scores
    assert np.abs(both - alone).max() > 1e-3


# ---- what their results depend on

FIELDS = {"features.dino_input_size": 72, "features.sd_timestep": 100, "features.clip_layer": -1, "masks.maskcut_tau": 0.3,
          "masks.detector_score": 0.9, "models.dino": "package:clip", "models.mae": ""}
"""Settings and models of other parts, with another value."""


def key(profile, step="colour"):
    return for_words(made_from(profile, step), "cat")[0]


@pytest.fixture
def profile(tiny_profile):
    """Names no model of which the tiny ones hold nothing."""
    return tiny_profile.override({"features.extractors": ["colour"], "masks.segmenter": "bright", "models.detector": ""})


def test_parts_depend_on_what_they_declare_and_else_on_their_whole_section(profile, registered, monkeypatch):
    assert key(profile, "support") == key(profile.override({"masks.segmenter": "threshold"}), "support")  # depends on neither

    def counting():
        return {field for field, value in FIELDS.items() if key(profile.override({field: value})) != key(profile)}

    assert counting() == set(FIELDS)
    for registry, name, kind in ((EXTRACTORS, "colour", ColourAndPlace), (SEGMENTERS, "bright", Bright)):
        monkeypatch.setitem(registry, name, Part(kind, models=(), settings=()))
    assert counting() == set()
    monkeypatch.setitem(EXTRACTORS, "colour", Part(ColourAndPlace, models=("dino",), settings=("clip_", "seed")))
    monkeypatch.setitem(SEGMENTERS, "bright", Part(Bright, models=(), settings=("maskcut_",)))
    assert counting() == {"features.clip_layer", "models.dino", "masks.maskcut_tau"}
    assert key(profile.override({"features.seed": 5})) != key(profile)


@pytest.mark.parametrize("entry, word", [
    (Part(print, models=("dinoo",)), "dinoo"), (Part(print, models=("device",)), "device"), (Part(print, settings=("clip",)), "clip"),
    (Part(print, settings=("sad_",)), "sad_"), (ColourAndPlace, "Part(ColourAndPlace)"), (None, "NoneType"), (..., "colour")])
def test_entries_that_cannot_be_are_refused(profile, registered, monkeypatch, tmp_path, entry, word):
    for registry, name in ((EXTRACTORS, "colour"), (SEGMENTERS, "bright")):
        with monkeypatch.context() as patch:
            if entry is ...:
                patch.delitem(registry, name)
                word = name
            else:
                patch.setitem(registry, name, entry)
            for use in (lambda: OVDiff(profile, library=tmp_path, progress=False).build("cat"), lambda: uses(profile)):
                with pytest.raises(ProfileError) as caught:
                    use()
                assert word in str(caught.value)


# ---- the code of a part is in the keys

MODULE = """
from ovdiff_lib.features.vit import ClipExtractor

LEVEL = 1


class Mine(ClipExtractor):
    def run(self, pixels):
        return LEVEL


def build(profile):
    return Mine
"""


@pytest.mark.parametrize("choose", [
    lambda module: module.Mine, lambda module: module.Mine.build, lambda module: module.build, lambda module: module.Mine.run,
    lambda module: functools.partial(module.Mine.build, kind="keys")])
def test_an_edited_part_has_other_keys(profile, tmp_path, monkeypatch, choose):
    count = itertools.count()

    def written(text):
        """A module ``own_parts`` with this text, as an import of it gives in a new process."""
        folder = tmp_path / str(next(count))
        folder.mkdir()
        (folder / "own_parts.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "own_parts", raising=False)
        return importlib.import_module("own_parts")

    def depends(text, **options):
        for registry, name in ((EXTRACTORS, "colour"), (SEGMENTERS, "bright")):
            monkeypatch.setitem(registry, name, Part(choose(written(text)), (), (), **options))
        return key(profile), of_labels(profile), of_part(profile, "features", "colour")["code"]

    first, edited = depends(MODULE), depends(MODULE.replace("LEVEL = 1", "LEVEL = 2"))
    assert first == depends(MODULE)  # in another folder
    assert all(a != b for a, b in zip(first, edited, strict=True))
    one, same, other = (depends(text, version=v) for text, v in ((MODULE, "1"), (MODULE + "# more\n", "1"), (MODULE, "2")))
    assert one == same and all(a != b for a, b in zip(one, other, strict=True)) and one[0] != first[0]
    sys.modules.pop("own_parts", None)


def test_code_without_a_file(profile, monkeypatch):
    """In a notebook the text of a function or of a class's methods is there, in what was typed last nothing at all."""
    def code(text, seen=True):
        names = {"__name__": "__main__"}
        file = f"<cell {abs(hash(text))}>"
        exec(compile(text, file, "exec"), names)
        if seen:
            linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        monkeypatch.setitem(EXTRACTORS, "colour", Part(names["build"]))
        return of_part(profile, "features", "colour")["code"]

    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    texts = ["def build(profile):\n    return 1\n", "class build:\n    def __init__(self, profile):\n        self.x = 1\n"]
    for text in texts:
        assert code(text) == code(text) != code(text.replace("1", "2"))
    assert code("def build(profile):\n    return 3\n", seen=False) == code("def build(profile):\n    return 4\n", seen=False)
