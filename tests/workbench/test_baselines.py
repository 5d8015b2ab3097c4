"""MaskCLIP against transformers' own blocks under a diagonal attention mask, and its windows against a per-pixel average."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.features.clip import CLIP_MEAN, CLIP_STD
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.measure import evaluate, search_threshold

TEMPLATES = ("a good picture of a {name}",)
PETS = Vocabulary.of("cat, dog, chest of drawers")


@pytest.fixture(scope="module")
def make(tiny_profile):
    model, tokenizer = load_clip(tiny_profile)

    def build(templates=TEMPLATES, threshold=None, **fields):
        matching = tiny_profile.override({f"matching.{k}": v for k, v in fields.items()}).matching
        return MaskCLIP(model, tokenizer, matching, templates, threshold)

    return build


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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
        expected = F.normalize(maskclip.clip.visual_projection(vision.post_layernorm(last[:, 1:])), dim=-1)
    found = maskclip.dense_embeddings(images)
    assert found.shape == (2, shape[0] // 8, shape[1] // 8, 16)
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ordinary = maskclip.clip.visual_projection(vision.post_layernorm(states[-1][:, 1:]))
    assert (F.normalize(ordinary, dim=-1).reshape(found.shape) - found).abs().max() > 1e-2  # the plain block is something else


def test_a_patch_far_away_changes_the_embedding_only_through_earlier_blocks(make):
    maskclip = make()
    image = picture(64, 64)
    changed = image.copy()
    changed[56:, 56:] = 0
    blocks = maskclip.clip.vision_model.encoder.layers
    kept, blocks_only_last = blocks, torch.nn.ModuleList([blocks[-1]])
    maskclip.clip.vision_model.encoder.layers = blocks_only_last
    try:
        before, after = maskclip.dense_embeddings(np.stack([image, changed]))
    finally:
        maskclip.clip.vision_model.encoder.layers = kept
    moved = (before - after).abs().amax(-1) > 1e-5
    assert moved[7, 7] and moved.sum() == 1


def test_text_embeddings_are_the_normalised_mean_over_templates(make):
    templates = ("a good picture of a {name}", "a {name} and water")
    maskclip = make(templates)
    vocabulary = Vocabulary((Category("pet", "cat"), Category("chest of drawers"), Category("odd {name} {0}")))
    found = maskclip.text_embeddings(vocabulary)
    for row, words in zip(found, ("cat", "chest of drawers", "odd {name} {0}"), strict=True):
        total = 0
        for text in (f"a good picture of a {words}", f"a {words} and water"):
            ids = maskclip.tokenizer(text, return_tensors="pt", truncation=True)
            with torch.no_grad():
                total = total + F.normalize(maskclip.clip.get_text_features(**ids).pooler_output[0], dim=0)
        torch.testing.assert_close(row, F.normalize(total, dim=0), rtol=1e-4, atol=1e-5)
    assert maskclip.text_embeddings(vocabulary) is found  # computed once


def by_hand(maskclip, image, vocabulary, sizes, stride):
    """Scores of an image whose short side needs no resizing, one window at a time."""
    texts = maskclip.text_embeddings(vocabulary).numpy()
    scales = []
    for size in sizes:
        total, cover = np.zeros((len(vocabulary), *image.shape[:2])), np.zeros(image.shape[:2])
        for top, left, side in windows(image.shape[:2], size, stride):
            dense = maskclip.dense_embeddings(image[None, top:top + side, left:left + side])[0].numpy()
            grid = torch.from_numpy(np.einsum("hwd,cd->chw", dense, texts))
            total[:, top:top + side, left:left + side] += F.interpolate(grid[None], (side, side), mode="bilinear")[0].numpy()
            cover[top:top + side, left:left + side] += 1
        scales.append(total / cover)
    return np.mean(scales, axis=0)


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (130, 64)])
@pytest.mark.parametrize("batch", [1, 3])
def test_scores_average_overlaps_then_window_sizes(make, shape, batch):
    maskclip, image = make(batch_size=batch), picture(*shape)
    scores = maskclip.scores(image, PETS)
    assert scores.shape == (4, *shape) and scores.dtype == np.float32
    assert (scores[0] == -np.inf).all() and np.abs(scores[1:]).max() <= 1.0001
    np.testing.assert_allclose(scores[1:], by_hand(maskclip, image, PETS, [64, 48], 32), atol=1e-4)


def test_scores_come_back_at_the_image_size(make):
    image = np.kron(picture(16, 25), np.ones((8, 8, 1), np.uint8))  # 128 x 200: short side 64 halves it
    scores = make().scores(image, PETS)
    assert scores.shape == (4, 128, 200)
    from ovdiff_lib.images import resize_short_side

    small = make().scores(resize_short_side(image, 64), PETS)
    expected = F.interpolate(torch.from_numpy(small[None, 1:]), (128, 200), mode="bilinear")[0]
    np.testing.assert_allclose(scores[1:], expected, atol=1e-5)


def test_background_threshold_and_prediction(make):
    image = picture(64, 80)
    without = make().predict(image, PETS)
    assert without.shape == (64, 80) and without.min() >= 1
    scores = make().scores(image, PETS)
    middle = float(np.median(scores[1:].max(0)))
    labels = make(threshold=middle).predict(image, PETS)
    assert 0.3 < (labels == 0).mean() < 0.7
    assert (labels[labels > 0] == without[labels > 0]).all()
    assert (make(threshold=2.0).predict(image, PETS) == 0).all()


def test_adding_a_class_changes_no_other_score(make):
    image = picture(64, 80)
    more = make().scores(image, Vocabulary.of("cat, dog, chest of drawers, boat"))
    np.testing.assert_allclose(make().scores(image, PETS)[1:], more[1:4], atol=1e-5)


def test_it_plugs_into_the_evaluation(make):
    dataset, maskclip = load_dataset("mini-voc", "wild"), make(threshold=0.1)
    alone = evaluate(lambda image: maskclip.predict(image, dataset.vocabulary), dataset, limit=3, progress=False)
    search = search_threshold(lambda image: maskclip.scores(image, dataset.vocabulary), dataset, [0.0, 0.1], limit=3, progress=False)
    assert (search[0.1].confusion == alone.confusion).all() and alone.images == 3


@pytest.mark.parametrize("templates", [(), "a good picture of a {name}", ("a picture",)])
def test_templates_that_cannot_be_used(make, templates):
    with pytest.raises(InputError, match="templates"):
        make(templates)


def test_windows_that_split_a_patch(make):
    with pytest.raises(InputError, match="patch size 8"):
        make(windows=[64, 50])


def test_clip_sees_what_ovdiffs_own_vits_see(make, tiny_profile):
    from PIL import Image

    built = MaskCLIP.build(tiny_profile.override({"features.vit_scale": 1.5}))
    assert built.scale == 1.5 and built.templates == (tiny_profile.support.prompt,)
    image = np.array(Image.fromarray(picture(8, 10)).resize((80, 64), Image.Resampling.BICUBIC))  # smooth: resizing may differ a little
    enlarged = np.array(Image.fromarray(image).resize((120, 96), Image.Resampling.BILINEAR))
    found = built.dense_embeddings(image[None])
    assert found.shape == (1, 12, 15, 16)
    alike = (found * make().dense_embeddings(enlarged[None])).sum(-1)  # the oracle's pixels are rounded to grey levels
    assert alike.median() > 0.995 and alike.min() > 0.9
    assert (found * make().dense_embeddings(enlarged[None, :, ::-1])).sum(-1).median() < 0.9
    assert built.scores(image, PETS).shape == (4, 64, 80)
    assert make().dense_embeddings(picture(20, 33)[None]).shape == (1, 3, 5, 16)  # sides are rounded up to whole patches


@pytest.mark.parametrize("sizes", [[], [64, 48]])
def test_the_squashed_whole_image_as_a_window(make, sizes):
    from PIL import Image

    image = picture(64, 100)
    squashed = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    maskclip = make(windows=sizes, whole_image=True)
    grid = (maskclip.dense_embeddings(squashed[None])[0] @ maskclip.text_embeddings(PETS).T).permute(2, 0, 1)
    whole = F.interpolate(grid[None], (64, 100), mode="bilinear")[0].numpy()
    expected = np.mean([whole] + [by_hand(maskclip, image, PETS, [size], 32) for size in sizes], axis=0)
    np.testing.assert_allclose(maskclip.scores(image, PETS)[1:], expected, atol=1e-4)


def test_no_window_at_all(make):
    from ovdiff_lib.errors import ProfileError

    with pytest.raises(ProfileError, match=r"matching\.windows is empty"):
        make(windows=[]).scores(picture(64, 64), PETS)
