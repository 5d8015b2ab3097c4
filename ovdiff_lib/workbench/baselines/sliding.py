"""Windows for the baselines that use them: placed, averaged and resized as OVDiff's are (Sec. 4, "sliding window")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.windows import crop, scales
from ovdiff_lib.networks.instruments import batches
from ovdiff_lib.profiles.schema import Matching


def sliding_scores(image: np.ndarray, matching: Matching, score: Callable[[np.ndarray], Tensor]) -> Tensor:
    """f32 (C, H, W) on the CPU for an image u8 (H, W, 3).

    ``score`` maps squares u8 (n, S, S, 3) to (n, C, h, w). The short side is resized, windows of each size are averaged where they overlap,
    sizes are averaged (with ``whole_image`` the squashed image is one more), bilinear to (H, W). ``matching.long_side`` has no effect.
    Raises ``ProfileError`` if there is no window.
    """
    resized = resize_short_side(image, matching.short_side, matching.resample)
    shape = resized.shape[:2]
    placed = scales(shape, matching)
    if not placed:
        raise ProfileError("matching.windows is empty; name at least one size, or set matching.whole_image to true.")
    mean = None
    for side, boxes in placed:
        squares = np.stack([crop(resized, box, side) for box in boxes])
        total, cover = None, torch.zeros(shape, dtype=torch.float32, device="cpu")
        for start, stop in batches(len(boxes), matching.batch_size):
            batch = boxes[start:stop]
            grids = score(squares[start:stop])
            total = torch.zeros(grids.shape[1], *shape, dtype=torch.float32, device="cpu") if total is None else total
            for (top, left, h, w), grid in zip(batch, grids, strict=True):
                total[:, top:top + h, left:left + w] += resize_maps(grid, (h, w))
                cover[top:top + h, left:left + w] += 1
        total /= cover * len(placed)
        mean = total if mean is None else mean.add_(total)
    return resize_maps(mean, image.shape[:2])


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size), bilinear."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
