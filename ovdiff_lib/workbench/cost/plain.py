"""What OVDiff is compared with: each step done the plain way, with the same networks, inputs and results."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from ovdiff_lib.categories import Category
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.windows import crop, scales
from ovdiff_lib.profiles.schema import Features, Profile
from ovdiff_lib.support.attribution import fill_template
from ovdiff_lib.support.sampler import image_seed, initial_latents


def draw(pipe: StableDiffusionPipeline, category: Category, profile: Profile, count: int) -> np.ndarray:
    """Support images u8 (count, S, S, 3) by the bare pipeline: prompt, noise, steps, batches of ``sample_support``."""
    settings = profile.support
    prompt, side = fill_template(settings.prompt, category.prompt), settings.image_size // pipe.vae_scale_factor
    seeds = np.array([image_seed(settings.seed, prompt, i) for i in range(count)], np.int64)
    size, drawn = settings.batch_size, []
    for batch in np.split(seeds, range(size, count, size)):
        latents, generators = initial_latents(batch, (pipe.unet.config.in_channels, side, side))
        drawn.append(pipe(
            prompt, num_images_per_prompt=len(batch), negative_prompt=settings.negative_prompt,
            latents=latents.to(pipe.device, pipe.unet.dtype), generator=generators,
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
    squares = [F.interpolate(one, size=(side, side), mode="bilinear", antialias=True) for one in planes]
    pixels, latent = torch.cat(squares).to(pipe.device, pipe.vae.dtype), side // pipe.vae_scale_factor
    noise = initial_latents(np.arange(len(images)), (pipe.unet.config.in_channels, latent, latent))[0].to(pipe.device)
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
    """The windows u8 (S, S, 3) of an image u8 (H, W, 3) that matching cuts."""
    settings = profile.matching
    resized = resize_short_side(image, settings.short_side, settings.resample, settings.long_side)
    return [crop(resized, box, side) for side, boxes in scales(resized.shape[:2], settings) for box in boxes]


@torch.no_grad()
def padded_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
    """Unit CLIP embeddings f32 (n, E) on the CPU by ``CLIPModel.get_text_features``, texts padded to full length."""
    found, device = [], clip.text_projection.weight.device
    for start in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[start : start + batch]), padding="max_length", truncation=True,
                           return_tensors="pt", max_length=clip.config.text_config.max_position_embeddings)
        found.append(F.normalize(clip.get_text_features(**tokens.to(device)).pooler_output.float(), dim=-1).cpu())
    return torch.cat(found)
