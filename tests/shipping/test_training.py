"""What the trainers of the mini world stand on; the training itself is checked by the quality of what ships."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovdiff_lib.recipes.training import round_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounded_weights_have_bfloat16_fractions(dtype):
    weights = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_weights({"w": weights, "n": torch.tensor(3)})
    assert rounded["n"].item() == 3 and rounded["w"].dtype == dtype
    torch.testing.assert_close(rounded["w"].float(), weights.to(torch.bfloat16).float(), rtol=2 ** -8, atol=0)
    assert torch.equal(rounded["w"].float(), rounded["w"].to(torch.bfloat16).float())  # nothing below the seventh bit is left
    again = round_weights(rounded)
    assert torch.equal(again["w"], rounded["w"])


def test_sinkhorn_uses_prototypes_alike_and_keeps_rows_probabilities():
    from ovdiff_lib.recipes.train_dino import sinkhorn

    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, 0] += 10  # without balancing, everything would go to the first prototype
    table = sinkhorn(scores, rounds=50)
    torch.testing.assert_close(table.sum(1), torch.ones(64))
    torch.testing.assert_close(table.sum(0), torch.full((8,), 8.0), atol=0.05, rtol=0)
    assert float(scores.softmax(1).sum(0)[0]) > 60


def test_distillation_loss_is_the_cross_entropy_of_other_views():
    from ovdiff_lib.recipes.train_dino import STUDENT_TEMPERATURE, distillation_loss

    generator = torch.Generator().manual_seed(2)
    student = [torch.randn(5, 4, generator=generator) for _ in range(3)]
    teacher = [torch.randn(5, 4, generator=generator).softmax(1) for _ in range(2)]
    by_hand = np.mean([float(F.cross_entropy(student[j] / STUDENT_TEMPERATURE, teacher[i])) for i in range(2) for j in range(3) if i != j])
    assert math.isclose(float(distillation_loss(student, teacher)), by_hand, rel_tol=1e-5)


def test_crops_stay_inside_and_mirror():
    from ovdiff_lib.recipes.train_dino import crop

    columns = torch.linspace(0, 1, 64).expand(16, 3, 64, 64)
    out = crop(columns, 32, (0.2, 0.5), torch.Generator().manual_seed(3))
    assert out.shape == (16, 3, 32, 32) and out.min() >= 0 and out.max() <= 1
    spans = out[:, 0, 16, -1] - out[:, 0, 16, 0]
    assert (spans > 0).any() and (spans < 0).any()  # some are mirrored
    assert (spans.abs() < math.sqrt(0.5 * 4 / 3) + 0.02).all()  # none shows more than the largest share at the widest aspect


def test_the_trainer_learns_from_pairs_of_frames(tmp_path):
    """A few steps on random frames: the loop runs, logs, writes a loadable ViTModel, and its weights have moved."""
    import json

    from transformers import ViTModel

    from ovdiff_lib.recipes import train_dino

    rng = np.random.default_rng(0)
    np.save(tmp_path / "train_images.npy", rng.integers(0, 255, (4, 64, 64, 3), dtype=np.uint8))
    np.save(tmp_path / "frames.npy", rng.integers(0, 255, (8, 2, 64, 64, 3), dtype=np.uint8))
    np.save(tmp_path / "eval_images.npy", rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8))
    np.save(tmp_path / "eval_labels.npy", np.arange(12) % 2)
    for name, content in (("train_captions", [["a"]] * 4), ("nouns", ["a", "b"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    common = ["--data", str(tmp_path), "--batch", "4", "--width", "32", "--layers", "1", "--small-crops", "2"]
    for steps in (1, 3):
        train_dino.main([*common, "--out", str(tmp_path / f"out{steps}"), "--work", str(tmp_path / "work"), "--steps", str(steps)])
    first, last = (ViTModel.from_pretrained(tmp_path / f"out{steps}").state_dict() for steps in (1, 3))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert (tmp_path / "work" / "log.csv").exists()


def test_an_error_costs_more_on_a_coloured_pixel():
    from ovdiff_lib.recipes.train_vae import reconstruction_loss

    target = torch.zeros(1, 3, 4, 6)
    target[0, :, 1, 2] = torch.tensor([0.8, -0.4, -0.4])  # red; its distance from grey is 0.8
    costs = {}
    for name, (row, column) in {"red": (1, 2), "grey": (2, 4)}.items():
        output = target.clone()
        output[0, :, row, column] += 0.1  # all channels alike: no tint, the same gradient wherever it is
        costs[name] = float(reconstruction_loss(output, target, chroma=4.0))
    mean_weight = (23 + 4.2) / 24
    error = (0.1 + 0.01) / 24
    gradient = 0.5 * (2 * 0.1 / (4 * 5) + 2 * 0.1 / (3 * 6))
    assert math.isclose(costs["grey"], error / mean_weight + gradient, rel_tol=1e-4)
    assert math.isclose(costs["red"], 4.2 * error / mean_weight + gradient, rel_tol=1e-4)


def test_frames_show_one_object_twice_in_two_places():
    from ovdiff_lib.recipes import build
    from ovdiff_lib.recipes.art import drawn_world

    world, arrays = drawn_world(), {}
    for i, thing in enumerate(world.things):  # every noun a plain colour of its own
        for ref in (f"{style}/{key}" for style, keys in thing.glyphs.items() for key in keys):
            arrays[ref] = np.full((32, 32, 4), 255, np.uint8)
            arrays[ref][..., :3] = (0, 255, 0) if ref in thing.held else (255, 0, 255) if i == 0 else (0, 0, 0)
    build._start(world, arrays)
    first = build._frames(0, 64)
    assert first.shape == (2, 64, 64, 3) and not np.array_equal(first[0], first[1])
    magenta = (first[..., 0] > 130) & (first[..., 2] > 130) & (first[..., 1] < 120)
    assert (magenta.mean(axis=(1, 2)) > 0.03).all()
    assert np.array_equal(first, build._frames(0, 64)) and not np.array_equal(first, build._frames(len(world.things), 64))
    black = (build._frames(1, 64) < 70).all(-1)
    assert (black.mean(axis=(1, 2)) > 0.03).all()
