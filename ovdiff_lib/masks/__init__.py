"""Step 2a, Sec. 3.2: from attribution to foreground and background masks.

A segmenter (the paper's Gamma) proposes masks without knowing any class; :mod:`~ovdiff_lib.masks.select` picks among
them by attribution (Eq. 1). To add one, write a class with ``name`` and ``propose`` and give it a line in
:data:`SEGMENTERS`: ``"name": Part(Mine)``, where ``Mine(profile)`` builds it. The prototype library's keys hold a hash
of the module that defines ``Mine``, so that classes are built again after it was edited; ``Part(Mine, version="1")``
puts a version of your own in its place (:class:`~ovdiff_lib.registry.Part`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ovdiff_lib.masks.segmenters.cutler import CutLER
from ovdiff_lib.masks.segmenters.detector import DetectorSegmenter
from ovdiff_lib.masks.segmenters.maskcut import MaskCut
from ovdiff_lib.masks.segmenters.sam import GroundedSam, SegmentAnything
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Profile, check_choice
from ovdiff_lib.registry import Part, check_part


class Segmenter(Protocol):
    """Class-agnostic mask proposals for one image. ``name`` says in results what made a mask.

    A segmenter that is faster on several images at a time may also have ``propose_many(images, words)``: images u8 (n,
    H, W, 3), and a list of what ``propose`` returns for each, up to rounding.
    """

    name: str

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W), M >= 0 proposals that may overlap, for a u8 RGB image (H, W, 3). The background is not among
        them.

        ``words`` name what the image was drawn for; only a segmenter guided by text reads them.
        """
        ...


class ThresholdOnly:
    """No proposals: every mask comes from thresholding the attribution (the paper's "-CutLER")."""

    name = "threshold"

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        return np.zeros((0, *image.shape[:2]), dtype=bool)


SEGMENTERS: dict[str, Part] = {
    "threshold": Part(lambda profile: ThresholdOnly(), models=(), settings=()),
    "detector": Part(DetectorSegmenter.build, models=("detector",), settings=("detector_",)),
    "maskcut": Part(MaskCut.build, models=("dino",), settings=("maskcut_",)),
    "cutler": Part(CutLER.build, models=("cutler",), settings=("cutler_",)),
    "sam": Part(SegmentAnything.build, models=("sam",), settings=("sam_",)),
    "grounded-sam": Part(GroundedSam.build, models=("grounding", "sam"), settings=("grounding_",)),
}
"""Name -> how the segmenter is built and what its proposals depend on."""

COMMON_SETTINGS = ("segmenter", "threshold_", "background_below", "erosion", "overlaps", "fallback", "fallback_", "resize")
"""Fields of ``profile.masks`` that matter with any segmenter."""


def check_segmenter(profile: Profile) -> None:
    """``ProfileError`` unless ``masks.segmenter`` names a ``Part`` in :data:`SEGMENTERS`."""
    name = profile.masks.segmenter
    check_choice("masks.segmenter", name, SEGMENTERS)
    check_part("SEGMENTERS", name, SEGMENTERS[name])


@undisturbed()
def build_segmenter(profile: Profile) -> Segmenter:
    """The segmenter that ``profile.masks.segmenter`` names. Raises ``ProfileError`` and ``ModelNotAvailable``."""
    check_segmenter(profile)
    return SEGMENTERS[profile.masks.segmenter](profile)
