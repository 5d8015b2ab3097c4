"""MaskCLIP (Zhou et al., 2022; Table 1): dense CLIP features compared with the text embeddings of the class names.

The last block of the image tower attends nowhere: every token keeps its own value, so that its embedding stays local.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.errors import InputError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.profiles.profile import Matching
from ovdiff_lib.types import Vocabulary


class MaskCLIP:
    """Open-vocabulary segmentation by a CLIP model alone.

    ``clip`` is a ``transformers.CLIPModel`` and ``tokenizer`` its tokenizer; ``matching`` gives short side, windows and stride, the same
    as OVDiff's. Text embeddings are averaged over ``templates``, each with ``{name}`` for the class. ``background_threshold`` is the
    constant score of the background; None = there is no background, as in the published evaluation without one. To evaluate::

        evaluate(lambda image: maskclip.predict(image, dataset.vocabulary), dataset)
    """

    def __init__(self, clip, tokenizer, matching: Matching, templates: Sequence[str], background_threshold: float | None = None) -> None:
        if isinstance(templates, str) or not templates or not all("{name}" in t for t in templates):
            raise InputError(f"The prompt templates {templates!r} must be a list of at least one text, each with {{name}} in it.")
        patch = clip.config.vision_config.patch_size
        odd = [w for w in matching.windows if w % patch]
        if odd:
            raise InputError(f"MaskCLIP needs windows that are multiples of its patch size {patch}, and {odd[0]} is not;"
                             " change matching.windows.")
        self.clip, self.tokenizer, self.matching = clip, tokenizer, matching
        self.templates, self.background_threshold = tuple(templates), background_threshold
        self._texts: dict[tuple[str, ...], Tensor] = {}

    @torch.inference_mode()
    def text_embeddings(self, vocabulary: Vocabulary) -> Tensor:
        """f32 (C, D), unit length: mean over templates of the normalised text embeddings. Kept for the next image."""
        prompts = tuple(c.prompt for c in vocabulary)
        if prompts not in self._texts:
            total = torch.zeros(())
            for template in self.templates:
                # Replaced, not formatted: a class name or template may hold braces.
                texts = [template.replace("{name}", prompt) for prompt in prompts]
                tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
                total = total + F.normalize(self.clip.get_text_features(**tokens).pooler_output.float().cpu(), dim=-1)
            self._texts[prompts] = F.normalize(total, dim=-1)
        return self._texts[prompts]

    @torch.inference_mode()
    def dense_embeddings(self, images: np.ndarray) -> Tensor:
        """Images u8 (n, H, W, 3), sides multiples of the patch size -> f32 (n, h, w, D), unit length, in CLIP's joint space."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        vision = self.clip.vision_model
        patch = vision.config.patch_size
        n, height, width = images.shape[:3]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]
        x = vision.embeddings(pixels.to(self.clip.device, self.clip.dtype), interpolate_pos_encoding=True)
        x = vision.pre_layrnorm(x)
        *blocks, last = vision.encoder.layers
        for block in blocks:
            x = block(x, None)
        # The residual and the MLP of the last block stay; only its attention is replaced by the value path.
        x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = x + last.mlp(last.layer_norm2(x))
        x = self.clip.visual_projection(vision.post_layernorm(x[:, 1:]))  # (n, 1 + h w, channels) -> (n, h w, D)
        return F.normalize(x.float(), dim=-1).reshape(n, height // patch, width // patch, -1).cpu()

    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Cosine similarities f32 (C + 1, H, W) of ``image`` u8 (H, W, 3); row 0 is the constant background score, -inf if there is none.

        As for OVDiff: short side resized, windows of each size averaged where they overlap, sizes averaged, bilinear to (H, W).
        """
        from ovdiff_lib.matching import windows

        texts = self.text_embeddings(vocabulary)
        resized = resize_short_side(image, self.matching.short_side)
        shape = resized.shape[:2]
        mean = torch.zeros(len(texts), *shape)
        for size in self.matching.windows:
            places = windows(shape, size, self.matching.stride)
            total, cover = torch.zeros_like(mean), torch.zeros(shape)
            for start in range(0, len(places), self.matching.batch_size):
                batch = places[start:start + self.matching.batch_size]
                crops = np.stack([resized[top:top + side, left:left + side] for top, left, side in batch])
                similarity = (self.dense_embeddings(crops) @ texts.T).permute(0, 3, 1, 2)  # (n, h, w, D) -> (n, C, h, w)
                for (top, left, side), grid in zip(batch, similarity, strict=True):
                    total[:, top:top + side, left:left + side] += _resize(grid, (side, side))
                    cover[top:top + side, left:left + side] += 1
            mean += total / cover / len(self.matching.windows)
        background = -torch.inf if self.background_threshold is None else self.background_threshold
        scores = _resize(mean, image.shape[:2])
        return torch.cat([torch.full((1, *scores.shape[1:]), background), scores]).numpy()

    def predict(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Labels i64 (H, W): 0 = background, i + 1 = category i."""
        return self.scores(image, vocabulary).argmax(axis=0)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size), bilinear."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
