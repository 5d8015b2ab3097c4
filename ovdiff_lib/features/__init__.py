"""Step 2b, Sec. 4.1 and App. C.2: dense features of frozen networks.

To add an extractor, write a class with the three members of :class:`Extractor` and one line in :data:`EXTRACTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.features.clip import ClipExtractor
from ovdiff_lib.features.diffusion import DiffusionExtractor

if TYPE_CHECKING:
    from ovdiff_lib.profiles import Profile


class Extractor(Protocol):
    """Phi_v of Sec. 3.3. ``channels`` is D."""

    name: str
    channels: int

    def __call__(self, images: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """Images u8 (n, H, W, 3) of any size, i64 (n,) seeds for what the extractor draws: f32 (n, h, w, D), raw, on the CPU."""
        ...


EXTRACTORS: dict[str, Callable[[Profile], Extractor]] = {
    "sd": DiffusionExtractor.build,
    "clip-keys": lambda profile: ClipExtractor.build(profile, "keys"),
    "clip-tokens": lambda profile: ClipExtractor.build(profile, "tokens"),
}


def build_extractors(profile: Profile) -> dict[str, Extractor]:
    """The extractors of ``features.extractors`` by name, in order. Raises ``ProfileError`` for none, an unknown or a repeated one."""
    names = profile.features.extractors
    unknown = [name for name in names if name not in EXTRACTORS]
    if unknown or not names or len(set(names)) != len(names):
        raise ProfileError(f"features.extractors is {names}; name each wanted one of {', '.join(EXTRACTORS)} once.")
    return {name: EXTRACTORS[name](profile) for name in names}


__all__ = ["EXTRACTORS", "ClipExtractor", "DiffusionExtractor", "Extractor", "build_extractors"]
