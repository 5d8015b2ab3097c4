"""What OVDiff is compared with: each step done the plain way, with the same networks, inputs and results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.pamr import DILATIONS, affinity
from ovdiff_lib.matching.windows import window_seeds
from ovdiff_lib.networks.instruments import attention_grid
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.support.attribution import RecordingProcessor, class_token_positions, fill_template
from ovdiff_lib.support.sampler import image_seed, initial_latents, min_max
from ovdiff_lib.workbench.cost.flops import window_boxes

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

    from ovdiff_lib.categories import Category
    from ovdiff_lib.profiles.schema import Features, Profile
    from ovdiff_lib.types import PrototypeBank



def draw(pipe: StableDiffusionPipeline, category: Category, profile: Profile, count: int) -> np.ndarray:
    """Support images u8 (count, S, S, 3) by the bare pipeline, with whatever attention processors it has: the prompt, starting noise,
    steps and batches of :func:`~ovdiff_lib.support.sampler.sample_support`, no attribution."""
    settings = profile.support
    prompt, side = fill_template(settings.prompt, category.prompt), settings.image_size // pipe.vae_scale_factor
    seeds = np.array([image_seed(settings.seed, prompt, i) for i in range(count)], np.int64)
    drawn = []
    for batch in np.split(seeds, range(settings.batch_size, count, settings.batch_size)):
        latents = initial_latents(batch, (pipe.unet.config.in_channels, side, side)).to(pipe.device, pipe.unet.dtype)
        drawn.append(pipe(
            prompt, num_images_per_prompt=len(batch), negative_prompt=settings.negative_prompt, latents=latents,
            height=settings.image_size, width=settings.image_size, num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale, output_type="np").images)
    return (np.concatenate(drawn) * 255).round().astype(np.uint8)


def bare_features(pipe: StableDiffusionPipeline, settings: Features, images: Sequence[np.ndarray],
                  batch: int | None) -> Callable[[], None]:
    """A call that runs the networks alone: VAE encoder, noise, one UNet pass without guidance, ``batch`` images at a time (None: all).

    ``images`` u8 (H, W, 3) of any size are resized, and the noise is drawn, here and not in the call. Nothing is read out.
    """
    side = settings.sd_input_size
    pixels = torch.cat([F.interpolate(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1,
                                      size=(side, side), mode="bilinear", antialias=True) for image in images])
    pixels = pixels.to(pipe.device, pipe.vae.dtype)
    latent = side // pipe.vae_scale_factor
    noise = initial_latents(np.arange(len(images)), (pipe.unet.config.in_channels, latent, latent)).to(pipe.device)
    signal = float(pipe.scheduler.alphas_cumprod[settings.sd_timestep])
    with torch.no_grad():
        prompt = pipe.encode_prompt("", pipe.device, 1, False)[0]
    step = batch or len(images)

    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(pixels), step):
            latents = pipe.vae.encode(pixels[start : start + step]).latent_dist.mean.float() * pipe.vae.config.scaling_factor
            for _ in range(settings.sd_noise_samples):
                noised = signal**0.5 * latents + (1 - signal) ** 0.5 * noise[start : start + step]
                pipe.unet(noised.to(pipe.unet.dtype), settings.sd_timestep, prompt.expand(len(noised), -1, -1), return_dict=False)

    return run


def window_crops(image: np.ndarray, profile: Profile) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """The windows of an image u8 (H, W, 3) that matching cuts: crops u8 (S, S, 3) with their (top, left, S) in the resized image."""
    settings = profile.matching
    resized = resize_short_side(image, settings.short_side, settings.resample, settings.long_side)
    boxes = window_boxes(image.shape[:2], profile)
    return [(resized[top : top + size, left : left + size], (top, left, size)) for top, left, size in boxes]


class StoringRecorder:
    """Keeps the attention of every layer and step, all heads and tokens of the conditional half, until :meth:`maps` sums it up."""

    def __init__(self, token_positions: list[int], size: tuple[int, int], guided: bool) -> None:
        self.token_positions, self.size, self.guided = list(token_positions), size, guided
        self.stored: dict[str, list[torch.Tensor]] = {}  # layer -> a step f32 (n, heads, positions of that layer, tokens)

    @torch.no_grad()
    def add(self, layer: str, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Store softmax(scale q k^T); q (B, heads, hw, d), k (B, heads, tokens, d)."""
        if self.guided:
            query, key = query[len(query) // 2 :], key[len(key) // 2 :]
        self.stored.setdefault(layer, []).append(((query.float() * scale) @ key.float().transpose(-1, -2)).softmax(dim=-1))

    def maps(self) -> torch.Tensor:
        """Attribution f32 (n, h, w) on the CPU: each layer summed over steps, averaged over heads and class tokens, and upsampled."""
        total = 0
        for steps in self.stored.values():
            attention = torch.stack(steps).sum(0)[..., self.token_positions].mean(dim=(1, 3))
            grid = attention.unflatten(1, attention_grid(attention.shape[1], self.size))[:, None]
            total = total + F.interpolate(grid, size=self.size, mode="bicubic", align_corners=False).clamp_min(0)
        return total[:, 0].cpu()


@contextlib.contextmanager
def store_attention(unet: torch.nn.Module, recorder: StoringRecorder, mid_block: bool) -> Iterator[None]:
    """Show the cross-attention of a UNet to ``recorder`` inside the ``with`` block; its processors are put back."""
    layers = {name: module for name, module in unet.named_modules()
              if name.endswith(".attn2") and (mid_block or not name.startswith("mid_block"))}
    former = {name: module.processor for name, module in layers.items()}
    try:
        for name, module in layers.items():
            module.set_processor(RecordingProcessor(name, recorder))
        yield
    finally:
        for name, module in layers.items():
            module.set_processor(former[name])


def stored_attribution(pipe: StableDiffusionPipeline, category: Category, profile: Profile, count: int) -> np.ndarray:
    """Attribution f32 (count, h, w) in [0, 1] of ``count`` drawings, all of whose attention is kept until they are finished."""
    settings = profile.support
    positions = class_token_positions(pipe.tokenizer, settings.prompt, category.prompt)
    side = settings.image_size // pipe.vae_scale_factor
    recorder = StoringRecorder(positions, (side, side), settings.guidance_scale > 1)
    whole = profile.override({"support.batch_size": count})  # one batch: the maps of all images belong together
    with store_attention(pipe.unet, recorder, settings.mid_block):
        draw(pipe, category, whole, count)
    return min_max(recorder.maps().numpy())


@torch.no_grad()
def padded_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
    """Unit CLIP embeddings f32 (n, E) on the CPU as ``CLIPModel.get_text_features`` gives them, each text padded to the model's length."""
    found, device = [], clip.text_projection.weight.device
    for start in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[start : start + batch]), padding="max_length", truncation=True, return_tensors="pt",
                           max_length=clip.config.text_config.max_position_embeddings)
        found.append(F.normalize(clip.get_text_features(**tokens.to(device)).pooler_output.float(), dim=-1).cpu())
    return torch.cat(found)


@torch.no_grad()
def scores_at_once(extractor: Callable, profile: Profile, image: np.ndarray, bank: PrototypeBank) -> np.ndarray:
    """Scores f32 (C + 1, H, W) of an image: all features of all its windows against all prototypes of all classes in one matrix.

    Of the bank, the prototypes of ``extractor`` count; some class has background prototypes.
    """
    device, seeds = resolve_device(profile), window_seeds(profile.features.seed, image, len(window_boxes(image.shape[:2], profile)))
    rows = bank.prototypes[extractor.name]
    groups = [np.concatenate([p.vectors[p.region == "background"] for p in rows])]
    groups += [p.vectors[p.region == "foreground"] for p in rows]
    prototypes = F.normalize(torch.from_numpy(np.concatenate(groups)).to(device), dim=1)
    crops = window_crops(image, profile)
    sizes = sorted({size for _, (_, _, size) in crops}, reverse=True)
    features = {}
    for size in sizes:
        index = [i for i, (crop, _) in enumerate(crops) if len(crop) == size]
        features |= zip(index, extractor(np.stack([crops[i][0] for i in index]), seeds[index]), strict=True)
    stacked = torch.stack([features[i] for i in range(len(crops))]).to(device)
    cosine = F.normalize(stacked.flatten(0, 2), dim=1) @ prototypes.T  # pixels x prototypes
    best = torch.stack([part.amax(1) for part in cosine.split([len(group) for group in groups], dim=1)])
    best = best.unflatten(1, stacked.shape[:3]).transpose(0, 1)
    settings = profile.matching
    shape = resize_short_side(image, settings.short_side, settings.resample, settings.long_side).shape[:2]
    total = torch.zeros(len(groups), *shape, device=device)
    for size in sizes:
        scores, cover = torch.zeros_like(total), torch.zeros(shape, device=device)
        for values, (crop, (top, left, _)) in zip(best, crops, strict=True):
            if len(crop) == size:
                enlarged = F.interpolate(values[None], size=(size, size), mode="bilinear", align_corners=False)[0]
                scores[:, top : top + size, left : left + size] += enlarged
                cover[top : top + size, left : left + size] += 1
        total += scores / cover / len(sizes)
    return F.interpolate(total[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0].cpu().numpy()


@torch.no_grad()
def pamr_unfolded(image: np.ndarray, scores: torch.Tensor, iterations: int = 10, dilations: Sequence[int] = DILATIONS) -> torch.Tensor:
    """PAMR with all neighbours of all classes laid out at once, (C, 8 x dilations, H, W), as the published code does it."""
    weights = affinity(image, dilations, scores.device)
    for _ in range(iterations):
        scores = (_unfolded(scores, dilations) * weights).sum(1)
    return scores


def _unfolded(maps: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """The 8 neighbours at every dilation of each pixel of maps (C, H, W), whose border is repeated: (C, 8 x dilations, H, W)."""
    taken = []
    for dilation in dilations:
        padded = F.pad(maps[:, None], (dilation,) * 4, mode="replicate")
        patches = F.unfold(padded, 3, dilation=dilation).unflatten(1, (1, 9))[:, 0]  # the centre is the fifth of nine
        taken.append(torch.cat([patches[:, :4], patches[:, 5:]], 1).unflatten(2, tuple(maps.shape[1:])))
    return torch.cat(taken, 1)
