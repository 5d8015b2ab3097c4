"""Scenarios of Sec. 3.1 to 3.3: drawing with attribution, what the maps take of memory, and all steps of a class."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import Prototypes
from ovdiff_lib.workbench.cost.fresh import alternate_fresh
from ovdiff_lib.workbench.cost.plain import bare_features, draw, stored_attribution
from ovdiff_lib.workbench.cost.ratio import Bound, Check, Ratio, alternate
from ovdiff_lib.workbench.cost.scene import Scene, difference

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from ovdiff_lib.profiles.schema import Profile


LEVELS = 2
"""Largest difference of two drawings of one image, in levels of 255: rounding of another attention kernel."""

SAME_MAPS = 1e-5


def sampling(scene: Scene) -> list[Ratio]:
    """Drawing a support set with its attribution against the bare pipeline, which draws the same images."""
    bound = Bound(1.15)
    return [_sampling(scene, scene.pipe, scene.profile, scene.profile.support.size, bound, "sampling-attribution", scene.repeats)]


def sampling_full_size(scene: Scene) -> list[Ratio]:
    """The same at the size of Stable Diffusion v1.5, random weights: one image of 512 x 512 pixels, two steps."""
    from ovdiff_lib.workbench.cost.full_size import stable_diffusion

    profile = scene.profile.override({"support.image_size": 512, "support.steps": 2, "support.guidance_scale": 8.0})
    pipe = stable_diffusion(scene.device)
    return [_sampling(scene, pipe, profile, 1, Bound(1.05), "sampling-attribution, full size", scene.repeats)]


def _sampling(scene: Scene, pipe: StableDiffusionPipeline, profile: Profile, count: int, bound: Bound, name: str, rounds: int) -> Ratio:
    def ours(_: int, used: Profile = profile):
        return sample_support(pipe, scene.category, used, count, progress=False)

    def theirs(_: int, used: Profile = profile):
        return draw(pipe, scene.category, used, count)

    short = profile.override({"support.steps": 1})
    pair = alternate(ours, theirs, rounds, device=scene.device, warm_up=(lambda: ours(0, short), lambda: theirs(0, short)))
    same = Check("levels of 255 between the drawings", difference(pair.our_result.images, pair.their_result), LEVELS)
    return Ratio(name, f"{count} support image{'s' * (count > 1)} of {profile.support.steps} steps, with attribution",
                 "the bare StableDiffusionPipeline with its own attention processors, same images and steps",
                 pair.ours, pair.theirs, bound, (same,))


def attribution_memory(scene: Scene) -> list[Ratio]:
    """Accumulated maps against stored ones: memory of each in a process of its own, and that the maps are the same."""
    count = scene.profile.support.size
    pair = alternate_fresh(scene, "attribution", {"stored": False}, {"stored": True})
    few = min(4, count)
    ours = sample_support(scene.pipe, scene.category, scene.profile, few, progress=False).attribution
    same = Check("largest difference of the maps", difference(ours, stored_attribution(scene.pipe, scene.category, scene.profile, few)),
                 SAME_MAPS)
    return [Ratio("attribution memory", f"drawing {count} images in one batch, attribution summed as it comes",
                  "the attention of every layer and step kept until the end, then summed", pair.ours, pair.theirs, None, (same,), "memory",
                  "each in a process of its own, once")]


def building(scene: Scene) -> list[Ratio]:
    """All steps of a class with the extractor sd against the bare pipeline and one bare pass of its networks over each image."""
    profile, pipe, count = scene.profile, scene.pipe, scene.profile.support.size
    steps = ClassSteps(scene)

    def theirs(_: int) -> None:
        drawn = draw(pipe, scene.category, profile, count)
        bare_features(pipe, profile.features, list(drawn), profile.features.batch_size)()

    pair = alternate(steps, theirs, scene.repeats, device=scene.device)
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in steps.medians().items())
    return [Ratio("building a class", f"{count} images: drawing, attribution, masks ({profile.masks.segmenter}), features, prototypes",
                  "the bare StableDiffusionPipeline, then VAE encoder and one UNet pass over each image, resized and noised as well",
                  pair.ours, pair.theirs, Bound(1.15), note=f"medians: {parts}")]


class ClassSteps:
    """Builds the scene's class, all steps, at every call; ``spent`` keeps the seconds of each step in each call, by name."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.segmenter, self.extractor = scene, build_segmenter(scene.profile), EXTRACTORS["sd"](scene.profile)
        self.spent: dict[str, list[float]] = {}

    def __call__(self, _: int = 0) -> Prototypes:
        scene, profile = self.scene, self.scene.profile
        support = self._step("drawing", lambda: sample_support(scene.pipe, scene.category, profile, progress=False))
        masks = self._step("masks", lambda: make_masks(support, profile, self.segmenter))
        features = self._step("features", lambda: self.extractor(support.images, support.seeds))
        return self._step("prototypes", lambda: build_prototypes(features, masks, profile.prototypes, profile.masks.resize))

    def medians(self) -> dict[str, float]:
        """Median seconds of each step, the first call left out: it warms up."""
        return {name: statistics.median(times[1:]) for name, times in self.spent.items()}

    def _step(self, name: str, function: Callable[[], Any]) -> Any:
        # Not `measured`: it would set back the peak of memory that the whole class is measured by.
        started = time.perf_counter()
        result = function()
        if self.scene.device.type == "cuda":
            torch.cuda.synchronize(self.scene.device)
        self.spent.setdefault(name, []).append(time.perf_counter() - started)
        return result
