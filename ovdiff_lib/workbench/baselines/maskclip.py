"""MaskCLIP (Zhou et al., 2022; Table 1): dense CLIP features compared with the text embeddings of the class names.

The last block of the image tower attends nowhere: every token keeps its own value, so that its embedding stays local.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.schema import Matching, Profile
from ovdiff_lib.workbench.baselines.common import Baseline, TextEmbeddings, clip_pixels, sliding_scores

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer



class MaskCLIP(Baseline):
    """Open-vocabulary segmentation by a CLIP model alone.

    ``clip`` is a ``transformers.CLIPModel`` and ``tokenizer`` its tokenizer; ``matching`` gives short side, windows and stride, the same
    as OVDiff's. Text embeddings are averaged over ``templates``, each with ``{name}`` for the class. ``background_threshold`` is the
    constant score of the background; None = there is no background, as in the published evaluation without one. CLIP sees its windows
    enlarged by ``scale``, as OVDiff's own ViTs do (``features.vit_scale``). To evaluate::

        evaluate(lambda image: maskclip.predict(image, dataset.vocabulary), dataset)
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, matching: Matching, templates: Sequence[str],
                 background_threshold: float | None = None, scale: float = 1.0) -> None:
        """Raises ``InputError`` for templates without ``{name}`` and for windows that split a patch."""
        self.texts = TextEmbeddings(clip, tokenizer, templates)
        patch = clip.config.vision_config.patch_size
        odd = [w for w in matching.windows if w % patch]
        if odd:
            raise InputError(f"MaskCLIP needs windows that are multiples of its patch size {patch}, and {odd[0]} is not;"
                             " change matching.windows.")
        self.clip, self.tokenizer, self.matching = clip, tokenizer, matching
        self.templates, self.background_threshold, self.scale = self.texts.templates, background_threshold, scale

    @classmethod
    def build(cls, profile: Profile) -> MaskCLIP:
        """With the CLIP, the windows, the scale and the prompt (``support.prompt``) of a profile. Raises ``ModelNotAvailable`` and
        ``InputError``."""
        return cls(*load_clip(profile), profile.matching, (profile.support.prompt,), scale=profile.features.vit_scale)

    def text_embeddings(self, vocabulary: Vocabulary) -> Tensor:
        """f32 (C, D), unit length: mean over templates of the normalised text embeddings. Kept for the next image."""
        return self.texts([c.prompt for c in vocabulary])

    @undisturbed()
    def dense_embeddings(self, images: np.ndarray) -> Tensor:
        """Images u8 (n, H, W, 3) -> f32 (n, h, w, D), unit length, in CLIP's joint space: one a patch of the images times ``scale``, both
        sides rounded up to whole patches."""
        vision = self.clip.vision_model
        patch = vision.config.patch_size
        grid = [math.ceil(side * self.scale / patch) for side in images.shape[1:3]]
        pixels = clip_pixels(self.clip, images, (grid[0] * patch, grid[1] * patch))
        x = vision.embeddings(pixels, interpolate_pos_encoding=True)
        x = vision.pre_layrnorm(x)
        *blocks, last = vision.encoder.layers
        for block in blocks:
            x = block(x, None)
        # The residual and the MLP of the last block stay; only its attention is replaced by the value path.
        x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = x + last.mlp(last.layer_norm2(x))
        x = self.clip.visual_projection(vision.post_layernorm(x[:, 1:]))  # (n, 1 + h w, channels) -> (n, h w, D)
        return F.normalize(x.float(), dim=-1).unflatten(1, tuple(grid)).cpu()

    @undisturbed()
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Cosine similarities f32 (C + 1, H, W) of ``image`` u8 (H, W, 3); row 0 is the constant background score, -inf if there is none.

        As for OVDiff: short side resized, windows of each size averaged where they overlap, sizes averaged, bilinear to (H, W).
        """
        texts = self.text_embeddings(vocabulary)
        # (n, h, w, D) -> (n, C, h, w)
        return self.beside_background(
            sliding_scores(image, self.matching, lambda crops: (self.dense_embeddings(crops) @ texts.T).permute(0, 3, 1, 2)))
