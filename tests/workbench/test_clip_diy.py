"""CLIP-DIY against patches cut and classified one by one, and FOUND's background seed against loops and transformers."""

import math

import numpy as np
import pytest
import torch
from oracles import PETS, texts_of
from PIL import Image
from transformers import ViTModel

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.loading import load_clip, load_dino
from ovdiff_lib.workbench.baselines import clip_diy
from ovdiff_lib.workbench.baselines.clip_diy import ClipDIY, background_words, saliency


def picture(height, width, seed=0):
    """Coarse blotches: patches differ from each other, and enlarging them loses nothing."""
    blotches = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def make(tiny_profile):
    texts = texts_of(*load_clip(tiny_profile))

    def build(salient=lambda image: torch.full((3, 5), 0.5), **fields):
        settings = tiny_profile.override({f"baselines.{k}": v for k, v in fields.items()}).baselines
        return ClipDIY(texts, salient, settings)

    return build


# ---- patches

def embed(clip, image):
    pixels = (np.asarray(image, np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    with torch.no_grad():
        found = clip.get_image_features(pixel_values=torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).pooler_output[0]
    return (found / found.norm()).numpy()


@pytest.mark.parametrize(("scales", "batch"), [(1, 64), (3, 7)])
def test_cosines_are_the_mean_over_scales_of_patch_scores(make, scales, batch, monkeypatch):
    monkeypatch.setattr(clip_diy, "BATCH", batch)
    diy, image = make(clip_diy_scales=scales), picture(64, 88)
    squashed = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)
    texts = diy.texts(["cat", "dog"])
    expected = 0
    for size in (64, 32, 16)[:scales]:
        count = 2 * 64 // size - 1
        grids = np.zeros((2, count, count), np.float32)
        for i in range(count):
            for j in range(count):
                top, left = i * size // 2, j * size // 2
                patch = squashed.crop((left, top, left + size, top + size)).resize((64, 64), Image.Resampling.BICUBIC)
                grids[:, i, j] = texts.numpy() @ embed(diy.clip, patch)
        enlarged = [np.array(Image.fromarray(grid).resize((64, 64), Image.Resampling.BILINEAR)) for grid in grids]
        expected = expected + np.stack(enlarged) / scales
    found = diy.cosines(image, texts).numpy()
    assert found.shape == (2, 64, 64) and (scales == 1 or np.ptp(found, axis=(1, 2)).min() > 0.1)
    np.testing.assert_allclose(found, expected, atol=0.02)  # one grey level of rounding where patches are enlarged


def test_scores_weigh_classes_by_saliency_and_background_by_its_complement(make, monkeypatch):
    """One cosine a text and one saliency a column, so that the result is known by hand; a negative cosine, which would
    win by being made small, counts as none."""
    diy = make(lambda image: torch.tensor([[0.0, 0.5, 1.0]]), clip_diy_background=["sky", "water"])
    cosines = {"sky": 0.2, "water": 0.3, "cat": 0.4, "dog": -0.3, "chest of drawers": 0.1}
    monkeypatch.setattr(diy, "texts", lambda words: torch.tensor([cosines[w] for w in words]))
    monkeypatch.setattr(diy, "cosines", lambda image, texts: texts[:, None, None].expand(-1, 64, 64))
    scores = diy.scores(picture(16, 48), PETS)
    assert scores.shape == (4, 16, 48) and scores.dtype == np.float32
    for column, salient in ((0, 0.0), (23, 0.5 * (23.5 / 48 * 3 - 0.5)), (47, 1.0)):  # centre of a column in its cells
        values = [0.3 * (1 - salient), 0.4 * salient, 0.0, 0.1 * salient]
        expected = np.exp(values) / np.exp(values).sum()
        np.testing.assert_allclose(scores[:, 0, column], expected, atol=1e-6)
    labels = diy.predict(picture(16, 48), PETS)
    assert labels.dtype == np.int64 and set(labels[:, :20].ravel()) == {0} and set(labels[:, 40:].ravel()) == {1}


def test_words_that_are_classes_are_no_background(make):
    words = Vocabulary((Category("cat"), Category("pond", "water")))
    image = picture(40, 64)
    left, alone = (make(clip_diy_background=some).scores(image, words) for some in (["Cat", "water", "boat"], ["boat"]))
    np.testing.assert_array_equal(left, alone)
    np.testing.assert_allclose(alone.sum(0), 1, atol=1e-5)
    none = make(clip_diy_background=["cat", "water"])
    scores = none.scores(image, words)
    assert (scores[0] == -np.inf).all() and none.predict(image, words).min() == 1
    assert (scores[1:] >= 0).all() and scores[1:].max() <= 1 and (scores[1:].max(0) < 0.3).any()  # cosine by saliency
    assert [background_words(one.settings, words) for one in (none, make(clip_diy_background=["boat", "Cat"]))] == [[], ["boat"]]


@pytest.mark.parametrize("size", [60, 4])
def test_sizes_that_cannot_be_halved(make, size):
    with pytest.raises(ProfileError, match="clip_diy_size"):
        make(clip_diy_size=size)


# ---- saliency

def by_loops(attention, keys, cosine):
    heads, n = attention.shape
    mean = sum(attention[h][p] for h in range(heads) for p in range(n)) / (heads * n)
    share = [sum(attention[h][p] > mean for p in range(n)) / n + 1e-10 for h in range(heads)]
    weight = [math.log(sum(share) / share[h]) for h in range(heads)]
    total = [sum(weight[h] * attention[h][p] for h in range(heads)) for p in range(n)]
    seed = total.index(min(total))
    vectors = [np.concatenate([weight[h] * keys[p][h] for h in range(heads)]) for p in range(n)]
    out = []
    for vector in vectors:
        like = vector @ vectors[seed] / np.linalg.norm(vector) / np.linalg.norm(vectors[seed])
        out.append(1 - min(1.0, max(0.0, like / (2 * cosine))))
    return np.array(out), seed


@pytest.mark.parametrize("cosine", [0.3, 0.5])
def test_saliency_follows_founds_first_step(cosine):
    rng = np.random.default_rng(4)
    attention = rng.dirichlet(np.full(30, 0.3), 3)
    keys = rng.normal(size=(30, 3, 8)) + 0.4
    expected, seed = by_loops(attention, keys, cosine)
    found = saliency(torch.from_numpy(attention), torch.from_numpy(keys), cosine).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[seed] == pytest.approx(0, abs=1e-6) and 0 < np.median(found) < 1 and np.unique(found).size > 10


def test_the_class_tokens_attention_is_the_models_own(tiny_profile):
    model = load_dino(tiny_profile)
    eager = ViTModel.from_pretrained(tiny_profile.models.dino, add_pooling_layer=False, attn_implementation="eager").eval()
    image = picture(64, 104)
    square = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR), np.float32)
    pixels = (square / 255 - IMAGENET_MEAN) / IMAGENET_STD
    with torch.no_grad():
        out = eager(torch.from_numpy(pixels).float().permute(2, 0, 1)[None], output_attentions=True, output_hidden_states=True)
        last = eager.layers[-1]
        keys = last.attention.k_proj(last.layernorm_before(out.hidden_states[-2]))[0, 1:]
    heads = model.config.num_attention_heads
    expected, _ = by_loops(out.attentions[-1][0, :, 0, 1:].numpy(), keys.reshape(64, heads, -1).numpy(), 0.5)
    found = ClipDIY.build(tiny_profile.override({"baselines.clip_diy_seed_cosine": 0.5})).saliency(image)
    assert found.shape == (8, 8) and found.dtype == torch.float32
    np.testing.assert_allclose(found.flatten().numpy(), expected, atol=1e-4)
    assert np.ptp(expected) > 0.2
