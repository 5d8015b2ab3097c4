"""CLIP's image tower as a feature extractor (Table 2): the keys or the tokens of one of its layers."""

from __future__ import annotations

import torch

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.schema import Features

NORMALISATIONS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}


class ClipExtractor(ViTExtractor):
    """Of transformers' ``CLIPModel``. ``kind`` "keys": output of ``k_proj`` of layer ``features.clip_layer``; "tokens":
    output of that whole layer.

    The short side is ``features.clip_input_size``, the pixel statistics those of ``features.clip_normalisation``.
    """

    title, load = "CLIP", staticmethod(lambda profile: load_clip(profile)[0])

    def __init__(self, model: torch.nn.Module, settings: Features, kind: str) -> None:
        """Raises ``ProfileError`` for a layer the model does not have."""
        patch, channels = model.config.vision_config.patch_size, model.config.vision_config.hidden_size
        super().__init__(f"clip-{kind}", model, settings, settings.clip_input_size, patch, channels)
        layer = clip_layer(model.vision_model.encoder.layers, settings)
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = {"keys": layer.self_attn.k_proj, "tokens": layer}[kind]
        self.mean, self.std = NORMALISATIONS[settings.clip_normalisation]

    def run(self, pixels: torch.Tensor) -> None:
        self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)


def clip_layer(layers: torch.nn.ModuleList, settings: Features) -> torch.nn.Module:
    """Layer ``features.clip_layer`` of CLIP's image tower. Raises ``ProfileError`` if there is none."""
    if not -len(layers) <= settings.clip_layer < len(layers):
        raise ProfileError(f"features.clip_layer is {settings.clip_layer}; CLIP has {len(layers)} layers, 0 to "
                           f"{len(layers) - 1} or -1 to {-len(layers)} from the end.")
    return layers[settings.clip_layer]
