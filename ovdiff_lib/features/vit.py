"""What the extractors that are vision transformers share: the size at which an image is seen, pixel statistics,
batches, the patch grid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.instruments import all_finite, batches, captured, undisturbed

if TYPE_CHECKING:
    from ovdiff_lib.profiles.schema import Features

MOST_PATCHES = 16_384
"""Attention goes by the square of their number: 128 x 128 of them is the most that an image may make."""


class ViTExtractor(ABC):
    """Features of a frozen ViT, one a patch, raw. A subclass names the ``source``, the module whose output is read, and
    runs the model.

    The short side becomes ``features.<size_field>``, but a smaller square (a small window) keeps its size; then both
    sides are multiplied by ``features.vit_scale`` and rounded up to whole patches. Position embeddings are interpolated
    to that grid, the class token is dropped. Nothing is drawn: seeds have no effect.
    """

    title: str
    """What error messages call the model."""

    def __init__(self, name: str, model: Any, settings: Features, size_field: str, patch: int, channels: int) -> None:
        self.name, self.model, self.settings, self.patch, self.channels = name, model, settings, patch, channels
        self.short = getattr(settings, size_field)
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.source: torch.nn.Module | None = None

    @undisturbed()
    def __call__(self, images: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """Images u8 (n, H, W, 3) to features f32 (n, h, w, D) on the CPU, one a patch."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(seeds):
            raise ValueError(f"expected u8 (n, H, W, 3) images and n seeds, got {images.dtype} {images.shape} and {len(seeds)} seeds")
        size = self.input_size(images.shape[1], images.shape[2])
        chunks = [self._extract(images[i:j], size) for i, j in batches(len(images), self.settings.batch_size)]
        if not chunks:
            return torch.zeros(0, size[0] // self.patch, size[1] // self.patch, self.channels, dtype=torch.float32, device="cpu")
        features = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        if not all_finite(features):
            raise OVDiffError(f"{self.title} gave features that are not finite; use models.dtype float32 or check its weights.")
        return features

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which the model sees an image of that size.

        Raises ``InputError`` for an image without pixels and for one that makes more than :data:`MOST_PATCHES`, as
        elongated ones do.
        """
        given = f"{height} x {width} pixels"
        if height < 1 or width < 1:
            raise InputError(f"An image of {given} shows nothing; give one of at least 1 x 1.")
        if height != width or height > self.short:
            scale = self.short / min(height, width)
            height, width = int(height * scale + 0.5), int(width * scale + 0.5)
        height, width = height * self.settings.vit_scale, width * self.settings.vit_scale
        h, w = math.ceil(height / self.patch), math.ceil(width / self.patch)
        if h * w > MOST_PATCHES:
            raise InputError(f"An image of {given} makes {h} x {w} patches for {self.title}, more than {MOST_PATCHES:,}; crop it to one "
                             "less elongated, or lower the input size or features.vit_scale.")
        return h * self.patch, w * self.patch

    @abstractmethod
    def run(self, pixels: torch.Tensor) -> None:
        """One forward pass of normalised pixels (n, 3, H, W), H and W multiples of the patch, on the model's device and
        in its dtype."""

    def features_of(self, output: torch.Tensor) -> torch.Tensor:
        """(n, 1 + hw, D) from what the source put out, class token first, patches row by row; here the output
        itself."""
        return output

    def _extract(self, images: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        parameter = next(self.model.parameters())
        device, dtype = parameter.device, parameter.dtype
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(device, torch.float32) / 255
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (self.mean, self.std))
        with captured({"source": self.source}) as outputs:
            self.run(((pixels - mean) / std).to(dtype))
        patches = self.features_of(outputs["source"])[:, 1:].float()  # without the class token
        return patches.unflatten(1, (size[0] // self.patch, size[1] // self.patch)).cpu()
