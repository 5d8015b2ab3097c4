"""Extractors: a contract that every entry of the registry keeps, and oracles that compute the same features another way."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from sentences import refused
from tiny import VIT, make_dino, make_mae, make_open_clip
from tiny import noise as pictures

from ovdiff_lib.errors import InputError, ModelNotAvailable, OVDiffError, ProfileError
from ovdiff_lib.features import EXTRACTORS, build_extractors
from ovdiff_lib.features.open_clip import OpenClipExtractor
from ovdiff_lib.features.vit import ClipExtractor, DinoExtractor, MaeExtractor
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.networks.instruments import captured
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.profiles.reading import load_profile

LAYERS = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.1"]
CHANNELS = [16, 32, 16]


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
    extractor, images = sd(tiny_profile), [pictures(1, 40, 100)[0], pictures(1, 64, 64)[0], pictures(1, 64, 64, seed=1)[0]]
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


# ---------------------------------------------------------------------- DINO, MAE and both CLIP libraries against a ViT by hand

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPEN_CLIP = "open_clip_model.safetensors"
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def features(extractor, images):
    return extractor(images, np.zeros(len(images), np.int64))


def normalised(images, statistics):
    mean, std = (np.array(values, np.float32) for values in statistics)
    return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std)  # (n, H, W, 3)


# ---- a ViT by hand: numbers and names of a state dict, nothing of the libraries' code

def positions_by_hand(table, grid):
    """(1 + h w, D) from (1 + side^2, D)."""
    side = math.isqrt(len(table) - 1)
    patches = table[1:].unflatten(0, (side, side)).movedim(2, 0)[None]
    return torch.cat([table[:1], F.interpolate(patches, grid, mode="bicubic")[0].movedim(0, 2).flatten(0, 1)])


def keys_by_hand(state, images, patch=8, heads=2, layers=3):
    """Keys (n, h, w, D) of the last layer: patches cut out one by one in reading order, heads side by side."""
    pixels = normalised(images, IMAGENET)
    h, w = pixels.shape[1] // patch, pixels.shape[2] // patch
    kernel, bias = (state[f"embeddings.patch_embeddings.projection.{name}"] for name in ("weight", "bias"))
    rows = [torch.einsum("nyxc,dcyx->nd", pixels[:, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch], kernel) + bias
            for r in range(h) for c in range(w)]
    stream = torch.stack([state["embeddings.cls_token"][0, 0].expand(len(images), -1), *rows], dim=1)
    stream = stream + positions_by_hand(state["embeddings.position_embeddings"][0], (h, w))
    for i in range(layers):
        def linear(name, x, i=i):
            return x @ state[f"layers.{i}.{name}.weight"].T + state[f"layers.{i}.{name}.bias"]

        def norm(name, x, i=i):
            return F.layer_norm(x, x.shape[-1:], state[f"layers.{i}.{name}.weight"], state[f"layers.{i}.{name}.bias"], 1e-6)

        normed = norm("layernorm_before", stream)
        query, keys, value = (linear(f"attention.{part}_proj", normed) for part in "qkv")
        split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, keys, value)]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        stream = stream + linear("attention.o_proj", mixed)
        stream = stream + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("layernorm_after", stream))))
    return keys[:, 1:].reshape(len(images), h, w, -1)


@pytest.mark.parametrize("name", ["dino", "mae"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 48), (64, 104), (88, 64)])
def test_keys_equal_a_vit_computed_by_hand(tiny_profile, name, shape):
    extractor, images = EXTRACTORS[name](tiny_profile), pictures(2, *shape)
    expected = keys_by_hand(extractor.model.state_dict(), images)
    assert expected.shape == (2, shape[0] // 8, shape[1] // 8, 32)
    torch.testing.assert_close(features(extractor, images), expected, **CLOSE)


@pytest.mark.parametrize("name", ["dino", "mae", "clip-keys", "open-clip-keys"])
def test_scale_enlarges_what_the_model_sees(tiny_profile, name):
    """A doubled grid; and on an even colour, where interpolation has no say, the features of an image drawn twice as large."""
    images = np.kron(pictures(2, 6, 9), np.ones((1, 8, 8, 1), np.uint8))  # 48 x 72, resized to short side 64
    flat = np.broadcast_to(np.array([200, 90, 30], np.uint8), (1, 64, 64, 3)).copy()
    plain, scaled = (EXTRACTORS[name](tiny_profile.override({"features.vit_scale": s})) for s in (1.0, 2.0))
    assert features(scaled, images).shape == (2, 16, 24, scaled.channels)  # 64 x 96, doubled, patches of 8
    assert features(plain, images).shape == (2, 8, 12, plain.channels)
    big = features(scaled, flat)
    plain.short = 128
    torch.testing.assert_close(big, features(plain, np.repeat(np.repeat(flat, 2, 1), 2, 2)), **CLOSE)


# ---- the published sizes, without their weights

def published(kind, settings):
    """DINO ViT-B/8, MAE ViT-L/16 trained at 448, CLIP ViT-B/16 of both libraries."""
    import open_clip
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

    if kind == "dino":
        return DinoExtractor(ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False), settings)
    if kind == "mae":
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        return MaeExtractor(ViTMAEModel(ViTMAEConfig(**large, image_size=448, mask_ratio=0.0)), settings)
    if kind == "clip":
        config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"num_hidden_layers": 1})
        return ClipExtractor(CLIPModel(config).vision_model, settings, "keys")
    return OpenClipExtractor(open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu")).visual, settings, "keys")


@pytest.mark.parametrize(("kind", "channels", "patch", "source"), [
    ("dino", 768, 8, "layers.11.attention.k_proj"), ("mae", 1024, 16, "layers.23.attention.k_proj"),
    ("clip", 768, 16, "encoder.layers.10.self_attn.k_proj"), ("open_clip", 768, 16, "transformer.resblocks.10.ln_1")])
def test_published_networks_have_their_layers_and_run_at_every_size(kind, channels, patch, source):
    """At full depth on the device that computes shapes alone."""
    with torch.device("meta"), torch.no_grad():
        extractor = published(kind, load_profile("paper").features)
        named = {module: name for name, module in extractor.model.named_modules()}
        assert (named[extractor.source], extractor.channels, extractor.patch) == (source, channels, patch)
        for image, size in (((448, 448), (448, 448)), ((336, 336), (336, 336)), ((512, 512), (448, 448)), ((512, 336), (688, 448))):
            assert extractor.input_size(*image) == size
        for height, width in ((448, 448), (512, 336)):  # not square, and larger than it was trained with
            with captured({"source": extractor.source}) as outputs:
                extractor.run(torch.empty(1, 3, height, width))
            found = extractor.features_of(outputs["source"])
            assert found.shape == (1, 1 + height // patch * (width // patch), channels)


def mae(profile, source):
    return EXTRACTORS["mae"](profile.override({"models.mae": str(source)}))


def test_mae_with_its_decoder_as_it_is_on_the_hub(tiny_profile, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    whole = ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                              decoder_intermediate_size=32)).eval()
    whole.save_pretrained(tmp_path)
    images = pictures(1, 64, 64)
    expected = keys_by_hand(whole.vit.state_dict(), images)
    torch.testing.assert_close(features(mae(tiny_profile, tmp_path), images), expected, **CLOSE)


# ---- CLIP in two libraries

@pytest.mark.parametrize("layer", [0, -2, -1])
@pytest.mark.parametrize(("shape", "grid"), [((64, 64), (8, 8)), ((48, 48), (6, 6)), ((64, 120), (8, 15))])
def test_open_clip_equals_what_the_library_gives_of_its_layers(tiny_profile, tiny_models, layer, shape, grid):
    import open_clip

    images, profile = pictures(2, *shape), tiny_profile.override({"features.clip_layer": layer})
    visual = open_clip.create_model(f"local-dir:{tiny_models / 'open_clip'}").visual
    blocks, index = visual.transformer.resblocks, layer % 3
    with torch.no_grad():
        visual.positional_embedding = torch.nn.Parameter(positions_by_hand(visual.positional_embedding, grid))
        pixels = normalised(images, OPENAI).permute(0, 3, 1, 2)
        before, after = (visual.forward_intermediates(pixels, [i], output_fmt="NLC")["image_intermediates"][0]
                         for i in (max(index - 1, 0), index))
        keys = blocks[index].ln_1(before) @ blocks[index].attn.in_proj_weight[32:64].T + blocks[index].attn.in_proj_bias[32:64]
    assert after.std() > 0.1
    torch.testing.assert_close(features(EXTRACTORS["open-clip-tokens"](profile), images), after.reshape(2, *grid, 32), **CLOSE)
    if index:  # before the first there is none
        torch.testing.assert_close(features(EXTRACTORS["open-clip-keys"](profile), images), keys.reshape(2, *grid, 32), **CLOSE)


@pytest.mark.parametrize("name", ["clip-tokens", "open-clip-tokens"])
def test_clip_normalisation(tiny_profile, name):
    images = pictures(1, 64, 64)
    clip, imagenet = (EXTRACTORS[name](tiny_profile.override({"features.clip_normalisation": n})) for n in ("clip", "imagenet"))
    assert (clip.statistics, imagenet.statistics) == (OPENAI, IMAGENET)
    assert not torch.equal(features(clip, images), features(imagenet, images))
    clip.statistics = IMAGENET
    assert torch.equal(features(clip, images), features(imagenet, images))


def test_open_clip_folders_that_are_wrong(tiny_profile, tiny_models, tmp_path):
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    make_open_clip(tmp_path / "resnet", resnet)
    for name in ("lacking", "empty", "text", "no-config", "nan"):
        shutil.copytree(tiny_models / "open_clip", tmp_path / name)
    weights = load_file(tmp_path / "nan" / OPEN_CLIP)
    save_file({key: value for key, value in weights.items() if key != "visual.ln_post.bias"}, tmp_path / "lacking" / OPEN_CLIP)
    save_file({}, tmp_path / "empty" / OPEN_CLIP)
    (tmp_path / "text" / OPEN_CLIP).write_text("<html>")
    (tmp_path / "no-config" / "open_clip_config.json").unlink()
    save_file(weights | {"visual.ln_post.bias": torch.full((32,), torch.nan)}, tmp_path / "nan" / OPEN_CLIP)
    for name, told in (("resnet", "plain ViT"), ("lacking", "visual.ln_post.bias"), ("empty", "empty"), ("text", ""),
                       ("no-config", "open_clip_config.json"), ("nan", "not finite, in ln_post.bias")):
        with refused(ModelNotAvailable, tmp_path / name, told):
            EXTRACTORS["open-clip-keys"](tiny_profile.override({"models.open_clip": str(tmp_path / name)}))
    with refused(ProfileError, "models.open_clip", "not set"):
        EXTRACTORS["open-clip-keys"](tiny_profile.override({"models.open_clip": ""}))


# ---- models that are not there, or not whole

@pytest.mark.parametrize("name", ["dino", "mae"])
def test_a_model_that_is_not_set_or_lacks_its_last_keys(tiny_profile, tmp_path, name):
    with refused(ProfileError, f"models.{name}", "not set"):
        EXTRACTORS[name](tiny_profile.override({f"models.{name}": ""}))
    (make_dino if name == "dino" else make_mae)().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[next(key for key in sorted(state) if key.endswith(("k_proj.weight", "key.weight")))]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused(ModelNotAvailable, "lack", "k_proj"):
        EXTRACTORS[name](tiny_profile.override({f"models.{name}": str(tmp_path)}))
