"""PAMR, pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020), of the paper's "(+PAMR)" rows (Table 1).

Each pixel looks at its 8 neighbours at every dilation; how alike they are in colour is computed once, as weights that
sum to 1, and the scores are averaged with them several times.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.networks.instruments import undisturbed

DILATIONS = (1, 2, 4, 8, 12, 24)
OFFSETS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))

BLOCK_VALUES = 2**20
"""Weights used at a time, so that they stay in the processor's cache."""


@undisturbed()
def pamr(image: np.ndarray, scores: torch.Tensor, iterations: int = 10,
         dilations: Sequence[int] = DILATIONS) -> torch.Tensor:
    """Finite scores f32 (C, H, W) refined by an image (H, W, 3), u8 or f32 of any range: convex combinations of a
    class's scores, whatever the image's brightness and contrast."""
    weights, refined = affinity(image, dilations, scores.device), scores.float()
    for _ in range(iterations):
        shifted = _neighbours(refined, dilations)
        refined = torch.zeros_like(refined)
        for rows in _row_blocks(weights):
            for weight, neighbour in zip(weights, shifted, strict=True):
                refined[:, rows].addcmul_(weight[rows], neighbour[:, rows])
    return refined


@undisturbed()
def affinity(image: np.ndarray, dilations: Sequence[int] = DILATIONS,
             device: torch.device | str = "cpu") -> torch.Tensor:
    """Weights f32 (8 x dilations, H, W) of each pixel's neighbours, which sum to 1.

    Softmax over the neighbours of the mean over channels of -abs(x_p - x_q) / (1e-8 + 0.1 sigma_p), with sigma_p the
    unbiased standard deviation over 3 x 3 positions at every dilation, each with the centre. The border is repeated.
    """
    x = torch.from_numpy(np.ascontiguousarray(image)).to(device, torch.float32).permute(2, 0, 1).contiguous()
    around, count = _neighbours(x, dilations), 9 * len(dilations)
    mean = sum(around, x * len(dilations)) / count
    squares = sum(((neighbour - mean).square_() for neighbour in around), (x - mean).square_() * len(dilations))
    sharpness = -1 / (1e-8 + 0.1 * (squares / (count - 1)).sqrt_())
    weights = x.new_empty(len(around), *x.shape[1:])
    for weight, neighbour in zip(weights, around, strict=True):
        torch.mean((neighbour - x).abs_().mul_(sharpness), 0, out=weight)
    for rows in _row_blocks(weights):
        weights[:, rows] = torch.softmax(weights[:, rows], 0)
    return weights


def _neighbours(maps: torch.Tensor, dilations: Sequence[int]) -> list[torch.Tensor]:
    """Views (C, H, W) of maps (C, H, W), whose border is repeated, shifted to each neighbour of each pixel."""
    height, width = maps.shape[1:]
    reach = max(dilations)
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    corners = [(reach + y * dilation, reach + x * dilation) for dilation in dilations for y, x in OFFSETS]
    return [padded[:, top : top + height, left : left + width] for top, left in corners]


def _row_blocks(weights: torch.Tensor) -> Iterator[slice]:
    count, height, width = weights.shape
    step = max(1, BLOCK_VALUES // (count * width))
    return (slice(start, start + step) for start in range(0, height, step))
