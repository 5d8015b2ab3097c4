"""Support images (Sec. 3.1, App. C.5): a small batch of generated images per category, with their attribution."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import OVDiffError, ProfileError
from ovdiff_lib.networks.instruments import batches, undisturbed
from ovdiff_lib.support.attribution import class_token_positions, fill_template, record_attribution
from ovdiff_lib.types import SupportSet

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from ovdiff_lib.profiles.schema import Profile


@undisturbed("support.batch_size")
def sample_support(pipe: StableDiffusionPipeline, category: Category, profile: Profile, count: int | None = None,
                   progress: bool = True, start: int = 0) -> SupportSet:
    """In one pass ``count`` (default ``support.size``) images of ``category``, from number ``start``, and attribution.

    Image i depends on (support settings, prompt, ``support.seed``, i) alone, but for rounding: batches of another size
    are computed otherwise, on a GPU most of all. Images are u8 (N, S, S, 3), S = ``support.image_size``; attribution is
    f32 (N, S/f, S/f), f the VAE's factor, each map min-max scaled to [0, 1].
    """
    settings, size = profile.support, profile.support.image_size
    count = settings.size if count is None else count
    multiple = int(np.lcm(8, pipe.vae_scale_factor))  # 8: what StableDiffusionPipeline accepts
    if size % multiple:
        raise ProfileError(f"support.image_size is {size}; it must be a positive multiple of {multiple}.")
    prompt = fill_template(settings.prompt, category.prompt)
    positions = class_token_positions(pipe.tokenizer, settings.prompt, category.prompt)
    # Whether the pipeline doubles its batches: not for a UNet that was distilled to be told the scale.
    guided = settings.guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    side = size // pipe.vae_scale_factor
    seeds = np.array([image_seed(settings.seed, prompt, i) for i in range(start, start + count)], dtype=np.int64)
    positive, negative = pipe.encode_prompt(prompt, pipe.device, 1, guided, settings.negative_prompt)

    images, attribution = [], []
    with tqdm(total=count, desc=f"drawing {category.name}", unit="image", disable=not progress) as bar:
        for first, last in batches(count, settings.batch_size):
            n = last - first
            latents, generators = initial_latents(seeds[first:last], (pipe.unet.config.in_channels, side, side))
            with record_attribution(pipe.unet, positions, (side, side), settings.mid_block, guided) as recorder:
                drawn = pipe(
                    prompt_embeds=positive.expand(n, -1, -1),
                    negative_prompt_embeds=negative.expand(n, -1, -1) if guided else None,
                    latents=latents.to(pipe.device, positive.dtype), height=size, width=size,
                    generator=generators,  # for schedulers that add noise in their steps
                    num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, output_type="np").images
            maps = recorder.maps().numpy()
            if not (np.isfinite(drawn).all() and np.isfinite(maps).all()):
                raise OVDiffError(f"The diffusion model {profile.models.diffusion!r} drew values that are not finite "
                                  f"for {category.name!r}; use models.dtype float32 or check its weights.")
            images.append((drawn * 255).round().astype(np.uint8))
            attribution.append(min_max(maps))
            bar.update(n)
    return SupportSet(category, np.concatenate(images), np.concatenate(attribution), seeds)


def image_seed(seed: int, prompt: str, index: int) -> int:
    """Seed of support image ``index``: a hash of what it may depend on, in [0, 2^63)."""
    digest = hashlib.sha256(f"{seed}\0{prompt}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def initial_latents(seeds: np.ndarray, shape: tuple[int, int, int]) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Standard normal f32 (n, c, h, w) and its generators, one an image; on the CPU, the same for every device."""
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    drawn = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    return torch.stack(drawn), generators


def min_max(maps: np.ndarray) -> np.ndarray:
    """Each map of (n, h, w) scaled to [0, 1]; a constant map, which says nothing, becomes zeros."""
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return ((maps - low) / np.where(high > low, high - low, 1)).astype(np.float32)
