"""Windows for the baselines that use them: placed, averaged and resized as OVDiff's are (Sec. 4, "sliding window")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.windows import windows
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
    scales = [[(top, left, side, side) for top, left, side in windows(shape, size, matching.stride)] for size in matching.windows]
    crops = [np.stack([resized[top:top + h, left:left + w] for top, left, h, w in boxes]) for boxes in scales]
    if matching.whole_image:
        side = max(matching.windows, default=matching.short_side)
        scales.append([(0, 0, *shape)])
        crops.append(np.array(Image.fromarray(resized).resize((side, side), Image.Resampling.BILINEAR))[None])
    if not scales:
        raise ProfileError("matching.windows is empty; name at least one size, or set matching.whole_image to true.")
    mean = None
    for boxes, squares in zip(scales, crops, strict=True):
        total, cover = None, torch.zeros(shape, dtype=torch.float32, device="cpu")
        for start, stop in batches(len(boxes), matching.batch_size):
            batch = boxes[start:stop]
            grids = score(squares[start:stop])
            total = torch.zeros(grids.shape[1], *shape, dtype=torch.float32, device="cpu") if total is None else total
            for (top, left, h, w), grid in zip(batch, grids, strict=True):
                total[:, top:top + h, left:left + w] += resize_maps(grid, (h, w))
                cover[top:top + h, left:left + w] += 1
        total /= cover * len(scales)
        mean = total if mean is None else mean.add_(total)
    return resize_maps(mean, image.shape[:2])


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size), bilinear."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
