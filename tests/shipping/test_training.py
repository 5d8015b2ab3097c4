"""What the trainers of the mini world stand on; the training itself is checked by the quality of what ships."""

import json
from importlib import import_module
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovdiff_lib.recipes import rebuild, train_detector, train_dino, train_unet, train_vae, training


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def write_scenes(folder, size=32, count=12):
    """Random scenes with captions, and frames, as ``recipes.build`` leaves them."""
    rng = np.random.default_rng(0)
    for name, shape in (("train_images", (count,)), ("frames", (count, 2))):
        np.save(folder / f"{name}.npy", rng.integers(0, 255, (*shape, size, size, 3), dtype=np.uint8))
    nouns = ("cat", "hot dog")
    captions = [[f"a flat picture of a {n} with sky", f"a good picture of a {n}", n, f"a {n} and sky"] for n in nouns]
    for name, content in (("train_captions", captions * (count // 2)), ("nouns", nouns)):
        (folder / f"{name}.json").write_text(json.dumps(content))


# ---- pieces against their definitions

def test_halved_weights_have_bfloat16_fractions():
    model = torch.nn.Linear(30, 40)
    torch.nn.init.uniform_(model.weight, 0.01, 1)  # near zero a half has fewer bits
    weight, half = model.weight, training.halved(model).weight
    assert half.dtype == torch.float16 and torch.equal(half.float(), weight.bfloat16().float()) and weight.dtype == torch.float32


def test_a_step_draws_the_same_whenever_it_is_made_and_an_epoch_has_every_item_once():
    args = SimpleNamespace(batch=3, seed=5)
    steps = [training.draw(args, 9, step) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(i for draw in epoch for i in draw.index) == list(range(9))
    assert any((a.index != b.index).any() for a, b in zip(steps[:3], steps[3:], strict=True))
    again = training.draw(args, 9, 4)
    assert (again.index == steps[4].index).all() and again.picker.random() == steps[4].picker.random()
    assert torch.equal(torch.rand(4, generator=again.generator), torch.rand(4, generator=steps[4].generator))


def test_sinkhorn_uses_prototypes_alike_and_keeps_rows_probabilities():
    scores = torch.randn(64, 8, generator=generator(1)) * 3
    scores[:, 0] += 10  # without balancing, everything would go to the first prototype
    table = train_dino.sinkhorn(scores, rounds=50)
    torch.testing.assert_close(table.sum(1), torch.ones(64))
    torch.testing.assert_close(table.sum(0), torch.full((8,), 8.0), atol=0.05, rtol=0)
    assert float(scores.softmax(1).sum(0)[0]) > 60


def test_distillation_loss_is_the_cross_entropy_of_other_views():
    draw = generator(2)
    student = [torch.randn(5, 4, generator=draw) for _ in range(3)]
    teacher = [torch.randn(5, 4, generator=draw).softmax(1) for _ in range(2)]
    by_hand = np.mean([float(F.cross_entropy(student[j] / train_dino.STUDENT_TEMPERATURE, teacher[i]))
                       for i in range(2) for j in range(3) if i != j])
    assert float(train_dino.distillation_loss(student, teacher)) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("predicts", ["v_prediction", "epsilon"])
def test_what_is_predicted_turns_noisy_latents_back(monkeypatch, predicts):
    """signal * noisy - noise * v is the clean latent, and (noisy - noise * epsilon) / signal, where signal^2 + noise^2
    = 1; noisier steps weigh no less."""
    latents = np.random.default_rng(0).normal(size=(16, 4, 2, 3)).astype(np.float16)
    states, ends = np.arange(2 * 5 * 3, dtype=np.float16).reshape(2, 5, 3), np.array([1, 3])
    args = SimpleNamespace(text_length=5, ending_dropout=0.5, batch=16, seed=0)
    monkeypatch.setattr(train_unet, "EMPTY", 0.25)
    batch = train_unet.batches(args, latents, states, ends, [["x"] * 4] * 16, {"": 0, "x": 1}, predicts)
    noisy, t, text, target, weight = batch(training.draw(args, 16, 3))
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    alpha = torch.tensor(np.cumprod(1 - betas)[t.numpy()], dtype=torch.float32).view(-1, 1, 1, 1)
    clean = (alpha.sqrt() * noisy - (1 - alpha).sqrt() * target if predicts == "v_prediction" else
             (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt())
    assert torch.allclose(clean, torch.from_numpy(latents).float(), atol=2e-3)
    by_time = weight[t.argsort()]
    assert (by_time.diff() >= 0).all() and float(by_time[-1]) == 1 and len(set(t.tolist())) == 16
    empty, full = torch.from_numpy(states).float()
    mixture = torch.cat([full[:3], empty[3:]])  # a caption whose ending says nothing
    kinds = [sum(torch.equal(row, kind) for row in text) for kind in (empty, full, mixture)]
    assert sum(kinds) == 16 and min(kinds) >= 1


# ---- the loop and the stages

def loop(folder, *more, stop=None):
    """A run of one weight that is pulled to 3; at the step ``stop`` it is interrupted."""
    def loss(draw):
        if draw.step == stop:
            raise KeyboardInterrupt
        return (module.weight - 3).square().sum()

    parser = training.options("", steps=40, batch=2, minutes=60, lr=0.5)
    args = training.start(parser, ["--data", "", "--out", "", "--work", str(folder), *more])
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    run = training.Run(args, module, 10, decay=0.9, warmup=1)
    run.fit(loss, row=10)
    return module.weight.detach(), run.average.weight


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, monkeypatch):
    whole = loop(tmp_path / "one")
    monkeypatch.setattr(training, "CHECKPOINT", 0)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "two", stop=13)
    parts = loop(tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True)) and 2 < float(parts[0]) < 4
    log = tmp_path / "two" / "log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20, 30, 40]
    log.write_text(log.read_text() + '{"step": 50}\n')  # of a process that was killed after its checkpoint
    loop(tmp_path / "two", "--steps", "41")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20, 30, 40, 41]


def test_the_recipe_trains_every_stage_into_models_that_load(tmp_path, monkeypatch):
    """The recipe's own commands, two steps each, smaller: what a stage needs of those before it is where it looks."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

    from ovdiff_lib.masks.segmenters.detector import CONFIG

    small = {"widths": [8, 8, 16, 16], "pyramid": 16, "short_side": 64, "long_side": 128, "box_head": 24, "mask_head": [16]}
    monkeypatch.setattr(train_detector, "CONFIG", CONFIG | small)
    (tmp_path / "scenes").mkdir()
    write_scenes(tmp_path / "scenes")
    monkeypatch.setattr(train_vae, "CROP", 32)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    less = {"vae": ("--channels", "8", "8", "8", "8", "--latent-channels", "6"),
            "unet": ("--channels", "16", "16", "32"), "detector": ("--set", "masks.maskcut_size=32")}
    with torch.random.fork_rng():
        for name in (name for stream in rebuild.STREAMS for name in stream):
            module, *arguments = rebuild.command(name, tmp_path, 1)
            import_module(module).main([*arguments, "--batch", "2", *less.get(name, ()), "--steps", "2"])
            assert list((tmp_path / "models" / name).rglob("*.safetensors")), name
    weights = tmp_path / "weights"
    rebuild.assemble(tmp_path, weights)
    folders = {"stable-diffusion", "clip", "dino", "mae", "detector", "groupvit"}
    assert {path.name for path in weights.iterdir()} == folders
    tokenizer, clip = CLIPTokenizer.from_pretrained(weights / "clip"), CLIPModel.from_pretrained(weights / "clip")
    # With a legacy end token transformers pools text at the largest id; here that is the end token.
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) == clip.config.text_config.eos_token_id
    ViTModel.from_pretrained(weights / "dino", add_pooling_layer=False)
    pipe = StableDiffusionPipeline.from_pretrained(weights / "stable-diffusion")
    assert pipe.unet.config.in_channels == 6 and pipe.vae_scale_factor == 8 and pipe.unet.config.sample_size == 4
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    text, tower = pipe.text_encoder.state_dict(), clip.text_model.state_dict()
    assert all(torch.equal(text[name].float(), tower[name].float()) for name in text)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe.to(torch.float32)("a good picture of a cat", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()
    module, *arguments = rebuild.command("unet", tmp_path, 1)
    again = {"--init": weights / "stable-diffusion", "--out": tmp_path / "again", "--work": tmp_path / "further"}
    import_module(module).main([*arguments, *map(str, chain(*again.items())), "--steps", "1", "--lr", "0"])
    further = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), further.unet.float().parameters(), strict=True))


def test_chunks_are_made_from_where_it_was_interrupted(tmp_path):
    args, asked = SimpleNamespace(work=tmp_path), []

    def make(part):
        asked.append(part)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [np.full((i % 3, 5, 7), i) for i in part]  # scenes have several masks, one, or none

    with pytest.raises(KeyboardInterrupt):
        training.in_chunks(args, "masks", (7, 5, 7), 2, make)
    found = training.in_chunks(args, "masks", (7, 5, 7), 2, make)
    assert asked == [range(2), range(2, 4), range(4, 6), range(4, 6), range(6, 7)]
    again = training.in_chunks(args, "masks", (7, 5, 7), 2, make)
    for arrays in (found, again):
        assert [(len(x), *set(x.ravel().tolist())) for x in arrays] == [(i % 3, i)[:1 + (i % 3 > 0)] for i in range(7)]
    training.in_chunks(args, "masks", (8, 5, 7), 2, make)  # of another shape nothing is there
    assert len(asked) == 9


STAGE = """
import pathlib, sys
name, work = sys.argv[1], pathlib.Path(sys.argv[2])
(work / "training" / name).mkdir(parents=True, exist_ok=True)
with (work / "order").open("a") as file:
    file.write(name + " ")
sys.exit(name in sys.argv[3:])
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """``stages(*broken)``: one call of the recipe in a folder; each stage is a small script that finishes, or fails.
    Returns which ran until now, in order."""
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def train(*broken):
        monkeypatch.setattr(rebuild, "command", lambda name, work, hours: ["stage", name, str(work), *broken])
        rebuild.train(tmp_path, 1)
        return (tmp_path / "order").read_text().split()

    return train


def test_stages_run_side_by_side_and_only_once(stages):
    log = stages()
    assert sorted(log) == sorted(rebuild.SHARES) and stages() == log
    for stream in rebuild.STREAMS:
        assert [name for name in log if name in stream] == list(stream)
        assert 0.85 < sum(rebuild.SHARES[name] for name in stream) < 0.91


def test_where_a_stage_fails_the_others_are_trained(stages, tmp_path):
    with pytest.raises(SystemExit, match=r"clip, dino failed.*dino\.log"):
        stages("dino", "clip")
    assert {path.parent.name for path in tmp_path.glob("training/*/finished")} == set(rebuild.SHARES) - {"dino", "clip"}
