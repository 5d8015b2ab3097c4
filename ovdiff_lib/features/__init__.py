"""Step 2b, Sec. 4.1 and App. C.2: dense features of frozen networks.

To add an extractor, write a class with the three members of :class:`Extractor` and one line in :data:`EXTRACTORS`:
``"name": Part(Mine)``, where ``Mine(profile)`` builds it; a profile that names thresholds by extractor needs them of it
too. After an edit of ``Mine``'s module the library's prototypes are built again (:class:`~ovdiff_lib.registry.Part`).
"""

from functools import partial
from typing import Protocol

import numpy as np
import torch

from ovdiff_lib.features.diffusion import DiffusionExtractor
from ovdiff_lib.features.open_clip import OpenClipExtractor
from ovdiff_lib.features.vit import ClipExtractor, DinoExtractor, MaeExtractor
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import Part, chosen_part


class Extractor(Protocol):
    """Phi_v of Sec. 3.3. ``channels`` is D. One of true ``any_size`` also takes a list of images of several sizes."""

    name: str
    channels: int

    def __call__(self, images: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """Images u8 (n, H, W, 3) of any size, i64 (n,) seeds of what is drawn: f32 (n, h, w, D), raw, on any device."""
        ...


CLIP_SETTINGS = ("clip_", "vit_scale")

EXTRACTORS: dict[str, Part] = {
    "sd": Part(DiffusionExtractor.build, models=("diffusion",), settings=("sd_", "seed")),
    "clip-keys": Part(partial(ClipExtractor.build, kind="keys"), ("clip",), CLIP_SETTINGS),
    "clip-tokens": Part(partial(ClipExtractor.build, kind="tokens"), ("clip",), CLIP_SETTINGS),
    "open-clip-keys": Part(partial(OpenClipExtractor.build, kind="keys"), ("open_clip",), CLIP_SETTINGS),
    "open-clip-tokens": Part(partial(OpenClipExtractor.build, kind="tokens"), ("open_clip",), CLIP_SETTINGS),
    "dino": Part(DinoExtractor.build, models=("dino",), settings=("dino_", "vit_scale")),
    "mae": Part(MaeExtractor.build, models=("mae",), settings=("mae_", "vit_scale")),
}
"""Name -> how the extractor is built and what its features depend on."""


@undisturbed()
def build_extractors(profile: Profile) -> dict[str, Extractor]:
    """The extractors of ``features.extractors`` by name, in order. ``ProfileError``, ``ModelNotAvailable``."""
    parts = {name: chosen_part("features.extractors", name, EXTRACTORS) for name in profile.features.extractors}
    return {name: part(profile) for name, part in parts.items()}
