"""Stable Diffusion as a feature extractor (App. C.2): a UNet's cross-attention queries of the slightly noised image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.networks.instruments import attention_grid, captured, gathered, undisturbed
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.schema import Features, Profile

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

QUERY = ".transformer_blocks.0.attn2.to_q"


class DiffusionExtractor:
    """Queries of ``features.sd_layers``, brought to the latent grid and concatenated in that order.

    An image becomes a square of ``sd_input_size``, is encoded by the VAE, noised to ``sd_timestep`` (tau) and passed
    through the UNet once, with the empty prompt ("unconditional mode"). The noise is the image's own (``sd_noise:
    seeded``) or the same for all (``fixed``); features of several ``sd_noise_samples`` are averaged.
    """

    name = "sd"
    any_size = True  # all images of a call become the same square

    @undisturbed()
    def __init__(self, pipe: StableDiffusionPipeline, settings: Features) -> None:
        """Raises ``ProfileError`` for layers the UNet does not have and for values out of range."""
        self.pipe, self.settings = pipe, settings
        self.device = pipe.device  # which diffusers looks for in all modules at each call
        modules = dict(pipe.unet.named_modules())
        legal = [name.removesuffix(QUERY) for name in modules if name.endswith(QUERY)]
        if not settings.sd_layers or set(settings.sd_layers) - set(legal):
            raise ProfileError(f"features.sd_layers is {settings.sd_layers}; the legal ones are {', '.join(legal)}.")
        if settings.sd_timestep >= (steps := pipe.scheduler.config.num_train_timesteps):
            raise ProfileError(f"features.sd_timestep is {settings.sd_timestep}; it must be from 0 to {steps - 1}.")
        if settings.sd_input_size % (factor := pipe.vae_scale_factor):
            raise ProfileError(f"features.sd_input_size is {settings.sd_input_size}; use a multiple of {factor}.")
        self.queries = {layer: modules[layer + QUERY] for layer in settings.sd_layers}
        self.widths = [query.out_features for query in self.queries.values()]
        self.channels = sum(self.widths)
        # The closed form of Sec. 3 of DDPM, z_tau = sqrt(a) z_0 + sqrt(1 - a) noise. Not the scheduler's add_noise:
        # DPMSolverMultistepScheduler looks tau up in its current sampling grid and is silently wrong outside it.
        self.signal = float(pipe.scheduler.alphas_cumprod[settings.sd_timestep])
        self.prompt = pipe.encode_prompt("", pipe.device, 1, False)[0]

    @classmethod
    def build(cls, profile: Profile) -> DiffusionExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_diffusion(profile), profile.features)

    @undisturbed("features.batch_size")
    def __call__(self, images: np.ndarray | Sequence[np.ndarray], seeds: np.ndarray) -> torch.Tensor:
        """n images u8 (H, W, 3), in an array or of any sizes, i64 (n,) seeds: f32 (n, h, w, D), (h, w) the latent's."""
        side = self.settings.sd_input_size // self.pipe.vae_scale_factor
        return gathered(self._extract, images, seeds, (side, side, self.channels), self.settings.batch_size,
                        "The diffusion model")

    def _extract(self, images: Sequence[np.ndarray], seeds: np.ndarray) -> torch.Tensor:
        vae, settings = self.pipe.vae, self.settings
        squares = torch.cat([self._square(image) for image in images])
        posterior = vae.encode(squares.to(vae.dtype)).latent_dist
        drawn = self._draw(seeds, posterior.mean.shape[1:])
        latents = posterior.mean.float()
        if settings.sd_latent == "sample":
            latents = latents + posterior.std.float() * drawn[-1]
        latents = latents * vae.config.scaling_factor
        total: torch.Tensor | None = None
        for noise in drawn[:-1]:
            queries = self._queries_of(self.signal ** 0.5 * latents + (1 - self.signal) ** 0.5 * noise)
            total = queries if total is None else total.add_(queries)
        return total.div_(settings.sd_noise_samples)

    def _square(self, image: np.ndarray) -> torch.Tensor:
        """f32 (1, 3, S, S) in [-1, 1] of an image u8 (H, W, 3)."""
        side = self.settings.sd_input_size
        # Contiguous: the order of an array in memory would show in the last bits of the features.
        pixels = torch.from_numpy(np.ascontiguousarray(image)[None]).permute(0, 3, 1, 2).to(self.device, torch.float32)
        pixels = pixels / 127.5 - 1
        if image.shape[:2] == (side, side):
            return pixels
        return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)

    def _draw(self, seeds: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        """From each image's own generator: noises at tau, last that of the VAE posterior (samples + 1, n, c, h, w)."""
        settings, drawn = self.settings, []
        for seed in seeds if settings.sd_noise == "seeded" else [settings.seed] * len(seeds):
            generator = torch.Generator("cpu").manual_seed(int(seed))
            drawn.append(torch.randn(settings.sd_noise_samples + 1, *shape, generator=generator, dtype=torch.float32,
                                     device="cpu"))
        return torch.stack(drawn, dim=1).to(self.device)

    def _queries_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Queries f32 (n, h, w, D) of noised latents f32 (n, c, h, w); the UNet runs up to the last layer wanted."""
        unet, size = self.pipe.unet, tuple(latents.shape[-2:])
        prompt = self.prompt.expand(len(latents), -1, -1)
        with captured(self.queries, stop=True) as outputs:
            unet(latents.to(unet.dtype), self.settings.sd_timestep, encoder_hidden_states=prompt, return_dict=False)
        # Straight to their place: concatenating and transposing all channels would move each value twice more.
        queries = torch.empty(len(latents), *size, self.channels, dtype=torch.float32, device=latents.device)
        for layer, place in zip(self.settings.sd_layers, queries.split(self.widths, dim=-1), strict=True):
            grid = outputs[layer].unflatten(1, attention_grid(outputs[layer].shape[1], size))  # (n, h', w', C)
            if grid.shape[1:3] != size:
                grid = grid.float().permute(0, 3, 1, 2)
                grid = F.interpolate(grid, size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
            place.copy_(grid)
        return queries
