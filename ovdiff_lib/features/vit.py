"""What extractors that are vision transformers share: input size, pixel statistics, batches, the patch grid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.instruments import captured, gathered, undisturbed
from ovdiff_lib.profiles.schema import Features, Profile

MOST_PATCHES = 16_384
"""Attention goes by the square of their number: 128 x 128 of them is the most that an image may make."""


class ViTExtractor(ABC):
    """Features of a frozen ViT, one a patch, raw.

    The short side becomes ``short`` pixels, but a smaller square (a small window) keeps its size; then both sides are
    multiplied by ``features.vit_scale`` and rounded up to whole patches. Position embeddings are interpolated to that
    grid, the class token is dropped. Nothing is drawn: seeds have no effect.
    """

    title: str  # what error messages call the model
    load: Callable[[Profile], Any]  # the model of a profile
    source: torch.nn.Module  # the module whose output is read
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, name: str, model: Any, settings: Features, short: int, patch: int, channels: int) -> None:
        self.name, self.model, self.settings = name, model, settings
        self.short, self.patch, self.channels = short, patch, channels

    @classmethod
    def build(cls, profile: Profile, **kind: str) -> ViTExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(cls.load(profile), profile.features, **kind)

    @undisturbed("features.batch_size")
    def __call__(self, images: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """Images u8 (n, H, W, 3) to features f32 (n, h, w, D), one a patch."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(seeds):
            raise ValueError(f"expected u8 (n, H, W, 3) images and n seeds, got {images.dtype} {images.shape} and "
                             f"{len(seeds)} seeds")
        size = self.input_size(*images.shape[1:3])
        shape = (len(images), size[0] // self.patch, size[1] // self.patch, self.channels)
        return gathered(lambda part: self._extract(images[part], size), shape, self.settings.batch_size, self.title)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which the model sees an image of that size.

        ``InputError`` without pixels, and above :data:`MOST_PATCHES`, as elongated images are.
        """
        given = f"{height} x {width} pixels"
        if height < 1 or width < 1:
            raise InputError(f"An image of {given} shows nothing; give one of at least 1 x 1.")
        if height != width or height > self.short:
            scale = self.short / min(height, width)
            height, width = int(height * scale + 0.5), int(width * scale + 0.5)
        h, w = (math.ceil(side * self.settings.vit_scale / self.patch) for side in (height, width))
        if h * w > MOST_PATCHES:
            raise InputError(f"An image of {given} makes {h} x {w} patches for {self.title}, more than "
                             f"{MOST_PATCHES:,}; crop it, or lower the input size or features.vit_scale.")
        return h * self.patch, w * self.patch

    @abstractmethod
    def run(self, pixels: torch.Tensor) -> None:
        """One forward pass of normalised pixels (n, 3, H, W), H and W multiples of the patch, in the model's dtype."""

    def features_of(self, output: torch.Tensor) -> torch.Tensor:
        """(n, 1 + hw, D) of what the source put out, class token first, patches row by row; here the output itself."""
        return output

    def _extract(self, images: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        like = next(self.model.parameters())
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(like.device, torch.float32) / 255
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        with captured({"source": self.source}) as outputs:
            self.run(((pixels - mean) / std).to(like.dtype))
        patches = self.features_of(outputs["source"])[:, 1:]  # without the class token
        return patches.unflatten(1, (size[0] // self.patch, size[1] // self.patch))
