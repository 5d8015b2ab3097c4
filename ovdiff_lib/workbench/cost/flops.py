"""Floating-point operations of a class, counted while networks run that have shapes but no values; and its bytes.

One FLOP is one multiplication or one addition: a matrix product (m, k) x (k, n) is 2 m k n. Counted are matrix
products, convolutions and attention; activations, normalisation, resizing and softmax are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ovdiff_lib.features.clip import ClipExtractor
from ovdiff_lib.features.diffusion import QUERY
from ovdiff_lib.features.self_supervised import DinoExtractor
from ovdiff_lib.networks.instruments import captured
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.support.attribution import is_guided, record_attribution
from ovdiff_lib.workbench.cost.architectures import Networks

CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
"""Attention on a CPU, which PyTorch's counter passes over without a word."""


def flop_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOP of one call without gradients."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU) as count:
        function(*args, **kwargs)
    return count.get_total_flops()


def class_operations(networks: Networks, profile: Profile) -> dict[str, int]:
    """FLOP of drawing one class and of its features in each extractor of Table 1 (Sec. 3.1, App. C.2), by step. Not
    counted are masks and k-means, whose work depends on the images."""
    pipe, support = networks.pipe, profile.support
    halves = 1 + is_guided(pipe.unet, support.guidance_scale)
    side, tokens = support.image_size // pipe.vae_scale_factor, pipe.text_encoder.config.max_position_embeddings
    unet = unet_operations(pipe, side, halves)
    with record_attribution(pipe.unet, [1], (side, side), support.mid_block, halves == 2):
        recorded = unet_operations(pipe, side, halves)
    decoder = flop_of(pipe.vae.decode, _meta(1, pipe.vae.config.latent_channels, side, side))
    table = {
        "prompt": halves * flop_of(pipe.text_encoder, _meta(1, tokens).long()),
        "support images: UNet": support.size * support.steps * unet,
        "support images: attribution": support.size * support.steps * (recorded - unet),
        "support images: VAE decoder": support.size * decoder,
    }
    settings = profile.features
    queries = {layer: pipe.unet.get_submodule(layer + QUERY) for layer in settings.sd_layers}
    query = unet_operations(pipe, settings.sd_input_size // pipe.vae_scale_factor, upto=queries)
    encoder = flop_of(pipe.vae.encode, _meta(1, 3, settings.sd_input_size, settings.sd_input_size))
    table["features: sd"] = support.size * (encoder + settings.sd_noise_samples * query)
    for vit in (ClipExtractor(networks.clip, settings, "keys"), DinoExtractor(networks.dino, settings)):
        size = vit.input_size(support.image_size, support.image_size)
        table[f"features: {vit.name}"] = support.size * flop_of(vit.run, _meta(1, 3, *size))
    return table


def unet_operations(pipe: StableDiffusionPipeline, side: int, batch: int = 1,
                    upto: dict[str, torch.nn.Module] | None = None) -> int:
    """FLOP of a UNet call on latents of ``side`` x ``side``; with ``upto`` it ends when all of them were called."""
    config, tokens = pipe.unet.config, pipe.text_encoder.config.max_position_embeddings
    latents, prompt = _meta(batch, config.in_channels, side, side), _meta(batch, tokens, config.cross_attention_dim)

    def call() -> None:
        with captured(upto or {}, stop=bool(upto)):
            pipe.unet(latents, 1, encoder_hidden_states=prompt)

    return flop_of(call)


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
