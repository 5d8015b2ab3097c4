"""Any baseline with OVDiff's category pre-filter (Table A.1), so that the filter is no advantage of OVDiff alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.workbench.baselines.common import Baseline

CategoryFilter = Callable[[np.ndarray, Vocabulary], tuple[Sequence[int], np.ndarray]]
"""Image u8 (H, W, 3) and vocabulary -> indices of the kept categories, and their probabilities: ``OVDiff.category_filter``."""


class Filtered(Baseline):
    """``baseline`` with the categories that ``category_filter`` drops out of the running; the background always stays.

    For example ``Filtered(build_baseline("maskclip", ovdiff.profile), ovdiff.category_filter)``.
    """

    def __init__(self, baseline: Baseline, category_filter: CategoryFilter) -> None:
        self.baseline, self.category_filter = baseline, category_filter

    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """f32 (C + 1, H, W): the baseline's scores of the whole vocabulary, -inf for the categories that were dropped."""
        scores = self.baseline.scores(image, vocabulary).copy()
        kept, _ = self.category_filter(image, vocabulary)
        dropped = sorted(set(range(len(vocabulary))) - set(kept))
        scores[[k + 1 for k in dropped]] = -np.inf
        return scores
