"""Every baseline's contract; MaskCLIP, CLIP-DIY, proposals named by CLIP against transformers' own blocks, loops and by hand."""

import functools
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import PETS, averaged, enlarged, picture, texts_of
from PIL import Image
from test_groupvit import save_model
from transformers import ViTModel

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, resize_short_side
from ovdiff_lib.networks.loading import load_clip, load_dino
from ovdiff_lib.profiles.reading import available, load_profile
from ovdiff_lib.workbench.baselines import BASELINES, OWN_BACKGROUND, build_baseline, clip_diy
from ovdiff_lib.workbench.baselines.clip_diy import ClipDIY, background_words, saliency
from ovdiff_lib.workbench.baselines.common import Filtered, TextEmbeddings, templates_of
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP
from ovdiff_lib.workbench.baselines.segmenter import ClipSegmenter, majority_vote, smallest
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.rows import Rival
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks


@pytest.fixture(scope="module")
def maskclip_of(tiny_profile):
    texts = texts_of(*load_clip(tiny_profile))

    def build(**fields):
        return MaskCLIP(texts, tiny_profile.override({f"matching.{k}": v for k, v in fields.items()}).matching)

    return build


@pytest.mark.parametrize("shape", [(64, 64), (48, 48), (64, 88)])
def test_dense_embeddings_equal_a_last_block_that_sees_only_itself(maskclip_of, shape):
    maskclip = maskclip_of()
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


@pytest.mark.parametrize("templates", [["a good picture of a {name}"], ["{name}", "a boat with a dog and a {name} and", "a {name}"]])
def test_text_embeddings_are_means_over_templates(tiny_profile, monkeypatch, templates):
    clip, tokenizer = load_clip(tiny_profile)
    maskclip = MaskCLIP(TextEmbeddings(clip, tokenizer, templates), tiny_profile.matching)
    words = "cat", "chest of drawers", "odd {name} {0}"
    vocabulary = Vocabulary((Category("pet", "cat"), *map(Category, words[1:])))
    found = maskclip.text_embeddings(vocabulary)
    for row, word in zip(found, words, strict=True):
        total = torch.zeros(16)
        for before, after in (template.split("{name}") for template in templates):
            with torch.no_grad():
                ids = tokenizer(before + word + after, return_tensors="pt", truncation=True)
                alone = clip.get_text_features(**ids).pooler_output[0]
            total += alone / alone.norm()
        torch.testing.assert_close(row, total / total.norm(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(maskclip.texts, "clip", None)
    torch.testing.assert_close(maskclip.text_embeddings(vocabulary), found)  # computed once


def test_the_published_templates():
    for profile in ("paper", "official"):
        of = load_profile(profile).baselines
        for templates in (templates_of("maskclip", of), templates_of("reco", of)):
            assert len(set(templates)) == 85 and {"itap of my {name}.", "this is one {name} in the scene."} < set(templates)
            assert all(template.format(name="x").count("x") == template.count("x") + 1 for template in templates)
        assert (of.groupvit_templates, of.clip_diy_templates) == (["a photo of a {name}."], ["a photo of a {name}"])


def by_hand(maskclip, image, sizes):
    texts = maskclip.text_embeddings(PETS)
    return averaged(image, sizes, 32, lambda crop: enlarged(
        (maskclip.dense_embeddings(crop[None])[0] @ texts.T).permute(2, 0, 1), crop.shape[:2]))


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (130, 64)])
@pytest.mark.parametrize("batch", [1, 3])
def test_scores_average_overlaps_then_window_sizes(maskclip_of, shape, batch):
    maskclip, image = maskclip_of(batch_size=batch), picture(*shape)
    scores = maskclip.scores(image, PETS)
    assert scores.shape == (4, *shape) and scores.dtype == np.float32
    assert (scores[0] == -np.inf).all() and np.abs(scores[1:]).max() <= 1.0001
    np.testing.assert_allclose(scores[1:], by_hand(maskclip, image, [64, 48]), atol=1e-4)


def test_scores_come_back_at_the_image_size(maskclip_of):
    image = np.kron(picture(16, 25), np.ones((8, 8, 1), np.uint8))  # 128 x 200: short side 64 halves it
    scores = maskclip_of().scores(image, PETS)
    assert scores.shape == (4, 128, 200)
    small = maskclip_of().scores(resize_short_side(image, 64), PETS)
    np.testing.assert_allclose(scores[1:], enlarged(small[1:], (128, 200)), atol=1e-5)


def test_a_long_strip_is_seen_as_ovdiff_sees_it(maskclip_of):
    """Its long side is limited, and with it the short one and the windows."""
    image = np.kron(picture(8, 48), np.ones((8, 8, 1), np.uint8))  # 64 x 384
    maskclip, small = maskclip_of(long_side=192), np.array(Image.fromarray(image).resize((192, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(maskclip.scores(image, PETS)[1:], enlarged(by_hand(maskclip, small, [32]), (64, 384)), atol=1e-4)


@pytest.mark.parametrize("sizes", [[], [64, 48]])
def test_the_squashed_whole_image_as_a_window(maskclip_of, sizes):
    image = picture(64, 100)
    squashed = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    maskclip = maskclip_of(windows=sizes, whole_image=True)
    grid = (maskclip.dense_embeddings(squashed[None])[0] @ maskclip.text_embeddings(PETS).T).permute(2, 0, 1)
    parts = [enlarged(grid, (64, 100)), *(by_hand(maskclip, image, [size]) for size in sizes)]
    np.testing.assert_allclose(maskclip.scores(image, PETS)[1:], np.mean(parts, axis=0), atol=1e-4)


def test_without_a_constant_nothing_is_background(maskclip_of):
    image = picture(64, 80)
    without, scores = maskclip_of().predict(image, PETS), maskclip_of().scores(image, PETS)
    assert without.shape == (64, 80) and without.min() >= 1
    assert np.isneginf(scores[0]).all()
    more = maskclip_of().scores(image, Vocabulary.of([*PETS.names, "boat"]))  # another class changes no other's score
    np.testing.assert_allclose(scores[1:], more[1:4], atol=1e-5)


def test_clip_sees_what_ovdiffs_own_vits_see(maskclip_of, tiny_profile):
    built = MaskCLIP.build(tiny_profile.override({"features.vit_scale": 1.5}))
    assert built.scale == 1.5 and built.texts.templates == tiny_profile.baselines.maskclip_templates
    # Smooth: resizing may differ a little, and the oracle's pixels are rounded to grey levels.
    image = np.array(Image.fromarray(picture(8, 10)).resize((80, 64), Image.Resampling.BICUBIC))
    large = np.array(Image.fromarray(image).resize((120, 96), Image.Resampling.BILINEAR))
    found = built.dense_embeddings(image[None])
    assert found.shape == (1, 12, 15, 16)
    alike = (found * maskclip_of().dense_embeddings(large[None])).sum(-1)
    assert alike.median() > 0.995 and alike.min() > 0.9
    assert (found * maskclip_of().dense_embeddings(large[None, :, ::-1])).sum(-1).median() < 0.9
    assert built.scores(image, PETS).shape == (4, 64, 80)
    assert maskclip_of().dense_embeddings(picture(20, 33)[None]).shape == (1, 3, 5, 16)  # rounded up to whole patches


# ---------------------------------------------------------------------- CLIP-DIY and FOUND's background seed

def blurred(height, width, seed=0):
    """Coarse blotches: patches differ from each other, and enlarging them loses nothing."""
    blotches = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def diy_of(tiny_profile):
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
def test_cosines_are_the_mean_over_scales_of_patch_scores(diy_of, scales, batch, monkeypatch):
    monkeypatch.setattr(clip_diy, "BATCH", batch)
    diy, image = diy_of(clip_diy_scales=scales), blurred(64, 88)
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


def test_scores_weigh_classes_by_saliency_and_background_by_its_complement(diy_of, monkeypatch):
    """One cosine a text and one saliency a column, so that the result is known by hand; a negative cosine, which would
    win by being made small, counts as none."""
    diy = diy_of(lambda image: torch.tensor([[0.0, 0.5, 1.0]]), clip_diy_background=["sky", "water"])
    cosines = {"sky": 0.2, "water": 0.3, "cat": 0.4, "dog": -0.3, "chest of drawers": 0.1}
    monkeypatch.setattr(diy, "texts", lambda words: torch.tensor([cosines[w] for w in words]))
    monkeypatch.setattr(diy, "cosines", lambda image, texts: texts[:, None, None].expand(-1, 64, 64))
    scores = diy.scores(blurred(16, 48), PETS)
    assert scores.shape == (4, 16, 48) and scores.dtype == np.float32
    for column, salient in ((0, 0.0), (23, 0.5 * (23.5 / 48 * 3 - 0.5)), (47, 1.0)):  # centre of a column in its cells
        values = [0.3 * (1 - salient), 0.4 * salient, 0.0, 0.1 * salient]
        expected = np.exp(values) / np.exp(values).sum()
        np.testing.assert_allclose(scores[:, 0, column], expected, atol=1e-6)
    labels = diy.predict(blurred(16, 48), PETS)
    assert labels.dtype == np.int64 and set(labels[:, :20].ravel()) == {0} and set(labels[:, 40:].ravel()) == {1}


def test_words_that_are_classes_are_no_background(diy_of):
    words = Vocabulary((Category("cat"), Category("pond", "water")))
    image = blurred(40, 64)
    left, alone = (diy_of(clip_diy_background=some).scores(image, words) for some in (["Cat", "water", "boat"], ["boat"]))
    np.testing.assert_array_equal(left, alone)
    np.testing.assert_allclose(alone.sum(0), 1, atol=1e-5)
    none = diy_of(clip_diy_background=["cat", "water"])
    scores = none.scores(image, words)
    assert (scores[0] == -np.inf).all() and none.predict(image, words).min() == 1
    assert (scores[1:] >= 0).all() and scores[1:].max() <= 1 and (scores[1:].max(0) < 0.3).any()  # cosine by saliency
    assert [background_words(one.settings, words) for one in (none, diy_of(clip_diy_background=["boat", "Cat"]))] == [[], ["boat"]]


@pytest.mark.parametrize("size", [60, 4])
def test_sizes_that_cannot_be_halved(diy_of, size):
    with pytest.raises(ProfileError, match="clip_diy_size"):
        diy_of(clip_diy_size=size)


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
    image = blurred(64, 104)
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


# ---------------------------------------------------------------------- proposals, votes, and baselines behind the category filter

class Boxes:
    """A segmenter of given proposals."""

    name = "boxes"

    def __init__(self, shape, *boxes):
        self.masks = np.zeros((len(boxes), *shape), bool)
        for mask, (top, left, bottom, right) in zip(self.masks, boxes, strict=True):
            mask[top:bottom, left:right] = True

    def propose(self, image, words):
        assert words == ""
        return self.masks


# ---- overlaps and votes

def random_masks(seed, count=6, shape=(9, 13)):
    rng = np.random.default_rng(seed)
    return rng.random((count, *shape)) < rng.uniform(0.1, 0.7, (count, 1, 1))


@pytest.mark.parametrize(("seed", "dtype"), [(0, np.int64), (1, np.int64), (2, np.uint8)])
def test_the_smallest_proposal_owns_a_pixel_and_votes_are_counted(seed, dtype):
    masks, labels = random_masks(seed), np.random.default_rng(seed + 10).integers(0, 4, (9, 13)).astype(dtype)
    masks[4], masks[3] = masks[1], False
    owner, before, found = smallest(masks), labels.copy(), majority_vote(labels, masks)
    assert (owner != 4).all() and (owner == -1).any() and len(np.unique(owner)) >= 4
    assert found.dtype == dtype and (labels == before).all()
    for place in np.ndindex(9, 13):
        over = [(mask.sum(), m) for m, mask in enumerate(masks) if mask[place]]  # of two of one area the first
        assert owner[place] == (min(over)[1] if over else -1)
        inside = labels[masks[owner[place]]].tolist() if over else [labels[place]]
        assert found[place] == max(sorted(set(inside)), key=inside.count)  # max keeps the first of equals: the lowest
    others = (labels + 1) % 4
    both = majority_vote(np.stack([labels, others]), masks)  # each map votes by itself
    assert (both == [found, majority_vote(others, masks)]).all() and both.dtype == dtype


@pytest.mark.parametrize("count", [0, 2])
def test_no_proposals_and_empty_ones_change_nothing(count):
    labels = np.arange(12).reshape(3, 4)
    assert (majority_vote(labels, np.zeros((count, 3, 4), bool)) == labels).all()


# ---- proposals named by CLIP

@pytest.fixture(scope="module")
def named_by_clip(tiny_profile):
    def build(segmenter, **fields):
        matching = tiny_profile.override({f"matching.{k}": v for k, v in fields.items()}).matching
        return ClipSegmenter(texts_of(*load_clip(tiny_profile)), segmenter, matching)

    return build


def test_tokens_are_projected_as_clip_projects_its_class_token(named_by_clip):
    baseline, image = named_by_clip(None), picture(64, 96)
    clip, pixels = baseline.clip, (picture(64, 96).astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    pixels = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        states = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1][0]
        projected = clip.visual_projection(clip.vision_model.post_layernorm(states))
        whole = clip.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output[0]
    torch.testing.assert_close(projected[0], whole, rtol=1e-4, atol=1e-4)
    found = baseline.tokens(image)
    assert found.shape == (8, 12, 16)
    torch.testing.assert_close(found, projected[1:].reshape(8, 12, 16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("shape", "grid"), [((64, 64), (8, 8)), ((64, 100), (8, 13)), ((200, 128), (13, 8)), ((10, 12), (8, 10))])
def test_tokens_cover_images_of_any_shape(named_by_clip, shape, grid):
    assert named_by_clip(None).tokens(picture(*shape)).shape == (*grid, 16)
    assert named_by_clip(None, long_side=128).tokens(picture(64, 512)).shape == (2, 16, 16)


def test_proposals_are_the_mean_of_what_they_cover(named_by_clip):
    image = picture(64, 96)
    masks = Boxes((64, 96), (0, 0, 16, 24), (8, 4, 16, 16), (63, 95, 64, 96)).masks
    baseline = named_by_clip(None)
    tokens = baseline.tokens(image)
    expected = torch.stack([tokens[:2, :3].mean((0, 1)), (tokens[1, 0] * 0.5 + tokens[1, 1]) / 1.5, tokens[7, 11]])
    torch.testing.assert_close(baseline.embed(image, masks), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_scores_inside_and_outside_of_proposals(named_by_clip):
    image = picture(64, 96)
    boxes = Boxes((64, 96), (0, 0, 40, 50), (8, 8, 24, 24), (50, 60, 64, 96), (0, 0, 0, 0))
    baseline = named_by_clip(boxes)
    scores, labels = baseline.scores(image, PETS), baseline.predict(image, PETS)
    assert scores.shape == (4, 64, 96) and scores.dtype == np.float32 and labels.dtype == np.int64
    covered = boxes.masks.any(0)
    assert (scores[0, ~covered] == 0).all() and (scores[1:, ~covered] == -np.inf).all() and (labels[~covered] == 0).all()
    assert (scores[0, covered] == -np.inf).all() and np.isfinite(scores[1:, covered]).all() and labels[covered].min() >= 1
    cosines = (baseline.embed(image, boxes.masks[:3]) @ baseline.texts(["cat", "dog", "chest of drawers"]).T).numpy()
    np.testing.assert_allclose(scores[1:, 10, 10], cosines[1], atol=1e-6)  # of the inner proposal
    np.testing.assert_allclose(scores[1:, 30, 30], cosines[0], atol=1e-6)
    np.testing.assert_allclose(scores[1:, 60, 90], cosines[2], atol=1e-6)
    assert labels[30, 30] == cosines[0].argmax() + 1
    assert (named_by_clip(Boxes((64, 96))).predict(image, PETS) == 0).all()  # no proposals


@pytest.mark.parametrize("name", ["threshold", "grounded-sam"])
def test_it_needs_a_segmenter_that_proposes_without_words(tiny_profile, tmp_path, name):
    """Told before any weights are looked for; of a row that a segmenter votes on, too."""
    with pytest.raises(ProfileError, match=rf"'{name}'.*masks\.segmenter.* cutler, detector, maskcut, sam\."):
        ClipSegmenter.build(tiny_profile.override({"masks.segmenter": name}))
    own, other = {"masks.segmenter": name}, {"masks.segmenter": "sam", "models.sam": "nobody/nowhere"}
    rows = [Rival("plain", own, baseline="maskclip"), *(Rival(label, settings, baseline="maskclip", voted=True)
                                                        for label, settings in (("voted", own), ("absent", other)))]
    missing = Bench(tiny_profile, library=tmp_path, seeds=[0], progress=False).missing(rows)
    assert list(missing) == ["voted", "absent"] and name in missing["voted"] and "nobody/nowhere" in missing["absent"]
    assert ClipSegmenter.build(tiny_profile.override({"masks.segmenter": "maskcut"})).segmenter.name == "maskcut"


def test_dropped_categories_cannot_win_and_background_stays():
    made = np.array([0.1, 0.9, 0.5, 0.3])[:, None, None] * np.ones((4, 2, 3))
    made[0, 0] = 0.6
    baseline = SimpleNamespace(scores=lambda image, vocabulary: made)
    filtered = Filtered(baseline, lambda image, vocabulary: ((1, 2), np.zeros(3)))
    scores = filtered.scores(picture(2, 3), PETS)
    assert (scores[1] == -np.inf).all() and (np.delete(scores, 1, 0) == np.delete(made, 1, 0)).all()
    assert np.isfinite(made).all()
    assert filtered.predict(picture(2, 3), PETS).tolist() == [[0, 0, 0], [2, 2, 2]]


# ---------------------------------------------------------------------- the contract of every baseline

ODD = Vocabulary((Category("cat"), Category("hound", "dog"), Category("odd {name} {0}")))


@pytest.fixture(scope="module")
def profile(tiny_profile, tiny_models, tmp_path_factory):
    """Tiny models but for the mini CLIP and detector, which find something in a scene; an archive of sixteen scenes."""
    folder = tmp_path_factory.mktemp("contract")
    save_model(tiny_models, folder / "groupvit")
    data = load_dataset("mini-voc")
    (folder / "archive").mkdir()
    for i in range(16):
        shutil.copyfile(data.files[i][1], folder / "archive" / f"{i}.webp")
    return tiny_profile.override({
        "models.clip": "package:clip", "models.groupvit": str(folder / "groupvit"), "masks.segmenter": "detector",
        "baselines.archive": str(folder / "archive"), "baselines.reco_retrieved": 3, "baselines.reco_contexts": ["water"]})


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
        scores, labels = baseline.scores(image, ODD), baseline.predict(image, ODD)
        assert (image == before).all()
        assert scores.shape == (4, *image.shape[:2]) and scores.dtype == np.float32 and not np.isnan(scores).any()
        assert labels.shape == image.shape[:2] and labels.dtype == np.int64 and (labels == scores.argmax(0)).all()
        if name in OWN_BACKGROUND:
            assert np.isfinite(scores).any(0).all()
        else:
            assert (scores[0] == -np.inf).all() and np.isfinite(scores[1:]).all() and labels.min() >= 1
    # Different things are told apart somewhere.
    assert len(np.unique(baseline.scores(scene, ODD)[1:].round(4))) > 3


@pytest.mark.parametrize("name", BASELINES)
def test_results_depend_on_image_vocabulary_and_prompt_alone(name, built, profile, scene):
    used = built(name)
    first = used.scores(scene, ODD)
    used.scores(picture(64, 88), Vocabulary.of("boat, sofa"))
    torch.manual_seed(99)
    np.random.seed(99)
    np.testing.assert_array_equal(used.scores(scene, ODD), first)
    alone = build_baseline(name, profile.override({"matching.batch_size": 1}))
    np.testing.assert_allclose(alone.scores(scene, ODD), first, atol=1e-4)
    fields = {f"baselines.{n.replace('-', '_')}_templates": ["dog and water and {name} and boat"] for n in BASELINES}
    own = f"baselines.{name.replace('-', '_')}_templates"
    other = build_baseline(name, profile.override({own: fields.pop(own)}))
    assert not np.array_equal(other.scores(scene, ODD), first)
    others = build_baseline(name, profile.override({**fields, "support.prompt": "dog and {name}"}))
    np.testing.assert_array_equal(others.scores(scene, ODD), first)


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
    build_baseline(name, profile.override(others)).predict(picture(64, 64), ODD)
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
    for words in (ODD, Vocabulary.of("boat, cat"), ODD):
        assert np.array_equal(baseline.scores(image, words), built(name).scores(image, words))
    assert name != "reco" or baseline.maskclip is parts.baseline("maskclip", profile)
