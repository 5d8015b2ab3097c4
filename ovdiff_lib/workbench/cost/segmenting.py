"""Scenarios of segmenting (Sec. 3.4): an image against the bare networks, images together, other number types, PAMR."""

from __future__ import annotations

from typing import Any

import numpy as np

from ovdiff_lib.workbench.cost.fresh import alternate_fresh
from ovdiff_lib.workbench.cost.plain import bare_features, pamr_unfolded, scores_at_once, window_crops
from ovdiff_lib.workbench.cost.ratio import Bound, Check, Ratio, alternate
from ovdiff_lib.workbench.cost.scene import Scene, difference, quiet

FEW = 20
"""Classes of PASCAL VOC, and of the paper's times."""

TOGETHER = 8
"""Images of a round."""

SAME_SCORES = 1e-4

OTHER_LABELS = 0.01
"""Share of pixels whose label a number type or a layout may change."""

PAMR_SHAPE, PAMR_CLASSES = (448, 600), 21


def segmenting(scene: Scene) -> list[Ratio]:
    """Images against :data:`FEW` classes, all texts of the filter known, against the networks alone on the same windows.

    The second row does the same with the windows of all images in common batches, on both sides. A third sets the image pass of the
    category filter's CLIP beside the bare pass: it is part of the others.
    """
    bank, images, settings = scene.made_up(FEW), [scene.image(i) for i in range(TOGETHER)], scene.profile
    size = settings.matching.batch_size
    bare = [bare_features(scene.pipe, settings.features, [crop for crop, _ in window_crops(image, settings)], size) for image in images]

    def theirs(_: int) -> None:
        for run in bare:
            run()

    with quiet():
        pair = alternate(lambda _: [scene.ovdiff.segment(image, bank) for image in images], theirs, scene.repeats, device=scene.device)
    windows = np.mean([len(window_crops(image, settings)) for image in images])
    against = f"VAE encoder and one UNet pass over the same windows, prepared before, those of an image in batches of {size}"
    rows = [Ratio("segmenting", f"{len(images)} images, {windows:.1f} windows each, against {FEW} classes, category filter "
                  f"{'on with known texts' if settings.filters.category else 'off'}", against, pair.ours, pair.theirs, Bound(1.2))]
    every = bare_features(scene.pipe, settings.features, [crop for image in images for crop, _ in window_crops(image, settings)],
                          size)
    with quiet():
        pair = alternate(lambda _: list(scene.ovdiff.segment_many(images, bank)), lambda _: every(), scene.repeats, device=scene.device)
    rows.append(Ratio("segmenting together", f"the same {len(images)} images in one call", "the same bare pass, windows of all images in "
                      f"batches of {size}", pair.ours, pair.theirs, Bound(1.2)))
    if settings.filters.category:
        embed = scene.ovdiff.category_filter.embed_image
        own = alternate(lambda _: [embed(image) for image in images], theirs, scene.repeats, device=scene.device)
        rows.append(Ratio("segmenting: the filter's image pass", f"CLIP's image tower on the same {len(images)} images", against,
                          own.ours, own.theirs, note="part of the rows above"))
    return rows


def images_together(scene: Scene) -> list[Ratio]:
    """Windows of many images in common batches against one image after the other."""
    bank, images = scene.made_up(FEW), [scene.image(i) for i in range(2 * TOGETHER)]
    with quiet():
        pair = alternate(lambda _: list(scene.ovdiff.segment_many(images, bank)),
                         lambda _: [scene.ovdiff.segment(image, bank) for image in images], scene.repeats, device=scene.device)
    worst = max(difference(one.kept_scores, other.kept_scores) for one, other in zip(pair.our_result, pair.their_result, strict=True))
    return [Ratio("images together", f"{len(images)} images against {FEW} classes, windows of several in one batch",
                  "one image after the other", pair.ours, pair.theirs, None, (Check("largest difference of a score", worst, SAME_SCORES),))]


def matching_memory(scene: Scene, classes: int = 500) -> list[Ratio]:
    """Matching without the category filter, class by class, against one matrix of all pixels and prototypes; each in its own process."""
    scene.ovdiff.build(scene.bank.vocabulary)  # in the library, where the other processes take it from
    pair = alternate_fresh(scene, "matching", {"at_once": False, "classes": classes}, {"at_once": True, "classes": classes})
    ovdiff = scene.method({"filters.category": False, "filters.stuff": False, "matching.refine": "none"})
    bank, image = scene.made_up(FEW), scene.image(0)
    at_once = scores_at_once(ovdiff.extractors["sd"], scene.profile, image, bank)
    same = Check("largest difference of a score", difference(ovdiff.segment(image, bank).kept_scores, at_once), SAME_SCORES)
    return [Ratio("matching memory", f"an image against {classes} classes, category filter off", "all pixels x all prototypes at once",
                  pair.ours, pair.theirs, None, (same,), "memory", "each in a process of its own, once")]


def number_type(scene: Scene, dtype: str) -> list[Ratio]:
    """Networks in ``dtype`` against float32."""
    return [_switched(scene, dtype, f"networks in {dtype}", "float32", {"models.dtype": dtype}, {"models.dtype": "float32"})]


def _switched(scene: Scene, name: str, what: str, against: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Ratio:
    """Images segmented together with the profile's fields ``ours`` and ``theirs``, the same prototypes: time, and pixels with one label."""
    bank, images = scene.bank, [scene.image(i) for i in range(TOGETHER)]
    methods = scene.method(ours), scene.method(theirs)
    pair = alternate(*(lambda _, method=method: [found.labels for found in method.segment_many(images, bank)] for method in methods),
                     scene.repeats, device=scene.device)
    equal = [a == b for a, b in zip(pair.our_result, pair.their_result, strict=True)]
    differ = 1 - sum(int(e.sum()) for e in equal) / sum(e.size for e in equal)
    return Ratio(name, f"{len(images)} images against {len(bank.vocabulary)} classes, {what}", against, pair.ours, pair.theirs,
                 checks=(Check("share of pixels with another label", differ, OTHER_LABELS),), note=f"on {scene.device.type}")


def pamr_memory(scene: Scene) -> list[Ratio]:
    """PAMR in blocks of rows against all neighbours laid out, each in its own process."""
    import torch

    from ovdiff_lib.matching.pamr import pamr

    given = {"shape": PAMR_SHAPE, "classes": PAMR_CLASSES}
    pair = alternate_fresh(scene, "pamr", {"unfolded": False, **given}, {"unfolded": True, **given})
    image = scene.image(0)
    scores = torch.rand(3, *image.shape[:2], generator=torch.Generator().manual_seed(0))
    same = Check("largest difference of a score", difference(pamr(image, scores), pamr_unfolded(image, scores)), 1e-5)
    return [Ratio("PAMR", f"scores of {PAMR_CLASSES} classes at {PAMR_SHAPE[0]} x {PAMR_SHAPE[1]} pixels refined in blocks of rows",
                  "all neighbours of all classes unfolded at once", pair.ours, pair.theirs, None, (same,), "memory",
                  "each in a process of its own, once")]
