"""Step 2a, Sec. 3.2: from attribution to foreground and background masks.

A segmenter (the paper's Gamma) proposes masks without knowing any class; :mod:`~ovdiff_lib.masks.select` picks among
them by attribution (Eq. 1). To add one, write a class with ``name`` and ``propose`` and give it a line in
:data:`SEGMENTERS`: ``"name": Part(Mine)``, where ``Mine(profile)`` builds it. After an edit of the module that defines
``Mine`` the library's classes are built again (:class:`~ovdiff_lib.registry.Part`).
"""

from typing import Protocol

import numpy as np

from ovdiff_lib.masks.segmenters.cutler import CutLER
from ovdiff_lib.masks.segmenters.detector import DetectorSegmenter
from ovdiff_lib.masks.segmenters.maskcut import MaskCut
from ovdiff_lib.masks.segmenters.sam import GroundedSam, SegmentAnything
from ovdiff_lib.masks.threshold import ThresholdOnly
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import Part, chosen_part


class Segmenter(Protocol):
    """Class-agnostic mask proposals for one image. ``name`` says in results what made a mask.

    A segmenter that is faster on several images at a time may also have ``propose_many(images, words)``: images u8 (n,
    H, W, 3) to a list of what ``propose`` returns for each, up to rounding.
    """

    name: str

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W) of an image u8 RGB (H, W, 3): M >= 0 proposals, which may overlap, without the background.

        ``words`` name what the image was drawn for; only a segmenter guided by text reads them.
        """
        ...


SEGMENTERS: dict[str, Part] = {
    "threshold": Part(ThresholdOnly, models=(), settings=()),
    "detector": Part(DetectorSegmenter.build, models=("detector",), settings=("detector_",)),
    "maskcut": Part(MaskCut.build, models=("dino",), settings=("maskcut_",)),
    "cutler": Part(CutLER.build, models=("cutler",), settings=("cutler_",)),
    "sam": Part(SegmentAnything.build, models=("sam",), settings=("sam_",)),
    "grounded-sam": Part(GroundedSam.build, models=("grounding", "sam"), settings=("grounding_",)),
}
"""Name -> how the segmenter is built and what its proposals depend on."""

COMMON_SETTINGS = ("segmenter", "threshold_", "background_below", "erosion", "overlaps", "fallback", "fallback_",
                   "resize")
"""Fields of ``profile.masks`` that matter with any segmenter."""


@undisturbed()
def build_segmenter(profile: Profile) -> Segmenter:
    """The segmenter that ``profile.masks.segmenter`` names. Raises ``ProfileError`` and ``ModelNotAvailable``."""
    return chosen_part("masks.segmenter", profile.masks.segmenter, SEGMENTERS)(profile)
