"""Vision transformers as feature extractors (Table 2): the keys of DINO and MAE, the keys or the tokens of CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.instruments import captured, gathered, normalised, undisturbed
from ovdiff_lib.networks.loading import last_projection, load_clip, load_dino, load_mae
from ovdiff_lib.profiles.schema import Features, Profile

MOST_PATCHES = 16_384
"""Attention goes by the square of their number: 128 x 128 of them is the most that an image may make."""

NORMALISATIONS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}


class ViTExtractor:
    """Features of a frozen ViT, one a patch, raw.

    The short side becomes ``short`` pixels, but a smaller square (a small window) keeps its size; then both sides are
    multiplied by ``features.vit_scale`` and rounded up to whole patches. Position embeddings are interpolated to that
    grid, the class token is dropped. Nothing is drawn: seeds have no effect.
    """

    title: str  # what error messages call the model
    load: Callable[[Profile], Any]  # the model of a profile
    source: torch.nn.Module  # the module whose output is read
    statistics = NORMALISATIONS["imagenet"]  # of the pixels

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
        size = self.input_size(*images.shape[1:3])
        shape = size[0] // self.patch, size[1] // self.patch, self.channels
        return gathered(lambda part, _: self._extract(part, size), images, seeds, shape, self.settings.batch_size,
                        self.title)

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

    def run(self, pixels: torch.Tensor) -> None:
        """One forward pass of normalised pixels (n, 3, H, W), H and W multiples of the patch, in the model's dtype."""
        self.model(pixels, interpolate_pos_encoding=True)

    def features_of(self, output: torch.Tensor) -> torch.Tensor:
        """(n, 1 + hw, D) of what the source put out, class token first, patches row by row; here the output itself."""
        return output

    def _extract(self, images: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        pixels = normalised(images, next(self.model.parameters()), self.statistics, size)
        with captured({"source": self.source}) as outputs:
            self.run(pixels)
        patches = self.features_of(outputs["source"])[:, 1:]  # without the class token
        return patches.unflatten(1, (size[0] // self.patch, size[1] // self.patch))


class LastKeys(ViTExtractor):
    """Output of ``k_proj`` of the last layer of a ViT of transformers, heads side by side.

    The short side is ``features.dino_input_size`` or ``features.mae_input_size``.
    """

    def __init__(self, model: torch.nn.Module, settings: Features) -> None:
        short, config = getattr(settings, f"{self.name}_input_size"), model.config
        super().__init__(self.name, model, settings, short, config.patch_size, config.hidden_size)
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = last_projection(model, "k_proj")


class DinoExtractor(LastKeys):
    """DINO (Caron et al., 2021): the keys of the last attention layer of transformers' ``ViTModel``."""

    name, title, load = "dino", "DINO", staticmethod(load_dino)


class MaeExtractor(LastKeys):
    """Of transformers' ``ViTMAEModel``, no patch hidden. The paper's checkpoint, pre-trained at 448 pixels
    ("long_seq_mae"), is published in a format of its own, which is not read."""

    name, title, load = "mae", "MAE", staticmethod(load_mae)

    def run(self, pixels: torch.Tensor) -> None:
        """Patches are sorted by their "noise" even if none is hidden: rising noise keeps them row by row."""
        count = pixels.shape[-2] // self.patch * (pixels.shape[-1] // self.patch)
        noise = torch.arange(count, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
        self.model(pixels, noise=noise, interpolate_pos_encoding=True)


class ClipExtractor(ViTExtractor):
    """Of the image tower of transformers' ``CLIPModel``. ``kind`` "keys": output of ``k_proj`` of layer
    ``features.clip_layer``; "tokens": output of that whole layer.

    The short side is ``features.clip_input_size``, the pixel statistics those of ``features.clip_normalisation``.
    """

    title, load = "CLIP", staticmethod(lambda profile: load_clip(profile)[0].vision_model)

    def __init__(self, model: torch.nn.Module, settings: Features, kind: str) -> None:
        """Raises ``ProfileError`` for a layer the model does not have."""
        patch, channels = model.config.patch_size, model.config.hidden_size
        super().__init__(f"clip-{kind}", model, settings, settings.clip_input_size, patch, channels)
        layer = clip_layer(model.encoder.layers, settings)
        self.source = {"keys": layer.self_attn.k_proj, "tokens": layer}[kind]  # the keys as in LastKeys
        self.statistics = NORMALISATIONS[settings.clip_normalisation]


def clip_layer(layers: torch.nn.ModuleList, settings: Features) -> torch.nn.Module:
    """Layer ``features.clip_layer`` of CLIP's image tower. Raises ``ProfileError`` if there is none."""
    if not -len(layers) <= settings.clip_layer < len(layers):
        raise ProfileError(f"features.clip_layer is {settings.clip_layer}; CLIP has {len(layers)} layers, 0 to "
                           f"{len(layers) - 1} or -1 to {-len(layers)} from the end.")
    return layers[settings.clip_layer]
