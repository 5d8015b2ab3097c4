"""What the baselines share: their two methods, class names and images as unit vectors of CLIP's joint space, and windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, resize_short_side
from ovdiff_lib.matching.windows import crop, scales
from ovdiff_lib.networks.instruments import batches, undisturbed
from ovdiff_lib.profiles.schema import Matching

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


class Baseline(ABC):
    """Open-vocabulary segmentation of one image at a time."""

    background_threshold: float | None = None
    """Constant background score of a method without a model of the background; None = there is none, or the caller searches it."""

    @abstractmethod
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W) of an image u8 (H, W, 3), row 0 the background: -inf or a constant where the method has no model of it."""

    def predict(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Labels i64 (H, W): 0 = background, i + 1 = category i."""
        return self.scores(image, vocabulary).argmax(axis=0)

    def beside_background(self, scores: Tensor) -> np.ndarray:
        """Scores (C, H, W) with the constant background's as row 0."""
        background = -torch.inf if self.background_threshold is None else self.background_threshold
        return torch.cat([scores.new_full((1, *scores.shape[1:]), background), scores]).numpy()


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


def sliding_scores(image: np.ndarray, matching: Matching, score: Callable[[np.ndarray], Tensor]) -> Tensor:
    """f32 (C, H, W) on the CPU for an image u8 (H, W, 3), through windows as OVDiff's (Sec. 4, "sliding window").

    ``score`` maps squares u8 (n, S, S, 3) to (n, C, h, w). The short side is resized, windows of each size are averaged where they overlap,
    sizes are averaged (with ``whole_image`` the squashed image is one more), bilinear to (H, W). ``matching.long_side`` has no effect.
    Raises ``ProfileError`` if there is no window.
    """
    resized = resize_short_side(image, matching.short_side, matching.resample)
    shape = resized.shape[:2]
    placed = scales(shape, matching)
    if not placed:
        raise ProfileError("matching.windows is empty; name at least one size, or set matching.whole_image to true.")
    mean = None
    for side, boxes in placed:
        squares = np.stack([crop(resized, box, side) for box in boxes])
        total, cover = None, torch.zeros(shape, dtype=torch.float32, device="cpu")
        for start, stop in batches(len(boxes), matching.batch_size):
            batch = boxes[start:stop]
            grids = score(squares[start:stop])
            total = torch.zeros(grids.shape[1], *shape, dtype=torch.float32, device="cpu") if total is None else total
            for (top, left, h, w), grid in zip(batch, grids, strict=True):
                total[:, top:top + h, left:left + w] += resize_maps(grid, (h, w))
                cover[top:top + h, left:left + w] += 1
        total /= cover * len(placed)
        mean = total if mean is None else mean.add_(total)
    return resize_maps(mean, image.shape[:2])


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size), bilinear."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
