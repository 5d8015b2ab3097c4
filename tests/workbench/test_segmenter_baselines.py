"""Proposals named by CLIP, votes within proposals, and baselines behind the category filter: by hand, by brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import PETS, picture, texts_of

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.workbench.baselines.common import Filtered
from ovdiff_lib.workbench.baselines.segmenter import ClipSegmenter, majority_vote, smallest


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
def make(tiny_profile):
    def build(segmenter, **fields):
        matching = tiny_profile.override({f"matching.{k}": v for k, v in fields.items()}).matching
        return ClipSegmenter(texts_of(*load_clip(tiny_profile)), segmenter, matching)

    return build


def test_tokens_are_projected_as_clip_projects_its_class_token(make):
    baseline, image = make(None), picture(64, 96)
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
def test_tokens_cover_images_of_any_shape(make, shape, grid):
    assert make(None).tokens(picture(*shape)).shape == (*grid, 16)
    assert make(None, long_side=128).tokens(picture(64, 512)).shape == (2, 16, 16)


def test_proposals_are_the_mean_of_what_they_cover(make):
    image = picture(64, 96)
    masks = Boxes((64, 96), (0, 0, 16, 24), (8, 4, 16, 16), (63, 95, 64, 96)).masks
    baseline = make(None)
    tokens = baseline.tokens(image)
    expected = torch.stack([tokens[:2, :3].mean((0, 1)), (tokens[1, 0] * 0.5 + tokens[1, 1]) / 1.5, tokens[7, 11]])
    torch.testing.assert_close(baseline.embed(image, masks), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_scores_inside_and_outside_of_proposals(make):
    image = picture(64, 96)
    boxes = Boxes((64, 96), (0, 0, 40, 50), (8, 8, 24, 24), (50, 60, 64, 96), (0, 0, 0, 0))
    baseline = make(boxes)
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
    assert (make(Boxes((64, 96))).predict(image, PETS) == 0).all()  # no proposals


def test_it_needs_a_segmenter_that_proposes(tiny_profile):
    with pytest.raises(ProfileError, match=r"masks\.segmenter.* maskcut"):
        ClipSegmenter.build(tiny_profile.override({"masks.segmenter": "threshold"}))
    assert ClipSegmenter.build(tiny_profile.override({"masks.segmenter": "maskcut"})).segmenter.name == "maskcut"


# ---- behind the category filter

def test_dropped_categories_cannot_win_and_background_stays():
    made = np.array([0.1, 0.9, 0.5, 0.3])[:, None, None] * np.ones((4, 2, 3))
    made[0, 0] = 0.6
    baseline = SimpleNamespace(scores=lambda image, vocabulary: made)
    filtered = Filtered(baseline, lambda image, vocabulary: ((1, 2), np.zeros(3)))
    scores = filtered.scores(picture(2, 3), PETS)
    assert (scores[1] == -np.inf).all() and (np.delete(scores, 1, 0) == np.delete(made, 1, 0)).all()
    assert np.isfinite(made).all()
    assert filtered.predict(picture(2, 3), PETS).tolist() == [[0, 0, 0], [2, 2, 2]]
