"""CLIP-DIY (Wysoczanska et al., 2024; Table 1): CLIP classifies patches of several sizes; saliency tells background.

How this differs from the published method:

- CLIP is the profile's (``models.clip``), not the ViT-B/32 trained on LAION-2B.
- FOUND's trained saliency is replaced by FOUND's first, training-free step (:class:`BackgroundSeed`), as soft values.
- Scores and saliency come to the image's size before they are multiplied, so that labels are not enlarged; a cosine
  below zero counts as zero; the words for background are ``baselines.clip_diy_background``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import ProfileError
from ovdiff_lib.features.vit import DinoExtractor
from ovdiff_lib.networks.instruments import captured, undisturbed
from ovdiff_lib.networks.loading import last_projection
from ovdiff_lib.profiles.schema import Baselines, Profile
from ovdiff_lib.workbench.baselines.common import Baseline, TextEmbeddings, embed_images, resize_maps

BATCH = 64
"""Patches that run through CLIP at a time."""

TINY = 1e-10
"""Keeps the logarithm finite for a head that attends nowhere."""


class ClipDIY(Baseline):
    """Open-vocabulary segmentation by CLIP as a classifier of patches; the background is a class of its own.

    ``saliency`` maps an image u8 (H, W, 3) to f32 (h, w) in [0, 1], ``settings`` are a profile's ``baselines``.
    """

    networks = ("embed", "saliency")

    def __init__(self, texts: TextEmbeddings, saliency: Callable[[np.ndarray], Tensor], settings: Baselines) -> None:
        """Raises ``ProfileError`` for sizes that cannot be halved as often as asked."""
        if settings.clip_diy_size % 2 ** settings.clip_diy_scales:
            raise ProfileError(f"baselines.clip_diy_size is {settings.clip_diy_size}; give a multiple of 2 to the power"
                               f" of clip_diy_scales, which is {settings.clip_diy_scales}.")
        self.texts, self.clip, self.saliency, self.settings = texts, texts.clip, saliency, settings
        self.embed = partial(embed_images, self.clip)

    @classmethod
    def build(cls, profile: Profile) -> ClipDIY:
        """With the CLIP and the DINO of a profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        seed = BackgroundSeed(DinoExtractor.build(profile), profile.baselines.clip_diy_seed_cosine)
        return cls(TextEmbeddings.build(profile, "clip-diy"), seed, profile.baselines)

    @undisturbed()
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Probabilities f32 (C + 1, H, W) of an image u8 (H, W, 3), row 0 the background.

        Without :func:`background_words` row 0 is -inf, the others are cosines by saliency, to set beside a constant.
        """
        words = background_words(self.settings, vocabulary)
        texts = self.texts((*words, *(c.prompt for c in vocabulary)))
        # A negative score would win where it is multiplied by a small number.
        cosines = resize_maps(self.cosines(image, texts), image.shape[:2]).clamp(min=0)
        salient = resize_maps(self.saliency(image)[None], image.shape[:2])
        foreground = cosines[len(words):] * salient
        if not words:
            return torch.cat([torch.full_like(salient, -torch.inf), foreground]).numpy()
        background = cosines[:len(words)].amax(0, keepdim=True) * (1 - salient)
        return torch.cat([background, foreground]).softmax(0).numpy()

    def cosines(self, image: np.ndarray, texts: Tensor) -> Tensor:
        """Cosines f32 (C, S, S) of the image u8 (H, W, 3), squashed to S = ``clip_diy_size``, with unit texts (C, D).

        At each scale patches that half overlap get one score each, a grid enlarged to S; scales are averaged.
        """
        side = self.settings.clip_diy_size
        squashed = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        scales = []
        for scale in range(self.settings.clip_diy_scales):
            patches, count = self._patches(squashed, side // 2 ** scale)
            embedded = [self.embed(patches[i:i + BATCH]) for i in range(0, len(patches), BATCH)]
            grid = torch.cat(embedded) @ texts.T
            scales.append(resize_maps(grid.T.unflatten(1, (count, count)), (side, side)))
        return torch.stack(scales).mean(0)

    def _patches(self, square: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """All patches of ``size`` pixels, row by row, as u8 (n * n, s, s, 3) of CLIP's input size s, and n."""
        views = np.lib.stride_tricks.sliding_window_view(square, (size, size), axis=(0, 1))[::size // 2, ::size // 2]
        patches = torch.from_numpy(views.reshape(-1, 3, size, size).copy())
        wanted = self.clip.config.vision_config.image_size
        if size != wanted:
            patches = F.interpolate(patches.float(), (wanted, wanted), mode="bicubic", antialias=True)
            patches = patches.clamp(0, 255).round().byte()
        return patches.permute(0, 2, 3, 1).numpy(), len(views)


def background_words(settings: Baselines, vocabulary: Vocabulary) -> list[str]:
    """Those of ``clip_diy_background`` that the vocabulary does not name: a class is not background."""
    named = {word.casefold() for c in vocabulary for word in (c.name, c.prompt)}
    return [word for word in settings.clip_diy_background if word.casefold() not in named]


class BackgroundSeed:
    """Where an image shows an object at all, without training: the first step of FOUND (Siméoni et al., 2023), by the
    last layer of ``extractor``'s DINO. ``cosine`` is as for :func:`saliency`."""

    def __init__(self, extractor: DinoExtractor, cosine: float) -> None:
        self.extractor, self.cosine = extractor, cosine
        self.sources = {"queries": last_projection(extractor.model, "q_proj"), "keys": extractor.source}

    @undisturbed()
    def __call__(self, image: np.ndarray) -> Tensor:
        """:func:`saliency` f32 (n, n) of the patches of an image u8 (H, W, 3), squashed to ``dino_input_size``."""
        side = self.extractor.short
        square = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        with captured(self.sources) as outputs:
            grid = self.extractor(square[None], np.zeros(1, np.int64)).shape[1:3]
        heads = self.extractor.model.config.num_attention_heads
        queries, keys = (outputs[n][0].float().cpu().unflatten(1, (heads, -1)) for n in ("queries", "keys"))
        logits = torch.einsum("hd,nhd->hn", queries[0], keys) * keys.shape[-1] ** -0.5
        return saliency(torch.softmax(logits, dim=1)[:, 1:], keys[1:], self.cosine).reshape(tuple(grid))


def saliency(attention: Tensor, keys: Tensor, cosine: float) -> Tensor:
    """f32 (n,) in [0, 1]: 1 for patches of no similarity to the background seed, 0.5 at ``cosine``, 0 from twice that.

    ``attention`` (heads, n) is what each head's class token pays to each patch, ``keys`` (n, heads, d) are the patches'
    features. Heads that attend to few patches count more, for seed and similarity (FOUND's sparsity weights).
    """
    spread = (attention > attention.mean()).float().mean(1) + TINY
    weight = torch.log(spread.sum() / spread)  # (heads,)
    unit = F.normalize((keys * weight[:, None]).flatten(1), dim=1)
    seed = (attention * weight[:, None]).sum(0).argmin()
    return 1 - (unit @ unit[seed] / (2 * cosine)).clamp(0, 1)
