"""Support images and attribution against diffusers' own pipeline and its explicit attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tiny import make_unet

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError, OVDiffError, ProfileError
from ovdiff_lib.networks.instruments import attention_grid
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.support.attribution import AttributionRecorder, class_token_positions, record_attribution
from ovdiff_lib.support.sampler import image_seed, initial_latents, min_max, sample_support

TEMPLATE = "A good picture of a {name}"
CAT = Category("cat")
PNDM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}


class ExplicitAttention(AttnProcessor):
    """diffusers' processor that materialises the probabilities; keeps all of them, every call."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        query, key = attn.head_to_batch_dim(attn.to_q(hidden_states)), attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        self.kept.append(attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads)))  # (B, heads, hw, tokens)
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


class Oracle:
    """Stored probabilities of every cross-attention, merged afterwards by the definition."""

    def __init__(self, unet):
        self.layers = {n: m for n, m in unet.named_modules() if n.endswith("attn2")}
        self.former = {n: m.processor for n, m in self.layers.items()}

    def __enter__(self):
        self.processors = {n: ExplicitAttention() for n in self.layers}
        for name, module in self.layers.items():
            module.set_processor(self.processors[name])
        return self

    def __exit__(self, *_):
        for name, module in self.layers.items():
            module.set_processor(self.former[name])

    def maps(self, positions, size, mid_block=False, guided=True):
        total = 0
        for name, processor in self.processors.items():
            if mid_block or not name.startswith("mid_block"):
                calls = torch.stack(processor.kept)  # (steps, B, heads, hw, tokens)
                calls = calls[:, calls.shape[1] // 2:] if guided else calls
                layer = calls[..., positions].mean(dim=(2, 4)).sum(dim=0)  # (n, hw)
                grid = layer.reshape(-1, 1, *attention_grid(layer.shape[1], size))
                total = total + F.interpolate(grid, size=size, mode="bicubic", align_corners=False).clamp(min=0)[:, 0]
        return total


@pytest.fixture(scope="module")
def pipe(tiny_profile):
    return load_diffusion(tiny_profile)


@pytest.fixture(scope="module")
def tokenizer(tiny_profile):
    return load_clip(tiny_profile)[1]


def unet_input(pipe, size, entries=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"sample": torch.randn(entries, 4, *size, generator=generator), "timestep": 500,
            "encoder_hidden_states": torch.randn(entries, 32, pipe.unet.config.cross_attention_dim, generator=generator)}


# ---- class token positions

@pytest.mark.parametrize(("template", "name", "expected"), [
    (TEMPLATE, "cat", [6]), (TEMPLATE, "chest of drawers", [6, 7, 8]),
    (TEMPLATE, "good picture", [6, 7]),  # the template's own "good picture" at 2, 3 is not the class
    ("{name} and a dog", "dog", [1]), ("a cat of {name}, good", "cat", [4]), ("a ({name})", "cat", [3])])
def test_positions_by_hand(tokenizer, template, name, expected):
    assert class_token_positions(tokenizer, template, name) == expected


@pytest.mark.parametrize("name", ["zebra", "Potted Plant", "déjà", "deja\u0300", "🐈‍⬛", "sofa-bed 2", "l'eau", "猫"])
def test_positions_hold_exactly_the_tokens_of_the_name(tokenizer, name):
    ids = tokenizer(TEMPLATE.format(name=name)).input_ids
    positions = class_token_positions(tokenizer, TEMPLATE, name)
    assert [ids[i] for i in positions] == tokenizer(name).input_ids[1:-1]


@pytest.mark.parametrize("template", ["A good picture", "{name} and {name}", "a {class}", "a {name} {", "imagenet"])
def test_templates_that_do_not_do(tiny_profile, template):
    with pytest.raises(ProfileError, match=r"support\.prompt"):
        tiny_profile.override({"support.prompt": template})


def test_names_that_are_too_long(tokenizer):
    with pytest.raises(InputError, match="32"):
        class_token_positions(tokenizer, TEMPLATE, "cat " * 26)
    assert class_token_positions(tokenizer, TEMPLATE, "cat " * 24 + "cat") == list(range(6, 31))  # as many as the text encoder reads


# ---- attribution

@pytest.mark.parametrize(("size", "mid_block", "guided"), [
    ((16, 16), False, True), ((16, 24), True, True), ((10, 14), False, True), ((10, 14), True, True), ((16, 24), False, False)])
def test_attribution_equals_explicit_attention(pipe, size, mid_block, guided):
    """Without guidance the whole batch is conditional."""
    positions = [6, 7, 8]
    with torch.no_grad():
        with Oracle(pipe.unet) as oracle:
            for step in range(2):
                pipe.unet(**unet_input(pipe, size, seed=step))
        with record_attribution(pipe.unet, positions, size, mid_block, guided) as recorder:
            for step in range(2):
                pipe.unet(**unet_input(pipe, size, seed=step))
    maps = recorder.maps()
    assert maps.shape == (2 if guided else 4, *size) and maps.dtype == torch.float32
    assert all(kept.ndim == 2 and len(kept) == len(maps) for kept in recorder.sums.values())  # nothing is kept per step or head
    torch.testing.assert_close(maps, oracle.maps(positions, size, mid_block, guided), rtol=1e-4, atol=1e-6)
    assert (maps - oracle.maps(positions, size, not mid_block, guided)).abs().max() > 1e-3  # the mid block is seen in the map
    assert (maps - oracle.maps([1, 2, 3], size, mid_block, guided)).abs().max() > 1e-3  # and so are the tokens


def test_processors_are_restored_even_after_an_error(pipe):
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(KeyboardInterrupt), record_attribution(pipe.unet, [6], (16, 16)):
        changed = pipe.unet.attn_processors
        assert sum(changed[k] is not before[k] for k in before) == 9  # 3 down, 6 up; not the mid block, not self-attention
        raise KeyboardInterrupt
    after = pipe.unet.attn_processors
    assert before.keys() == after.keys() and all(after[k] is before[k] for k in before)


# ---- sampling

def draw(pipe, profile, count, category=CAT):
    return sample_support(pipe, category, profile, count, progress=False)


@pytest.mark.parametrize("guidance", [1.5, 1.0])
def test_support_set_equals_the_plain_pipeline(pipe, tiny_profile, guidance):
    profile = tiny_profile.override({"support.guidance_scale": guidance, "support.negative_prompt": "water"})
    support = sample_support(pipe, Category("pet", prompt="chest of drawers"), profile, progress=False)
    prompt = "A good picture of a chest of drawers"
    with Oracle(pipe.unet) as oracle:
        latents, _ = initial_latents(support.seeds, (4, 16, 16))
        images = pipe([prompt] * 3, negative_prompt=["water"] * 3, latents=latents, height=64, width=64, num_inference_steps=2,
                      guidance_scale=guidance, output_type="np").images
    assert support.images.shape == (3, 64, 64, 3) and support.images.dtype == np.uint8
    assert np.abs(support.images - images * 255).max() <= 0.51  # rounded to the nearest level
    expected = oracle.maps([6, 7, 8], (16, 16), guided=guidance > 1).numpy()
    assert support.attribution.dtype == np.float32
    np.testing.assert_allclose(support.attribution, min_max(expected), atol=1e-3)
    assert (support.attribution.min((1, 2)) == 0).all() and (support.attribution.max((1, 2)) == 1).all()


def test_an_image_depends_on_its_own_index_alone(pipe, tiny_profile):
    whole = draw(pipe, tiny_profile, 5)  # batches of 4 and 1
    assert whole.seeds.tolist() == [image_seed(tiny_profile.support.seed, "A good picture of a cat", i) for i in range(5)]
    for batch, count in [(1, 3), (3, 5)]:
        part = draw(pipe, tiny_profile.override({"support.batch_size": batch}), count)
        assert (part.seeds == whole.seeds[:count]).all()
        np.testing.assert_allclose(part.attribution, whole.attribution[:count], atol=1e-3)
        assert np.abs(part.images.astype(int) - whole.images[:count]).max() <= 1
    assert np.abs(whole.images[0].astype(int) - whole.images[1]).mean() > 5  # and the images do differ


@pytest.mark.parametrize(("scheduler", "fields", "guided"), [
    (LCMScheduler, {"time_cond_proj_dim": 8}, False), (EulerAncestralDiscreteScheduler, {}, True)])
def test_schedulers_that_add_noise_and_unets_that_are_told_the_guidance(pipe, tiny_profile, scheduler, fields, guided):
    """Drawn again they are the same, in batches of another size too, and no half of the images is taken for the negative one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = make_unet(**fields)
    other = StableDiffusionPipeline(**{**pipe.components, "unet": unet, "scheduler": scheduler.from_config(PNDM)},
                                    requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    profile = tiny_profile.override({"support.guidance_scale": 8.0, "support.steps": 3})
    support = draw(other, profile, 4)
    latents, generators = initial_latents(support.seeds, (4, 16, 16))
    with Oracle(unet) as oracle:
        images = other(["A good picture of a cat"] * 4, negative_prompt=[""] * 4, latents=latents, generator=generators, height=64,
                        width=64, num_inference_steps=3, guidance_scale=8.0, output_type="np").images
    assert np.abs(support.images - images * 255).max() <= 0.6
    np.testing.assert_allclose(support.attribution, min_max(oracle.maps([6], (16, 16), guided=guided).numpy()), atol=1e-3)
    assert (draw(other, profile, 4).images == support.images).all()
    assert np.abs(draw(other, profile.override({"support.batch_size": 1}), 4).images.astype(int) - support.images).max() <= 1


def test_categories_with_one_prompt_share_their_images_and_others_do_not(pipe, tiny_profile):
    seeds = {image_seed(s, p, i) for s in (0, 1) for p in ("a cat", "a dog") for i in range(4)}
    assert len(seeds) == 16 and all(0 <= s < 2 ** 63 for s in seeds)
    cat = draw(pipe, tiny_profile, 1)
    assert (cat.images == draw(pipe, tiny_profile, 1, Category("Felix", prompt="cat")).images).all()
    for category, profile in [(Category("dog"), tiny_profile), (CAT, tiny_profile.override({"support.seed": 1}))]:
        assert (cat.images != draw(pipe, profile, 1, category).images).any()


def test_min_max_of_constant_and_ordinary_maps():
    scaled = min_max(np.stack([np.full((2, 3), 7.0), np.arange(6.0).reshape(2, 3) - 2]))
    np.testing.assert_allclose(scaled, np.stack([np.zeros((2, 3)), np.arange(6).reshape(2, 3) / 5]))


def test_what_cannot_be_drawn_is_refused(pipe, tiny_profile, monkeypatch):
    with pytest.raises(ProfileError, match=r"support\.image_size"):
        draw(pipe, tiny_profile.override({"support.image_size": 60}), 1)
    bias, maps = pipe.vae.decoder.conv_out.bias, AttributionRecorder.maps
    for place, name, broken in ((AttributionRecorder, "maps", lambda recorder: maps(recorder).index_fill(1, torch.tensor([0]), torch.nan)),
                                (bias, "data", bias * torch.nan)):
        with monkeypatch.context() as patched, pytest.raises(OVDiffError, match="not finite"):
            patched.setattr(place, name, broken)
            draw(pipe, tiny_profile, 1)
