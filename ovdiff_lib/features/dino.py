"""DINO as a feature extractor (Table 2): the keys of its last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.loading import last_attention, load_dino

if TYPE_CHECKING:
    from transformers import ViTModel

    from ovdiff_lib.profiles.schema import Features, Profile


class DinoExtractor(ViTExtractor):
    """Output of ``k_proj`` of the last layer, heads side by side; the short side is ``features.dino_input_size``."""

    title = "DINO"

    def __init__(self, model: ViTModel, settings: Features) -> None:
        super().__init__("dino", model, settings, "dino_input_size", model.config.patch_size, model.config.hidden_size)
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = last_attention(model).k_proj

    @classmethod
    def build(cls, profile: Profile) -> DinoExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_dino(profile), profile.features)

    def run(self, pixels: torch.Tensor) -> None:
        """Through the whole model, positions interpolated."""
        self.model(pixels, interpolate_pos_encoding=True)
