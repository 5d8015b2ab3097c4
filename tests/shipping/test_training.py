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


# ---- all stages

def write_scenes(folder, size=32, count=12):
    """Random scenes with captions, frames and an evaluation split, as ``recipes.build`` leaves them."""
    import json

    rng = np.random.default_rng(0)
    for name, shape in (("train_images", (count,)), ("frames", (count, 2)), ("eval_images", (count,))):
        np.save(folder / f"{name}.npy", rng.integers(0, 255, (*shape, size, size, 3), dtype=np.uint8))
    np.save(folder / "eval_labels.npy", np.arange(count) % 2)
    nouns = ("cat", "hot dog")
    captions = [[f"a flat picture of a {n} with sky", f"a good picture of a {n}", n, f"a {n} and sky"] for n in nouns] * (count // 2)
    for name, content in (("train_captions", captions), ("nouns", nouns)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_clip_vae_and_unet_train_in_pieces_into_a_pipeline_that_draws(tmp_path):
    """Two steps of each at 32 px. A call that stops after its piece exits with PAUSED, and the next one goes on."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

    from ovdiff_lib.recipes import train_clip, train_unet, train_vae
    from ovdiff_lib.recipes.training import PAUSED

    write_scenes(tmp_path)

    def train(script, name, *more):
        script.main(["--data", str(tmp_path), "--out", str(tmp_path / name), "--work", str(tmp_path / f"{name}.work"), "--steps", "2",
                     "--batch", "4", "--no-bf16", *more])

    train(train_clip, "clip", "--width", "32", "--layers", "1")
    tokenizer, clip = CLIPTokenizer.from_pretrained(tmp_path / "clip"), CLIPModel.from_pretrained(tmp_path / "clip")
    # With a legacy end token transformers pools text at the largest id; here that is the end token.
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) == clip.config.text_config.eos_token_id
    train(train_vae, "vae", "--channels", "8", "8", "8", "8", "--crop", "16", "--latent-channels", "6")
    unet = ("--vae", str(tmp_path / "vae"), "--clip", str(tmp_path / "clip"), "--channels", "16", "16", "32", "--no-compile")
    with pytest.raises(SystemExit) as stop:
        train(train_unet, "sd", *unet, "--piece", "0")
    assert stop.value.code == PAUSED and not (tmp_path / "sd").exists()
    train(train_unet, "sd", *unet)
    assert [row.split(",")[0] for row in (tmp_path / "sd.work" / "log.csv").read_text().splitlines()] == ["step", "2"]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    assert pipe.unet.config.in_channels == 6 and pipe.vae_scale_factor == 8 and pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.sample_size == 4
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe.to(torch.float32)("a good picture of a cat", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()


def test_v_is_what_turns_noisy_latents_back(tmp_path):
    """Batches: signal * noisy - noise * v is the clean latent, and signal^2 + noise^2 = 1; noisier steps weigh no less."""
    from types import SimpleNamespace

    from ovdiff_lib.recipes.train_unet import Batches

    latents = np.random.default_rng(0).normal(size=(16, 4, 2, 3)).astype(np.float16)
    states, ends = np.arange(2 * 5 * 3, dtype=np.float16).reshape(2, 5, 3), np.array([1, 3])
    args = SimpleNamespace(text_length=5, ending_dropout=0.5, batch=16, seed=0, dropout=0.25, gamma=5.0)
    noisy, t, text, v, weight = Batches(args, latents, states, ends, [["x"] * 4] * 16, {"": 0, "x": 1})(3)
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    alpha = torch.tensor(np.cumprod(1 - betas)[t.numpy()], dtype=torch.float32).view(-1, 1, 1, 1)
    clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * v
    assert torch.allclose(clean, torch.from_numpy(latents).float(), atol=2e-3)
    by_time = weight[t.argsort()]
    assert (by_time.diff() >= 0).all() and float(by_time[-1]) == 1 and len(set(t.tolist())) == 16
    empty, full = torch.from_numpy(states).float()
    mixture = torch.cat([full[:3], empty[3:]])  # a caption whose ending says nothing
    kinds = [sum(torch.equal(row, kind) for row in text) for kind in (empty, full, mixture)]
    assert sum(kinds) == 16 and min(kinds) >= 1


def test_patches_are_dropped_only_while_clip_trains():
    from transformers import CLIPConfig, CLIPModel

    from ovdiff_lib.recipes.train_clip import drop_patches

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16))
    drop_patches(model, 0.5)
    pixels = torch.randn(3, 3, 32, 32)
    whole = model.eval().vision_model.embeddings(pixels)
    some = model.train().vision_model.embeddings(pixels)
    assert whole.shape == (3, 17, 32) and some.shape == (3, 9, 32) and torch.equal(some[:, 0], whole[:, 0])
    for kept, row in zip(some, whole, strict=True):
        places = [int((row == token).all(1).nonzero()[0]) for token in kept[1:]]
        assert len(set(places)) == 8 and 0 not in places


def test_koleo_and_hidden_patches():
    from ovdiff_lib.recipes.train_dino import hide, spread

    angles = torch.tensor([0.0, 0.1, 2.0])
    tokens = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    near, far = 2 * math.sin(0.05), 2 * math.sin(0.95)  # chords
    assert math.isclose(float(spread(tokens)), -(2 * math.log(near) + math.log(far)) / 3, rel_tol=1e-3)
    hidden = hide(40, 6, torch.Generator().manual_seed(0)).view(40, 6, 6)
    assert (hidden[::2].sum((1, 2)) == 1).all() and 0.25 < hidden[1::2].float().mean() < 0.55
    for crop in hidden:
        rows, columns = crop.any(1), crop.any(0)
        assert torch.equal(crop, rows[:, None] & columns) and rows.sum() * columns.sum() == crop.sum()


def test_every_stage_understands_what_the_recipe_tells_it(tmp_path, monkeypatch):
    """The recipe's own commands, one step each, smaller: what a stage needs of those before it is where it looks."""
    from importlib import import_module

    from ovdiff_lib.masks.segmenters.detector import CONFIG
    from ovdiff_lib.recipes import rebuild, train_detector

    small = {"widths": [8, 8, 16, 16], "pyramid": 16, "short_side": 64, "long_side": 128, "box_head": 24, "mask_head": [16]}
    monkeypatch.setattr(train_detector, "CONFIG", CONFIG | small)
    monkeypatch.setattr(train_detector, "HELD_OUT", 1)
    (tmp_path / "scenes").mkdir()
    write_scenes(tmp_path / "scenes")
    less = {"clip": ("--width", "32", "--layers", "1"), "vae": ("--channels", "8", "8", "8", "8", "--crop", "16"),
            "unet": ("--channels", "16", "16", "32", "--no-compile"), "dino": ("--width", "32", "--layers", "1", "--small-crops", "1"),
            "mae": ("--width", "32", "--layers", "1"), "groupvit": ("--width", "32"), "detector": ("--set", "masks.maskcut_size=32")}
    for name in (name for stream in rebuild.STREAMS for name in stream):
        module, *arguments = rebuild.command(name, tmp_path, 1, "--piece", "9", "--steps", "1", "--batch", "2", *less[name])
        import_module(module).main(arguments)
        assert list((tmp_path / "models" / name).rglob("*.safetensors")), name
    rebuild.assemble(tmp_path, tmp_path / "weights")
    folders = {"stable-diffusion", "clip", "dino", "mae", "detector", "groupvit"}
    assert {path.name for path in (tmp_path / "weights").iterdir()} == folders


def test_stages_run_side_by_side_in_pieces_and_only_once(tmp_path, monkeypatch):
    """Each stage here is a small script that is paused once and then finishes."""
    from ovdiff_lib.recipes import rebuild

    (tmp_path / "stage.py").write_text(
        "import pathlib, sys\nname, work = sys.argv[1], pathlib.Path(sys.argv[2])\n(work / 'training' / name).mkdir(parents=True, "
        "exist_ok=True)\nwith (work / 'order').open('a') as f: f.write(name + ' ')\nlog = (work / 'order').read_text().split()\n"
        "if name == 'clip': assert 'groupvit' not in log\nsys.exit(0 if log.count(name) > 1 else 75)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rebuild, "command", lambda name, work, hours, *more: ["stage", name, str(work)])
    for _ in range(4):
        if rebuild.train(tmp_path, 1, 0.52):
            break
    else:
        raise AssertionError("never finished")
    log = (tmp_path / "order").read_text().split()
    assert {name: log.count(name) for name in rebuild.SHARES} == dict.fromkeys(rebuild.SHARES, 2)
    assert rebuild.train(tmp_path, 1, 0.52) and (tmp_path / "order").read_text().split() == log
    for stream in rebuild.STREAMS:
        assert [name for name in dict.fromkeys(log) if name in stream] == list(stream)
        assert 0.85 < sum(rebuild.SHARES[name] for name in stream) < 0.91
    monkeypatch.setattr(rebuild, "command", lambda name, work, hours, *more: ["no_such_module"])
    with pytest.raises(SystemExit, match="failed; its last words"):
        rebuild.train(tmp_path / "other", 1, 0.52)
