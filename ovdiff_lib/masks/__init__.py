"""Step 2a, Sec. 3.2: from attribution to foreground and background masks.

A segmenter (the paper's Gamma) proposes masks without knowing any class; :mod:`~ovdiff_lib.masks.select` picks among them by
attribution (Eq. 1). To add one, write a class with ``propose`` and give it a line in :data:`SEGMENTERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ovdiff_lib.errors import ProfileError

if TYPE_CHECKING:
    from ovdiff_lib.profiles.profile import Profile


class Segmenter(Protocol):
    """Class-agnostic mask proposals for one image."""

    def propose(self, image: np.ndarray) -> np.ndarray:
        """bool (M, H, W), M >= 0 proposals that may overlap, for a u8 RGB image (H, W, 3). The background is not among them."""
        ...


class ThresholdOnly:
    """No proposals: every mask comes from thresholding the attribution (the paper's "-CutLER")."""

    def propose(self, image: np.ndarray) -> np.ndarray:
        return np.zeros((0, *image.shape[:2]), dtype=bool)


SEGMENTERS: dict[str, Callable[[Profile], Segmenter]] = {
    "threshold": lambda profile: ThresholdOnly(),
}


def build_segmenter(profile: Profile) -> Segmenter:
    """The segmenter that ``profile.masks.segmenter`` names; ``ProfileError`` if there is none of that name."""
    name = profile.masks.segmenter
    if name not in SEGMENTERS:
        raise ProfileError(f"There is no segmenter {name!r}; set masks.segmenter to one of {', '.join(sorted(SEGMENTERS))}.")
    return SEGMENTERS[name](profile)
