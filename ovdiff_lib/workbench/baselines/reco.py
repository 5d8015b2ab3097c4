"""ReCo (Shin et al., 2022; Table 1): images retrieved by CLIP, what they have in common found by comparing them, and that found again.

How this differs from the published method:

- Dense features are the keys of the profile's DINO (``models.dino``), not those of a DeiT-S/16 trained on stylised ImageNet.
- CLIP is the profile's (``models.clip``) for retrieval and for dense scores, not a ViT-L/14@336px and an RN50x16, and the prompt is
  ``support.prompt``, not 85 templates.
- The archive is ``baselines.archive`` (published: ImageNet's training split). Images are seen through OVDiff's windows; there is no CRF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import ProfileError
from ovdiff_lib.features.dino import DinoExtractor
from ovdiff_lib.filters.category import square_image
from ovdiff_lib.networks.identity import model_identity
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.schema import Baselines, Profile
from ovdiff_lib.workbench.baselines.archive import ArchiveIndex, load_archive
from ovdiff_lib.workbench.baselines.common import Baseline, sliding_scores
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP

if TYPE_CHECKING:
    from ovdiff_lib.features import Extractor


SHARPNESS = 10.0
"""Factor of a dense CLIP cosine before its sigmoid."""


class ReCo(Baseline):
    """Open-vocabulary segmentation by retrieval and co-segmentation.

    ``maskclip`` gives text embeddings, dense CLIP and windows; ``extractor`` the dense features; ``index`` searches the archive;
    ``settings`` are a profile's ``baselines``. ``background_threshold`` is the constant score of the background; None = there is no
    background, as in the published evaluation without one. A class costs its co-segmentation once and is kept for the next image.
    """

    def __init__(self, maskclip: MaskCLIP, extractor: Extractor, index: ArchiveIndex, settings: Baselines,
                 background_threshold: float | None = None) -> None:
        """Raises ``ProfileError`` for a size that is no multiple of CLIP's patch."""
        patch = maskclip.clip.config.vision_config.patch_size
        if settings.reco_size % patch:
            raise ProfileError(f"baselines.reco_size is {settings.reco_size}; make it a multiple of CLIP's patch size {patch}.")
        self.maskclip, self.extractor, self.index, self.settings = maskclip, extractor, index, settings
        self.background_threshold = background_threshold
        self._references: dict[str, Tensor] = {}

    @classmethod
    def build(cls, profile: Profile) -> ReCo:
        """With the CLIP, the DINO and the archive of a profile; embeddings of the archive are kept in the user's library folder.

        Raises ``ProfileError``, ``ModelNotAvailable``, and ``InputError`` for an archive that is not set or not there.
        """
        from ovdiff_lib.library.store import default_root

        archive = load_archive(profile.baselines.archive)
        model = f"{model_identity(profile.models.clip)} {profile.models.dtype}"
        index = ArchiveIndex(archive, load_clip(profile)[0], model, default_root() / "archives")
        return cls(MaskCLIP.build(profile), DinoExtractor.build(profile), index, profile.baselines)

    @undisturbed()
    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W) of an image u8 (H, W, 3); row 0 is the constant background score, -inf if there is none.

        For every class sigmoid(cosine to its reference) times sigmoid(10 x dense CLIP cosine), both in (0, 1).
        """
        texts = self.maskclip.text_embeddings(vocabulary)
        references = torch.stack([self.reference(category.prompt) for category in vocabulary])

        def score(crops: np.ndarray) -> Tensor:
            features = F.normalize(self.extractor(crops, np.zeros(len(crops), np.int64)), dim=-1)
            alike = torch.sigmoid(features @ references.T).permute(0, 3, 1, 2)
            named = torch.sigmoid(SHARPNESS * self.maskclip.dense_embeddings(crops) @ texts.T).permute(0, 3, 1, 2)
            size = crops.shape[1:3]
            return _enlarge(alike, size) * _enlarge(named, size)

        scores = sliding_scores(image, self.maskclip.matching, score)
        return self.beside_background(scores)

    def retrieve(self, prompt: str) -> list[int]:
        """Numbers of the ``reco_retrieved`` images of the archive that CLIP finds most like the class words, best first."""
        return self.index.nearest(self.maskclip.texts([prompt])[0], self.settings.reco_retrieved)

    def reference(self, prompt: str) -> Tensor:
        """Reference embedding f32 (D,), unit length, of the class words: what the images retrieved for them have in common.

        Seeds keep away from the contexts ``reco_contexts``, whose own references are found first, each avoiding those before it.
        """
        contexts = self.settings.reco_contexts
        for known, context in enumerate(contexts):
            if context not in self._references:
                self._references[context] = self._cosegment(context, contexts[:known])
        if prompt not in self._references:
            self._references[prompt] = self._cosegment(prompt, contexts)
        return self._references[prompt]

    @undisturbed()
    def _cosegment(self, prompt: str, avoided: Sequence[str]) -> Tensor:
        side = self.settings.reco_size
        images = np.stack([square_image(self.index.archive[i], side, "centre") for i in self.retrieve(prompt)])
        features = self.extractor(images, np.zeros(len(images), np.int64))
        cosine = self.maskclip.dense_embeddings(images) @ self.maskclip.texts([prompt])[0]
        weights = _enlarge(torch.sigmoid(SHARPNESS * cosine)[:, None], features.shape[1:3])[:, 0]
        unit = F.normalize(features, dim=-1)
        for context in avoided:
            weights = weights * (1 - torch.sigmoid(unit @ self._references[context]))
        return cosegment(features.flatten(1, 2).to(self.maskclip.clip.device), weights.flatten(1).to(self.maskclip.clip.device)).cpu()


def cosegment(features: Tensor, weights: Tensor) -> Tensor:
    """Reference embedding f32 (D,), unit length, of k images: the mean of one seed from each.

    ``features`` f32 (k, n, D) are raw, ``weights`` f32 (k, n) in [0, 1] say how much a pixel counts as a counterpart. A pixel's score is
    the mean over all images, its own among them, of the highest weighted cosine into that image; an image's seed has the highest.
    """
    unit = F.normalize(features, dim=-1)
    seeds = []
    for own, raw in zip(unit, features, strict=True):
        into = torch.stack([(own @ other.T * weight).amax(1) for other, weight in zip(unit, weights, strict=True)])  # (k, n)
        seeds.append(raw[into.mean(0).argmax()])
    return F.normalize(torch.stack(seeds).mean(0), dim=0)


def _enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, C, h, w) -> (n, C, *size), bilinear."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
