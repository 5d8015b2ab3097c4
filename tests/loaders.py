"""How the parts that use them load the models of a profile."""

from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.masks import SEGMENTERS
from ovdiff_lib.networks.loading import load_clip, load_diffusion, load_dino, load_mae
from ovdiff_lib.workbench.baselines.groupvit import load_groupvit

LOADERS = {"diffusion": load_diffusion, "clip": load_clip, "dino": load_dino, "mae": load_mae, "groupvit": load_groupvit,
           "open_clip": EXTRACTORS["open-clip-keys"], "detector": SEGMENTERS["detector"], "sam": SEGMENTERS["sam"],
           "grounding": SEGMENTERS["grounded-sam"]}
"""The field that names a model -> what loads it for a profile."""
