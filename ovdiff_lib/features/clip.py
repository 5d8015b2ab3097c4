"""CLIP's image tower as a feature extractor (Table 2): the keys or the tokens of one of its layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import OVDiffError, ProfileError
from ovdiff_lib.models import captured, load_clip

if TYPE_CHECKING:
    from transformers import CLIPModel

    from ovdiff_lib.profiles import Profile
    from ovdiff_lib.profiles.profile import Features

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipExtractor:
    """``kind`` "keys": output of ``k_proj`` of layer ``features.clip_layer``; "tokens": output of that whole layer.

    Images are resized so that the short side is ``clip_input_size``; a smaller square, which is what a small matching window is,
    keeps its size. Then both sides are rounded up to a multiple of the patch. Position embeddings are interpolated (bicubic),
    the class token is dropped. Nothing is drawn: seeds have no effect.
    """

    def __init__(self, model: CLIPModel, settings: Features, kind: str) -> None:
        """Raises ``ProfileError`` for a layer the model does not have or a size that is not positive."""
        layers = model.vision_model.encoder.layers
        if not -len(layers) <= settings.clip_layer < len(layers):
            raise ProfileError(f"features.clip_layer is {settings.clip_layer}; CLIP has {len(layers)} layers, 0 to {len(layers) - 1} "
                               f"or -1 to {-len(layers)} from the end.")
        for name in ("clip_input_size", "batch_size"):
            if getattr(settings, name) < 1:
                raise ProfileError(f"features.{name} is {getattr(settings, name)}; it must be at least 1.")
        self.name, self.model, self.settings = f"clip-{kind}", model, settings
        layer = layers[settings.clip_layer]
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = {"keys": layer.self_attn.k_proj, "tokens": layer}[kind]
        self.patch = model.config.vision_config.patch_size
        self.channels = model.config.vision_config.hidden_size

    @classmethod
    def build(cls, profile: Profile, kind: str) -> ClipExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_clip(profile)[0], profile.features, kind)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """Images u8 (n, H, W, 3) to features f32 (n, h, w, D) on the CPU, one a patch."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(seeds):
            raise ValueError(f"expected u8 (n, H, W, 3) images and n seeds, got {images.dtype} {images.shape} and {len(seeds)} seeds")
        size = self.input_size(images.shape[1], images.shape[2])
        step = self.settings.batch_size
        chunks = [self._extract(images[i:i + step], size) for i in range(0, len(images), step)]
        if not chunks:
            return torch.zeros(0, size[0] // self.patch, size[1] // self.patch, self.channels)
        features = torch.cat(chunks)
        if not torch.isfinite(features).all():
            raise OVDiffError("CLIP gave features that are not finite; use models.dtype float32 or check its weights.")
        return features

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which CLIP sees an image of that size."""
        short = self.settings.clip_input_size
        if height != width or height > short:
            scale = short / min(height, width)
            height, width = int(height * scale + 0.5), int(width * scale + 0.5)
        return math.ceil(height / self.patch) * self.patch, math.ceil(width / self.patch) * self.patch

    def _extract(self, images: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        device, dtype = self.model.device, self.model.dtype
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(device, torch.float32) / 255
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        with captured({"source": self.source}) as outputs:
            self.model.vision_model(pixel_values=((pixels - mean) / std).to(dtype), interpolate_pos_encoding=True)
        patches = outputs["source"][:, 1:].float()  # without the class token
        return patches.unflatten(1, (size[0] // self.patch, size[1] // self.patch)).cpu()
