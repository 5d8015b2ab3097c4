"""Multi-level thresholding of attribution maps (App. C.5): what is left when a segmenter proposes nothing, and
"-CutLER"."""

from __future__ import annotations

import numpy as np

from ovdiff_lib.errors import InputError, ProfileError

BINS = 256
"""Bins of the histogram that multi-Otsu divides; it spans the range of the values."""

NOT_FINITE = "The attribution maps hold values that are not finite; check the diffusion model's weights, or use dtype float32."


def check_multi_otsu(classes: int, foreground_levels: int) -> None:
    """``ProfileError`` unless at least one level remains below the foreground's."""
    if not 1 <= foreground_levels < classes:
        raise ProfileError(f"masks.threshold_foreground is {foreground_levels}; set it to a number from 1 to {classes - 1}, below "
                           "masks.threshold_classes.")


def check_fixed(foreground_above: float, background_below: float) -> None:
    """``ProfileError`` unless 0 <= ``background_below`` <= ``foreground_above`` <= 1."""
    if not 0 <= background_below <= foreground_above <= 1:
        raise ProfileError(f"masks.fallback_background is {background_below} and masks.fallback_foreground {foreground_above}; set both "
                           "from 0 to 1, the first at most as high as the second.")


def multi_otsu(attribution: np.ndarray, classes: int = 3, scope: str = "image",
               foreground_levels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and background of attribution maps f32 (n, h, w): bool (n, h, w) each, disjoint.

    Multi-Otsu (Liao, Chen and Chung, 2001) splits the values into ``classes`` levels, of each map or (``scope`` "set")
    of all together; the top ``foreground_levels`` are foreground, the bottom one is background. Values in fewer bins
    than there are classes are split in two at the middle of their range; a constant map says nothing, so both its masks
    are empty.
    """
    check_multi_otsu(classes, foreground_levels)
    if not np.isfinite(attribution).all():
        raise InputError(NOT_FINITE)
    if scope == "set":
        return _split(attribution, classes, foreground_levels)
    pairs = [_split(one, classes, foreground_levels) for one in attribution]
    masks = np.array(pairs, dtype=bool).reshape(len(attribution), 2, *attribution.shape[1:])
    return masks[:, 0], masks[:, 1]


def fixed_thresholds(attribution: np.ndarray, foreground_above: float, background_below: float) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and background of attribution maps f32 (n, h, w): bool (n, h, w) each, disjoint.

    Each map is min-max scaled; foreground is what lies above the first threshold, background what lies below the
    second. A constant map has neither. Raises ``ProfileError`` unless 0 <= ``background_below`` <= ``foreground_above``
    <= 1.
    """
    check_fixed(foreground_above, background_below)
    if not np.isfinite(attribution).all():
        raise InputError(NOT_FINITE)
    low, high = (f(attribution, axis=(1, 2), keepdims=True).astype(np.float64) for f in (np.min, np.max))
    span = np.where(high > low, high - low, np.nan)  # a comparison with NaN is false
    unit = (attribution - low) / span
    return unit > foreground_above, unit < background_below


def _split(values: np.ndarray, classes: int, foreground_levels: int) -> tuple[np.ndarray, np.ndarray]:
    from skimage.filters import threshold_multiotsu

    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    if not low < high:
        empty = np.zeros(values.shape, dtype=bool)
        return empty, empty.copy()
    unit = (values.astype(np.float64) - low) / (high - low)
    counts, edges = np.histogram(unit, BINS, (0.0, 1.0))
    if np.count_nonzero(counts) < classes:
        return unit > 0.5, unit <= 0.5
    # Thresholds come back as the numbers of the last bins of a level; comparing bin numbers keeps each bin's pixels together.
    last = threshold_multiotsu(hist=(counts, np.arange(BINS)), classes=classes)
    level = np.clip(np.searchsorted(edges, unit, side="right") - 1, 0, BINS - 1)
    return level > last[-foreground_levels], level <= last[0]
