"""DINO as a feature extractor (Table 2): the keys of its last layer."""

from __future__ import annotations

import torch

from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.loading import last_attention, load_dino
from ovdiff_lib.profiles.schema import Features, Profile


class DinoExtractor(ViTExtractor):
    """Output of ``k_proj`` of the last layer of transformers' ``ViTModel``, heads side by side.

    The short side is ``features.dino_input_size``.
    """

    title = "DINO"

    def __init__(self, model: torch.nn.Module, settings: Features) -> None:
        config = model.config
        super().__init__("dino", model, settings, settings.dino_input_size, config.patch_size, config.hidden_size)
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = last_attention(model).k_proj

    @classmethod
    def build(cls, profile: Profile) -> DinoExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_dino(profile), profile.features)

    def run(self, pixels: torch.Tensor) -> None:
        self.model(pixels, interpolate_pos_encoding=True)
