"""Several processes build the same library that one builds."""

import numpy as np

from ovdiff_lib import OVDiff
from ovdiff_lib.engines import build_classes, processors
from ovdiff_lib.types import Category


def test_two_workers_build_what_one_builds(tiny_profile, tmp_path):
    words = [Category("dog"), Category("boat"), Category("hound", "dog")]  # the last is the first by another name
    assert build_classes(tiny_profile, words, [0, 1], tmp_path / "two", workers=2, progress=False) == []
    for seed in (0, 1):
        settings = {"support.seed": seed, "prototypes.seed": seed}
        made = OVDiff(tiny_profile, settings, library=tmp_path / "two", progress=False)
        stored = {e.key for e in made.library.entries()}
        bank = made.build(["dog", "boat"])
        assert {e.key for e in made.library.entries()} == stored  # nothing was left to build
        alone = OVDiff(tiny_profile, settings, library=tmp_path / "one", progress=False).build(["dog", "boat"])
        for one, other in zip(bank.prototypes["sd"], alone.prototypes["sd"], strict=True):
            assert np.allclose(one.vectors, other.vectors, atol=1e-4)
    assert len(made.library.entries()) == 8  # two classes, two seeds, a support set and prototypes each


def test_what_cannot_be_built_is_said(tiny_profile, tmp_path):
    long = Category("a name that is far too long for the text encoder of this small model ", "dog " * 60)
    (sentence,) = build_classes(tiny_profile, [Category("dog"), long], [0], tmp_path, workers=1, progress=False)
    assert "tokens" in sentence and "seed 0" in sentence and "\n" not in sentence


def test_processors(tiny_profile):
    assert processors(tiny_profile) >= 1
