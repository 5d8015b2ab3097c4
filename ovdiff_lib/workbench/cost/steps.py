"""What a class and an image cost on this machine (Sec. 4.2, App. C.5): every step of the method, timed.

The steps of a class are called themselves, not through the prototype library: nothing is read that an earlier run left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovdiff_lib.categories import Category
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.networks.loading import load_diffusion, resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.cost.flops import window_boxes
from ovdiff_lib.workbench.cost.instruments import Measured, joined, measured


def measure_drawing(profile: Profile, category: Category, sizes: Sequence[int], repeats: int = 1,
                    budget: float = math.inf) -> dict[int, Measured]:
    """Step 1 for support sets of each of ``sizes`` images; results are ``SupportSet``.

    One image of one step is drawn before, so that loading is not counted. ``repeats`` rounds go through all sizes, so
    that a machine that is busy for a while slows all of them; a size that took ``budget`` seconds is left out of
    further rounds.
    """
    pipe, device = load_diffusion(profile), resolve_device(profile)
    sample_support(pipe, category, profile.override({"support.steps": 1}), 1, progress=False)
    found: dict[int, list[Measured]] = {size: [] for size in sorted(set(sizes))}
    for _ in range(repeats):
        for size, runs in found.items():
            if sum(sum(run.seconds) for run in runs) < budget:
                runs.append(measured(sample_support, [(pipe, category, profile, size, False)], device=device))
    return {size: joined(runs) for size, runs in found.items()}


@dataclass(frozen=True)
class ClassTimes:
    """What one class took, by step: drawing (result ``SupportSet``), masks (``ForegroundBackground``), and by extractor
    its features (f32 (N, h, w, D)) and its prototypes with and without clustering (``Prototypes``)."""

    drawing: Measured
    masks: Measured
    features: dict[str, Measured]
    clustered: dict[str, Measured]
    averaged: dict[str, Measured]

    def steps(self, extractor: str, clustering: bool = True) -> dict[str, Measured]:
        """The steps of a class with one extractor by name, in order; drawing and masks are the same for all."""
        last = self.clustered if clustering else self.averaged
        return {"drawing": self.drawing, "masks": self.masks, "features": self.features[extractor],
                "prototypes": last[extractor]}

    def seconds(self, extractor: str, clustering: bool = True) -> float:
        """Sum of the steps' medians."""
        return sum(step.median for step in self.steps(extractor, clustering).values())


def measure_building(profile: Profile, drawing: Measured, extractors: Sequence[str], repeats: int = 1) -> ClassTimes:
    """Steps 2a to 2c on the support set drawn last, ``repeats`` times each, after one unmeasured image for every
    network.

    "With clustering" is the profile's kinds of prototypes, "without" those without parts (App. C.5 times both).
    """
    support, settings, device = drawing.result, profile.prototypes, resolve_device(profile)
    plain = dataclasses.replace(settings, kinds=[kind for kind in settings.kinds if kind != "part"] or ["class"])
    segmenter, one = build_segmenter(profile), support.take([0])
    make_masks(one, profile, segmenter)
    masks = measured(make_masks, [(support, profile, segmenter)] * repeats, device=device)
    times = ClassTimes(drawing, masks, {}, {}, {})
    for name in extractors:
        extractor = EXTRACTORS[name](profile)
        extractor(one.images, one.seeds)
        features = measured(extractor, [(support.images, support.seeds)] * repeats, device=device)
        times.features[name] = features
        for into, used in ((times.averaged, plain), (times.clustered, settings)):
            given = (features.result, masks.result, used, profile.masks.resize)
            into[name] = measured(build_prototypes, [given] * repeats, device=device)
    return times


def measure_segmenting(methods: Mapping[str, Callable[[np.ndarray, PrototypeBank], Any]], bank: PrototypeBank,
                       counts: Sequence[int], images: Sequence[np.ndarray],
                       profile: Profile) -> dict[str, list[tuple[int, Measured]]]:
    """Times of each method (image u8 (H, W, 3), bank) with the first so many classes: name -> [(classes, Measured)].

    The first image warms up and is not counted; each other one is segmented once: a filter that knows an image is
    faster.
    """
    device, found = resolve_device(profile), {name: [] for name in methods}
    for count in counts:
        part = bank.restrict(range(count))
        for name, method in methods.items():
            method(images[0], part)
            found[name].append((count, measured(method, [(image, part) for image in images[1:]], device=device)))
    return found


def measure_windows(profile: Profile, bank: PrototypeBank,
                    images: Sequence[np.ndarray]) -> dict[str, tuple[float, Measured]]:
    """Times against the number of windows, without the category filter: what was set -> (mean windows, Measured).

    The profile's first scale alone, all its scales, and all with half and a quarter of its stride. The first image
    warms up.
    """
    cut, found = profile.matching, {}
    finer = [(cut.windows, max(1, cut.stride // part)) for part in (1, 2, 4)]
    for sizes, stride in [(cut.windows[:1], cut.stride), *finer]:
        ovdiff = OVDiff(profile, {"filters.category": False, "matching.windows": sizes, "matching.stride": stride})
        ovdiff.segment(images[0], bank)
        mean = float(np.mean([len(window_boxes(image.shape[:2], ovdiff.profile)) for image in images[1:]]))
        times = measured(ovdiff.segment, [(image, bank) for image in images[1:]], device=resolve_device(profile))
        found[f"windows of {' and '.join(map(str, sizes))}, stride {stride}"] = mean, times
    return found
