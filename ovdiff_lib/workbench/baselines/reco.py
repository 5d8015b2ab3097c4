"""ReCo (Shin et al., 2022; Table 1): images retrieved by CLIP, and what they have in common found by comparing them.

How this differs from the published method:

- Dense features are the keys of the profile's DINO (``models.dino``), not of a DeiT-S/16 trained on stylised ImageNet.
- CLIP is the profile's (``models.clip``) for retrieval and for dense scores, not a ViT-L/14@336px and an RN50x16.
- The archive is ``baselines.archive`` (published: ImageNet's training split), seen in OVDiff's windows; no CRF.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.features.vit import DinoExtractor
from ovdiff_lib.library.store import Library
from ovdiff_lib.networks.identity import model_identity
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Baselines, Profile
from ovdiff_lib.workbench.baselines.archive import Archive, embed_archive, load_archive
from ovdiff_lib.workbench.baselines.common import TextEmbeddings, Windowed, resize_maps, templates_of
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP

if TYPE_CHECKING:
    from ovdiff_lib.features import Extractor

SHARPNESS = 10.0
"""Factor of a dense CLIP cosine before its sigmoid."""


class ReCo(Windowed):
    """Open-vocabulary segmentation by retrieval and co-segmentation.

    ``maskclip`` gives CLIP, its dense embeddings and windows, ``extractor`` dense features; folder ``kept`` holds the
    archive's embeddings by ``model`` (:func:`embed_archive`). A class costs its co-segmentation once.
    """

    networks = ("extractor",)

    def __init__(self, maskclip: MaskCLIP, extractor: Extractor, archive: Archive, settings: Baselines,
                 model: str = "", kept: Path | None = None) -> None:
        self.maskclip, self.extractor, self.archive, self.settings = maskclip, extractor, archive, settings
        self.matching, self.model, self.kept = maskclip.matching, model, kept
        self.texts = TextEmbeddings(maskclip.clip, maskclip.texts.tokenizer, templates_of("reco", settings))
        self._references: dict[str, Tensor] = {}

    @classmethod
    def build(cls, profile: Profile) -> ReCo:
        """With the CLIP, the DINO and the archive of a profile; its embeddings are kept in the user's library.

        Raises ``ProfileError``, ``ModelNotAvailable``, and ``InputError`` for an archive that is not set or not there.
        """
        archive, model = load_archive(profile.baselines.archive), model_identity(profile.models.clip)
        return cls(MaskCLIP.build(profile), DinoExtractor.build(profile), archive, profile.baselines,
                   f"{model} {profile.models.dtype}", Library().root / "archives")

    @functools.cached_property
    def embeddings(self) -> Tensor:
        """f32 (n, D), unit length, of the archive's images; computed when first asked for."""
        return embed_archive(self.archive, self.maskclip.clip, self.model, self.kept)

    def window_scores(self, crops: np.ndarray, vocabulary: Vocabulary) -> Tensor:
        """(n, C, S, S) in (0, 1): sigmoid(cosine to the class's reference) times sigmoid(10 x dense CLIP cosine)."""
        references = torch.stack([self.reference(category.prompt) for category in vocabulary])
        features = F.normalize(self.extractor(crops, np.zeros(len(crops), np.int64)).cpu(), dim=-1)
        alike = torch.sigmoid(features @ references.T).permute(0, 3, 1, 2)
        cosines = self.maskclip.dense_embeddings(crops) @ self.text_embeddings(vocabulary).T
        named = torch.sigmoid(SHARPNESS * cosines).permute(0, 3, 1, 2)
        return resize_maps(alike, crops.shape[1:3]) * resize_maps(named, crops.shape[1:3])

    def retrieve(self, prompt: str) -> list[int]:
        """Numbers of the archive's ``reco_retrieved`` images, or all, that CLIP finds most like the words, in order."""
        order = torch.argsort(self.embeddings @ self.texts([prompt])[0], descending=True, stable=True)
        return order[:self.settings.reco_retrieved].tolist()

    def reference(self, prompt: str) -> Tensor:
        """Reference embedding f32 (D,), unit length, of class words: what the images retrieved for them have in common.

        Seeds keep away from the contexts ``reco_contexts``, whose references are found first, each off those before it.
        """
        contexts = self.settings.reco_contexts
        for word, avoided in [*((word, contexts[:i]) for i, word in enumerate(contexts)), (prompt, contexts)]:
            if word not in self._references:
                self._references[word] = self._cosegment(word, avoided)
        return self._references[prompt]

    @undisturbed()
    def _cosegment(self, prompt: str, avoided: Sequence[str]) -> Tensor:
        images, device = self.archive.squares(self.retrieve(prompt), self.settings.reco_size), self.maskclip.clip.device
        features = self.extractor(images, np.zeros(len(images), np.int64)).cpu()
        cosine = self.maskclip.dense_embeddings(images) @ self.texts([prompt])[0]
        weights = resize_maps(torch.sigmoid(SHARPNESS * cosine)[:, None], features.shape[1:3])[:, 0]
        unit = F.normalize(features, dim=-1)
        for context in avoided:
            weights = weights * (1 - torch.sigmoid(unit @ self._references[context]))
        return cosegment(features.flatten(1, 2).to(device), weights.flatten(1).to(device)).cpu()


def cosegment(features: Tensor, weights: Tensor) -> Tensor:
    """Reference embedding f32 (D,), unit length, of k images: the mean of one seed from each.

    ``features`` f32 (k, n, D) are raw, ``weights`` f32 (k, n) in [0, 1] say how much a pixel counts as a counterpart.
    An image's seed has the highest mean over all images of the highest weighted cosine into that image.
    """
    unit = F.normalize(features, dim=-1)
    seeds = []
    for own, raw in zip(unit, features, strict=True):
        into = torch.stack([(own @ other.T * weight).amax(1) for other, weight in zip(unit, weights, strict=True)])
        seeds.append(raw[into.mean(0).argmax()])  # into: (k, n)
    return F.normalize(torch.stack(seeds).mean(0), dim=0)
