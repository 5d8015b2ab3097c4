"""Eq. 1: among mask proposals, the one with the highest average attribution is foreground, the one with the lowest
background."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.masks import Segmenter, build_segmenter
from ovdiff_lib.masks.threshold import NOT_FINITE, check_fixed, check_multi_otsu, fixed_thresholds, multi_otsu
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Masks, Profile
from ovdiff_lib.types import ForegroundBackground, SupportSet

TOGETHER = 8
"""Images that a segmenter with ``propose_many`` gets in one call; on a CPU the detector gains nothing by more."""


def select(proposals: np.ndarray, attribution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 1: foreground and background, bool (H, W), from proposals bool (M, H, W) and their mean attribution, f32 (H,
    W).

    What no proposal covers is one more mask (the paper's "including a mask for the background"). Where the two chosen
    masks overlap the pixel is foreground. Both are empty without a proposal; one that covers the image has no
    background.
    """
    if not proposals.any():
        empty = np.zeros(attribution.shape, dtype=bool)
        return empty, empty.copy()
    masks = np.concatenate([proposals, ~proposals.any(axis=0, keepdims=True)])
    masks = masks[masks.any(axis=(1, 2))]
    mean = mean_attribution(masks, attribution)
    best, worst = int(mean.argmax()), int(mean.argmin())
    foreground = masks[best]
    background = masks[worst] & ~foreground if worst != best else np.zeros_like(foreground)
    return foreground, background


def mean_attribution(masks: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """sum(A * M) / sum(M * M), f64 (M,), of masks bool (M, H, W), none empty, in ``attribution`` f32 (H, W)."""
    flat = masks.reshape(len(masks), attribution.size).astype(np.float64)
    return flat @ attribution.reshape(-1).astype(np.float64) / flat.sum(axis=1)


def separate(proposals: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """Proposals bool (M, H, W) made disjoint: a pixel of several stays with the one of highest mean attribution as a
    whole."""
    proposals = proposals[proposals.any(axis=(1, 2))]
    order = np.argsort(-mean_attribution(proposals, attribution), kind="stable")
    ranked = proposals[order]
    taken = np.logical_or.accumulate(ranked, axis=0)
    ranked[1:] &= ~taken[:-1]
    alone = np.empty_like(proposals)
    alone[order] = ranked
    return alone[alone.any(axis=(1, 2))]


def check_masks(settings: Masks) -> None:
    """``ProfileError`` for values of ``profile.masks`` that do not go together."""
    if settings.fallback == "fixed":
        check_fixed(settings.fallback_foreground, settings.fallback_background)
    else:
        check_multi_otsu(settings.threshold_classes, settings.threshold_foreground)


def make_masks(support: SupportSet, profile: Profile, segmenter: Segmenter | None = None) -> ForegroundBackground:
    """Masks of every support image, bool (N, H, W) at the images' size, by Eq. 1 among what the segmenter proposes.

    Where it proposes nothing, thresholds on the attribution decide (``masks.fallback``; App. C.5: multi-Otsu), and the
    image's ``source`` is "threshold". ``segmenter`` defaults to the one that ``masks.segmenter`` names.
    """
    from tqdm import tqdm

    settings = profile.masks
    check_masks(settings)
    segmenter = segmenter or build_segmenter(profile)
    label = segmenter.name
    attribution = upsample(support.attribution, support.images.shape[1:3])
    if not np.isfinite(attribution).all():
        raise InputError(NOT_FINITE)
    foreground, background = (np.zeros(attribution.shape, dtype=bool) for _ in range(2))
    source, images = [], support.images
    proposed = proposals(segmenter, images, support.category.prompt)
    waited = tqdm(zip(images, proposed, strict=True), desc=f"masks of {support.category.name}", total=len(images), leave=False, delay=3)
    for n, (image, found) in enumerate(waited):
        masks = np.asarray(found, dtype=bool)
        if masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
            raise InputError(f"The segmenter {label!r} returned masks of shape {masks.shape}; "
                             f"propose() must return bool (M, {image.shape[0]}, {image.shape[1]}).")
        some = bool(masks.any())
        if some and settings.overlaps == "attribution":
            masks = separate(masks, attribution[n])
        if some:
            foreground[n], background[n] = select(masks, attribution[n])
        source.append(label if some else "threshold")
    bare = [n for n, made_by in enumerate(source) if made_by == "threshold"]
    if bare:  # searching thresholds costs as much as a network
        foreground[bare], background[bare] = _thresholds(attribution, bare, settings)
    return ForegroundBackground(foreground, _tighten(background, attribution, settings), tuple(source))


def proposals(segmenter: Segmenter, images: np.ndarray, words: str) -> Iterator[np.ndarray]:
    """What ``segmenter`` proposes for each of the images u8 (N, H, W, 3), :data:`TOGETHER` at a time where it has
    ``propose_many``."""
    several = getattr(segmenter, "propose_many", None)
    for start in range(0, len(images), TOGETHER if several else 1):
        with undisturbed():
            found = several(images[start : start + TOGETHER], words) if several else [segmenter.propose(images[start], words)]
        yield from found


def _thresholds(attribution: np.ndarray, chosen: list[int], settings: Masks) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and background of the maps at the indices ``chosen``; thresholds of the whole set are those of all
    maps."""
    if settings.fallback == "fixed":
        return fixed_thresholds(attribution[chosen], settings.fallback_foreground, settings.fallback_background)
    if settings.threshold_scope == "set":
        foreground, background = multi_otsu(attribution, settings.threshold_classes, "set", settings.threshold_foreground)
        return foreground[chosen], background[chosen]
    return multi_otsu(attribution[chosen], settings.threshold_classes, settings.threshold_scope, settings.threshold_foreground)


def upsample(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps f32 (n, h, w) resized bilinearly to (n, *size)."""
    import torch
    import torch.nn.functional as F

    tensor = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))[:, None]
    return F.interpolate(tensor, size=tuple(size), mode="bilinear", align_corners=False)[:, 0].numpy()


def _tighten(background: np.ndarray, attribution: np.ndarray, settings: Masks) -> np.ndarray:
    """Background without pixels of high attribution and without a seam of ``erosion`` pixels along everything else."""
    if settings.background_below < 1:
        background = background & (attribution < settings.background_below)
    if settings.erosion > 0:
        from scipy.ndimage import binary_erosion

        # One structure per image: the leading axis of length 1 keeps neighbours within an image. What lies outside the image is unknown,
        # not object, so the border itself does not erode.
        cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], dtype=bool)
        background = binary_erosion(background, cross, iterations=settings.erosion, border_value=1)
    return background
