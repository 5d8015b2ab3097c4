"""One cheap step of every network whose weights are here: whether it computes, and whether it is the published one."""

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.masks import SEGMENTERS
from ovdiff_lib.networks.loading import load_clip, load_diffusion, load_dino, load_mae
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.baselines import BASELINES
from ovdiff_lib.workbench.console import described
from ovdiff_lib.workbench.doctor import HERE, Check, published

LOADERS = {"diffusion": load_diffusion, "clip": lambda profile: load_clip(profile)[0], "dino": load_dino,
           "mae": load_mae}


def trials(profile: Profile, checks: Sequence[Check]) -> Iterator[Check]:
    """What comes of one step of each part whose models are all here, by the ``checks`` of them: one drawing in one
    step, then features, masks and scores of noise; and the constants of published models. Whatever is raised is a
    result."""
    models = {check.what.removeprefix("models."): check for check in checks if check.what.startswith("models.")}
    one, words = profile.override({"support.steps": 1, "support.size": 1}), Vocabulary.of("cat, dog")
    side, segmenter = profile.support.image_size, profile.masks.segmenter
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    parts = {
        "support images": ((1, None, None), lambda: sample_support(
            load_diffusion(one), words.categories[0], one, progress=False).attribution),
        f"segmenter {segmenter}": ((None, side, side), lambda: SEGMENTERS[segmenter](one).propose(noise, "cat")),
        "category filter": ((2,), lambda: CategoryFilter.build(one)(noise, words)[1]),
        "baseline groupvit": ((2, side, side), lambda: BASELINES["groupvit"](one).scores(noise, words)[1:]),
        **{f"extractor {name}": ((1, None, None, None), lambda part=part: part(one)(noise[None], np.zeros(1, np.int64)))
           for name, part in EXTRACTORS.items()}}
    for label, (shape, step) in parts.items():
        states = [check.state in HERE for check in models.values() if label in check.used_by]
        if not states or not all(states):
            continue
        try:
            found = np.asarray(step())
            fits = found.ndim == len(shape) and all(n in (found.shape[i], None) for i, n in enumerate(shape))
            lives = found.dtype == bool or (np.isfinite(found).all() and np.ptp(found) > 0)
            wrong = "not finite, or all the same" if fits else f"not of the shape {shape}"
            wrong = "" if fits and lives else f"What the {label} gave, {found.shape}, is {wrong}."
            yield Check(f"step of {label}", state=str(found.shape), problem=wrong)
        except Exception as error:
            problem = f"One step of the {label} failed: {described(error)}"
            yield Check(f"step of {label}", state="failed", problem=problem)
    for field in (one for one in LOADERS if one in models and models[one].used_by and models[one].state in HERE):
        known = published(models[field].named)
        for path, _, value in (pair.partition("=") for pair in ("" if known is None else known.constants).split()):
            found = float(attrgetter(path)(LOADERS[field](one)))
            right = math.isclose(found, float(value), rel_tol=0.005)  # half precision
            wrong = "" if right else f"{path} of models.{field} is {found:g}, and {value} in the published model."
            yield Check(f"models.{field} {path}", state=f"{found:g}", problem=wrong)
