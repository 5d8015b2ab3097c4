"""Extractors: a contract that every registry entry keeps, and oracles that compute the same features another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from sentences import refused

from ovdiff_lib.errors import InputError, OVDiffError, ProfileError
from ovdiff_lib.features import EXTRACTORS, build_extractors
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.networks.loading import load_clip, load_diffusion

LAYERS = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.1"]
CHANNELS = [16, 32, 16]


def pictures(n, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def sd(profile, **fields):
    return EXTRACTORS["sd"](profile.override({"features.sd_layers": LAYERS, **{f"features.{k}": v for k, v in fields.items()}}))


# ---- the contract

@pytest.mark.parametrize("name", ["sd", "dino"])
def test_one_batch_stays_on_the_device(tiny_profile, monkeypatch, name):
    extractor, images, seeds = EXTRACTORS[name](tiny_profile), pictures(6, 64, 64), np.arange(6)  # batches of 4
    extract, together = extractor._extract, extractor(images, seeds)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda values: torch.tensor(True))
    monkeypatch.setattr(extractor, "_extract", lambda *given: extract(*given).to("meta", torch.bfloat16))
    one = extractor(images[:4], seeds[:4])
    assert one.device.type == "meta" and one.dtype == torch.float32 and one.shape == together[:4].shape


SHAPES = [(64, 64), (48, 48), (50, 90)]
EXTREMES = [(1, 1), (2, 1000), (3, 2)]


def check_extractor(profile, name, shape):
    """What every entry of the registry keeps, for images of ``shape``."""
    extractor = EXTRACTORS[name](profile)
    images, seeds = pictures(5, *shape), np.arange(5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    features = extractor(images, seeds)
    assert torch.equal(torch.get_rng_state(), before)  # nothing drawn from the global generator
    n, h, w, channels = features.shape
    assert (n, channels, extractor.name) == (5, extractor.channels, name) and h > 1 and w > 1
    assert features.dtype == torch.float32 and features.device.type == "cpu" and not features.requires_grad
    assert features.std(dim=(1, 2)).mean() > 1e-3  # pixels differ
    assert (features[0] - features[1]).abs().mean() > 1e-3  # images differ
    features += 0  # an ordinary tensor, not an inference tensor
    alone = extractor(images[3:4], seeds[3:4])
    torch.testing.assert_close(alone[0], features[3], rtol=1e-3, atol=1e-3)  # companions and batch size do not matter
    turned = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)  # as a pipeline gives them: channel by channel
    assert turned.strides != images.strides and torch.equal(extractor(turned[3:4], seeds[3:4]), alone)  # to the last bit
    assert extractor(images[:0], seeds[:0]).shape == (0, h, w, channels)


def check_extreme_size(profile, name, shape):
    """Finite features or one sentence."""
    try:
        features = EXTRACTORS[name](profile)(pictures(2, *shape), np.arange(2))
    except OVDiffError as error:
        assert len(str(error)) < 300 and "\n" not in str(error)
    else:
        assert features.ndim == 4 and features.numel() and features.isfinite().all()


def check_place(profile, name):
    """What changes in the right half of an image changes mostly cells of the right half, and so for the lower half."""
    extractor, images = EXTRACTORS[name](profile), pictures(4, 64, 128)
    features, shift = extractor(images, np.arange(4)), np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    right, below = images.copy(), images.copy()
    right[:, :, 64:], below[:, 32:] = shift[:, :, 64:], shift[:, 32:]
    across, down = ((extractor(painted, np.arange(4)) - features).norm(dim=-1) for painted in (right, below))
    h, w = across.shape[1:]
    assert across[..., -(w // 2):].mean() > 1.2 * across[..., :w // 2].mean()
    assert down[:, -(h // 2):].mean() > 1.2 * down[:, :h // 2].mean()


def check_dependencies(profile, part):
    """What its results depend on are profile fields, or it declares nothing."""
    models, settings = part.depends_on(profile, "features")
    assert set(part.models or ()) <= set(models) <= set(vars(profile.models)) and set(settings) <= set(vars(profile.features))
    assert part.settings is None or (len(settings) > 0) == (len(part.settings) > 0)


def check_wrong_arguments(profile, name):
    """One sentence for seeds that are missing, a single image, and pixels that are not u8."""
    extractor = EXTRACTORS[name](profile)
    for images, seeds in [(pictures(2, 64, 64), [0]), (pictures(2, 64, 64)[0], [0]), (pictures(1, 64, 64) / 255, [0])]:
        with pytest.raises(ValueError, match="expected u8"):
            extractor(images, np.array(seeds))


def check_contract(profile, name):
    for shape in SHAPES:
        check_extractor(profile, name, shape)
    for shape in EXTREMES:
        check_extreme_size(profile, name, shape)
    check_wrong_arguments(profile, name)
    check_place(profile, name)
    check_dependencies(profile, EXTRACTORS[name])


@pytest.mark.parametrize("name", EXTRACTORS)
def test_contract(tiny_profile, name):
    check_contract(tiny_profile, name)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_that_are_not_finite_are_reported(tiny_profile, monkeypatch, name):
    extractor = EXTRACTORS[name](tiny_profile)
    model = extractor.pipe.unet if hasattr(extractor, "pipe") else getattr(extractor, "model", None)
    if model is None:
        pytest.skip("it has no network whose weights could be damaged")
    weights = next(getattr(model, "vision_model", model).parameters())
    monkeypatch.setattr(weights, "data", torch.full_like(weights, float("nan")))
    with refused(OVDiffError, "not finite"):
        extractor(pictures(1, 64, 64), np.array([0]))


def test_build_extractors(tiny_profile):
    built = build_extractors(tiny_profile.override({"features.extractors": ["clip-keys", "sd"]}))
    assert list(built) == ["clip-keys", "sd"] and all(e.name == n for n, e in built.items())
    with refused(ProfileError, "clip-tokens", "Did you mean 'mae'"):
        build_extractors(tiny_profile.override({"features.extractors": ["MAEE"]}))


# ---- Stable Diffusion

class QueryKeeper(AttnProcessor):
    """diffusers' explicit processor, keeping the query projection it is about to use."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        self.query = attn.to_q(hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


@torch.no_grad()
def queries_by_hand(profile, pixels, noise, timestep=200, spread=None):
    """The paper's recipe through other doors: DDPM's add_noise, an attention processor, a reshape by known factors."""
    pipe = load_diffusion(profile)
    posterior = pipe.vae.encode(pixels).latent_dist
    latents = (posterior.mean if spread is None else posterior.mean + posterior.std * spread) * pipe.vae.config.scaling_factor
    noised = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, torch.tensor([timestep] * len(latents)))
    ids = pipe.tokenizer("", padding="max_length", max_length=32, return_tensors="pt").input_ids
    prompt = pipe.text_encoder(ids)[0].repeat(len(latents), 1, 1)
    modules = [pipe.unet.get_submodule(layer + ".transformer_blocks.0.attn2") for layer in LAYERS]
    former = [module.processor for module in modules]
    for module in modules:
        module.set_processor(QueryKeeper())
    pipe.unet(noised, timestep, prompt)
    grids = []
    for module, processor in zip(modules, former, strict=True):
        n, tokens, channels = module.processor.query.shape
        side = {256: 16, 64: 8, 16: 4}[tokens]
        grid = module.processor.query.reshape(n, side, side, channels).permute(0, 3, 1, 2)
        grids.append(F.interpolate(grid, (16, 16), mode="bilinear").permute(0, 2, 3, 1))
        module.set_processor(processor)
    return torch.cat(grids, dim=-1)


def signed(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn(seed, samples=1):
    """What the extractor draws for one seed: its noises, then that of the VAE posterior."""
    return torch.randn(samples + 1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def assert_by_hand(features, expected):
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("timestep", [0, 200, 999])
def test_sd_equals_the_recipe_by_hand(tiny_profile, timestep):
    images = pictures(2, 64, 64)
    expected = queries_by_hand(tiny_profile, signed(images), torch.stack([drawn(7)[0], drawn(9)[0]]), timestep)
    load_diffusion(tiny_profile).scheduler.set_timesteps(7)  # as sampling leaves it
    extractor = sd(tiny_profile, sd_timestep=timestep)
    assert_by_hand(extractor(images, np.array([7, 9])), expected)
    if timestep == 200:
        assert extractor.signal == pytest.approx(0.753692, abs=1e-6)  # the closed form for Stable Diffusion's noise


def test_sd_variants_equal_the_recipe_by_hand(tiny_profile):
    images, seeds = pictures(1, 64, 64), np.array([4])
    first, second, _ = drawn(4, samples=2)
    expected = sum(queries_by_hand(tiny_profile, signed(images), noise[None]) for noise in (first, second)) / 2
    assert_by_hand(sd(tiny_profile, sd_noise_samples=2)(images, seeds), expected)
    noise, spread = drawn(4)
    features = sd(tiny_profile, sd_latent="sample")(images, seeds)
    assert_by_hand(features, queries_by_hand(tiny_profile, signed(images), noise[None], spread=spread[None]))
    assert (features - sd(tiny_profile)(images, seeds)).abs().mean() > 1e-3
    fixed = sd(tiny_profile, sd_noise="fixed", seed=4)(np.repeat(images, 2, axis=0), np.array([5, 6]))
    assert_by_hand(fixed, queries_by_hand(tiny_profile, signed(images), noise[None]).expand_as(fixed))
    wide = pictures(1, 40, 100)
    pixels = F.interpolate(signed(wide), (64, 64), mode="bilinear", antialias=True)  # every window becomes the square
    assert_by_hand(sd(tiny_profile)(wide, seeds), queries_by_hand(tiny_profile, pixels, noise[None]))
    assert sd(tiny_profile, sd_input_size=40)(images, seeds).shape == (1, 10, 10, sum(CHANNELS))


def test_sd_takes_images_of_several_sizes(tiny_profile):
    extractor, images = sd(tiny_profile), [pictures(1, 40, 100)[0], pictures(1, 64, 64)[0], pictures(1, 64, 64, 1)[0]]
    together = extractor(images, np.arange(3))
    for n, image in enumerate(images):
        torch.testing.assert_close(together[n], extractor(image[None], np.array([n]))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "field", "value", "told"), [
    ("sd", "sd_timestep", 1000, "999"), ("sd", "sd_input_size", 63, "4"), ("clip-tokens", "clip_layer", 3, "3 layers"),
    ("clip-tokens", "clip_layer", -4, "-3"), ("open-clip-keys", "clip_layer", 3, "3 layers"),
    *(("sd", "sd_layers", layers, "up_blocks.2.attentions.1") for layers in (
        [], ["down_blocks.0.attentions.0", "up_blocks.7.attentions.0"], ["mid_block"]))])
def test_values_that_the_network_does_not_have(tiny_profile, name, field, value, told):
    with refused(ProfileError, f"features.{field}", told):
        EXTRACTORS[name](tiny_profile.override({f"features.{field}": value}))


def fail(*_args, **_kwargs):
    raise RuntimeError("it ran")


def test_sd_runs_no_layer_behind_the_last_it_reads(tiny_profile, monkeypatch):
    """The same queries, whether they are read at the end of a run or in the middle."""
    images, seeds = pictures(2, 64, 64), np.arange(2)
    every, extractor = sd(tiny_profile)(images, seeds), sd(tiny_profile, sd_layers=LAYERS[:1])
    monkeypatch.setattr(extractor.pipe.unet.mid_block, "forward", fail)
    torch.testing.assert_close(extractor(images, seeds), every[..., : extractor.channels], rtol=0, atol=0)


# ---- CLIP

@pytest.mark.parametrize("layer", [0, -2, 2])
@pytest.mark.parametrize("shape", [(64, 64), (64, 104)])
def test_clip_equals_hidden_states_of_the_library(tiny_profile, layer, shape):
    model = load_clip(tiny_profile)[0]
    images = pictures(2, *shape)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        states = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        block = model.vision_model.encoder.layers[layer]
        index = layer % 3  # states[i] enters layer i
        keys = block.self_attn.k_proj(block.layer_norm1(states[index]))
    profile = tiny_profile.override({"features.clip_layer": layer})
    for kind, expected in (("keys", keys), ("tokens", states[index + 1])):
        expected = expected[:, 1:].reshape(2, shape[0] // 8, shape[1] // 8, 32)
        torch.testing.assert_close(EXTRACTORS[f"clip-{kind}"](profile)(images, np.zeros(2)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "field"), [("clip-keys", "clip"), ("open-clip-keys", "clip"), ("dino", "dino"), ("mae", "mae")])
def test_input_size(tiny_profile, name, field):
    size = EXTRACTORS[name](tiny_profile.override({f"features.{field}_input_size": 448})).input_size
    for shape, expected in {  # windows keep their native size, rounded up to the patch of 8
            (448, 448): (448, 448), (336, 336): (336, 336), (340, 340): (344, 344), (512, 512): (448, 448), (512, 768): (448, 672),
            (100, 200): (448, 896), (200, 101): (888, 448)}.items():
        assert size(*shape) == expected
    other = EXTRACTORS["dino" if field != "dino" else "mae"](tiny_profile.override({f"features.{field}_input_size": 448}))
    assert other.input_size(512, 512) == (64, 64)  # settings of one model leave the others alone


def test_an_image_may_make_so_many_patches_and_no_more(tiny_profile):
    extractor = EXTRACTORS["clip-keys"](tiny_profile)  # short side 64, patches of 8
    assert extractor.input_size(64, 16_384) == (64, 16_384)  # 8 x 2,048
    for shape in ((64, 16_385), (2, 1000), (1000, 2)):
        with refused(InputError, f"{shape[0]} x {shape[1]} pixels", "16,384"):
            extractor.input_size(*shape)
    for shape in ((0, 64), (64, 0), (0, 0)):
        with refused(InputError, "at least 1 x 1"):
            extractor(np.zeros((1, *shape, 3), np.uint8), np.zeros(1))
