"""What OVDiff is compared with: each step done the plain way, with the same networks, inputs and results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.pamr import DILATIONS, affinity
from ovdiff_lib.matching.windows import window_seeds
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.support.attribution import class_token_positions, fill_template, record_attribution
from ovdiff_lib.support.sampler import image_seed, initial_latents, min_max
from ovdiff_lib.workbench.cost.flops import window_boxes

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

    from ovdiff_lib.categories import Category
    from ovdiff_lib.profiles.schema import Features, Profile
    from ovdiff_lib.types import PrototypeBank


def draw(pipe: StableDiffusionPipeline, category: Category, profile: Profile, count: int) -> np.ndarray:
    """Support images u8 (count, S, S, 3) by the bare pipeline: prompt, noise, steps, batches of ``sample_support``."""
    settings = profile.support
    prompt, side = fill_template(settings.prompt, category.prompt), settings.image_size // pipe.vae_scale_factor
    seeds = np.array([image_seed(settings.seed, prompt, i) for i in range(count)], np.int64)
    size, drawn = settings.batch_size, []
    for batch in np.split(seeds, range(size, count, size)):
        latents = initial_latents(batch, (pipe.unet.config.in_channels, side, side)).to(pipe.device, pipe.unet.dtype)
        drawn.append(pipe(
            prompt, num_images_per_prompt=len(batch), negative_prompt=settings.negative_prompt, latents=latents,
            height=settings.image_size, width=settings.image_size, num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale, output_type="np").images)
    return (np.concatenate(drawn) * 255).round().astype(np.uint8)


def bare_features(pipe: StableDiffusionPipeline, settings: Features, images: Sequence[np.ndarray],
                  batch: int) -> Callable[[], None]:
    """A call that runs the networks alone: VAE encoder, noise, one UNet pass, ``batch`` images at a time.

    ``images`` u8 (H, W, 3) of any size are resized, and the noise is drawn, here and not in the call.
    """
    side = settings.sd_input_size
    planes = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in images]
    pixels = torch.cat([F.interpolate(one, size=(side, side), mode="bilinear", antialias=True) for one in planes])
    pixels, latent = pixels.to(pipe.device, pipe.vae.dtype), side // pipe.vae_scale_factor
    noise = initial_latents(np.arange(len(images)), (pipe.unet.config.in_channels, latent, latent)).to(pipe.device)
    signal = float(pipe.scheduler.alphas_cumprod[settings.sd_timestep])
    with torch.no_grad():
        prompt = pipe.encode_prompt("", pipe.device, 1, False)[0]

    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(pixels), batch):
            part = slice(start, start + batch)
            latents = pipe.vae.encode(pixels[part]).latent_dist.mean.float() * pipe.vae.config.scaling_factor
            for _ in range(settings.sd_noise_samples):
                noised = (signal**0.5 * latents + (1 - signal) ** 0.5 * noise[part]).to(pipe.unet.dtype)
                pipe.unet(noised, settings.sd_timestep, prompt.expand(len(noised), -1, -1), return_dict=False)

    return run


def window_crops(image: np.ndarray, profile: Profile) -> list[np.ndarray]:
    """The windows u8 (S, S, 3) of an image u8 (H, W, 3) that matching cuts, in the order of ``window_boxes``."""
    settings = profile.matching
    resized = resize_short_side(image, settings.short_side, settings.resample, settings.long_side)
    return [resized[top : top + size, left : left + size] for top, left, size in window_boxes(image.shape[:2], profile)]


def stored_attribution(pipe: StableDiffusionPipeline, category: Category, profile: Profile, count: int) -> np.ndarray:
    """Attribution f32 (count, h, w) in [0, 1] of ``count`` drawings in one batch: the attention of every layer and
    step, all heads and tokens of the conditional half, is kept until they are finished and then summed."""
    settings, side, stored = profile.support, profile.support.image_size // pipe.vae_scale_factor, defaultdict(list)
    positions = class_token_positions(pipe.tokenizer, settings.prompt, category.prompt)
    guided = settings.guidance_scale > 1

    def keep(layer: str, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        query, key = (x[len(x) // 2 :].float() if guided else x.float() for x in (query, key))
        stored[layer].append(((query * scale) @ key.transpose(-1, -2)).softmax(dim=-1))

    with record_attribution(pipe.unet, positions, (side, side), settings.mid_block, guided) as recorder:
        recorder.add = keep
        draw(pipe, category, profile.override({"support.batch_size": count}), count)
    summed = {layer: torch.stack(steps).sum(0) for layer, steps in stored.items()}
    recorder.sums = {layer: attention[..., positions].mean(dim=(1, 3)) for layer, attention in summed.items()}
    return min_max(recorder.maps().numpy())


@torch.no_grad()
def padded_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
    """Unit CLIP embeddings f32 (n, E) on the CPU by ``CLIPModel.get_text_features``, texts padded to full length."""
    found, device = [], clip.text_projection.weight.device
    for start in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[start : start + batch]), padding="max_length", truncation=True,
                           return_tensors="pt", max_length=clip.config.text_config.max_position_embeddings)
        found.append(F.normalize(clip.get_text_features(**tokens.to(device)).pooler_output.float(), dim=-1).cpu())
    return torch.cat(found)


@torch.no_grad()
def scores_at_once(extractor: Callable, profile: Profile, image: np.ndarray, bank: PrototypeBank) -> np.ndarray:
    """Scores f32 (C + 1, H, W) of an image: all features of all its windows against all prototypes of all classes in
    one matrix. Some class of ``bank`` has background prototypes of ``extractor``, and no filter is on."""
    settings, device, rows = profile.matching, resolve_device(profile), bank.prototypes[extractor.name]
    groups = [np.concatenate([p.vectors[p.region == "background"] for p in rows])]
    groups += [p.vectors[p.region == "foreground"] for p in rows]
    prototypes = F.normalize(torch.from_numpy(np.concatenate(groups)).to(device), dim=1)
    boxes, crops = window_boxes(image.shape[:2], profile), window_crops(image, profile)
    seeds = window_seeds(profile.features.seed, image, len(boxes))
    sizes = list(dict.fromkeys(size for _, _, size in boxes))
    parts = [[i for i, box in enumerate(boxes) if box[2] == size] for size in sizes]
    features = torch.cat([extractor(np.stack([crops[i] for i in part]), seeds[part]) for part in parts]).to(device)
    cosine = F.normalize(features.flatten(0, 2), dim=1) @ prototypes.T  # pixels x prototypes
    best = torch.stack([part.amax(1) for part in cosine.split([len(group) for group in groups], dim=1)])
    best = best.unflatten(1, features.shape[:3]).transpose(0, 1)
    shape = resize_short_side(image, settings.short_side, settings.resample, settings.long_side).shape[:2]
    total = torch.zeros(len(groups), *shape, device=device)
    for size, part in zip(sizes, parts, strict=True):
        scores, cover = torch.zeros_like(total), torch.zeros(shape, device=device)
        for i in part:
            place = slice(boxes[i][0], boxes[i][0] + size), slice(boxes[i][1], boxes[i][1] + size)
            scores[:, *place] += F.interpolate(best[i][None], size=(size, size), mode="bilinear")[0]
            cover[place] += 1
        total += scores / cover / len(sizes)
    return F.interpolate(total[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0].cpu().numpy()


@torch.no_grad()
def pamr_unfolded(image: np.ndarray, scores: torch.Tensor, iterations: int = 10,
                  dilations: Sequence[int] = DILATIONS) -> torch.Tensor:
    """PAMR with all neighbours of all classes laid out at once, (C, 8 x dilations, H, W), like the published code."""
    weights = affinity(image, dilations, scores.device)
    for _ in range(iterations):
        padded = [F.pad(scores[:, None], (d,) * 4, mode="replicate") for d in dilations]
        patches = [F.unfold(one, 3, dilation=d) for one, d in zip(padded, dilations, strict=True)]
        around = torch.cat([patch[:, [0, 1, 2, 3, 5, 6, 7, 8]] for patch in patches], 1)  # without the centre
        scores = (around.unflatten(2, tuple(scores.shape[1:])) * weights).sum(1)
    return scores
