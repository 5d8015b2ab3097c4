"""What the baselines share: their two methods, and class names and images as unit vectors of CLIP's joint space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.networks.instruments import undisturbed

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer



class Baseline(Protocol):
    """Open-vocabulary segmentation of one image at a time."""

    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W) of an image u8 (H, W, 3), row 0 the background: -inf or a constant where the method has no model of it."""
        ...

    def predict(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Labels i64 (H, W): 0 = background, i + 1 = category i."""
        ...


class TextEmbeddings:
    """Text embeddings of class names, averaged over ``templates``, each of which has ``{name}`` where the name goes."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, templates: Sequence[str]) -> None:
        """Raises ``InputError`` for templates that are no list of texts with ``{name}``."""
        if isinstance(templates, str) or not templates or not all("{name}" in t for t in templates):
            raise InputError(f"The prompt templates {templates!r} must be a list of at least one text, each with {{name}} in it.")
        self.clip, self.tokenizer, self.templates = clip, tokenizer, tuple(templates)
        self._known: dict[tuple[str, ...], Tensor] = {}

    @undisturbed()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """f32 (C, D) on the CPU, unit length: mean over templates of the normalised embeddings. Kept for the next image."""
        prompts = tuple(prompts)
        if prompts not in self._known:
            total = torch.zeros((), dtype=torch.float32, device="cpu")
            for template in self.templates:
                # Replaced, not formatted: a class name or template may hold braces.
                texts = [template.replace("{name}", prompt) for prompt in prompts]
                tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
                total = total + F.normalize(self.clip.get_text_features(**tokens).pooler_output.float().cpu(), dim=-1)
            self._known[prompts] = F.normalize(total, dim=-1)
        return self._known[prompts]


def clip_pixels(clip: CLIPModel, images: np.ndarray, size: tuple[int, int] | None = None) -> Tensor:
    """Images u8 (n, H, W, 3) as CLIP's normalised pixels (n, 3, H, W), or resized (n, 3, *size), on its device and in its dtype."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if size is not None and tuple(size) != images.shape[1:3]:
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).to(clip.device, clip.dtype)


@undisturbed()
def embed_images(clip: CLIPModel, images: np.ndarray) -> Tensor:
    """Image embeddings f32 (n, D) on the CPU, unit length, of squares u8 (n, S, S, 3) of CLIP's own input size."""
    return F.normalize(clip.get_image_features(pixel_values=clip_pixels(clip, images)).pooler_output.float().cpu(), dim=-1)
