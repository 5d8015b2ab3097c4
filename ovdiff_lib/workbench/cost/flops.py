"""Floating-point operations of a class and an image: counted while they run, or from the shapes of the networks alone.

One FLOP is one multiplication or one addition: a matrix product (m, k) x (k, n) is 2 m k n. Counted are matrix
products, convolutions and attention; activations, normalisation, resizing, softmax and what NumPy does (masks) are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ovdiff_lib.errors import InputError
from ovdiff_lib.features.clip import ClipExtractor
from ovdiff_lib.features.diffusion import QUERY
from ovdiff_lib.features.self_supervised import DinoExtractor
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.windows import scales
from ovdiff_lib.networks.clip_text import WIDTH, encode, pack
from ovdiff_lib.networks.instruments import captured
from ovdiff_lib.profiles.schema import Profile, PrototypeSettings
from ovdiff_lib.prototypes.kmeans import ITERATIONS, REFINE, RESTARTS, SAMPLE
from ovdiff_lib.support.attribution import record_attribution
from ovdiff_lib.workbench.cost.architectures import Networks


def _multi_head(query: Sequence[int], key: Sequence[int], _: Sequence[int], width: int, *__: Any, **___: Any) -> int:
    projections = 2 * width * width * (2 * math.prod(query[:-1]) + 2 * math.prod(key[:-1]))
    return projections + 4 * query[0] * query[1] * key[1] * width


aten = torch.ops.aten
UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_fused_attention_overrideable: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_attention_math_for_mps: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._native_multi_head_attention: _multi_head,
    aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
}
"""Matrix products that PyTorch's counter passes over without a word, all attention on a CPU among them."""


def counter() -> FlopCounterMode:
    """Counts what runs inside it: ``with counter() as c: ...``, then ``c.get_total_flops()``."""
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED)


def flop_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOP of one call without gradients."""
    with torch.no_grad(), counter() as count:
        function(*args, **kwargs)
    return count.get_total_flops()


class FeatureCost(NamedTuple):
    """What features of one image take: ``flop``, and what comes out: ``cells`` positions of ``channels`` values."""

    flop: int
    cells: int
    channels: int


# ---- a class

def class_operations(networks: Networks, profile: Profile, extractors: Sequence[str] | None = None) -> dict[str, int]:
    """FLOP of building one class (Sec. 3.1 to 3.3), by step; ``extractors`` default to the profile's.

    k-means is the most it can take: every feature is foreground or background and no run converges early. A segmenter
    (Eq. 1) is not counted. Raises ``InputError`` for an extractor without a rule.
    """
    support, halves = profile.support, 1 + (profile.support.guidance_scale > 1)
    side, tokens = support.image_size // networks.vae_factor, networks.text_encoder.config.max_position_embeddings
    unet = unet_operations(networks, side, halves)
    with record_attribution(networks.unet, [1], (side, side), support.mid_block, halves == 2):
        recorded = unet_operations(networks, side, halves)
    decoder = flop_of(networks.vae.decode, _meta(1, networks.vae.config.latent_channels, side, side))
    table = {
        "prompt": halves * flop_of(networks.text_encoder, _meta(1, tokens).long()),
        "support images: UNet": support.size * support.steps * unet,
        "support images: attribution": support.size * support.steps * (recorded - unet),
        "support images: VAE decoder": support.size * decoder,
    }
    for name in extractors or profile.features.extractors:
        cost = feature_cost(networks, profile, name, support.image_size)
        table[f"features: {name}"] = support.size * cost.flop
        if "part" in profile.prototypes.kinds:
            points = support.size * cost.cells
            table[f"k-means: {name}, at most"] = clustering_operations(points, cost.channels, profile.prototypes)
    return table


def class_total(table: dict[str, int], extractor: str) -> int:
    """FLOP of a class with one extractor: what all extractors share, and its own features and k-means."""
    return sum(flop for step, flop in table.items()
               if not step.startswith(("features: ", "k-means: ")) or step.split(",")[0].endswith(f": {extractor}"))


def unet_operations(networks: Networks, side: int, batch: int = 1,
                    upto: dict[str, torch.nn.Module] | None = None) -> int:
    """FLOP of a UNet call on latents of ``side`` x ``side``; with ``upto`` it ends when all of them were called."""
    config, tokens = networks.unet.config, networks.text_encoder.config.max_position_embeddings
    latents, prompt = _meta(batch, config.in_channels, side, side), _meta(batch, tokens, config.cross_attention_dim)

    def call() -> None:
        with captured(upto or {}, stop=bool(upto)):
            networks.unet(latents, 1, encoder_hidden_states=prompt)

    return flop_of(call)


def clustering_operations(points: int, channels: int, settings: PrototypeSettings) -> int:
    """Most FLOP of k-means over ``points`` features: seeding and iterations on samples of both regions, then on all."""
    k, regions = settings.clusters, 1 + settings.background
    sample = min(points, regions * k * SAMPLE)
    seeding = 2 * sample * channels * (1 + (k - 1) * (2 + int(math.log(k))))
    one_pass = 4 * channels * k  # a point's distances to the centroids, and the sums of the clusters
    tries = RESTARTS if points > sample else 1
    return tries * (seeding + one_pass * ITERATIONS * sample) + one_pass * REFINE * points


# ---- features

def feature_cost(networks: Networks, profile: Profile, name: str, side: int) -> FeatureCost:
    """Features of one square image of ``side`` pixels. ``InputError`` for an extractor that :data:`FEATURES` lacks."""
    if name not in FEATURES:
        raise InputError(f"Operations of the extractor {name!r} cannot be counted; choose from {', '.join(FEATURES)}.")
    return FEATURES[name](networks, profile, side)


def _diffusion_cost(networks: Networks, profile: Profile, _side: int) -> FeatureCost:
    settings, size = profile.features, profile.features.sd_input_size
    latent, modules = size // networks.vae_factor, dict(networks.unet.named_modules())
    wanted = {layer: modules[layer + QUERY] for layer in settings.sd_layers}
    flop = flop_of(networks.vae.encode, _meta(1, 3, size, size))
    flop += settings.sd_noise_samples * unet_operations(networks, latent, upto=wanted)
    return FeatureCost(flop, latent * latent, sum(module.out_features for module in wanted.values()))


def _vit_cost(extractor: ClipExtractor | DinoExtractor, side: int) -> FeatureCost:
    height, width = extractor.input_size(side, side)
    flop = flop_of(extractor.run, _meta(1, 3, height, width))
    return FeatureCost(flop, height * width // extractor.patch**2, extractor.channels)


FEATURES = {
    "sd": _diffusion_cost,
    "dino": lambda nets, profile, side: _vit_cost(DinoExtractor(nets.dino, profile.features), side),
    "clip-keys": lambda nets, profile, side: _vit_cost(ClipExtractor(nets.clip, profile.features, "keys"), side),
    "clip-tokens": lambda nets, profile, side: _vit_cost(ClipExtractor(nets.clip, profile.features, "tokens"), side),
}
"""Extractor -> what its features take, by networks, profile and the side of the image."""


# ---- an image

def image_operations(networks: Networks, profile: Profile, shape: tuple[int, int], classes: int,
                     extractors: Sequence[str] | None = None) -> dict[str, int]:
    """FLOP of segmenting one image of ``shape`` (H, W) in pixels against ``classes`` classes (Sec. 3.4), by step.

    Every class has all its prototypes, K and N of both regions. The text of the category filter is the most it can
    take: all non-empty subsets of eta names of one token, none of them encoded for an earlier image.
    """
    sides, table = [size for _, _, size in window_boxes(shape, profile)], {}
    for name in extractors or profile.features.extractors:
        by_side = {side: feature_cost(networks, profile, name, side) for side in set(sides)}
        costs = [by_side[side] for side in sides]
        table[f"features: {name}"] = sum(c.flop for c in costs)
        table[f"matching: {name}"] = sum(2 * c.cells * c.channels * classes * prototype_rows(profile) for c in costs)
    if profile.filters.category:
        clip, side = networks.clip, networks.clip.config.vision_config.image_size
        names = min(profile.filters.category_top, classes)
        table["category filter: image"] = flop_of(clip.get_image_features, pixel_values=_meta(1, 3, side, side))
        table["category filter: text, at most"] = joined_prompt_operations(networks, names)
    return table


def window_boxes(shape: tuple[int, int], profile: Profile) -> list[tuple[int, int, int]]:
    """Windows (top, left, size) of all scales of an image of ``shape`` (H, W), in pixels of the resized image."""
    settings, blank = profile.matching, np.zeros((*shape, 3), np.uint8)
    resized = resize_short_side(blank, settings.short_side, settings.resample, settings.long_side).shape[:2]
    return [(top, left, side) for side, boxes in scales(resized, settings) for top, left, _, _ in boxes]


def joined_prompt_operations(networks: Networks, names: int) -> int:
    """FLOP of CLIP's text tower over the 2^names - 1 joined prompts of the category filter, which share beginnings."""
    start, joiner, end, sequences = 0, names + 1, names + 2, []
    for size in range(1, names + 1):
        for subset in itertools.combinations(range(1, names + 1), size):
            words = [joiner] * (2 * size - 1)
            words[::2] = subset
            sequences.append((start, *words, end))
    length = networks.clip.config.text_config.max_position_embeddings
    return flop_of(encode, networks.clip, *pack(sequences, max(WIDTH, length)))


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


# ---- bytes

def prototype_rows(profile: Profile) -> int:
    """Most prototypes of one class (Eq. 2, 3): of each region one of the class, N of the drawings, K of the parts."""
    settings = profile.prototypes
    count = {"class": 1, "instance": profile.support.size, "part": settings.clusters}
    return (1 + settings.background) * sum(count[kind] for kind in settings.kinds)


def prototype_bytes(profile: Profile, width: int) -> int:
    """Bytes of one class's prototypes of ``width`` channels (App. C.5): 2 (1 + N + K) D x 4 with the paper's kinds."""
    return prototype_rows(profile) * width * 4


def support_bytes(profile: Profile, latent: int) -> int:
    """Bytes of one class's support set: u8 images, f32 attribution of ``latent`` x ``latent``, an i64 seed an image."""
    return profile.support.size * (3 * profile.support.image_size**2 + 4 * latent**2 + 8)
