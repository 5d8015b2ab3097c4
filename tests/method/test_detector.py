"""The class-agnostic Mask R-CNN and CutLER's recipe: geometry, DropLoss, pseudo-masks and views against values computed by hand."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import maximum_filter, minimum_filter
from sentences import refused
from tiny import noise

from ovdiff_lib.errors import InputError, ModelNotAvailable
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.segmenters.detector import CONFIG, DetectorSegmenter, build_detector, detect_many, load_detector, paste, save_detector
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes import quality, train_detector
from ovdiff_lib.recipes.train_detector import DropLossHeads, as_target, boxes_of, losses, views

SMALL = CONFIG | {"widths": [8, 8, 16, 16], "pyramid": 16, "short_side": 64, "long_side": 256, "anchors": [8, 16, 32, 56], "canonical": 56,
                  "box_head": 24, "mask_head": [16], "detections": 6}


def detect(model, image, score=0.0):
    return detect_many(model, image[None], score)[0]


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_detector(SMALL).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector")
    save_detector(small(), SMALL, path)
    return path


def profile_of(folder, score=0.0):
    return load_profile("mini", {"masks.segmenter": "detector", "models.detector": str(folder), "masks.detector_score": score})


def rectangle(shape, top, left, bottom, right):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


# ---- the network

def test_the_shipped_size_is_small_and_its_levels_have_the_named_strides():
    model = build_detector(CONFIG)
    assert sum(p.numel() for p in model.parameters()) <= 1_600_000
    maps = model.backbone(torch.zeros(1, 3, 128, 192))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 64, 128 // s, 192 // s) for s in (4, 8, 16, 32)]
    # A box of 112 px is pooled at stride 16, of 56 at 8, and so on (equation 1 of the feature pyramid paper); a narrow image that
    # comes first must not change the strides.
    boxes = torch.tensor([[0, 0, side, side] for side in (27.0, 29.0, 57.0, 113.0, 225.0)])
    pool = model.roi_heads.box_roi_pool
    pool(model.backbone(torch.zeros(1, 3, 32, 256)), [boxes], [(12, 256)])
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert pool.map_levels([boxes]).tolist() == [0, 0, 1, 2, 3]


def test_saved_and_loaded_again_gives_the_same_proposals(folder):
    weights = load_file(folder / "model.safetensors")
    assert {v.dtype for v in weights.values()} == {torch.float16} and json.loads((folder / "config.json").read_text()) == SMALL
    loaded = load_detector(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not any(p.requires_grad for p in loaded.parameters())
    for name, value in small().half().float().state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_proposals_of_images_that_are_not_square(folder):
    segmenter = build_segmenter(profile_of(folder))
    assert segmenter.name == "detector" and isinstance(segmenter, DetectorSegmenter)
    for shape in ((40, 90), (90, 40), (130, 200), (9, 200)):
        masks, _, boxes = detect(segmenter.model, noise(*shape))
        assert boxes[:, [0, 2]].max() <= shape[1] and boxes[:, [1, 3]].max() <= shape[0]
        assert boxes[:, [0, 2] if shape[1] > shape[0] else [1, 3]].max() > min(shape)  # width and height are not swapped
        found = segmenter.propose(noise(*shape), "cat")
        assert found.dtype == bool and found.shape[1:] == shape and np.array_equal(found, masks[masks.any(axis=(1, 2))])


def test_scores_descend_and_the_threshold_is_inclusive(folder):
    model, image = load_detector(folder), noise(48, 64)
    masks, scores, _ = detect(model, image)
    assert len(scores) > 2 and (np.diff(scores) <= 0).all()
    for cut in (1.0, float(scores[1]), 0.0):  # each call has its own
        expected = masks[(scores >= np.float32(cut)) & masks.any(axis=(1, 2))]
        assert np.array_equal(DetectorSegmenter(model, cut).propose(image, ""), expected)
        assert detect(model, image, cut)[1].tolist() == [score for score in scores.tolist() if score >= cut]


def test_paste_against_a_direct_loop():
    rng = np.random.default_rng(0)
    masks, boxes = rng.random((2, 4, 5)).astype(np.float32), np.array([[2.3, 1.1, 9.7, 6.0], [-3.0, 2.5, 4.2, 12.0]], np.float32)
    pasted = paste(torch.from_numpy(masks), torch.from_numpy(boxes), (9, 13)).numpy()
    assert pasted.shape == (2, 9, 13)
    for m, (x0, y0, x1, y1) in enumerate(boxes):
        padded = np.pad(masks[m], 1)
        for row, column in np.ndindex(9, 13):
            # Where the pixel's centre falls between the centres of the mask's cells.
            v = (row + 0.5 - y0) / (y1 - y0) * 4 + 0.5
            u = (column + 0.5 - x0) / (x1 - x0) * 5 + 0.5
            expected = 0.0
            if 0 <= v < 5 and 0 <= u < 6:
                (i, a), (j, b) = divmod(v, 1), divmod(u, 1)
                corners = padded[int(i):int(i) + 2, int(j):int(j) + 2]
                expected = np.array([1 - a, a]) @ corners @ np.array([1 - b, b])
            assert pasted[m, row, column] == pytest.approx(expected, abs=1e-4)


# ---- what can go wrong with a model folder

def broken(folder, tmp_path, change):
    weights, config = load_file(folder / "model.safetensors"), dict(SMALL)
    change(weights, config)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


BIAS = "rpn.head.cls_logits.bias"


@pytest.mark.parametrize(("change", "words"), [
    (lambda w, c: w.pop(BIAS), f'Missing key(s) in state_dict: "{BIAS}"'),
    (lambda w, c: w.update(extra=torch.zeros(2)), "Unexpected key"), (lambda w, c: w[BIAS].fill_(torch.nan), f"not finite, in {BIAS}"),
    (lambda w, c: w.update({BIAS: torch.zeros(5)}), f"mismatch for {BIAS}"),
    (lambda w, c: c.pop("pyramid"), "lacks pyramid or"), (lambda w, c: c.update(stages=3), "lacks stages or"),
    (lambda w, c: c.update(short_side="64"), "short_side"), (lambda w, c: c.update(anchors=[8, 16]), "anchors"),
    (lambda w, c: c.update(mask_head=[]), "mask_head"), (lambda w, c: c.update(ratios=[0.5, -1.0]), "ratios"),
    (lambda w, c: c.update(widths=[8, 8, 24, 16]), "size mismatch")])
def test_an_unfit_folder_is_refused_in_one_sentence(folder, tmp_path, change, words):
    with refused(ModelNotAvailable, "could not be loaded", words):
        build_segmenter(profile_of(broken(folder, tmp_path, change)))


def test_a_damaged_configuration_and_an_elongated_image_are_one_sentence(folder, tmp_path):
    (tmp_path / "config.json").write_text("{")
    for wrong in (tmp_path, folder / "config.json"):
        with refused(ModelNotAvailable, wrong):
            build_segmenter(profile_of(wrong))
    with refused(InputError, "1 x 4000 pixels"):
        detect(load_detector(folder), noise(1, 4000))


# ---- DropLoss

def test_drop_loss_against_a_case_computed_by_hand():
    heads = small().roi_heads
    heads.__class__ = DropLossHeads
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    regions = torch.tensor([
        [10.0, 10.0, 20.0, 18.0],  # IoU 0.8: object
        [15.0, 10.0, 25.0, 20.0],  # IoU 1/3: background
        [19.0, 10.0, 28.0, 20.0],  # IoU 10/180 = 0.056: background
        [19.0, 19.0, 29.0, 29.0],  # IoU 1/199 = 0.005: dropped
        [40.0, 40.0, 50.0, 50.0],  # IoU 0: dropped
    ])
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": torch.zeros(1, 64, 64, dtype=torch.uint8)}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64, dtype=torch.uint8)}
    kept, _, labels, _ = heads.select_training_samples([regions, regions.clone()], [target, nothing])
    found = {tuple(r.tolist()): int(label) for r, label in zip(kept[0], labels[0], strict=True)}
    # The sampler keeps all: 6 regions (the box itself joins them) are fewer than it may take.
    assert found == {**{tuple(r.tolist()): v for r, v in zip(regions, (1, 0, 0, -100, -100), strict=True)}, tuple(box[0].tolist()): 1}
    assert set(labels[1].tolist()) == {-100}
    plain = small().roi_heads.select_training_samples([regions.clone()], [target])[2][0]
    assert sorted(plain.tolist()) == [0, 0, 0, 0, 1, 1]


# ---- views

def scene(size=(48, 64), colour=200, box=(10, 20, 30, 44)):
    image = np.full((*size, 3), 20, np.uint8)
    mask = rectangle(size, *box)
    image[mask] = colour
    return image, mask[None]


@pytest.mark.parametrize("paste_share", [0.0, 1.0])
def test_masks_of_a_view_follow_its_pixels(paste_share):
    images, masks = zip(*(scene(box=box) for box in ((10, 20, 30, 44), (2, 3, 20, 25), (28, 30, 46, 60))), strict=True)
    generator, seen = torch.Generator().manual_seed(3), 0
    for _ in range(12):
        shown, targets = views(np.stack(images), list(masks), 96, paste_share, generator)
        assert shown.shape == (3, 3, 96, 96) and 0 <= float(shown.min()) and float(shown.max()) <= 1
        for picture, target in zip(shown, targets, strict=True):
            found = target["masks"].bool().numpy()
            assert 1 <= len(found) <= 1 + paste_share and found.sum((1, 2)).min() >= train_detector.LEAST_AREA
            assert found.sum(0).max() == 1  # what is pasted hides what was there
            # Objects are bright; pixels that mix object and ground, near a border, may fall either way.
            bright = (picture[0] > 110 / 255).numpy()
            sure = maximum_filter(bright, 5) == minimum_filter(bright, 5)
            assert not ((bright ^ found.any(0)) & sure).any()
            rows, columns = np.nonzero(found[0])
            assert target["boxes"][0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert target["labels"].tolist() == [1] * len(found)
            seen += len(found)
    assert seen > 36 if paste_share else seen == 36


def test_boxes_reach_the_outer_edges_and_specks_are_no_objects():
    masks = torch.zeros(3, 12, 20, dtype=torch.bool)
    masks[0, 3, 4] = True
    masks[1, 2:8, 5:11] = True
    assert boxes_of(masks[:2]).tolist() == [[4, 3, 5, 4], [5, 2, 11, 8]]
    assert as_target(masks, masks)["boxes"].tolist() == [[5, 2, 11, 8]]
    assert as_target(masks[[0, 2]], masks[[0, 2]])["boxes"].tolist() == [[4, 3, 5, 4]]  # better a speck than a view without object


# ---- training

def test_a_few_steps_lower_the_loss_and_find_a_bright_square():
    torch.manual_seed(0)
    model = build_detector(SMALL)
    model.roi_heads.__class__ = DropLossHeads
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    boxes = ((8, 10, 28, 30), (20, 20, 44, 44), (4, 24, 24, 46), (24, 4, 44, 28))
    images, masks = zip(*(scene((48, 48), box=b) for b in boxes), strict=True)
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(40):
        batch, targets = views(np.stack(images), list(masks), 64, 0.0, generator)
        loss = losses(model.train(), batch, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert np.mean(history[-10:]) < 0.65 * np.mean(history[:3])
    model.eval()
    pairs = list(zip(images, masks, strict=True))
    best = [[quality.best_ious(detect(m, image)[0], mask[0].astype(np.uint8))[0] for image, mask in pairs] for m in (model, small())]
    assert np.mean(best[0]) > 0.55 > 1.5 * np.mean(best[1])
