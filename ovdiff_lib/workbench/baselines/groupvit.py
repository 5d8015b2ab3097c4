"""GroupViT (Xu et al., 2022; Table 1 and A.7): a vision transformer that groups its patches, trained on captions alone.

Every window is divided among the groups of the last grouping stage, and a group's pixels get the classes whose text
embeddings are near the group's: the inference of the authors' released evaluation, over ``transformers.GroupViTModel``.
Its ``segmentation_logits`` are not used: they have the logit scale twice, and neither class mask nor background.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.networks.instruments import normalised, undisturbed
from ovdiff_lib.networks.loading import load_transformers
from ovdiff_lib.profiles.schema import Matching, Profile
from ovdiff_lib.workbench.baselines.common import TextEmbeddings, Windowed, resize_maps, templates_of

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, GroupViTModel

TOP_CLASSES = 5  # classes that a window can hold
MAX_SCALE = 100.0  # of the logits, as in training


class GroupViT(Windowed):
    """Open-vocabulary segmentation by the groups of the GroupViT of ``texts``.

    The model takes images of one size, to which every window of ``matching`` is resized. With one window the scores
    against a constant background are the published rule; of several, it is their mean score that is compared.
    """

    networks = ("groups",)

    def __init__(self, texts: TextEmbeddings, matching: Matching) -> None:
        self.texts, self.model, self.matching = texts, texts.clip, matching

    @classmethod
    def build(cls, profile: Profile) -> GroupViT:
        """With GroupViT, windows and templates of a profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        templates = templates_of("groupvit", profile.baselines)
        return cls(TextEmbeddings(*load_groupvit(profile), templates), profile.matching)

    @undisturbed()
    def groups(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What the model makes of windows u8 (n, H, W, 3), each squashed to its input size.

        * Soft assignment f32 (n, G, h, w) of each patch to the groups of the last grouping stage: the stages'
          assignments multiplied, patches to groups, groups to fewer groups. Sums to 1 over groups.
        * Embeddings f32 (n, G, D) of the groups, unit length, in the joint space of images and texts.
        * Embedding f32 (n, D) of the whole window, the mean of its groups projected, unit length.
        """
        model, vision = self.model, self.model.vision_model
        patches = vision.embeddings.patch_embeddings
        # Trained with ImageNet's statistics, though its texts are CLIP's.
        pixels = normalised(images, patches.projection.weight, (IMAGENET_MEAN, IMAGENET_STD), patches.image_size)
        out = vision(pixels, output_attentions=True, return_dict=True)
        # Of a GroupViT these "attentions" are the soft assignments of the grouping stages, (n, groups, those before).
        assigned, *later = (stage.float() for stage in out.attentions)
        for stage in later:
            assigned = stage @ assigned
        grid = [side // patch for side, patch in zip(patches.image_size, patches.patch_size, strict=True)]
        tokens = out.last_hidden_state
        # The projection holds a batch norm, which takes rows: one group a row.
        joint = [model.visual_projection(part) for part in (tokens.flatten(0, 1), out.pooler_output)]
        embeddings, whole = (F.normalize(part.float(), dim=-1).cpu() for part in joint)
        return assigned.unflatten(2, grid).cpu(), embeddings.unflatten(0, tokens.shape[:2]), whole

    def window_scores(self, crops: np.ndarray, vocabulary: Vocabulary) -> Tensor:
        """Scores f32 (n, C, S, S) of windows u8 (n, S, S, 3): each pixel has those of the group it belongs to most."""
        texts, scale = self.text_embeddings(vocabulary), self.model.logit_scale.detach().float().exp()
        assignment, embeddings, whole = self.groups(crops)
        best = resize_maps(assignment, crops.shape[1:3]).argmax(1)
        scores = [group_scores(e, w, texts, float(scale.clamp(max=MAX_SCALE)))[b]
                  for e, w, b in zip(embeddings, whole, best, strict=True)]
        return torch.stack(scores).permute(0, 3, 1, 2)


def group_scores(groups: Tensor, whole: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Scores f32 (G, C) in [0, 1] from unit embeddings (G, D) of groups, (D,) of the whole window and (C, D) of texts.

    The softmax over all classes, times the softmax over the :data:`TOP_CLASSES` classes nearest to the whole window.
    The highest score becomes 1: the published rule makes a pixel background where its best score is below the threshold
    and below the window's highest, so the highest is never background, whatever the threshold.
    """
    logits = scale * groups @ texts.T
    likely = (texts @ whole).topk(min(TOP_CLASSES, len(texts))).indices
    masked = torch.full_like(logits, -torch.inf)
    masked[:, likely] = logits[:, likely]
    scores = logits.softmax(-1) * masked.softmax(-1)
    return torch.where(scores == scores.max(), 1.0, scores)


def load_groupvit(profile: Profile) -> tuple[GroupViTModel, CLIPTokenizer]:
    """GroupViT and its tokenizer of ``models.groupvit``."""
    return load_transformers(profile, "groupvit", "GroupViTModel", "CLIPTokenizer")
