"""MaskCut, its refinement, and the recall that measures segmenters on the mini world."""

import importlib.util

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from segmenter_models import make_dino

from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.masks.segmenters import maskcut
from ovdiff_lib.masks.segmenters.maskcut import WEAK, MaskCut, cut, cut_vector, salient_part
from ovdiff_lib.masks.segmenters.refine import iou, refine, resize_mask, walker
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes import proposals
from ovdiff_lib.workbench.data.datasets import load_dataset


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


@pytest.mark.parametrize(("n", "blocks"), [(2, 2), (6, 2), (20, 2), (21, 2), (150, 3), (400, 5)])
def test_cut_vector_is_the_second_generalised_eigenvector(n, blocks):
    joined = blurred_blocks(n, blocks) if n > 2 else np.eye(2, dtype=bool)
    x, y = cut_vector(joined), generalised(joined)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)
    assert x[np.abs(x).argmax()] > 0
    assert np.array_equal(x, cut_vector(joined))


def test_cut_vector_with_painted_out_patches_and_with_equal_eigenvalues():
    joined = blurred_blocks(120, 2, noise=0.05)
    joined[:30] = joined[:, :30] = False  # not even joined to themselves
    x, y = cut_vector(joined), generalised(joined)
    assert abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) == pytest.approx(1, abs=1e-9)
    # Five blocks of one size: the second eigenvalue is fourfold, so any vector of that space will do, if it is one.
    block = np.repeat(np.arange(5), 24)
    even = block[:, None] == block[None]
    x = cut_vector(even)
    degree = np.where(even, 1.0, WEAK).sum(1)
    quotient = (x @ (degree * x) - x @ np.where(even, 1.0, WEAK) @ x) / (x @ (degree * x))
    expected = eigh(np.diag(degree) - np.where(even, 1.0, WEAK), np.diag(degree), eigvals_only=True)[1]
    assert quotient == pytest.approx(expected, rel=1e-3, abs=1e-12) and abs(x @ degree) < 1e-6 * np.linalg.norm(x) * np.linalg.norm(degree)


@pytest.mark.slow
def test_the_iterative_solver_agrees_at_the_size_of_the_paper():
    joined = blurred_blocks(3600, 4, noise=0.3)
    x, y = cut_vector(joined), generalised(joined)
    assert abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) == pytest.approx(1, abs=1e-9)


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


def test_patches_that_are_all_alike_have_no_cut():
    assert cut(np.ones((4, 6, 3)), 3, 0.15) == []


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


@pytest.mark.parametrize(("second", "expected"), [
    ("overlapping", 1),  # IoU with the first above one half
    ("tiny", 1),  # one of 126 patches
    ("shifted", 2),
])
def test_later_cuts_are_dropped_or_lose_what_is_covered(monkeypatch, second, expected):
    grid = (9, 14)
    first = np.zeros(grid, bool)
    first[2:6, 2:6] = True
    masks = {"overlapping": np.zeros(grid, bool), "tiny": np.zeros(grid, bool), "shifted": np.zeros(grid, bool)}
    masks["overlapping"][2:6, 2:7] = True
    masks["tiny"][8, 8] = True
    masks["shifted"][2:6, 4:8] = True
    script = iter([first, masks[second], first])
    monkeypatch.setattr(maskcut, "salient_part", lambda vector, shape: next(script))
    found = cut(np.random.default_rng(0).standard_normal((*grid, 8)), 2, 0.3)
    assert len(found) == expected and np.array_equal(found[0], first)
    if expected == 2:
        assert np.array_equal(found[1], masks["shifted"] & ~first)


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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_dino()


def settings(**fields):
    return load_profile("mini", {f"masks.{name}": value for name, value in fields.items()}).masks


@pytest.mark.parametrize(("facet", "projection"), [("keys", "k_proj"), ("queries", "q_proj"), ("values", "v_proj")])
def test_features_are_a_facet_of_the_last_layer_in_raster_order(dino, facet, projection):
    segmenter = MaskCut(dino, settings(maskcut_size=45, maskcut_facet=facet))
    assert segmenter.side == 40
    square = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    features = segmenter.features(square)
    assert features.shape == (5, 5, 32) and features.dtype == np.float32
    pixels = (square.transpose(2, 0, 1)[None] / 255 - np.array([[0.485], [0.456], [0.406]])[..., None]) / np.array(
        [[0.229], [0.224], [0.225]])[..., None]
    with torch.no_grad():
        states = dino(torch.from_numpy(pixels).float(), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        layer = dino.layers[-1]
        assert len(states) == len(dino.layers) + 1
        normal = torch.nn.functional.layer_norm(states[-2], (32,), layer.layernorm_before.weight, layer.layernorm_before.bias,
                                                dino.config.layer_norm_eps)
        linear = getattr(layer.attention, projection)
        by_hand = normal @ linear.weight.T + linear.bias
    assert np.allclose(features.reshape(25, 32), by_hand[0, 1:].numpy(), atol=1e-4)


def test_proposals_follow_a_non_square_image(dino):
    """Two flat regions: some proposal is one of them, at the shape of the image."""
    image = np.full((36, 60, 3), 30, np.uint8)
    image[10:26, 20:42] = (220, 60, 40)
    masks = MaskCut(dino, settings(maskcut_size=96, maskcut_refine="walker", maskcut_tau=0.3)).propose(image, "ignored")
    assert masks.dtype == bool and masks.shape[1:] == (36, 60) and 1 <= len(masks) <= 3 and masks.any(axis=(1, 2)).all()
    truth = image[..., 0] == 220
    assert max(iou(mask, truth) for mask in masks) > 0.8


def test_an_image_without_proposals_gives_none(dino, monkeypatch):
    monkeypatch.setattr(maskcut, "cut", lambda *arguments: [])
    assert MaskCut(dino, settings(maskcut_size=32)).propose(np.zeros((5, 9, 3), np.uint8), "").shape == (0, 5, 9)


def test_squares_below_two_patches_are_refused(dino):
    with pytest.raises(ProfileError, match="maskcut_size"):
        MaskCut(dino, settings(maskcut_size=15))


def disc(side=80, radius=23.0, patch=8):
    """An image of a disc on a striped ground, its true mask, and the patches that are mostly disc."""
    y, x = np.mgrid[:side, :side] + 0.5
    truth = (y - 41) ** 2 + (x - 37) ** 2 < radius ** 2
    image = np.where(truth[..., None], (200, 120, 60), np.where((x // 5 % 2 == 0)[..., None], (60, 90, 140), (70, 100, 150)))
    coarse = truth.reshape(side // patch, patch, side // patch, patch).mean((1, 3)) > 0.5
    return image.astype(np.uint8), truth, coarse


def test_the_random_walker_moves_the_border_to_the_edge():
    image, truth, coarse = disc()
    blocks = np.kron(coarse, np.ones((8, 8), bool))
    assert iou(blocks, truth) < 0.9
    assert iou(refine(coarse, image, "walker"), truth) > 0.98


def test_the_random_walker_keeps_what_is_well_inside_and_thin_parts():
    image, _, coarse = disc()
    noise = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    blocks = np.kron(coarse, np.ones((8, 8), bool))
    fine = walker(blocks, noise, 4)
    inner = np.kron(coarse, np.ones((8, 8), bool))[4:-4, 4:-4]
    for dy in range(9):
        for dx in range(9):
            inner = inner & blocks[dy:72 + dy, dx:72 + dx]
    assert fine[4:-4, 4:-4][inner].all()
    thin = np.zeros((40, 60), bool)
    thin[20, 10:50] = True
    flat = np.full((40, 60, 3), 90, np.uint8)
    flat[20, 10:50] = 200
    assert np.array_equal(walker(thin, flat, 8), thin)


def test_a_large_image_is_walked_at_a_smaller_size():
    image, truth, coarse = disc()
    large = np.kron(image, np.ones((5, 5, 1), np.uint8))
    fine = refine(coarse, large, "walker")
    assert fine.shape == (240, 240)
    assert iou(resize_mask(fine, (80, 80)), truth) > 0.95


def test_without_refinement_patches_are_enlarged_and_holes_filled():
    coarse = np.ones((3, 5), bool)
    coarse[1, 2] = coarse[0, 0] = False
    fine = refine(coarse, np.zeros((6, 10, 3), np.uint8), "none")
    expected = np.ones((6, 10), bool)
    expected[:2, :2] = False
    assert np.array_equal(fine, expected)


def test_a_mask_that_refinement_does_not_confirm_is_dropped(monkeypatch):
    image, _, coarse = disc()
    monkeypatch.setattr("ovdiff_lib.masks.segmenters.refine.walker", lambda mask, image, margin: ~mask)
    assert refine(coarse, image, "walker") is None


def test_an_image_of_one_colour_and_full_masks_are_left_alone():
    image, _, coarse = disc()
    flat = np.full_like(image, 7)
    assert np.array_equal(refine(coarse, flat, "walker"), np.kron(coarse, np.ones((8, 8), bool)))
    assert refine(np.ones_like(coarse), image, "walker").all()


@pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is not installed")
def test_the_dense_crf_moves_the_border_to_the_edge():
    image, truth, coarse = disc()
    assert iou(refine(coarse, image, "crf"), truth) > 0.98


def test_the_dense_crf_says_what_it_needs(without, dino):
    without("pydensecrf")
    with pytest.raises(ProfileError, match="pip install pydensecrf2"):
        MaskCut(dino, settings(maskcut_refine="crf"))


def test_resizing_a_mask():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    assert np.array_equal(resize_mask(mask, (4, 6)), mask)
    assert np.array_equal(resize_mask(np.kron(mask, np.ones((8, 8), bool)), (4, 6)), mask)
    assert resize_mask(mask, (2, 9)).shape == (2, 9)


class Truth:
    """Proposes exactly the objects of the image, found by the image's bytes."""

    name = "truth"

    def __init__(self, keep=lambda label: True):
        self.words, self.masks = {}, {}
        data = load_dataset("mini-object")
        for sample in data:
            labels = np.setdiff1d(np.unique(sample.labels), (0, 255))
            self.words[sample.image.tobytes()] = " and ".join(data.vocabulary.names[label - 1] for label in labels)
            self.masks[sample.image.tobytes()] = np.array([sample.labels == label for label in labels if keep(label)], bool).reshape(
                -1, *sample.labels.shape)

    def propose(self, image, words):
        assert words == self.words[image.tobytes()]
        return self.masks[image.tobytes()]


def test_recall_of_the_truth_is_one_and_of_some_nouns_is_theirs():
    perfect = proposals.recall(Truth(), limit=12, progress=False)
    assert perfect.best == perfect.found == 1 and perfect.images == 12 and set(perfect.by_noun.values()) == {1.0}
    some = proposals.recall(Truth(lambda label: label % 2 == 0), limit=12, progress=False)
    names = load_dataset("mini-object").vocabulary.names
    assert {noun: value for noun, value in some.by_noun.items()} == {noun: float(names.index(noun) % 2 == 1) for noun in perfect.by_noun}
    assert some.objects == perfect.objects and 0 < some.best == some.found < 1


def test_best_ious_by_hand():
    labels = np.array([[1, 1, 2, 255], [1, 0, 2, 0]], np.uint8)
    masks = np.zeros((2, 2, 4), bool)
    masks[0, 0] = True  # 2 of noun 1, 1 of noun 2, the ignored pixel
    masks[1, :, 0] = True
    assert proposals.best_ious(masks, labels) == {1: pytest.approx(2 / 3), 2: pytest.approx(1 / 4)}
    assert proposals.best_ious(masks[:0], labels) == {1: 0.0, 2: 0.0}


def test_recall_of_no_image():
    with pytest.raises(InputError, match="at least 1"):
        proposals.recall(Truth(), limit=0)


