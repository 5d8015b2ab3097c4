"""Eq. 1: among mask proposals, that of highest average attribution is foreground, that of lowest background."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.masks import Segmenter
from ovdiff_lib.masks.threshold import fixed_thresholds, multi_otsu
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import Masks, Profile
from ovdiff_lib.types import ForegroundBackground, SupportSet

TOGETHER = 8
"""Images that a segmenter with ``propose_many`` gets in one call; on a CPU the detector gains nothing by more."""


def select(proposals: np.ndarray, attribution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 1: foreground and background, bool (H, W), from proposals bool (M, H, W) and attribution f32 (H, W).

    What no proposal covers is one more mask (the paper's "including a mask for the background"). Where the two chosen
    masks overlap the pixel is foreground. Both are empty without a proposal; one that covers all has no background.
    """
    if not proposals.any():
        return np.zeros(attribution.shape, dtype=bool), np.zeros(attribution.shape, dtype=bool)
    masks = np.concatenate([proposals, ~proposals.any(axis=0, keepdims=True)])
    masks = masks[masks.any(axis=(1, 2))]
    mean = mean_attribution(masks, attribution)
    foreground, background = masks[mean.argmax()], masks[mean.argmin()]
    return foreground, background & ~foreground


def mean_attribution(masks: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """sum(A * M) / sum(M * M), f64 (M,), of masks bool (M, H, W), none empty, in ``attribution`` f32 (H, W)."""
    flat = masks.reshape(len(masks), attribution.size).astype(np.float64)
    return flat @ attribution.reshape(-1).astype(np.float64) / flat.sum(axis=1)


def separate(proposals: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """Proposals bool (M, H, W) made disjoint: a pixel of several stays with the one of highest mean attribution."""
    proposals = proposals[proposals.any(axis=(1, 2))]
    order = np.argsort(-mean_attribution(proposals, attribution), kind="stable")
    ranked = proposals[order]
    ranked[1:] &= ~np.logical_or.accumulate(ranked, axis=0)[:-1]
    alone = np.empty_like(proposals)
    alone[order] = ranked
    return alone[alone.any(axis=(1, 2))]


def make_masks(support: SupportSet, profile: Profile, segmenter: Segmenter) -> ForegroundBackground:
    """Masks of every support image, bool (N, H, W) at the images' size, by Eq. 1 among what the segmenter proposes.

    Where it proposes nothing, thresholds on the attribution decide (``masks.fallback``; App. C.5: multi-Otsu), and the
    image's ``source`` is "threshold". Of the segmenter "threshold" they are always multi-Otsu's, as in released code.
    """
    settings, images = profile.masks, support.images
    if support.attribution is None:
        raise InputError("Own pictures have no attribution to choose masks by; masks_of has what build_from made.")
    attribution = upsample(support.attribution, images.shape[1:3])
    foreground, background = np.zeros((2, *attribution.shape), dtype=bool)
    source, found = [], proposals(segmenter, images, support.category.prompt)
    waited = tqdm(found, desc=f"masks of {support.category.name}", total=len(images), leave=False, delay=3)
    for n, masks in zip(range(len(images)), waited, strict=True):
        masks = np.asarray(masks, dtype=bool)
        if masks.ndim != 3 or masks.shape[1:] != attribution.shape[1:]:
            raise InputError(f"The segmenter {segmenter.name!r} returned masks of shape {masks.shape}; propose() must "
                             f"return bool (M, {images.shape[1]}, {images.shape[2]}).")
        if settings.overlaps == "attribution":
            masks = separate(masks, attribution[n])
        foreground[n], background[n] = select(masks, attribution[n])
        source.append(segmenter.name if masks.any() else "threshold")
    bare = [n for n, made_by in enumerate(source) if made_by == "threshold"]
    if bare:  # searching thresholds costs as much as a network
        fixed = settings.fallback == "fixed" and segmenter.name != "threshold"
        foreground[bare], background[bare] = _thresholds(attribution, bare, settings, fixed)
    return ForegroundBackground(foreground, _tighten(background, attribution, settings), tuple(source))


def proposals(segmenter: Segmenter, images: np.ndarray, words: str) -> Iterator[np.ndarray]:
    """What ``segmenter`` proposes for each of the images u8 (N, H, W, 3), :data:`TOGETHER` at a time where it can."""
    several = getattr(segmenter, "propose_many", None)
    for start in range(0, len(images), TOGETHER if several else 1):
        with undisturbed():
            group = images[start : start + TOGETHER]
            found = several(group, words) if several else [segmenter.propose(group[0], words)]
        yield from found


def _thresholds(attribution: np.ndarray, chosen: list[int], settings: Masks, fixed: bool) -> tuple[np.ndarray, ...]:
    """Foreground and background of the maps at the indices ``chosen``, by ``fixed`` thresholds or multi-Otsu's."""
    if fixed:
        return fixed_thresholds(attribution[chosen], settings.fallback_foreground, settings.fallback_background)
    levels = settings.threshold_classes, settings.threshold_foreground
    if settings.threshold_scope == "set":  # the levels of all maps, not of the chosen ones alone
        return tuple(masks[chosen] for masks in multi_otsu(attribution, *levels))
    return tuple(np.stack([multi_otsu(attribution[n], *levels) for n in chosen], axis=1))


def upsample(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps f32 (n, h, w) resized bilinearly to (n, *size)."""
    tensor = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))[:, None]
    return F.interpolate(tensor, size=tuple(size), mode="bilinear", align_corners=False)[:, 0].numpy()


def _tighten(background: np.ndarray, attribution: np.ndarray, settings: Masks) -> np.ndarray:
    """Background without pixels of high attribution and without a seam of ``erosion`` pixels along everything else."""
    if settings.background_below < 1:
        background = background & (attribution < settings.background_below)
    if settings.erosion > 0:
        from scipy.ndimage import binary_erosion, generate_binary_structure

        # The leading axis of length 1 keeps to one image. What lies outside it is unknown, not object, so the border
        # itself does not erode, nor does it in the released code (scikit-image's erosion).
        cross = generate_binary_structure(2, 1)[None]
        background = binary_erosion(background, cross, iterations=settings.erosion, border_value=1)
    return background
