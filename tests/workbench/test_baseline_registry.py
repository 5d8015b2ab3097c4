"""The contract of every baseline: what goes in, what comes out, and that nothing else matters."""

import shutil

import numpy as np
import pytest
import torch
from test_groupvit import make_model

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.images import read_image
from ovdiff_lib.profiles.reading import available, load_profile
from ovdiff_lib.workbench.baselines import BASELINES, OWN_BACKGROUND, build_baseline
from ovdiff_lib.workbench.data.datasets import load_dataset

PETS = Vocabulary((Category("cat"), Category("hound", "dog"), Category("odd {name} {0}")))
SHAPES = [(64, 88), (100, 70), (33, 40)]


@pytest.fixture(scope="module")
def profile(tiny_profile, tiny_models, tmp_path_factory):
    """Tiny models but for the mini CLIP and detector, which find something in a scene, and an archive of sixteen scenes."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("contract")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        make_model(CLIPTokenizer.from_pretrained(tiny_models / "clip")).save_pretrained(folder / "groupvit")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(tiny_models / "clip" / name, folder / "groupvit" / name)
    data = load_dataset("mini-voc")
    (folder / "archive").mkdir()
    for i in range(16):
        shutil.copyfile(data.files[i].image, folder / "archive" / f"{i}.webp")
    return tiny_profile.override({
        "models.clip": "package:clip", "models.groupvit": str(folder / "groupvit"), "masks.segmenter": "detector",
        "baselines.archive": str(folder / "archive"), "baselines.reco_retrieved": 3, "baselines.reco_contexts": ["water"]})


@pytest.fixture(autouse=True)
def own_library(monkeypatch, tmp_path):
    monkeypatch.setenv("OVDIFF_LIBRARY", str(tmp_path))


@pytest.fixture(scope="module")
def scene():
    data = load_dataset("mini-voc")
    return data[0].image


def picture(shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", BASELINES)
def test_scores_and_labels(name, profile, scene):
    baseline = build_baseline(name, profile)
    for image in [scene, *map(picture, SHAPES)]:
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
    assert len(np.unique(build_baseline(name, profile).scores(scene, PETS)[1:].round(4))) > 3


@pytest.mark.parametrize("name", BASELINES)
def test_results_depend_on_image_and_vocabulary_alone(name, profile, scene):
    used = build_baseline(name, profile)
    first = used.scores(scene, PETS)
    used.scores(picture((64, 88)), Vocabulary.of("boat, sofa"))
    torch.manual_seed(99)
    np.random.seed(99)
    np.testing.assert_array_equal(used.scores(scene, PETS), first)
    np.testing.assert_allclose(build_baseline(name, profile.override({"matching.batch_size": 1})).scores(scene, PETS), first, atol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_one_class_and_many(name, profile):
    image = picture((40, 64))
    many = Vocabulary.of([f"noun {i}" for i in range(40)])
    baseline = build_baseline(name, profile)
    assert baseline.scores(image, Vocabulary.of("cat")).shape == (2, 40, 64) and baseline.scores(image, many).shape == (41, 40, 64)


@pytest.mark.parametrize("name", BASELINES)
def test_the_prompt_of_the_profile_is_used(name, profile, scene):
    other = build_baseline(name, profile.override({"support.prompt": "dog and water and {name} and boat"}))
    assert not np.array_equal(other.scores(scene, PETS), build_baseline(name, profile).scores(scene, PETS))


@pytest.mark.parametrize("name", BASELINES)
def test_only_declared_models_are_needed(name, profile):
    declared = BASELINES[name].models or ("clip", "detector")  # of the segmenter that this profile names
    others = {f"models.{field}": "" for field in ("diffusion", "mae", "open_clip", "detector", "clip", "dino", "groupvit")
              if field not in declared}
    build_baseline(name, profile.override(others)).predict(picture((64, 64)), PETS)
    for field in declared:
        with pytest.raises((ProfileError, ModelNotAvailable), match="model"):
            build_baseline(name, profile.override({f"models.{field}": ""}))


def test_an_unknown_baseline():
    with pytest.raises(ProfileError, match="There is no baseline 'tcl'; choose one of maskclip, clip-diy, reco, groupvit, clip-segmenter"):
        build_baseline("tcl", load_profile("mini"))


def test_fields_of_baselines_change_no_digest_of_the_method():
    for name in available():
        profile = load_profile(name)
        other = profile.override({"baselines.reco_retrieved": 3})
        assert other.digest() == profile.digest() and other.digest("baselines") != profile.digest("baselines")
    assert load_profile("paper").baselines == load_profile("official").baselines
    paper = load_profile("paper").baselines
    assert (paper.reco_retrieved, paper.reco_size, paper.clip_diy_size, paper.clip_diy_scales) == (50, 224, 256, 3)
    assert paper.reco_contexts == ["tree", "sky", "building", "road", "person"] and paper.clip_diy_background == ["background"]


@pytest.mark.parametrize("name", BASELINES)
def test_declared_settings_are_fields_of_the_section(name):
    fields = load_profile("mini").to_dict()["baselines"]
    for setting in BASELINES[name].settings:
        assert any(f == setting or (setting.endswith("_") and f.startswith(setting)) for f in fields), setting


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (280, 5)])
@pytest.mark.parametrize("name", BASELINES)
def test_images_of_odd_shapes(name, profile, shape):
    image = read_image(picture(shape))
    assert build_baseline(name, profile).predict(image, PETS).shape == shape
