"""Stable Diffusion as a feature extractor (App. C.2): cross-attention queries of a UNet that sees the slightly noised
image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import OVDiffError, ProfileError
from ovdiff_lib.networks.instruments import all_finite, attention_grid, batches, captured, undisturbed
from ovdiff_lib.networks.loading import load_diffusion

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from ovdiff_lib.profiles.schema import Features, Profile

QUERY = ".transformer_blocks.0.attn2.to_q"


class DiffusionExtractor:
    """Queries of ``features.sd_layers``, brought to the latent grid and concatenated in that order.

    An image becomes a square of ``sd_input_size``, is encoded by the VAE, noised to ``sd_timestep`` (tau) and passed
    through the UNet once, with the empty prompt ("unconditional mode"). The noise is the image's own (``sd_noise:
    seeded``) or the same for all (``fixed``); features of several ``sd_noise_samples`` are averaged.
    """

    name = "sd"

    @undisturbed()
    def __init__(self, pipe: StableDiffusionPipeline, settings: Features) -> None:
        """Raises ``ProfileError`` for layers the UNet does not have and for values out of range."""
        self.pipe, self.settings = pipe, settings
        self.device = pipe.device  # which diffusers looks for in all modules at each call
        modules = dict(pipe.unet.named_modules())
        legal = [name.removesuffix(QUERY) for name in modules if name.endswith(QUERY)]
        unknown = [layer for layer in settings.sd_layers if layer not in legal]
        if unknown or not settings.sd_layers:
            wrong = f"names {', '.join(unknown)}, which the UNet does not have" if unknown else "is empty"
            raise ProfileError(f"features.sd_layers {wrong}; the legal ones are {', '.join(legal)}.")
        self.queries = {layer: modules[layer + QUERY] for layer in settings.sd_layers}
        self.widths = [self.queries[layer].out_features for layer in settings.sd_layers]
        self.channels = sum(self.widths)
        self._check_settings()
        # The closed form of Sec. 3 of DDPM, z_tau = sqrt(a) z_0 + sqrt(1 - a) noise. Not the scheduler's add_noise: that of
        # DPMSolverMultistepScheduler looks the timestep up in its current sampling grid and is silently wrong outside it.
        self.signal = float(pipe.scheduler.alphas_cumprod[settings.sd_timestep])
        self.prompt = pipe.encode_prompt("", pipe.device, 1, False)[0]

    @classmethod
    def build(cls, profile: Profile) -> DiffusionExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_diffusion(profile), profile.features)

    any_size = True
    """Images of one call may differ in size: all of them become the same square."""

    @undisturbed()
    def __call__(self, images: np.ndarray | Sequence[np.ndarray], seeds: np.ndarray) -> torch.Tensor:
        """Images u8 (n, H, W, 3), or n images u8 (H, W, 3) of any sizes, and one i64 seed an image to queries f32 (n,
        h, w, D) on the CPU, (h, w) the latent grid."""
        wrong = [i for i in images if i.ndim != 3 or i.shape[-1] != 3 or i.dtype != np.uint8]
        if wrong or len(images) != len(seeds):
            found = f"{wrong[0].dtype} {wrong[0].shape}" if wrong else f"{len(images)} images"
            raise ValueError(f"expected u8 (H, W, 3) images and as many seeds, got {found} and {len(seeds)} seeds")
        chunks = [self._extract(images[i:j], seeds[i:j]) for i, j in batches(len(images), self.settings.batch_size)]
        if not chunks:
            side = self.settings.sd_input_size // self.pipe.vae_scale_factor
            return torch.zeros(0, side, side, self.channels, dtype=torch.float32, device="cpu")
        features = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        if not all_finite(features):
            raise OVDiffError("The diffusion model gave features that are not finite; use models.dtype float32 or check its weights.")
        return features

    def _squares(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """f32 (n, 3, S, S) in [-1, 1]; neighbours of one size are resized together."""
        side, squares = self.settings.sd_input_size, []
        for shape, alike in itertools.groupby(images, lambda image: image.shape):
            # Contiguous: the order of an array in memory would show in the last bits of the features.
            array = np.ascontiguousarray(np.stack(list(alike)))
            pixels = torch.from_numpy(array).permute(0, 3, 1, 2).to(self.device, torch.float32) / 127.5 - 1
            if shape[:2] != (side, side):
                pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
            squares.append(pixels)
        return torch.cat(squares)

    def _extract(self, images: Sequence[np.ndarray], seeds: np.ndarray) -> torch.Tensor:
        pipe, settings = self.pipe, self.settings
        pixels = self._squares(images)
        posterior = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist
        noises, wiggle = self._draw(seeds, tuple(posterior.mean.shape[1:]))
        latents = posterior.mean.float()
        if settings.sd_latent == "sample":
            latents = latents + posterior.std.float() * wiggle
        latents = latents * pipe.vae.config.scaling_factor
        total: torch.Tensor | None = None
        for noise in noises:
            queries = self._queries_of(self.signal ** 0.5 * latents + (1 - self.signal) ** 0.5 * noise)
            total = queries if total is None else total.add_(queries)
        return total.div_(len(noises)).cpu()

    def _draw(self, seeds: np.ndarray, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise at tau (samples, n, c, h, w) and for the VAE posterior (n, c, h, w), from each image's own
        generator."""
        drawn = []
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(int(seed) if self.settings.sd_noise == "seeded" else self.settings.seed)
            drawn.append(torch.randn(self.settings.sd_noise_samples + 1, *shape, generator=generator, dtype=torch.float32, device="cpu"))
        drawn = torch.stack(drawn, dim=1).to(self.device)
        return drawn[:-1], drawn[-1]

    def _queries_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Concatenated queries f32 (n, h, w, D) of one UNet call on noised latents f32 (n, c, h, w); it ends at the
        last layer wanted."""
        unet, size = self.pipe.unet, tuple(latents.shape[-2:])
        with captured(self.queries, stop=True) as outputs:
            unet(latents.to(unet.dtype), self.settings.sd_timestep, encoder_hidden_states=self.prompt.expand(len(latents), -1, -1),
                 return_dict=False)
        # Straight to where they belong: a concatenation and a transposition of all channels would move each value twice more.
        queries = torch.empty(len(latents), *size, self.channels, dtype=torch.float32, device=latents.device)
        for layer, place in zip(self.settings.sd_layers, queries.split(self.widths, dim=-1), strict=True):
            grid = outputs[layer].unflatten(1, attention_grid(outputs[layer].shape[1], size))  # (n, h', w', C), heads side by side
            if grid.shape[1:3] != size:
                grid = F.interpolate(grid.float().permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
            place.copy_(grid)
        return queries

    def _check_settings(self) -> None:
        settings, steps = self.settings, self.pipe.scheduler.config.num_train_timesteps
        if settings.sd_timestep >= steps:
            raise ProfileError(f"features.sd_timestep is {settings.sd_timestep}; it must be from 0 to {steps - 1}.")
        factor = self.pipe.vae_scale_factor
        if settings.sd_input_size < factor or settings.sd_input_size % factor:
            raise ProfileError(f"features.sd_input_size is {settings.sd_input_size}; it must be a positive multiple of {factor}.")
