"""MaskCLIP against transformers' own blocks under a diagonal attention mask, and its windows against an average."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import PETS, averaged, enlarged, picture, texts_of
from PIL import Image

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, resize_short_side
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP


@pytest.fixture(scope="module")
def make(tiny_profile):
    texts = texts_of(*load_clip(tiny_profile))

    def build(threshold=None, **fields):
        maskclip = MaskCLIP(texts, tiny_profile.override({f"matching.{k}": v for k, v in fields.items()}).matching)
        maskclip.background_threshold = threshold
        return maskclip

    return build


@pytest.mark.parametrize("shape", [(64, 64), (48, 48), (64, 88)])
def test_dense_embeddings_equal_a_last_block_that_sees_only_itself(make, shape):
    maskclip = make()
    vision, images = maskclip.clip.vision_model, np.stack([picture(*shape, seed=i) for i in range(2)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        states = vision(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        tokens = states[0].shape[1]
        alone = torch.full((1, 1, tokens, tokens), -torch.inf)
        alone[..., range(tokens), range(tokens)] = 0
        last = vision.encoder.layers[-1](states[-2], alone)
        expected, ordinary = (F.normalize(maskclip.clip.visual_projection(vision.post_layernorm(x[:, 1:])), dim=-1)
                              for x in (last, states[-1]))
    found = maskclip.dense_embeddings(images)
    assert found.shape == (2, shape[0] // 8, shape[1] // 8, 16)
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)
    assert (ordinary.reshape(found.shape) - found).abs().max() > 1e-2  # the plain block is something else


def test_text_embeddings_are_those_of_the_prompts(make):
    maskclip, words = make(), ("cat", "chest of drawers", "odd {name} {0}")
    vocabulary = Vocabulary((Category("pet", "cat"), *map(Category, words[1:])))
    found = maskclip.text_embeddings(vocabulary)
    for row, word in zip(found, words, strict=True):
        ids = maskclip.texts.tokenizer(f"a good picture of a {word}", return_tensors="pt", truncation=True)
        with torch.no_grad():
            alone = maskclip.clip.get_text_features(**ids).pooler_output[0]
        torch.testing.assert_close(row, F.normalize(alone, dim=0), rtol=1e-4, atol=1e-5)
    assert maskclip.text_embeddings(vocabulary) is found  # computed once


def by_hand(maskclip, image, sizes):
    texts = maskclip.text_embeddings(PETS)
    return averaged(image, sizes, 32, lambda crop: enlarged(
        (maskclip.dense_embeddings(crop[None])[0] @ texts.T).permute(2, 0, 1), crop.shape[:2]))


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (130, 64)])
@pytest.mark.parametrize("batch", [1, 3])
def test_scores_average_overlaps_then_window_sizes(make, shape, batch):
    maskclip, image = make(batch_size=batch), picture(*shape)
    scores = maskclip.scores(image, PETS)
    assert scores.shape == (4, *shape) and scores.dtype == np.float32
    assert (scores[0] == -np.inf).all() and np.abs(scores[1:]).max() <= 1.0001
    np.testing.assert_allclose(scores[1:], by_hand(maskclip, image, [64, 48]), atol=1e-4)


def test_scores_come_back_at_the_image_size(make):
    image = np.kron(picture(16, 25), np.ones((8, 8, 1), np.uint8))  # 128 x 200: short side 64 halves it
    scores = make().scores(image, PETS)
    assert scores.shape == (4, 128, 200)
    small = make().scores(resize_short_side(image, 64), PETS)
    np.testing.assert_allclose(scores[1:], enlarged(small[1:], (128, 200)), atol=1e-5)


@pytest.mark.parametrize("sizes", [[], [64, 48]])
def test_the_squashed_whole_image_as_a_window(make, sizes):
    image = picture(64, 100)
    squashed = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    maskclip = make(windows=sizes, whole_image=True)
    grid = (maskclip.dense_embeddings(squashed[None])[0] @ maskclip.text_embeddings(PETS).T).permute(2, 0, 1)
    parts = [enlarged(grid, (64, 100)), *(by_hand(maskclip, image, [size]) for size in sizes)]
    np.testing.assert_allclose(maskclip.scores(image, PETS)[1:], np.mean(parts, axis=0), atol=1e-4)


def test_background_threshold_and_prediction(make):
    image = picture(64, 80)
    without, scores = make().predict(image, PETS), make().scores(image, PETS)
    assert without.shape == (64, 80) and without.min() >= 1
    labels = make(float(np.median(scores[1:].max(0)))).predict(image, PETS)
    assert 0.3 < (labels == 0).mean() < 0.7 and (labels[labels > 0] == without[labels > 0]).all()
    assert (make(2.0).predict(image, PETS) == 0).all()
    more = make().scores(image, Vocabulary.of([*PETS.names, "boat"]))  # another class changes no other's score
    np.testing.assert_allclose(scores[1:], more[1:4], atol=1e-5)


def test_clip_sees_what_ovdiffs_own_vits_see(make, tiny_profile):
    built = MaskCLIP.build(tiny_profile.override({"features.vit_scale": 1.5}))
    assert built.scale == 1.5 and built.texts.template == tiny_profile.support.prompt
    # Smooth: resizing may differ a little, and the oracle's pixels are rounded to grey levels.
    image = np.array(Image.fromarray(picture(8, 10)).resize((80, 64), Image.Resampling.BICUBIC))
    large = np.array(Image.fromarray(image).resize((120, 96), Image.Resampling.BILINEAR))
    found = built.dense_embeddings(image[None])
    assert found.shape == (1, 12, 15, 16)
    alike = (found * make().dense_embeddings(large[None])).sum(-1)
    assert alike.median() > 0.995 and alike.min() > 0.9
    assert (found * make().dense_embeddings(large[None, :, ::-1])).sum(-1).median() < 0.9
    assert built.scores(image, PETS).shape == (4, 64, 80)
    assert make().dense_embeddings(picture(20, 33)[None]).shape == (1, 3, 5, 16)  # rounded up to whole patches
