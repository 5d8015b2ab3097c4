"""PAMR against a loop over pixels and neighbours written from its definition, and what its definition promises."""

import numpy as np
import pytest
import torch

from ovdiff_lib.matching import pamr as refine
from ovdiff_lib.matching.pamr import affinity, pamr

SHAPE = (9, 14)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scores():
    return torch.from_numpy(np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32))


def at(y, x):
    """The position that padding by repetition puts at (y, x)."""
    return min(max(y, 0), SHAPE[0] - 1), min(max(x, 0), SHAPE[1] - 1)


def slow_weights(image, dilations):
    """(neighbours, H, W) one pixel after another, in double precision."""
    image = image.astype(np.float64)
    offsets = [(y * d, x * d) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1)]
    around = [o for o in offsets if o != (0, 0)]
    weights = np.zeros((len(around), *SHAPE))
    for y, x in np.ndindex(SHAPE):
        samples = np.array([image[at(y + dy, x + dx)] for dy, dx in offsets])
        assert len(samples) == 9 * len(dilations)
        deviation = samples.std(0, ddof=1)
        alike = [np.mean(-np.abs(image[at(y + dy, x + dx)] - image[y, x]) / (1e-8 + 0.1 * deviation)) for dy, dx in around]
        exponentials = np.exp(np.array(alike) - max(alike))
        weights[:, y, x] = exponentials / exponentials.sum()
    return weights, around


def slow_pamr(image, scores, iterations, dilations):
    weights, around = slow_weights(image, dilations)
    values = scores.numpy().astype(np.float64)
    for _ in range(iterations):
        new = np.zeros_like(values)
        for y, x in np.ndindex(SHAPE):
            for weight, (dy, dx) in zip(weights[:, y, x], around, strict=True):
                new[:, y, x] += weight * values[(slice(None), *at(y + dy, x + dx))]
        values = new
    return values


@pytest.mark.parametrize(("iterations", "dilations"), [(1, [1]), (3, [1, 2, 4]), (10, [1, 2, 4, 8, 12, 24])])
def test_against_a_loop_over_pixels(image, scores, iterations, dilations):
    found = pamr(image, scores, iterations, dilations)
    assert found.dtype == torch.float32 and found.shape == scores.shape
    assert np.allclose(found.numpy(), slow_pamr(image, scores, iterations, dilations), atol=1e-5)
    assert (found - scores).abs().max() > 0.5


def test_weights_of_the_published_dilations_in_blocks_of_any_size(image, scores, monkeypatch):
    weights, whole = affinity(image), pamr(image, scores)
    assert weights.shape == (48, *SHAPE) and torch.allclose(weights.sum(0), torch.ones(SHAPE), atol=1e-5) and (weights >= 0).all()
    assert np.allclose(weights.numpy(), slow_weights(image, (1, 2, 4, 8, 12, 24))[0], atol=1e-5)
    for block in (48 * SHAPE[1] * 2, 1):
        monkeypatch.setattr(refine, "BLOCK_VALUES", block)
        assert torch.allclose(pamr(image, scores), whole, atol=1e-6)


def test_brightness_and_contrast_of_a_channel_do_not_matter(image, scores):
    plain = pamr(image, scores)
    changed = image.astype(np.float32) * np.float32([0.004, -2.5, 30]) + np.float32([-1.7, 200, 0.3])
    assert torch.allclose(pamr(changed, scores), plain, atol=1e-4)
    mixed = image[:, :, [1, 2, 0]]
    assert torch.allclose(pamr(mixed, scores), plain, atol=1e-5)  # channels count alike
    other = image.copy()
    other[4, 7] ^= 255
    assert not torch.allclose(pamr(other, scores), plain, atol=1e-3)


def test_scores_stay_in_their_range_and_constants_stay(image, scores):
    found = pamr(image, scores)
    low, high = scores.amin((1, 2))[:, None, None], scores.amax((1, 2))[:, None, None]
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()
    constant = pamr(image, torch.full((1, *SHAPE), 0.37))
    assert torch.allclose(constant, torch.tensor(0.37), atol=1e-5)
    assert torch.allclose(pamr(image, scores * 3 - 2), found * 3 - 2, atol=1e-4)  # linear
    assert torch.allclose(pamr(image, scores[1:2]), found[1:2], atol=1e-6)  # each class for itself


def test_scores_that_come_in_stay_as_they_are_and_broken_ones_are_not_hidden(image, scores):
    before = scores.clone()
    pamr(image, scores)
    assert torch.equal(scores, before)
    assert torch.isnan(pamr(image, scores / 0 * 0)).any()


def test_noisy_scores_follow_the_edges_of_the_image():
    image = np.full((20, 33, 3), 30, np.uint8)
    image[:, 15:] = (200, 90, 60)
    truth = np.zeros((20, 33), np.float32)
    truth[:, 15:] = 1
    noisy = torch.from_numpy(truth + np.random.default_rng(0).normal(0, 0.6, truth.shape).astype(np.float32))
    found = pamr(image, noisy[None])[0].numpy()
    assert ((noisy.numpy() > 0.5) == truth).mean() < 0.85 and ((found > 0.5) == truth).mean() > 0.98


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (30, 2)])
def test_small_images(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = pamr(image, torch.rand(2, *shape))
    assert found.shape == (2, *shape) and torch.isfinite(found).all()
