"""DINO and MAE as feature extractors (Table 2): the keys of their last layer."""

from __future__ import annotations

import torch

from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.loading import last_projection, load_dino, load_mae
from ovdiff_lib.profiles.schema import Features


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
    """Of transformers' ``ViTModel``."""

    name, title, load = "dino", "DINO", staticmethod(load_dino)

    def run(self, pixels: torch.Tensor) -> None:
        self.model(pixels, interpolate_pos_encoding=True)


class MaeExtractor(LastKeys):
    """Of transformers' ``ViTMAEModel``, no patch hidden. The paper's checkpoint, pre-trained at 448 pixels
    ("long_seq_mae"), is published in a format of its own, which is not read."""

    name, title, load = "mae", "MAE", staticmethod(load_mae)

    def run(self, pixels: torch.Tensor) -> None:
        """Patches are sorted by their "noise" even if none is hidden: rising noise keeps them row by row."""
        count = pixels.shape[-2] // self.patch * (pixels.shape[-1] // self.patch)
        noise = torch.arange(count, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
        self.model(pixels, noise=noise, interpolate_pos_encoding=True)
