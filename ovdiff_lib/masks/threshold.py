"""Thresholds on attribution maps (App. C.5): what is left when a segmenter proposes nothing, and "-CutLER"."""

import numpy as np

BINS = 256
"""Bins of the histogram that multi-Otsu divides; it spans the range of the values."""


def multi_otsu(values: np.ndarray, classes: int = 3, foreground_levels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and background of finite attribution values, of one map or of several together: bool each, disjoint.

    Multi-Otsu (Liao, Chen and Chung, 2001) splits the values into ``classes`` levels; the top ``foreground_levels`` are
    foreground, the bottom one is background. Values in fewer bins than there are classes are split in two at the middle
    of their range; a constant says nothing, so both its masks are empty.
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        return np.zeros(values.shape, dtype=bool), np.zeros(values.shape, dtype=bool)
    unit = (values.astype(np.float64) - low) / (high - low)
    counts, edges = np.histogram(unit, BINS, (0.0, 1.0))
    if np.count_nonzero(counts) < classes:
        return unit > 0.5, unit <= 0.5
    last = _last_bins(counts, classes)  # comparing bin numbers keeps each bin's pixels together
    level = np.clip(np.searchsorted(edges, unit, side="right") - 1, 0, BINS - 1)
    return level > last[-foreground_levels], level <= last[0]


def _last_bins(counts: np.ndarray, classes: int) -> np.ndarray:
    """The last bin of each level but the top one, i64 (classes - 1,), where a histogram i64 (bins,) divides with most
    variance between levels, none empty: the largest sum over levels of (sum of values)^2 / number. ``best[b]`` is that
    sum for the bins below b, a level more each round; ``ends`` remembers where the last level began."""
    below, weighted = (np.append(0.0, np.cumsum(c)) for c in (counts, counts * np.arange(len(counts))))
    number, total = (c[None] - c[:, None] for c in (below, weighted))  # of the bins from a to b - 1, at [a, b]
    gain = np.where(number > 0, total**2 / np.maximum(number, 1), -np.inf)
    best, ends = gain[0], []
    for _ in range(classes - 1):
        several = best[:, None] + gain
        ends.append(several.argmax(0))
        best = several.max(0)
    found = [len(counts)]
    for end in reversed(ends):
        found.append(end[found[-1]])
    return np.array(found[:0:-1]) - 1


def fixed_thresholds(maps: np.ndarray, foreground_above: float,
                     background_below: float) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and background of finite attribution maps f32 (n, h, w): bool (n, h, w) each.

    Each map is min-max scaled; foreground is above the first threshold, background below the second, none if constant.
    """
    low, high = (f(maps, axis=(1, 2), keepdims=True).astype(np.float64) for f in (np.min, np.max))
    unit = (maps - low) / np.where(high > low, high - low, np.nan)  # a comparison with NaN is false
    return unit > foreground_above, unit < background_below


class ThresholdOnly:
    """No proposals: every mask comes from thresholding the attribution (the paper's "-CutLER")."""

    name = "threshold"

    def __init__(self, profile: object = None) -> None:
        """It has no settings and loads nothing."""

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        return np.zeros((0, *image.shape[:2]), dtype=bool)
