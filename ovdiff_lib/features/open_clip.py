"""CLIP of the open_clip library as a feature extractor (Table 2): the keys or the tokens of one of its layers.

As :mod:`~ovdiff_lib.features.vit`, for what open_clip's authors and others published in that library's own format.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ovdiff_lib.features.vit import NORMALISATIONS, ViTExtractor, clip_layer
from ovdiff_lib.networks.loading import complete, load_network
from ovdiff_lib.profiles.schema import Features

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


class OpenClipExtractor(ViTExtractor):
    """``kind``, layer, short side and pixel statistics as :class:`~ovdiff_lib.features.vit.ClipExtractor` has them."""

    title, load = "CLIP of open_clip", staticmethod(lambda profile: load_network(profile, "open_clip", _build))

    def __init__(self, visual: VisionTransformer, settings: Features, kind: str) -> None:
        """Raises ``ProfileError`` for a layer the model does not have."""
        patch, channels = visual.patch_size[0], visual.conv1.out_channels
        super().__init__(f"open-clip-{kind}", visual, settings, settings.clip_input_size, patch, channels)
        layer = clip_layer(visual.transformer.resblocks, settings)
        self.kind, self.attention = kind, layer.attn
        # Attention is one fused operation and no module puts the keys out: they are projected again from its input.
        self.source = {"keys": layer.ln_1, "tokens": layer}[kind]
        self.statistics = NORMALISATIONS[settings.clip_normalisation]

    def run(self, pixels: torch.Tensor) -> None:
        """The tower's position embeddings (1 + side^2, D), class token first, fit one input size: those of this size
        take their place, resized without antialiasing as transformers does it (open_clip itself antialiases)."""
        positions, grid = self.model.positional_embedding, [length // self.patch for length in pixels.shape[-2:]]
        side = math.isqrt(len(positions) - 1)
        patches = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        positions = torch.cat([positions[:1], patches[0].flatten(1).T])
        torch.func.functional_call(self.model, {"positional_embedding": positions}, (pixels,))

    def features_of(self, output: torch.Tensor) -> torch.Tensor:
        """Keys: rows D to 2 D of the fused projection, heads side by side."""
        if self.kind == "tokens":
            return output
        weight, bias = self.attention.in_proj_weight.chunk(3)[1], self.attention.in_proj_bias.chunk(3)[1]
        return F.linear(output, weight, bias)


def _build(source: Path | str, device: torch.device, dtype: torch.dtype, _options: dict) -> VisionTransformer:
    import open_clip
    from open_clip.transformer import VisionTransformer

    place = f"{'local-dir' if isinstance(source, Path) else 'hf-hub'}:{source}"
    try:  # some of open_clip's failures only log and leave random weights, unless they are required
        visual = open_clip.create_model(place, require_pretrained=True).visual
    except StopIteration as error:
        raise ValueError("its weights are an empty table") from error
    if not isinstance(visual, VisionTransformer):
        raise ValueError(f"its image tower is a {type(visual).__name__}, not a plain ViT")
    return complete(visual).to(device, dtype)
