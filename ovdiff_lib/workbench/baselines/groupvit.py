"""GroupViT (Xu et al., 2022; Table 1 and Table A.7): a vision transformer that groups its patches, trained on captions alone.

Every window is divided among the groups of the last grouping stage, and a group's pixels get the classes whose text embeddings are near
the group's: the inference of the authors' released evaluation, over ``transformers.GroupViTModel``. The ``segmentation_logits`` of that
class are not used: they multiply by the logit scale twice and know neither the class mask nor the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import complete, load_network
from ovdiff_lib.profiles.schema import Matching, Profile
from ovdiff_lib.workbench.baselines.common import Baseline, TextEmbeddings, sliding_scores

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, GroupViTModel


PROMPT = "a photo of a {name}."
"""Text of the published evaluation."""

BACKGROUND_THRESHOLDS = {"VOC": 0.95, "Context": 0.35, "Object": 0.95}
"""Constant background scores of the published evaluation, by column of Table 1."""

TOP_CLASSES = 5  # classes that a window can hold
MAX_SCALE = 100.0  # of the logits, as in training


class GroupViT(Baseline):
    """Open-vocabulary segmentation by the groups of a GroupViT.

    ``model`` is a ``transformers.GroupViTModel`` and ``tokenizer`` its tokenizer (:func:`load_groupvit`). ``matching`` gives short side,
    windows and stride, the same as OVDiff's; the model takes images of one size only, so every window is resized to that. Text embeddings
    are averaged over ``templates``, each with ``{name}`` for the class. ``background_threshold`` is the constant score of the background
    (:data:`BACKGROUND_THRESHOLDS`); None = there is no background, or the caller searches it::

        search_threshold(lambda image: groupvit.scores(image, dataset.vocabulary), dataset, thresholds)
    """

    def __init__(self, model: GroupViTModel, tokenizer: CLIPTokenizer, matching: Matching, templates: Sequence[str] = (PROMPT,),
                 background_threshold: float | None = None) -> None:
        """Raises ``InputError`` for templates without ``{name}`` and for a threshold that no score, or every score, exceeds."""
        if background_threshold is not None and not 0 <= background_threshold < 1:
            raise InputError(f"The background threshold of GroupViT is {background_threshold}, but its scores are products of two "
                             "probabilities; give a number from 0 to below 1, or None.")
        self.texts = TextEmbeddings(model, tokenizer, templates)
        self.model, self.tokenizer, self.matching = model, tokenizer, matching
        self.templates, self.background_threshold = self.texts.templates, background_threshold

    @classmethod
    def build(cls, profile: Profile, templates: Sequence[str] | None = None) -> GroupViT:
        """With the GroupViT and the windows of a profile; ``templates`` (default: ``support.prompt``) must be texts that it knows, for
        the published weights [:data:`PROMPT`]. Raises ``ProfileError``, ``ModelNotAvailable`` and ``InputError``."""
        return cls(*load_groupvit(profile), profile.matching, (profile.support.prompt,) if templates is None else templates)

    def text_embeddings(self, vocabulary: Vocabulary) -> Tensor:
        """f32 (C, D), unit length: mean over templates of the normalised text embeddings. Kept for the next image."""
        return self.texts([c.prompt for c in vocabulary])

    @undisturbed()
    def groups(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What the model makes of windows u8 (n, H, W, 3), each squashed to its input size.

        * Soft assignment f32 (n, G, h, w) of each patch to the groups of the last grouping stage: the stages' assignments multiplied,
          patches to groups, groups to fewer groups. Sums to 1 over groups.
        * Embeddings f32 (n, G, D) of the groups, unit length, in the joint space of images and texts.
        * Embedding f32 (n, D) of the whole window, the mean of its groups projected, unit length.
        """
        model, vision = self.model, self.model.vision_model
        height, width = vision.embeddings.patch_embeddings.image_size
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        pixels = normalise(F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True))
        out = vision(pixels.to(model.device, model.dtype), output_attentions=True, return_dict=True)
        # Of a GroupViT these "attentions" are the soft assignments of the grouping stages, (n, groups, patches or groups before).
        first, *later = (stage.float() for stage in out.attentions)
        for stage in later:
            first = stage @ first
        patch_height, patch_width = vision.embeddings.patch_embeddings.patch_size
        assignment = first.unflatten(2, (height // patch_height, width // patch_width))
        tokens = out.last_hidden_state
        # The projection holds a batch norm, which takes rows: one group a row.
        embeddings = model.visual_projection(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        whole = model.visual_projection(out.pooler_output)
        return assignment.cpu(), F.normalize(embeddings.float(), dim=-1).cpu(), F.normalize(whole.float(), dim=-1).cpu()

    def window_scores(self, crops: np.ndarray, texts: Tensor) -> Tensor:
        """Scores f32 (n, C, S, S) of windows u8 (n, S, S, 3) for texts (C, D): each pixel has those of the group it belongs to most."""
        scale = float(self.model.logit_scale.detach().float().exp().clamp(max=MAX_SCALE))
        assignment, embeddings, whole = self.groups(crops)
        best = F.interpolate(assignment, size=crops.shape[1:3], mode="bilinear", align_corners=False).argmax(1)
        scores = [group_scores(e, w, texts, scale)[b] for e, w, b in zip(embeddings, whole, best, strict=True)]
        return torch.stack(scores).permute(0, 3, 1, 2)

    @undisturbed()
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Scores f32 (C + 1, H, W) in [0, 1] of ``image`` u8 (H, W, 3); row 0 is the constant background score, -inf if there is none.

        As for OVDiff: short side resized, windows of each size averaged where they overlap, sizes averaged, bilinear to (H, W). With one
        window this is the published rule; of several, it is their mean score that is compared with the threshold.
        """
        texts = self.text_embeddings(vocabulary)
        scores = sliding_scores(image, self.matching, lambda crops: self.window_scores(crops, texts))
        return self.beside_background(scores)


def group_scores(groups: Tensor, whole: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Scores f32 (G, C) in [0, 1] from unit embeddings (G, D) of a window's groups, (D,) of the whole window and (C, D) of the classes.

    The softmax over all classes, times the softmax over the :data:`TOP_CLASSES` classes nearest to the whole window. The highest score
    becomes 1: the published rule makes a pixel background where its best score is below the threshold and below the window's highest,
    so the highest is never background, whatever the threshold.
    """
    logits = scale * groups @ texts.T
    likely = (texts @ whole).topk(min(TOP_CLASSES, len(texts))).indices
    masked = torch.full_like(logits, -torch.inf)
    masked[:, likely] = logits[:, likely]
    scores = logits.softmax(-1) * masked.softmax(-1)
    return torch.where(scores == scores.max(), 1.0, scores)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] (n, 3, H, W) -> with ImageNet's mean and deviation, which GroupViT was trained with though its texts are CLIP's."""
    mean, deviation = (torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / deviation


def load_groupvit(profile: Profile) -> tuple[GroupViTModel, CLIPTokenizer]:
    """The network of ``profile.models.groupvit`` and its tokenizer, eval mode, on the device; cached like ``load_diffusion``.

    Raises ``ProfileError`` if the field is empty and ``ModelNotAvailable`` if the model cannot be loaded.
    """
    return load_network(profile, "groupvit", _build)


def _build(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> tuple[GroupViTModel, CLIPTokenizer]:
    from transformers import CLIPTokenizer, GroupViTModel

    model = complete("GroupViT", GroupViTModel.from_pretrained(source, dtype=dtype, output_loading_info=True, **options))
    return model.to(device), CLIPTokenizer.from_pretrained(source, **options)
