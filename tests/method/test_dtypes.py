"""Half precision against float32, on the networks of the mini world that ship: features, support images, and labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.data.datasets import load_dataset

HALF = ["bfloat16", "float16"]
SHIPPED = ["sd", "dino", "mae", "clip-keys", "clip-tokens"]


def profile(dtype="float32"):
    return load_profile("mini", {"models.dtype": dtype})


@pytest.fixture(scope="module")
def images():
    """Two validation images that are not square."""
    chosen = [load_dataset("mini-voc")[i].image for i in range(12)]
    return [image for image in chosen if image.shape[0] != image.shape[1]][:2]


def centred(features):
    """Without what all features have in common, which would make any two alike."""
    flat = features.flatten(0, 2)
    return flat - flat.mean(0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", SHIPPED)
def test_features_in_half_precision_point_the_same_way(images, name, dtype):
    for image in images:
        crop = image[None, :64, :48]
        plain, half = (EXTRACTORS[name](profile(d))(crop, np.array([3])) for d in ("float32", dtype))
        assert half.dtype == torch.float32 and half.shape == plain.shape and not torch.equal(half, plain)
        cosine = F.cosine_similarity(centred(plain), centred(half), dim=1)
        assert cosine.mean() > 0.99


@pytest.mark.parametrize("dtype", HALF)
def test_support_images_in_half_precision_look_alike(dtype):
    drawn = {}
    for d in ("float32", dtype):
        chosen = profile(d).override({"support.steps": 3})
        drawn[d] = sample_support(load_diffusion(chosen), Category("cat"), chosen, 2, progress=False)
    difference = np.abs(drawn["float32"].images.astype(float) - drawn[dtype].images).mean()
    apart = np.abs(drawn["float32"].images[0].astype(float) - drawn["float32"].images[1]).mean()
    assert difference < 0.15 * apart
    first, second = (drawn[d].attribution.ravel() for d in ("float32", dtype))
    assert np.corrcoef(first, second)[0, 1] > {"float16": 0.98, "bfloat16": 0.85}[dtype]  # 11 and 8 bits of mantissa


@pytest.mark.parametrize("dtype", HALF)
def test_labels_and_the_filter_in_half_precision(images, dtype):
    """Prototypes cut from an image itself: the labels of other images by them hardly change."""
    rng = np.random.default_rng(0)
    features = EXTRACTORS["sd"](profile())(images[0][None, :64, :64], np.array([0])).flatten(0, 2).numpy()
    rows = [features[rng.choice(len(features), 10, replace=False)] for _ in range(3)]
    region = np.array(["foreground"] * 6 + ["background"] * 4)
    none = np.full(10, -1, np.int32)
    made = tuple(Prototypes(r, np.full(10, "instance"), region, none, none, np.full((1, 2, 2), -1, np.int16)) for r in rows)
    bank = PrototypeBank(Vocabulary.of("cat, sky, boat"), {"sd": made})
    labels, kept = {}, {}
    for d in ("float32", dtype):
        chosen = profile(d)
        matcher = Matcher({"sd": EXTRACTORS["sd"](chosen)}, chosen)
        labels[d] = [scores.argmax(0) for scores, _ in matcher.scores([(image, bank) for image in images])]
        judge = CategoryFilter(*load_clip(chosen), chosen)
        kept[d] = [judge(image, load_dataset("mini-voc").vocabulary)[1] for image in images]
    agreement = np.mean([(a == b).mean() for a, b in zip(labels["float32"], labels[dtype], strict=True)])
    assert agreement > 0.97
    for plain, half in zip(kept["float32"], kept[dtype], strict=True):
        assert np.abs(plain - half).max() < 0.05 and plain.argmax() == half.argmax()
