"""Category pre-filter (Sec. 3.4): CLIP decides which categories of the vocabulary an image shows at all.

Single names narrow the vocabulary to at most eta categories; then every non-empty subset of those becomes one prompt,
"a and b and c", and the prompt most like the image decides. Those are 2^eta - 1 prompts, which
:mod:`~ovdiff_lib.networks.clip_text` encodes together.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.networks.clip_text import TextEncoder, unit
from ovdiff_lib.networks.instruments import normalised, undisturbed
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.schema import Profile

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


class CategoryFilter:
    """Which categories of a vocabulary are in an image, by CLIP.

    The result depends on the image, the vocabulary and the profile alone; text embeddings are kept for other images.
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, profile: Profile) -> None:
        self.settings, self.clip = profile.filters, clip
        self.text = TextEncoder(clip, tokenizer)
        self._names = functools.lru_cache(1)(self._names_of)  # of a large vocabulary too many to look up for each image

    @classmethod
    def build(cls, profile: Profile) -> CategoryFilter:
        """The filter with the CLIP of the profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        return cls(*load_clip(profile), profile)

    @undisturbed()
    def __call__(self, image: np.ndarray, vocabulary: Vocabulary) -> tuple[tuple[int, ...], np.ndarray]:
        """Indices of the kept categories in vocabulary order (never empty), and the class probabilities f32 (C,):
        softmax of logit scale x cosine over the vocabulary.

        ``image`` is u8 (H, W, 3). Categories above 1/C stay, at most ``category_top``; of their subsets the one whose
        joined prompt is most like the image is kept. With ``category_keep_stuff`` things alone are judged, and stuff
        stays, with probability 1. Raises ``InputError`` for a name that is too long for CLIP.
        """
        always = {i for i, c in enumerate(vocabulary) if self.settings.category_keep_stuff and c.kind == "stuff"}
        judged = [i for i in range(len(vocabulary)) if i not in always]
        probabilities = np.ones(len(vocabulary), dtype=np.float32)
        if not judged:
            return tuple(sorted(always)), probabilities
        embedding, scale = self.embed_image(image), self.settings.category_logit_scale
        cosine = self._names(vocabulary)[judged] @ embedding.double()
        scale = float(self.clip.logit_scale.detach().exp()) if scale is None else scale
        probabilities[judged] = torch.softmax(scale * cosine, 0).numpy()
        order = sorted(judged, key=lambda i: (-probabilities[i], i))
        # The slack is for rounding: equal probabilities are each exactly 1/C, and one class alone has probability 1.
        bar = (1 - 1e-5) / len(judged)
        top = sorted(i for i in order[: self.settings.category_top] if probabilities[i] >= bar) or order[:1]
        subsets = [s for size in range(1, len(top) + 1) for s in itertools.combinations(top, size)]
        texts = [self._prompt([vocabulary.categories[i] for i in subset]) for subset in subsets]
        fitting = [n for n, fits in enumerate(self.text.fits(texts)) if fits]
        if len(fitting) < len(texts):
            warnings.warn(f"The category filter left out {len(texts) - len(fitting)} of {len(texts)} joined prompts "
                          f"that are longer than CLIP's {self.text.length} tokens; lower filters.category_top or "
                          "shorten class names.", stacklevel=2)
        similarity = self.text([texts[n] for n in fitting]) @ embedding
        best = subsets[fitting[int(similarity.argmax())]]
        return tuple(sorted(always.union(best))), probabilities

    @undisturbed()
    def embed_image(self, image: np.ndarray) -> torch.Tensor:
        """L2-normalised CLIP embedding f32 (E,), on the CPU, of an image u8 (H, W, 3)."""
        square = square_image(image, self.clip.config.vision_config.image_size, self.settings.category_crop)
        pixels = normalised(square[None], self.clip.visual_projection.weight, (CLIP_MEAN, CLIP_STD))
        return unit(self.clip.get_image_features(pixel_values=pixels).pooler_output)[0]

    def _names_of(self, vocabulary: Vocabulary) -> torch.Tensor:
        """Embeddings f64 (C, E) of the single names."""
        texts = [self._prompt([category]) for category in vocabulary]
        for category, fits in zip(vocabulary, self.text.fits(texts), strict=True):
            if not fits:
                raise InputError(f"The class {category.name[:40]!r} makes a prompt longer than CLIP's "
                                 f"{self.text.length} tokens; shorten it.")
        return self.text(texts).double()

    def _prompt(self, categories: list[Category]) -> str:
        joined = self.settings.category_joiner.join(c.prompt for c in categories)
        return self.settings.category_prompt.replace("{names}", joined)


def square_image(image: np.ndarray, side: int, crop: str) -> np.ndarray:
    """An image u8 (H, W, 3) as CLIP's u8 (side, side, 3), bicubic: "squash" ignores the aspect, "centre" cuts it."""
    height, width = image.shape[:2]
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = None if crop == "squash" else (left, top, left + short, top + short)
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box))
