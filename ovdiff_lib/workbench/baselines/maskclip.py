"""MaskCLIP (Zhou et al., 2022; Table 1): dense CLIP features compared with the text embeddings of the class names.

The last block of the image tower attends nowhere: every token keeps its own value, so that its embedding stays local.
"""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.networks.instruments import normalised, undisturbed
from ovdiff_lib.profiles.schema import Matching, Profile
from ovdiff_lib.workbench.baselines.common import TextEmbeddings, Windowed


class MaskCLIP(Windowed):
    """Open-vocabulary segmentation by the CLIP of ``texts`` alone.

    It sees the windows of ``matching`` enlarged by ``scale``, as OVDiff's own ViTs do (``features.vit_scale``).
    """

    networks = ("dense_embeddings",)

    def __init__(self, texts: TextEmbeddings, matching: Matching, scale: float = 1.0) -> None:
        self.texts, self.clip, self.matching, self.scale = texts, texts.clip, matching, scale

    @classmethod
    def build(cls, profile: Profile) -> MaskCLIP:
        """With the CLIP, the templates, the windows and the scale of a profile. Raises ``ModelNotAvailable``."""
        return cls(TextEmbeddings.build(profile, "maskclip"), profile.matching, profile.features.vit_scale)

    @undisturbed()
    def dense_embeddings(self, images: np.ndarray) -> Tensor:
        """Images u8 (n, H, W, 3) -> f32 (n, h, w, D), unit length, in CLIP's joint space: one a patch of the images
        times ``scale``, both sides rounded up to whole patches."""
        vision = self.clip.vision_model
        patch = vision.config.patch_size
        grid = [math.ceil(side * self.scale / patch) for side in images.shape[1:3]]
        size, weight = (grid[0] * patch, grid[1] * patch), self.clip.visual_projection.weight
        pixels = normalised(images, weight, (CLIP_MEAN, CLIP_STD), size)
        x = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
        *blocks, last = vision.encoder.layers
        for block in blocks:
            x = block(x, None)
        # The residual and the MLP of the last block stay; only its attention is replaced by the value path.
        x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = x + last.mlp(last.layer_norm2(x))
        x = self.clip.visual_projection(vision.post_layernorm(x[:, 1:]))  # (n, 1 + h w, channels) -> (n, h w, D)
        return F.normalize(x.float(), dim=-1).unflatten(1, tuple(grid)).cpu()

    def window_scores(self, crops: np.ndarray, vocabulary: Vocabulary) -> Tensor:
        """Cosines (n, C, h, w) of the patches of windows u8 (n, S, S, 3) with the class names."""
        return (self.dense_embeddings(crops) @ self.text_embeddings(vocabulary).T).permute(0, 3, 1, 2)
