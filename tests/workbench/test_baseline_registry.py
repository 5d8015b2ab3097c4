"""The contract of every baseline: what goes in, what comes out, and that nothing else matters."""

import functools
import shutil

import numpy as np
import pytest
import torch
from oracles import picture
from test_groupvit import save_model

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.profiles.reading import available, load_profile
from ovdiff_lib.workbench.baselines import BASELINES, OWN_BACKGROUND, build_baseline
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks

PETS = Vocabulary((Category("cat"), Category("hound", "dog"), Category("odd {name} {0}")))


@pytest.fixture(scope="module")
def profile(tiny_profile, tiny_models, tmp_path_factory):
    """Tiny models but for the mini CLIP and detector, which find something in a scene; an archive of sixteen scenes."""
    folder = tmp_path_factory.mktemp("contract")
    save_model(tiny_models, folder / "groupvit")
    data = load_dataset("mini-voc")
    (folder / "archive").mkdir()
    for i in range(16):
        shutil.copyfile(data.files[i].image, folder / "archive" / f"{i}.webp")
    return tiny_profile.override({
        "models.clip": "package:clip", "models.groupvit": str(folder / "groupvit"), "masks.segmenter": "detector",
        "baselines.archive": str(folder / "archive"), "baselines.reco_retrieved": 3,
        "baselines.reco_contexts": ["water"]})


@pytest.fixture(scope="module", autouse=True)
def own_library(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVDIFF_LIBRARY", str(tmp_path_factory.mktemp("library")))
        yield


@pytest.fixture(scope="module")
def built(profile):
    """Each baseline, made once."""
    return functools.cache(lambda name: build_baseline(name, profile))


@pytest.fixture(scope="module")
def scene():
    return load_dataset("mini-voc")[0].image


@pytest.mark.parametrize("name", BASELINES)
def test_scores_and_labels(name, built, scene):
    """Of images of any shape, from a pixel to long strips."""
    baseline = built(name)
    for image in [scene, *(picture(*s) for s in ((64, 88), (100, 70), (33, 40), (1, 1), (5, 90), (80, 5)))]:
        before = image.copy()
        scores, labels = baseline.scores(image, PETS), baseline.predict(image, PETS)
        assert (image == before).all()
        assert scores.shape == (4, *image.shape[:2]) and scores.dtype == np.float32 and not np.isnan(scores).any()
        assert labels.shape == image.shape[:2] and labels.dtype == np.int64 and (labels == scores.argmax(0)).all()
        if name in OWN_BACKGROUND:
            assert np.isfinite(scores).any(0).all()
        else:
            assert (scores[0] == -np.inf).all() and np.isfinite(scores[1:]).all() and labels.min() >= 1
    # Different things are told apart somewhere.
    assert len(np.unique(baseline.scores(scene, PETS)[1:].round(4))) > 3


@pytest.mark.parametrize("name", BASELINES)
def test_results_depend_on_image_vocabulary_and_prompt_alone(name, built, profile, scene):
    used = built(name)
    first = used.scores(scene, PETS)
    used.scores(picture(64, 88), Vocabulary.of("boat, sofa"))
    torch.manual_seed(99)
    np.random.seed(99)
    np.testing.assert_array_equal(used.scores(scene, PETS), first)
    alone = build_baseline(name, profile.override({"matching.batch_size": 1}))
    np.testing.assert_allclose(alone.scores(scene, PETS), first, atol=1e-4)
    other = build_baseline(name, profile.override({"support.prompt": "dog and water and {name} and boat"}))
    assert not np.array_equal(other.scores(scene, PETS), first)


@pytest.mark.parametrize("name", BASELINES)
def test_one_class_and_many(name, built):
    for count in (1, 25):
        scores = built(name).scores(picture(40, 64), Vocabulary.of([f"noun {i}" for i in range(count)]))
        assert scores.shape == (count + 1, 40, 64)


@pytest.mark.parametrize("name", BASELINES)
def test_only_declared_models_and_settings_are_needed(name, profile):
    declared = BASELINES[name].models or ("clip", "detector")  # of the segmenter that this profile names
    others = {f"models.{field}": "" for field in ("diffusion", "mae", "open_clip", "detector", "clip", "dino", "groupvit")
              if field not in declared}
    build_baseline(name, profile.override(others)).predict(picture(64, 64), PETS)
    for field in declared:
        with pytest.raises((ProfileError, ModelNotAvailable)):
            build_baseline(name, profile.override({f"models.{field}": ""}))
    fields = load_profile("mini").to_dict()["baselines"]
    for setting in BASELINES[name].settings:
        assert any(f == setting or (setting.endswith("_") and f.startswith(setting)) for f in fields), setting


def test_an_unknown_baseline():
    with pytest.raises(ProfileError, match=", ".join(BASELINES)):
        build_baseline("tcl", load_profile("mini"))


def test_fields_of_baselines_change_no_digest_of_the_method():
    for name in available():
        profile = load_profile(name)
        other = profile.override({"baselines.reco_retrieved": 3})
        assert other.digest() == profile.digest() and other != profile


@pytest.mark.parametrize("name", BASELINES)
def test_networks_that_are_shared_and_remember_change_no_score(name, built, profile):
    """Nor does what was asked of the same image with another vocabulary; ReCo's dense CLIP is MaskCLIP's."""
    parts, image = SharedNetworks(), picture(64, 88)
    baseline = parts.baseline(name, profile)
    for words in (PETS, Vocabulary.of("boat, cat"), PETS):
        assert np.array_equal(baseline.scores(image, words), built(name).scores(image, words))
    assert name != "reco" or baseline.maskclip is parts.baseline("maskclip", profile)
