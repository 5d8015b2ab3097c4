"""What the baselines share: class names and images as vectors of CLIP's joint space, windows, the category filter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, resize_short_side
from ovdiff_lib.matching.windows import crop, scales
from ovdiff_lib.networks.instruments import batches, normalised, undisturbed
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.schema import IMAGENET, Baselines, Matching, Profile


class Baseline(ABC):
    """Open-vocabulary segmentation of one image at a time."""

    networks: tuple[str, ...] = ()
    """Its methods that know nothing of the vocabulary: what they say of an image can serve several."""

    @abstractmethod
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W) of an image u8 (H, W, 3), row 0 the background: -inf if there is no model."""

    def predict(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Labels i64 (H, W): 0 = background, i + 1 = category i."""
        return self.scores(image, vocabulary).argmax(axis=0)


class Windowed(Baseline):
    """A baseline that sees an image through OVDiff's windows (Sec. 4) and has no model of the background."""

    matching: Matching
    texts: TextEmbeddings

    @abstractmethod
    def window_scores(self, crops: np.ndarray, vocabulary: Vocabulary) -> Tensor:
        """Scores (n, C, h, w) of squares u8 (n, S, S, 3)."""

    def text_embeddings(self, vocabulary: Vocabulary) -> Tensor:
        """f32 (C, D) on the CPU, unit length."""
        return self.texts([c.prompt for c in vocabulary])

    @undisturbed()
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W) of an image u8 (H, W, 3): the mean over windows of a size, then over sizes; row 0: -inf."""
        resized = resize_short_side(image, self.matching.short_side, self.matching.resample, self.matching.long_side)
        placed = scales(resized.shape[:2], self.matching)
        total = torch.zeros(len(vocabulary), *resized.shape[:2], dtype=torch.float32, device="cpu")
        for side, boxes in placed:
            squares = np.stack([crop(resized, box, side) for box in boxes])
            of_size, cover = torch.zeros_like(total), torch.zeros_like(total[0])
            for start, stop in batches(len(boxes), self.matching.batch_size):
                grids = self.window_scores(squares[start:stop], vocabulary)
                for (top, left, h, w), grid in zip(boxes[start:stop], grids, strict=True):
                    of_size[:, top:top + h, left:left + w] += resize_maps(grid, (h, w))
                    cover[top:top + h, left:left + w] += 1
            total += of_size.div_(cover * len(placed))
        scores = resize_maps(total, image.shape[:2])
        return torch.cat([torch.full_like(scores[:1], -torch.inf), scores]).numpy()


class Filtered(Baseline):
    """``baseline`` behind OVDiff's category pre-filter (Table A.1), no advantage of OVDiff's then; background stays."""

    def __init__(self, baseline: Baseline, category_filter: Callable[[np.ndarray, Vocabulary], tuple]) -> None:
        self.baseline, self.category_filter = baseline, category_filter

    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W): the baseline's scores of the whole vocabulary, -inf for dropped categories."""
        scores = self.baseline.scores(image, vocabulary).copy()
        kept, _ = self.category_filter(image, vocabulary)
        scores[[k + 1 for k in range(len(vocabulary)) if k not in kept]] = -np.inf
        return scores


class TextEmbeddings:
    """Embeddings by ``clip`` (a CLIP or GroupViT) of class names in ``templates``, as of :func:`templates_of`."""

    def __init__(self, clip: Any, tokenizer: Any, templates: Sequence[str]) -> None:
        self.clip, self.tokenizer, self.templates = clip, tokenizer, templates
        self._known: dict[str, Tensor] = {}

    @classmethod
    def build(cls, profile: Profile, name: str) -> TextEmbeddings:
        """By the CLIP of a profile, in the templates of a baseline. Raises ``ModelNotAvailable``."""
        return cls(*load_clip(profile), templates_of(name, profile.baselines))

    @undisturbed()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """f32 (C, D) on the CPU, unit length: the mean of a name's unit embeddings in all templates; they are kept."""
        for prompt in set(prompts) - self._known.keys():
            texts = [template.replace("{name}", prompt) for template in self.templates]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
            found = F.normalize(self.clip.get_text_features(**tokens).pooler_output.float().cpu(), dim=-1)
            self._known[prompt] = F.normalize(found.mean(0), dim=0)
        return torch.stack([self._known[prompt] for prompt in prompts])


def templates_of(name: str, settings: Baselines) -> list[str]:
    """The templates of the baseline ``name``, with the 80 that open_clip has from CLIP's authors for ``imagenet``."""
    own = getattr(settings, f"{name.replace('-', '_')}_templates")
    if IMAGENET not in own:
        return own
    from open_clip import OPENAI_IMAGENET_TEMPLATES as EIGHTY

    return [*(template("{name}") for template in EIGHTY), *(template for template in own if template != IMAGENET)]


@undisturbed()
def embed_images(clip: Any, images: np.ndarray) -> Tensor:
    """Image embeddings f32 (n, D) on the CPU, unit length, of squares u8 (n, S, S, 3) of CLIP's own input size."""
    pixels = normalised(images, clip.visual_projection.weight, (CLIP_MEAN, CLIP_STD))
    return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output.float().cpu(), dim=-1)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) or (n, C, h, w) -> (..., C, *size), bilinear."""
    if maps.ndim == 3:
        return resize_maps(maps[None], size)[0]
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
