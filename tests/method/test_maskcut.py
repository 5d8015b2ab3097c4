"""MaskCut, its refinement, and the measure of segmenters on the mini world."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.ndimage import binary_erosion
from sentences import refused
from transformers import ViTConfig, ViTModel

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.masks.segmenters import maskcut
from ovdiff_lib.masks.segmenters.maskcut import WEAK, MaskCut, cut, cut_vector, salient_part
from ovdiff_lib.masks.segmenters.refine import iou, refine, resize_mask, walker
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes import quality


def blurred_blocks(n, blocks, seed=0, noise=0.1):
    """A symmetric affinity bool (n, n): patches of one block joined, with some pairs flipped."""
    rng = np.random.default_rng(seed)
    block = rng.integers(0, blocks, n)
    joined = (block[:, None] == block[None]) ^ (rng.random((n, n)) < noise)
    upper = np.triu(joined, 1)
    return upper | upper.T | np.eye(n, dtype=bool)


def generalised(joined):
    """The definition: second smallest of (D - A) x = lambda D x, all of it decomposed by LAPACK."""
    affinity = np.where(joined, 1.0, WEAK)
    degree = np.diag(affinity.sum(1))
    return eigh(degree - affinity, degree, subset_by_index=(1, 1))[1][:, 0]


def assert_parallel(x, y):
    assert abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("n", "blocks", "noise"), [(6, 2, 0.1), (20, 2, 0.1), (150, 3, 0.1), (400, 5, 0.1), (900, 4, 0.3)])
def test_cut_vector_is_the_second_generalised_eigenvector(n, blocks, noise):
    joined = blurred_blocks(n, blocks, noise=noise)
    x = cut_vector(joined)
    assert_parallel(x, generalised(joined))
    assert x[np.abs(x).argmax()] > 0 and np.array_equal(x, cut_vector(joined))


def test_cut_vector_with_painted_out_patches_and_with_equal_eigenvalues():
    joined = blurred_blocks(120, 2, noise=0.05)
    joined[:30] = joined[:, :30] = False  # not even joined to themselves
    assert_parallel(cut_vector(joined), generalised(joined))
    # Five blocks of one size: the second eigenvalue is fourfold, so any vector of that space will do, if it is one.
    block = np.repeat(np.arange(5), 24)
    affinity = np.where(block[:, None] == block[None], 1.0, WEAK)
    x, degree = cut_vector(affinity == 1), affinity.sum(1)
    quotient = (x @ (degree * x) - x @ affinity @ x) / (x @ (degree * x))
    expected = eigh(np.diag(degree) - affinity, np.diag(degree), eigvals_only=True)[1]
    assert quotient == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert abs(x @ degree) < 1e-6 * np.linalg.norm(x) * np.linalg.norm(degree)


def planted(grid=(9, 14)):
    """Features (h, w, 8) of a background with two objects of their own directions and a little noise; the objects' masks."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    objects = np.zeros((2, *grid), bool)
    objects[0, 2:7, 2:6] = True
    objects[1, 3:6, 9:12] = True
    label = np.where(objects[0], 1, np.where(objects[1], 2, 0))
    return directions[label] * 3 + 0.1 * rng.standard_normal((*grid, 8)), objects


def test_cut_finds_planted_objects_one_after_the_other():
    features, objects = planted()
    masks = cut(features, 3, 0.3)
    assert len(masks) >= 2
    assert {m.tobytes() for m in masks[:2]} == {m.tobytes() for m in objects}
    assert [m.tolist() for m in cut(features, 1, 0.3)] == [masks[0].tolist()]
    assert np.sum(masks, axis=0).max() == 1
    scaled = features * np.random.default_rng(1).uniform(0.5, 9, (*features.shape[:2], 1))  # cosines know no lengths
    assert [m.tolist() for m in cut(scaled, 3, 0.3)] == [m.tolist() for m in masks]
    assert cut(np.ones((4, 6, 3)), 3, 0.15) == []  # patches that are all alike


def test_salient_part_is_the_connected_side_of_the_extreme_patch():
    values = np.array([[0, 0, 0, 0, 0, 0],
                       [0, 9, 8, 0, 0, 0],
                       [0, 8, 0, 7, 0, 0],
                       [0, 0, 0, 7, 0, 0]], float)
    # (1, 2) and (2, 3) touch at a corner only.
    expected = [[0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert salient_part(values.reshape(-1), (4, 6)).astype(int).tolist() == expected


def test_the_side_with_three_corners_is_background():
    values = np.ones((4, 6))
    values[1:3, 2:4] = -0.9
    values[1, 2] = -0.95
    values[3, 5] = -0.5
    # Three corners and the extreme entry are positive: the other side counts, without the corner that is not connected to its extreme.
    part = salient_part(values.reshape(-1), (4, 6))
    expected = np.zeros((4, 6), bool)
    expected[1:3, 2:4] = True
    assert np.array_equal(part, expected)
    values[0, 0] = values[3, 0] = -0.5  # one corner left: the extreme side counts
    part = salient_part(values.reshape(-1), (4, 6))
    assert part[0, 5] and not part[1, 2]


@pytest.mark.parametrize(("rows", "columns", "expected"), [
    (slice(2, 6), slice(2, 7), 1),  # IoU with the first above one half
    (8, 8, 1),  # one of 126 patches
    (slice(2, 6), slice(4, 8), 2),  # shifted: it loses what is covered
])
def test_later_cuts_are_dropped_or_lose_what_is_covered(monkeypatch, rows, columns, expected):
    first, second = np.zeros((2, 9, 14), bool)
    first[2:6, 2:6] = second[rows, columns] = True
    script = iter([first, second, first])
    monkeypatch.setattr(maskcut, "salient_part", lambda vector, shape: next(script))
    found = cut(np.random.default_rng(0).standard_normal((9, 14, 8)), 2, 0.3)
    assert np.array_equal(found, [first, second & ~first][:expected])


def test_painted_out_patches_are_not_joined_to_anything(monkeypatch):
    features, _ = planted()
    seen, solve = [], cut_vector
    monkeypatch.setattr(maskcut, "cut_vector", lambda joined: seen.append(joined) or solve(joined))
    masks = cut(features, 2, 0.3)
    covered = masks[0].reshape(-1)
    assert seen[0][covered].any() and not seen[1][covered].any() and not seen[1][:, covered].any()
    assert np.array_equal(seen[0][~covered][:, ~covered], seen[1][~covered][:, ~covered])


@pytest.fixture(scope="module")
def dino():
    """Two random layers with weights large enough for patches to differ."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = ViTModel(config, add_pooling_layer=False).eval()
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim >= 2 else 1)
    return model


def settings(**fields):
    return load_profile("mini", {f"masks.{name}": value for name, value in fields.items()}).masks


@pytest.mark.parametrize(("facet", "projection"), [("keys", "k_proj"), ("queries", "q_proj"), ("values", "v_proj")])
def test_features_are_a_facet_of_the_last_layer_in_raster_order(dino, facet, projection):
    segmenter = MaskCut(dino, settings(maskcut_size=45, maskcut_facet=facet))
    assert segmenter.side == 40
    square = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    features = segmenter.features(square)
    assert features.shape == (5, 5, 32) and features.dtype == np.float32
    pixels = torch.from_numpy((square / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        states = dino(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        layer = dino.layers[-1]
        normal = torch.nn.functional.layer_norm(states[-2], (32,), layer.layernorm_before.weight, layer.layernorm_before.bias,
                                                dino.config.layer_norm_eps)
        linear = getattr(layer.attention, projection)
        by_hand = normal @ linear.weight.T + linear.bias
    assert np.allclose(features.reshape(25, 32), by_hand[0, 1:].numpy(), atol=1e-4)


def test_proposals_follow_a_non_square_image(dino):
    """Two flat regions: some proposal is one of them, at the shape of the image."""
    image = np.full((36, 60, 3), 30, np.uint8)
    image[10:26, 20:42] = (220, 60, 40)
    masks = MaskCut(dino, settings(maskcut_size=96, maskcut_tau=0.3)).propose(image, "ignored")
    assert masks.dtype == bool and masks.shape[1:] == (36, 60) and 1 <= len(masks) <= 3 and masks.any(axis=(1, 2)).all()
    truth = image[..., 0] == 220
    assert max(iou(mask, truth) for mask in masks) > 0.8


def test_what_cannot_be_cut(dino, monkeypatch):
    with refused(ProfileError, "masks.maskcut_size", "16"):  # two patches
        MaskCut(dino, settings(maskcut_size=15))
    monkeypatch.setattr(maskcut, "cut", lambda *arguments: [])
    assert MaskCut(dino, settings(maskcut_size=16)).propose(np.zeros((5, 9, 3), np.uint8), "").shape == (0, 5, 9)


def disc(side=80, radius=23.0, patch=8):
    """An image of a disc on a striped ground, its true mask, and the patches that are mostly disc."""
    y, x = np.mgrid[:side, :side] + 0.5
    truth = (y - 41) ** 2 + (x - 37) ** 2 < radius ** 2
    image = np.where(truth[..., None], (200, 120, 60), np.where((x // 5 % 2 == 0)[..., None], (60, 90, 140), (70, 100, 150)))
    coarse = truth.reshape(side // patch, patch, side // patch, patch).mean((1, 3)) > 0.5
    return image.astype(np.uint8), truth, coarse


def enlarged(coarse):
    return np.kron(coarse, np.ones((8, 8), bool))


def test_refinement_moves_the_border_to_the_edge():
    image, truth, coarse = disc()
    assert iou(enlarged(coarse), truth) < 0.9
    assert iou(refine(coarse, image), truth) > 0.98


def test_the_random_walker_keeps_what_is_well_inside_and_thin_parts():
    image, _, coarse = disc()
    noise = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    fine = walker(enlarged(coarse), noise, 4)
    assert fine[binary_erosion(enlarged(coarse), np.ones((9, 9)))].all() and (fine != enlarged(coarse)).any()
    thin = np.zeros((40, 60), bool)
    thin[20, 10:50] = True
    flat = np.full((40, 60, 3), 90, np.uint8)
    flat[20, 10:50] = 200
    assert np.array_equal(walker(thin, flat, 8), thin)


def test_a_large_image_is_walked_at_a_smaller_size():
    image, truth, coarse = disc()
    fine = refine(coarse, np.kron(image, np.ones((5, 5, 1), np.uint8)))
    assert fine.shape == (240, 240)
    assert iou(resize_mask(fine, (80, 80)), truth) > 0.95


def test_an_image_of_one_colour_has_its_patches_enlarged_and_holes_filled():
    coarse = np.ones((3, 5), bool)
    coarse[1, 2] = coarse[0, 0] = False
    expected = np.ones((6, 10), bool)
    expected[:2, :2] = False
    assert np.array_equal(refine(coarse, np.zeros((6, 10, 3), np.uint8)), expected)


def test_what_refinement_does_not_confirm_is_dropped_and_what_it_cannot_judge_left_alone(monkeypatch):
    image, _, coarse = disc()
    assert refine(np.ones_like(coarse), image).all()
    monkeypatch.setattr("ovdiff_lib.masks.segmenters.refine.walker", lambda mask, image, margin: ~mask)
    assert refine(coarse, image) is None


def test_resizing_a_mask():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    assert np.array_equal(resize_mask(mask, (4, 6)), mask)
    assert np.array_equal(resize_mask(np.kron(mask, np.ones((8, 8), bool)), (4, 6)), mask)
    assert resize_mask(mask, (2, 9)).shape == (2, 9)
    assert iou(mask[:0], mask[:0]) == 0


def test_best_ious_by_hand():
    labels = np.array([[1, 1, 2, 255], [1, 0, 2, 0]], np.uint8)
    masks = np.zeros((2, 2, 4), bool)
    masks[0, 0] = True  # 2 of noun 1, 1 of noun 2, the ignored pixel
    masks[1, :, 0] = True
    assert quality.best_ious(masks, labels) == pytest.approx([2 / 3, 1 / 4])
    assert quality.best_ious(masks[:0], labels) == [0, 0]
