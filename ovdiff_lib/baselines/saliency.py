"""Where an image shows an object at all, without training: the first step of FOUND (Siméoni et al., 2023), by a frozen DINO.

FOUND looks for the background instead of the object: the patch that the class token attends to least is the background's seed, and the
patches like it are background. The published method then trains a 1 x 1 convolution on these masks; here there is no such second step.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.features.dino import DinoExtractor
from ovdiff_lib.models import captured
from ovdiff_lib.profiles import Profile

TINY = 1e-10
"""Keeps the logarithm finite for a head that attends nowhere."""


class BackgroundSeed:
    """Saliency of the patches of an image, by the last layer of ``extractor``'s DINO; ``cosine`` is the similarity to the background seed
    at which a patch is half salient."""

    def __init__(self, extractor: DinoExtractor, cosine: float) -> None:
        """Raises ``ProfileError`` for a cosine outside (0, 0.5]: beyond, the seed itself would not be background."""
        if not 0 < cosine <= 0.5:
            raise ProfileError(f"baselines.clip_diy_seed_cosine is {cosine}; set it to a number above 0 and at most 0.5.")
        self.extractor, self.cosine = extractor, cosine
        attention = extractor.model.layers[-1].attention
        self.sources = {"queries": attention.q_proj, "keys": attention.k_proj}

    @classmethod
    def build(cls, profile: Profile) -> BackgroundSeed:
        """With ``models.dino``. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        return cls(DinoExtractor.build(profile), profile.baselines.clip_diy_seed_cosine)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """f32 (n, n) in [0, 1], one value a patch, of an image u8 (H, W, 3), which is squashed to a square of ``features.dino_input_size``.

        0 at the seed and at what is much like it, 1 where nothing is.
        """
        side = self.extractor.short
        square = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        with captured(self.sources) as outputs:
            grid = self.extractor(square[None], np.zeros(1, np.int64)).shape[1:3]
        heads = self.extractor.model.config.num_attention_heads
        queries, keys = (outputs[name][0].float().cpu().unflatten(1, (heads, -1)) for name in ("queries", "keys"))
        attention = torch.softmax(torch.einsum("hd,nhd->hn", queries[0], keys) * keys.shape[-1] ** -0.5, dim=1)[:, 1:]
        return saliency(attention, keys[1:], self.cosine).reshape(tuple(grid))


def saliency(attention: Tensor, keys: Tensor, cosine: float) -> Tensor:
    """f32 (n,) in [0, 1]: 1 for patches of no similarity to the background seed, 0.5 at ``cosine``, 0 from twice that on.

    ``attention`` (heads, n) is what each head's class token pays to each patch, ``keys`` (n, heads, d) are the patches' features. Heads
    that attend to few patches count more, for the seed and for the similarity (FOUND's sparsity weights).
    """
    spread = (attention > attention.mean()).float().mean(1) + TINY
    weight = torch.log(spread.sum() / spread)  # (heads,)
    unit = F.normalize((keys * weight[:, None]).flatten(1), dim=1)
    seed = (attention * weight[:, None]).sum(0).argmin()
    return 1 - (unit @ unit[seed] / (2 * cosine)).clamp(0, 1)
