"""What class-agnostic mask proposals do without support sets (App. A.1, Table A.2): "CLIP + CutLER" and "X + CutLER".

The first names every proposal by CLIP; the second lets the pixels of a proposal vote on the labels that a method X gave
them. Where proposals overlap, both show the smallest at a pixel (of equals the first): none hides one inside it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD, resize_short_side
from ovdiff_lib.masks import SEGMENTERS, GroundedSam, Segmenter, ThresholdOnly, build_segmenter
from ovdiff_lib.networks.instruments import normalised, undisturbed
from ovdiff_lib.profiles.schema import Matching, Profile
from ovdiff_lib.workbench.baselines.common import Baseline, TextEmbeddings


class ClipSegmenter(Baseline):
    """Open-vocabulary segmentation by naming the proposals of ``segmenter`` ("CLIP + CutLER" where that is CutLER).

    A proposal is the mean of CLIP's final spatial tokens inside it, projected to the joint space, and gets the class of
    the nearest text. Pixels of no proposal are background. ``matching`` gives the short side at which CLIP sees the
    whole image (with its ``long_side``); there are no windows.
    """

    networks = ("tokens",)

    def __init__(self, texts: TextEmbeddings, segmenter: Segmenter, matching: Matching) -> None:
        self.texts, self.clip, self.segmenter, self.matching = texts, texts.clip, segmenter, matching

    @classmethod
    def build(cls, profile: Profile) -> ClipSegmenter:
        """With the CLIP and segmenter of a profile. Raises ``ModelNotAvailable`` and as :func:`check_proposals`."""
        check_proposals(profile)
        return cls(TextEmbeddings.build(profile, "clip-segmenter"), build_segmenter(profile), profile.matching)

    @undisturbed()
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W) of an image u8 (H, W, 3).

        Inside proposals row 0 is -inf, the others the cosines of the proposal; outside row 0 is 0, the others -inf.
        """
        proposals = np.asarray(self.segmenter.propose(image, ""), bool)
        proposals = proposals[proposals.any(axis=(1, 2))]
        scores = np.full((len(vocabulary) + 1, *image.shape[:2]), -np.inf, np.float32)
        scores[0] = 0
        if len(proposals):
            cosines = (self.embed(image, proposals) @ self.texts([c.prompt for c in vocabulary]).T).numpy()  # (M, C)
            owner = smallest(proposals)
            inside = owner >= 0
            scores[0, inside] = -np.inf
            scores[1:, inside] = cosines[owner[inside]].T
        return scores

    @undisturbed()
    def embed(self, image: np.ndarray, proposals: np.ndarray) -> Tensor:
        """Unit embeddings f32 (M, D), on the CPU, of proposals bool (M, H, W), none empty, of an image u8 (H, W, 3)."""
        tokens = self.tokens(image)
        # The share of each patch's area that is inside: positive somewhere for any mask, however small.
        share = F.adaptive_avg_pool2d(torch.from_numpy(proposals).float()[None], tokens.shape[:2])[0]  # (M, h, w)
        return F.normalize(share.flatten(1) @ tokens.flatten(0, 1), dim=1)

    @undisturbed()
    def tokens(self, image: np.ndarray) -> Tensor:
        """CLIP's last spatial tokens f32 (h, w, D) on the CPU, layer-normed and projected, of the image u8 (H, W, 3) at
        the short side of ``matching``, both sides rounded up to whole patches."""
        vision = self.clip.vision_model
        patch = vision.config.patch_size
        resized = resize_short_side(image, self.matching.short_side, self.matching.resample, self.matching.long_side)
        grid = [-(-side // patch) for side in resized.shape[:2]]
        size, weight = (grid[0] * patch, grid[1] * patch), self.clip.visual_projection.weight
        pixels = normalised(resized[None], weight, (CLIP_MEAN, CLIP_STD), size)
        states = vision(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[0, 1:]
        return self.clip.visual_projection(vision.post_layernorm(states)).float().cpu().unflatten(0, tuple(grid))


def check_proposals(profile: Profile) -> None:
    """``ProfileError`` where the segmenter of a profile proposes nothing for an image whose words are not known."""
    none = {ThresholdOnly.name, GroundedSam.name}
    if profile.masks.segmenter in none:
        raise ProfileError(f"Rivals need proposals that no words guide, and {profile.masks.segmenter!r} has none; set "
                           f"masks.segmenter to one of {', '.join(sorted(set(SEGMENTERS) - none))}.")


def majority_vote(labels: np.ndarray, proposals: np.ndarray) -> np.ndarray:
    """Labels (..., H, W), whole numbers from 0, every proposal bool (M, H, W) with that of most of its pixels in each.

    All pixels of a proposal vote, by their labels before, background too; lowest of equals wins. Others keep theirs.
    """
    proposals = np.asarray(proposals, bool)
    maps = labels.reshape(-1, *labels.shape[-2:])
    count, classes = len(maps), int(maps.max(initial=0)) + 1
    places = np.arange(count)[:, None] * classes  # the votes of all maps are counted together
    votes = [np.bincount((maps[:, mask] + places).ravel(), minlength=count * classes) for mask in proposals]
    winner = np.zeros((count, len(proposals) + 1), labels.dtype)  # one more, so that there is one
    winner[:, :-1] = np.reshape(votes, (-1, count, classes)).argmax(2).T
    owner = smallest(proposals)
    return np.where(owner >= 0, winner[:, owner], maps).reshape(labels.shape)


def smallest(proposals: np.ndarray) -> np.ndarray:
    """i64 (H, W): number of the smallest proposal bool (M, H, W) at each pixel, the first of equals; -1 for none."""
    owner = np.full(proposals.shape[1:], -1, np.int64)
    for number in sorted(range(len(proposals)), key=lambda n: (-np.count_nonzero(proposals[n]), -n)):
        owner[proposals[number]] = number
    return owner
