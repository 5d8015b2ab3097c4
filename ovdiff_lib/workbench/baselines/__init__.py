"""Methods that the paper's tables compare OVDiff with (Table 1, A.1, A.2; App. C.4), run under the same protocol.

Each reads class names in templates of its own, and has the sizes and windows of the profile where it uses windows. To
add one, write a class with the method ``scores`` of :class:`Baseline` and one line in :data:`BASELINES`.
"""

from collections.abc import Callable

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.profiles.schema import Baselines, Profile
from ovdiff_lib.registry import Part, chosen_part
from ovdiff_lib.workbench.baselines.clip_diy import ClipDIY, background_words
from ovdiff_lib.workbench.baselines.common import Baseline
from ovdiff_lib.workbench.baselines.groupvit import GroupViT
from ovdiff_lib.workbench.baselines.maskclip import MaskCLIP
from ovdiff_lib.workbench.baselines.reco import ReCo
from ovdiff_lib.workbench.baselines.segmenter import ClipSegmenter

BASELINES: dict[str, Part] = {
    "maskclip": Part(MaskCLIP.build, models=("clip",), settings=("maskclip_",)),
    "clip-diy": Part(ClipDIY.build, models=("clip", "dino"), settings=("clip_diy_",)),
    "reco": Part(ReCo.build, models=("clip", "dino"), settings=("archive", "reco_")),
    "groupvit": Part(GroupViT.build, models=("groupvit",), settings=("groupvit_",)),
    "clip-segmenter": Part(ClipSegmenter.build, models=None, settings=("clip_segmenter_",))}
"""Name -> how it is built, which models and fields of ``baselines`` are its own (None: it depends on the segmenter)."""

OWN_BACKGROUND: dict[str, Callable[[Baselines, Vocabulary], bool]] = {
    "clip-diy": lambda settings, vocabulary: bool(background_words(settings, vocabulary)),
    "clip-segmenter": lambda settings, vocabulary: True}
"""Baselines that model the background themselves, and whether they do with a vocabulary. Row 0 of others is -inf as
built, and a constant threshold stands for the background
(:func:`~ovdiff_lib.workbench.evaluation.measure.above`)."""


def build_baseline(name: str, profile: Profile) -> Baseline:
    """The baseline of :data:`BASELINES` called ``name``. Raises ``ProfileError`` and ``ModelNotAvailable``."""
    return chosen_part("baseline", name, BASELINES)(profile)
