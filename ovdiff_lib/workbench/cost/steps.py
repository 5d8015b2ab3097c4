"""What a class and an image cost on this machine (Sec. 4.2, App. C.5): every step of the method, timed.

The steps of a class are called themselves, not through the prototype library: nothing is read that an earlier run left.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ovdiff_lib.categories import Category
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.networks.loading import load_diffusion, resolve_device
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank, SupportSet
from ovdiff_lib.workbench.cost.instruments import Measured, alternate, measured

ClassTimes = dict[tuple[str, bool], dict[str, Measured]]
"""(extractor, with clustering or not) -> step -> what it took: drawing (result ``SupportSet``), masks
(``ForegroundBackground``), features (f32 (N, h, w, D)), prototypes (``Prototypes``), in this order."""


def measure_drawing(profile: Profile, category: Category, sizes: Sequence[int], repeats: int = 1,
                    budget: float = math.inf) -> dict[int, Measured]:
    """Step 1, results ``SupportSet``, for each of ``sizes`` images, in turns (``alternate``), after one of one step."""
    pipe, sizes = load_diffusion(profile), sorted(set(sizes))
    short = profile.override({"support.steps": 1})

    def draw(size: int, number: int) -> SupportSet:
        return sample_support(pipe, category, profile if number else short, size if number else 1, False)

    found = alternate([partial(draw, size) for size in sizes], repeats, resolve_device(profile), budget)
    return dict(zip(sizes, found, strict=True))


def measure_building(profile: Profile, drawing: Measured, extractors: Sequence[str], repeats: int = 1) -> ClassTimes:
    """Steps 2a to 2c on the set drawn last, with clustering and without (App. C.5), after one unmeasured image."""
    support, settings, device = drawing.result, profile.prototypes, resolve_device(profile)
    plain = dataclasses.replace(settings, kinds=[kind for kind in settings.kinds if kind != "part"] or ["class"])
    segmenter, one = build_segmenter(profile), support.take([0])
    make_masks(one, profile, segmenter)
    masks = measured(make_masks, [(support, profile, segmenter)] * repeats, device=device)
    times: ClassTimes = {}
    for name in extractors:
        extractor = EXTRACTORS[name](profile)
        extractor(one.images, one.seeds)
        features = measured(extractor, [(support.images, support.seeds)] * repeats, device=device)
        for clustering, used in ((True, settings), (False, plain)):
            given = (features.result, masks.result, used, profile.masks.resize)
            made = measured(build_prototypes, [given] * repeats, device=device)
            times[name, clustering] = {"drawing": drawing, "masks": masks, "features": features, "prototypes": made}
    return times


def measure_segmenting(methods: Mapping[str, Callable[[np.ndarray, PrototypeBank], Any]], bank: PrototypeBank,
                       counts: Sequence[int], images: Sequence[np.ndarray],
                       profile: Profile) -> dict[str, list[tuple[int, Measured]]]:
    """Times of each method (image u8 (H, W, 3), bank) with the first so many classes: name -> [(classes, Measured)].
    The first image warms up; each other one is segmented once: a filter that knows an image is faster."""
    device, found = resolve_device(profile), {name: [] for name in methods}
    for count in counts:
        part = bank.restrict(range(count))
        for name, method in methods.items():
            method(images[0], part)
            found[name].append((count, measured(method, [(image, part) for image in images[1:]], device=device)))
    return found
