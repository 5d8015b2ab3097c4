"""Counted operations: against products by hand, a walk over layers, and what the counter sees while the method really runs."""

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.cost import flops as operations
from ovdiff_lib.workbench.cost.architectures import networks_of, published_networks
from ovdiff_lib.workbench.cost.flops import flop_of, prototype_bytes, prototype_rows, support_bytes

NAMES = ("sd", "dino", "clip-keys")


@pytest.fixture(scope="module")
def paper():
    return load_profile("paper")


@pytest.fixture(scope="module")
def published():
    return published_networks()


@pytest.fixture(scope="module")
def tiny(tiny_profile):
    return networks_of(tiny_profile)


def walked(network, run):
    """FLOP of ``run()`` by the layers' sizes: 2 x outputs x inputs of each Linear and Conv2d, two products for attention."""
    total = 0

    def layer(module, _given, output):
        nonlocal total
        inputs = module.in_features if isinstance(module, torch.nn.Linear) else module.weight[0].numel()
        total += 2 * output.numel() * inputs

    def attention(module, given, named, _output):
        nonlocal total
        hidden = given[0] if given else named["hidden_states"]
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        context = named.get("encoder_hidden_states")
        total += 4 * hidden.shape[0] * hidden.shape[1] * (hidden if context is None else context).shape[1] * module.to_q.out_features

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                stack.callback(module.register_forward_hook(layer).remove)
            elif isinstance(module, Attention):
                stack.callback(module.register_forward_hook(attention, with_kwargs=True).remove)
        run()
    return total


# ---- the counter

def test_products_by_hand():
    m, k, n = 3, 5, 7
    a, b, v = torch.rand(m, k), torch.rand(k, n), torch.rand(k)
    assert flop_of(torch.mm, a, b) == 2 * m * k * n
    assert flop_of(torch.matmul, a, v) == 2 * m * k and flop_of(torch.dot, v, v) == 2 * k
    assert flop_of(F.linear, torch.rand(2, 4, k), torch.rand(n, k), torch.rand(n)) == 2 * 8 * k * n
    assert flop_of(F.conv2d, torch.rand(2, 3, 6, 10), torch.rand(4, 3, 3, 3), padding=1) == 2 * (2 * 4 * 6 * 10) * (3 * 3 * 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_counted_on_every_device(device):
    """PyTorch's counter passes over the CPU's attention: the total would be 0 without a word."""
    q, k, v = (torch.zeros(2, 4, length, width, device=device) for length, width in ((16, 8), (9, 8), (9, 8)))
    for context in (torch.no_grad, torch.inference_mode):
        with context(), operations.counter() as count:
            F.scaled_dot_product_attention(q, k, v)
        assert count.get_total_flops() == 2 * (2 * 4) * 16 * 9 * 8 * 2


def test_fused_multi_head_attention():
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.rand(3, 5, 8)
    by_hand = 2 * 15 * 8 * 24 + 4 * 3 * 5 * 5 * 8 + 2 * 15 * 8 * 8  # three projections in, scores and sums, one projection out
    assert flop_of(attention, x, x, x, need_weights=False) == by_hand
    assert flop_of(attention.to("meta"), *[x.to("meta")] * 3, need_weights=False) == by_hand


# ---- networks

def test_a_unet_call_is_the_sum_of_its_layers(tiny, published):
    for networks, side, batch in ((tiny, 16, 3), (published, 64, 1)):
        config, tokens = networks.unet.config, networks.text_encoder.config.max_position_embeddings
        latents = torch.empty(batch, config.in_channels, side, side, device="meta")
        prompt = torch.empty(batch, tokens, config.cross_attention_dim, device="meta")
        expected = walked(networks.unet, functools.partial(networks.unet, latents, 1, encoder_hidden_states=prompt))
        assert operations.unet_operations(networks, side, batch) == expected > 0
        assert expected % batch == 0


def test_the_papers_networks_have_the_published_numbers_of_parameters(published):
    assert [sum(p.numel() for p in network.parameters()) for network in published] == [
        859_520_964, 83_653_863, 123_060_480, 149_620_737, 85_807_872]
    assert published.vae_factor == 8 and not any(p.device.type != "meta" for p in published.unet.parameters())


def test_a_vit_by_hand(published, paper):
    """DINO ViT-B/8 on 448 pixels: 3,136 patches and the class token through twelve layers."""
    cost = operations.feature_cost(published, paper, "dino", 512)
    patches, d = 56 * 56, 768
    n = patches + 1
    by_hand = 2 * patches * d * 3 * 8 * 8 + 12 * (2 * n * d * d * 4 + 4 * n * n * d + 2 * 2 * n * d * 4 * d)
    assert cost == operations.FeatureCost(by_hand, patches, d)


def test_feature_sizes_of_the_paper(published, paper):
    found = {name: operations.feature_cost(published, paper, name, 512)[1:] for name in NAMES}
    assert found == {"sd": (64 * 64, 7680), "dino": (56 * 56, 768), "clip-keys": (28 * 28, 768)}


# ---- a class

def test_a_class_takes_what_the_counter_sees(tiny, tiny_profile):
    """Prompt, drawing and attribution of the real sampler; features of the real extractors."""
    table, made = operations.class_operations(tiny, tiny_profile, NAMES), []
    pipe = load_diffusion(tiny_profile)
    drawn = flop_of(lambda: made.append(sample_support(pipe, Category("dog"), tiny_profile, progress=False)))
    assert drawn == table["prompt"] + sum(flop for step, flop in table.items() if step.startswith("support images"))
    assert table["support images: attribution"] > 0
    for name in NAMES:
        assert flop_of(EXTRACTORS[name](tiny_profile), made[0].images, made[0].seeds) == table[f"features: {name}"]


def test_drawing_grows_linearly_with_the_support_set_and_doubles_by_guidance(tiny, tiny_profile):
    changes = {"support.size": 1}, {"support.size": 8}, {"support.size": 8, "support.guidance_scale": 1.0}
    one, eight, plain = (operations.class_operations(tiny, tiny_profile.override(change), ["sd"]) for change in changes)
    for step in ("support images: UNet", "support images: VAE decoder", "features: sd"):
        assert eight[step] == 8 * one[step]
    assert one["prompt"] == eight["prompt"] == 2 * plain["prompt"]
    assert eight["support images: UNet"] == 2 * plain["support images: UNet"]
    assert eight["support images: attribution"] == plain["support images: attribution"]  # of the conditional half alone


def test_total_of_a_class():
    table = {"prompt": 1, "support images: UNet": 10, "features: sd": 100, "k-means: sd, at most": 1000, "features: sd2": 5,
             "features: clip-keys": 10_000, "k-means: clip-keys, at most": 100_000}
    assert operations.class_total(table, "sd") == 1111 and operations.class_total(table, "clip-keys") == 110_011


@pytest.mark.parametrize("points", [60, 3000])
def test_k_means_takes_no_more_than_its_bound(points):
    settings = load_profile("mini", {"prototypes.clusters": 4}).prototypes
    x = torch.rand(points, 6, generator=torch.Generator().manual_seed(0))
    taken = flop_of(kmeans, x[: points // 3], 4) + flop_of(kmeans, x[points // 3:], 4)
    one_pass = 4 * points * 4 * 6
    assert one_pass <= taken <= operations.clustering_operations(points, 6, settings)


# ---- an image

def bank_of(profile, channels, classes):
    """Random prototypes, as many as a class may have."""
    rng, count = np.random.default_rng(0), prototype_rows(profile)
    none, empty = np.full(count, -1, np.int32), np.zeros((1, 1, 1), np.int16)
    kind, region = np.full(count, "class"), np.repeat(["foreground", "background"], count // 2)
    return PrototypeBank(Vocabulary.of([f"class {i}" for i in range(classes)]), {name: tuple(
        Prototypes(rng.standard_normal((count, width), np.float32), kind, region, none, none, empty) for _ in range(classes))
        for name, width in channels.items()})


@pytest.mark.parametrize("shape", [(64, 112), (200, 90)])
def test_an_image_takes_what_the_counter_sees(tiny, tiny_profile, shape):
    profile = tiny_profile.override({"features.extractors": list(NAMES), "filters.category": False})
    extractors = {name: EXTRACTORS[name](profile) for name in NAMES}
    bank = bank_of(profile, {name: extractor.channels for name, extractor in extractors.items()}, 3)
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    table = operations.image_operations(tiny, profile, shape, 3)
    assert flop_of(Matcher(extractors, profile).scores, image, bank) == sum(table.values())
    assert set(table) == {f"{what}: {name}" for what in ("features", "matching") for name in NAMES}


def test_the_category_filter_takes_its_bound_when_every_prompt_is_new(tiny, tiny_profile):
    clip, tokenizer = load_clip(tiny_profile)
    names = ["cat", "dog", "sofa", "boat", "water"]
    table = operations.image_operations(tiny, tiny_profile, (64, 96), len(names))
    image = np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    chosen = CategoryFilter(clip, tokenizer, tiny_profile)
    assert flop_of(chosen.embed_image, image) == table["category filter: image"]
    texts = [chosen._prompt([Category(n) for i, n in enumerate(names) if subset >> i & 1]) for subset in range(1, 2 ** len(names))]
    assert flop_of(chosen.text, texts) == table["category filter: text, at most"]


def test_windows_of_the_paper(paper):
    """App. C.5's setting: 375 x 500 pixels become 448 x 597; two windows of 448 pixels and two rows of three of 336."""
    boxes = operations.window_boxes((375, 500), paper)
    assert boxes == [(0, 0, 448), (0, 149, 448), *((top, left, 336) for top in (0, 112) for left in (0, 224, 261))]
    assert resize_short_side(np.zeros((375, 500, 3), np.uint8), 448).shape[:2] == (448, 597)
    whole = operations.window_boxes((375, 500), paper.override({"matching.whole_image": True, "matching.windows": []}))
    assert whole == [(0, 0, 448)]


def test_an_extractor_without_a_rule(tiny, tiny_profile):
    with pytest.raises(InputError, match="sd, dino, clip-keys"):
        operations.feature_cost(tiny, tiny_profile, "mae", 64)


# ---- bytes

def test_bytes_of_a_class(paper):
    assert prototype_rows(paper) == 130 and prototype_bytes(paper, 768) == 399_360
    assert prototype_rows(paper.override({"prototypes.background": False, "prototypes.kinds": ["class", "part"]})) == 33
    assert support_bytes(paper, 64) == 32 * (512 * 512 * 3 + 64 * 64 * 4 + 8)


def test_the_paper_counts(published, paper):
    """The numbers that the notebook's text stands on: 0.8 TFLOP a UNet call (as published of SD v1.5), 60 of them an image."""
    call = operations.unet_operations(published, 64)
    assert math.isclose(call, 0.803e12, rel_tol=1e-3)
    assert operations.class_operations(published, paper, ["sd"])["support images: UNet"] == 32 * 30 * 2 * call
