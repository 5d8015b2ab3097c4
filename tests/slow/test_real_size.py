"""The published architectures without their weights: layers, grids, schedules and vocabulary, against numbers known from elsewhere; and one
pass of the profile `paper` through networks of their published sizes, random weights, read from disk like the published ones:

    OVDIFF_FULL_SIZE=1 python -m pytest tests/slow/test_real_size.py        # or: python -m pytest -m slow

Networks of real size live on the meta device, which has shapes but no values. Where values matter, Stable Diffusion v1.5's own layout is
run thin. ViTs, Segment Anything and CutLER at real size are in test_features.py and test_segmenters.py. The pass is skipped unless asked
for: on one thread it took 5 minutes, 7.2 GiB of memory at the peak and 5 GB of disk. The paper's windows are kept.
"""

import contextlib
import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from tiny import noise
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.features.diffusion import DiffusionExtractor
from ovdiff_lib.networks import loading as models
from ovdiff_lib.networks.instruments import attention_grid, captured
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.prototypes.build import resize_masks
from ovdiff_lib.support.attribution import class_token_positions, fill_template
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost.architectures import CLIP_B16, clip_tokenizer, sharpen, stable_diffusion
from ovdiff_lib.workbench.data.classes import NAMES, class_table, vocabulary_of

SD_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None}
"""The published file. It names no timestep spacing, so another scheduler made from it has its own; one that diffusers wrote does."""

NARROW = {
    "unet": {"block_out_channels": (16, 32, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8},
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}}
"""Makes the networks thin and keeps their layout: the same blocks, layers, heads and names."""


def save_pipeline(pipe, folder) -> None:
    """Write the pipeline with the scheduler's file as it is published."""
    pipe.register_modules(scheduler=PNDMScheduler.from_config(SD_SCHEDULER))
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))


LEVELS = {f"{block}.attentions.{i}": (channels, halvings) for block, count, channels, halvings in (
    ("down_blocks.0", 2, 320, 0), ("down_blocks.1", 2, 640, 1), ("down_blocks.2", 2, 1280, 2), ("mid_block", 1, 1280, 3),
    ("up_blocks.1", 3, 1280, 2), ("up_blocks.2", 3, 640, 1), ("up_blocks.3", 3, 320, 0)) for i in range(count)}
"""Transformer of a cross-attention -> channels, and how many times its grid was halved."""

BLOCK = ".transformer_blocks.0."
TEMPLATE = load_profile("paper").support.prompt


@pytest.fixture(scope="module")
def published():
    """The pipeline of Stable Diffusion v1.5 at its real size, without values."""
    with torch.device("meta"):
        return stable_diffusion()


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """The paper's profile over a thin Stable Diffusion v1.5 of random weights, at 128 pixels."""
    folder = tmp_path_factory.mktemp("thin")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = stable_diffusion(**NARROW)
        sharpen(pipe.text_encoder, 8)
        for name, module in pipe.unet.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k")):
                sharpen(module, 3)
        save_pipeline(pipe, folder)
    return load_profile("paper", {"models.diffusion": str(folder), "models.device": "cpu", "features.sd_input_size": 128,
                                  "support.image_size": 128, "support.size": 2})


@contextlib.contextmanager
def inputs_of(modules):
    """What each module is given inside the ``with`` block: name -> [(positional, named) of every call]."""
    calls = {name: [] for name in modules}
    handles = [module.register_forward_pre_hook(lambda _, given, options, kept=calls[name]: kept.append((given, options)), with_kwargs=True)
               for name, module in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()


def test_networks_have_the_published_numbers_of_parameters(published):
    """Stable Diffusion v1.5's three, CLIP ViT-B/16, DINO ViT-B/8, MAE ViT-L/16."""
    with torch.device("meta"):
        mae = ViTMAEModel(ViTMAEConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16))
        others = CLIPModel(CLIPConfig(**CLIP_B16)), ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False), mae
    networks = published.unet, published.vae, published.text_encoder, *others
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [
        859_520_964, 83_653_863, 123_060_480, 149_620_737, 85_807_872, 303_301_632]


def test_the_cross_attentions_are_those_of_the_table(published):
    found = {n.removesuffix(BLOCK + "attn2"): m for n, m in published.unet.named_modules() if n.endswith(".attn2")}
    assert found.keys() == LEVELS.keys()
    for name, (channels, _) in LEVELS.items():
        assert found[name].heads == 8 and found[name].scale == (channels / 8) ** -0.5 and found[name].to_k.in_features == 768


def test_published_vae_and_text_encoder(published):
    with torch.device("meta"):
        latents = published.vae.encode(torch.zeros(1, 3, 512, 448)).latent_dist.mean
    assert latents.shape == (1, 4, 64, 56) and published.vae_scale_factor == 8 and published.vae.config.scaling_factor == 0.18215
    assert published.encode_prompt("", published.device, 1, False)[0].shape == (1, 77, 768)
    config = CLIPConfig(**CLIP_B16)
    assert config.vision_config.hidden_act == config.text_config.hidden_act == published.text_encoder.config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(("without", "left", "channels"), [
    ("-", 9, 7680), ("down_blocks.0.", 8, 7360), ("mid_block.", 8, 6400), ("up_blocks.1.", 6, 3840), ("up_blocks.2.", 6, 5760),
    ("up_blocks.3.", 8, 7360)])
def test_channels_of_the_layer_ablation(published, without, left, channels):
    """Table A.5."""
    paper = load_profile("paper")
    layers = [layer for layer in paper.features.sd_layers if not layer.startswith(without)]
    extractor = DiffusionExtractor(published, paper.override({"features.sd_layers": layers}).features)
    assert extractor.channels == channels and len(layers) == left


@pytest.mark.parametrize(("pixels", "grids"), [
    ((512, 512), [(64, 64), (32, 32), (16, 16), (8, 8)]), ((448, 448), [(56, 56), (28, 28), (14, 14), (7, 7)]),
    ((336, 336), [(42, 42), (21, 21), (11, 11), (6, 6)]), ((448, 600), [(56, 75), (28, 38), (14, 19), (7, 10)]),
    ((600, 336), [(75, 42), (38, 21), (19, 11), (10, 6)])])
def test_grids_are_those_that_the_unet_works_on(published, pixels, grids):
    latent = (pixels[0] // 8, pixels[1] // 8)
    unet = published.unet
    transformers = {name: unet.get_submodule(name) for name in LEVELS}
    queries = {name: unet.get_submodule(f"{name}{BLOCK}attn2.to_q") for name in LEVELS}
    with inputs_of(transformers) as received, captured(queries) as outputs, torch.device("meta"):
        noise = unet(torch.zeros(2, 4, *latent), 200, encoder_hidden_states=torch.zeros(2, 77, 768)).sample
    assert noise.shape == (2, 4, *latent)
    for name, (channels, halvings) in LEVELS.items():
        (given, _), = received[name]
        assert given[0].shape == (2, channels, *grids[halvings])
        assert outputs[name].shape == (2, grids[halvings][0] * grids[halvings][1], channels)
        assert attention_grid(outputs[name].shape[1], latent) == grids[halvings]


def test_noise_at_tau_200(thin):
    """z_tau / 0.18215 = 0.868154 latents + 0.496295 / 0.18215 noise: both coefficients by least squares from what reaches the UNet."""
    pipe, seeds, images = load_diffusion(thin), np.array([3, 11]), noise(2, 128, 128)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    pipe.scheduler.set_timesteps(7)  # a sampling grid without 200
    with inputs_of({"unet": pipe.unet}) as received:
        DiffusionExtractor.build(thin)(images, seeds)
    (given, options), = received["unet"]  # one call, no guidance
    assert given[0].shape == (2, 4, 16, 16) and given[1] == 200
    with torch.no_grad():
        latents = pipe.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
        ids = torch.tensor([[49406] + [49407] * 76])  # the empty prompt
        torch.testing.assert_close(options["encoder_hidden_states"], pipe.text_encoder(ids)[0].expand(2, -1, -1))
    drawn = torch.stack([torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(int(seed)))[0] for seed in seeds])
    matrix = torch.stack([latents.flatten() * 0.18215, drawn.flatten()], dim=1).double()
    found = torch.linalg.lstsq(matrix, given[0].double().flatten()[:, None])
    assert found.solution.flatten().tolist() == pytest.approx([0.868154, 0.496295], abs=1e-5)
    assert (matrix @ found.solution - given[0].double().flatten()[:, None]).abs().max() < 1e-5


GRID = [999, 966, 932, 899, 866, 832, 799, 766, 733, 699, 666, 633, 599, 566, 533, 499, 466, 433, 400, 366, 333, 300, 266, 233, 200, 166,
        133, 100, 67, 33]


def test_images_are_drawn_in_the_30_steps_of_dpm_solver_from_both_halves(thin):
    profile = thin.override({"support.image_size": 64})
    pipe = load_diffusion(profile)
    with inputs_of({"unet": pipe.unet}) as received:
        sample_support(pipe, Category("potted plant"), profile, progress=False)
    assert [int(given[1]) for given, _ in received["unet"]] == GRID  # one call a step

    def encoded(text):
        ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids)[0].expand(2, -1, -1)

    halves = torch.cat([encoded(profile.support.negative_prompt), encoded("A good picture of a potted plant")])
    for given, options in received["unet"]:
        assert torch.equal(given[0][:2], given[0][2:])
        torch.testing.assert_close(options["encoder_hidden_states"], halves)


@pytest.mark.parametrize("data_set", class_table()["data_sets"])
def test_positions_of_every_class_of_every_data_set(tokenizer, data_set):
    """Against open_clip's tokenizer, another implementation of the same vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer

    encode = SimpleTokenizer().encode
    for names in NAMES:
        for category in vocabulary_of(data_set, names):
            ids = tokenizer(fill_template(TEMPLATE, category.prompt)).input_ids
            assert ids == [49406, *encode(fill_template(TEMPLATE, category.prompt)), 49407]
            positions = class_token_positions(tokenizer, TEMPLATE, category.prompt)
            assert positions == list(range(6, len(ids) - 1)) and [ids[p] for p in positions] == encode(category.prompt)


def test_the_cascade_has_the_layers_of_the_published_checkpoint():
    pytest.importorskip("detectron2")
    from ovdiff_lib.masks.segmenters.cutler import build_network

    shapes = {name: tuple(value.shape) for name, value in build_network("cpu").state_dict().items()}
    expected = {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7), "backbone.bottom_up.res5.2.conv3.weight": (2048, 512, 1, 1),
                "backbone.bottom_up.res2.0.conv1.norm.running_mean": (64,), "backbone.fpn_output2.norm.weight": (256,),
                "proposal_generator.rpn_head.objectness_logits.weight": (3, 256, 1, 1),
                "roi_heads.mask_head.mask_fcn4.weight": (256, 256, 3, 3), "roi_heads.mask_head.predictor.weight": (1, 256, 1, 1)}
    heads = {"box_head.{}.fc1": (1024, 256 * 7 * 7), "box_predictor.{}.cls_score": (2, 1024), "box_predictor.{}.bbox_pred": (4, 1024)}
    expected |= {f"roi_heads.{name.format(stage)}.weight": shape for name, shape in heads.items() for stage in range(3)}
    assert expected.items() <= shapes.items()


# ---------------------------------------------------------------------- one pass at full size

DISK, MEMORY = 6 * 2**30, 24 * 2**30
"""Bytes that the pass may take: of disk for the networks, of memory at its peak."""

EXTRACTORS = {"sd": (7680, 64), "dino": (768, 56), "clip-keys": (768, 28)}
"""Extractor -> its channels and the side of its grid over a support image."""

SHAPE = (448, 600)

@pytest.fixture
def profile(request, tmp_path, monkeypatch):
    """The paper's profile with one support image of two steps, over networks of its sizes on disk (5 GB); they are deleted afterwards."""
    if not (os.environ.get("OVDIFF_FULL_SIZE") or request.config.getoption("markexpr")):
        pytest.skip("many minutes and gigabytes; set OVDIFF_FULL_SIZE=1, or run -m slow")
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {DISK >> 30} GiB of free disk below {tmp_path}")
    monkeypatch.setattr(models, "_loaded", {})  # nothing of this size stays in memory
    threads = torch.get_num_threads()  # the other tests run on one; OMP_NUM_THREADS counts if it is set
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_pipeline(stable_diffusion(), tmp_path / "sd")
            CLIPModel(CLIPConfig(**CLIP_B16)).save_pretrained(tmp_path / "clip")
            clip_tokenizer().save_pretrained(tmp_path / "clip")
            sharpen(ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False), 4).save_pretrained(tmp_path / "dino")
        yield load_profile("paper", {
            "models.diffusion": str(tmp_path / "sd"), "models.clip": str(tmp_path / "clip"), "models.dino": str(tmp_path / "dino"),
            "models.device": "cpu", "support.size": 1, "support.steps": 2, "features.batch_size": 1, "matching.batch_size": 2,
            "matching.windows": [448], "matching.whole_image": True,  # two scales in three windows: each takes half a minute
            # CutLER needs detectron2; patches of a random DINO are more alike than those of the real one.
            "masks.segmenter": "maskcut", "masks.maskcut_tau": 0.75})
    finally:
        shutil.rmtree(tmp_path)
        torch.set_num_threads(threads)


def picture():
    """Blocks of colour, u8 (*SHAPE, 3)."""
    blocks = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize(SHAPE[::-1], Image.Resampling.BICUBIC))


@pytest.mark.slow
def test_one_pass_of_the_paper(profile, tmp_path):
    ovdiff = OVDiff(profile, library=tmp_path / "library", progress=False)
    support = ovdiff.support("chest of drawers")
    masks = ovdiff.masks(support)
    bank = ovdiff.build("chest of drawers")
    found = ovdiff.segment(picture(), bank)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < MEMORY

    assert support.images.shape == (1, 512, 512, 3) and support.images.std() > 1
    assert support.attribution.shape == (1, 64, 64) and (support.attribution.min(), support.attribution.max()) == (0, 1)
    assert masks.foreground.any() and masks.background.any() and not (masks.foreground & masks.background).any()
    assert bank.extractors == tuple(EXTRACTORS)
    for name, (channels, side) in EXTRACTORS.items():
        prototypes, = bank.prototypes[name]
        assert prototypes.vectors.shape[1] == channels and np.isfinite(prototypes.vectors).all()
        assert prototypes.assignment.shape == (1, side, side)
        for region in ("foreground", "background"):
            kinds = prototypes.kind[prototypes.region == region].tolist()
            cells = int(resize_masks(getattr(masks, region), (side, side)).sum())
            assert (kinds.count("class"), kinds.count("instance"), kinds.count("part")) == (1, 1, min(32, cells))
    assert found.labels.shape == SHAPE and found.scores.shape == (2, *SHAPE) and np.isfinite(found.scores).all()
    assert found.kept == (0,) and np.abs(found.scores).max() <= 1 + 1e-5 and found.scores.std() > 0
    assert (found.winner[0] == 0).all() and (found.winner[1] >= 0).all() and found.winner[1].max() < 68
