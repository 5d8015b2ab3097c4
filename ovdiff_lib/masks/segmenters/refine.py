"""From patch masks to pixels by a random walker (Grady, 2006), in place of MaskCut's dense CRF."""

import numpy as np
from PIL import Image

WALKER_SIDE = 240
"""Larger images are scaled down to this side for the random walker, a linear system over the uncertain pixels."""

BETA = 3000
"""How strongly the walk avoids edges. scikit-image's 130 lets it cross them: mini's masks leave their objects."""

SMALLEST_AGREEMENT = 0.5
"""A mask whose refined version has a lower IoU with it than this is not trusted (MaskCut)."""


def refine(mask: np.ndarray, image: np.ndarray) -> np.ndarray | None:
    """A mask bool (h, w), h and w at most the image's, at the pixels of ``image`` u8 (H, W, 3); holes are filled.

    Pixels well inside and well outside the mask stay, a random walk between them that avoids crossing edges decides the
    rest. None where the result has less than :data:`SMALLEST_AGREEMENT` IoU with the mask.
    """
    from scipy.ndimage import binary_fill_holes

    if max(image.shape[:2]) > WALKER_SIDE:
        scale = WALKER_SIDE / max(image.shape[:2])
        size = [max(round(side * scale), low) for side, low in zip(image.shape[:2], mask.shape, strict=True)]
        image = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    coarse = np.array(Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    if coarse.all() or not coarse.any() or (image == image[0, 0]).all():
        return binary_fill_holes(coarse)
    patch = max(image.shape[0] / mask.shape[0], image.shape[1] / mask.shape[1])
    fine = binary_fill_holes(walker(coarse, image, patch))
    return fine if iou(coarse, fine) >= SMALLEST_AGREEMENT else None


def walker(mask: np.ndarray, image: np.ndarray, margin: float) -> np.ndarray:
    """``mask`` bool (H, W) with pixels within ``margin`` of its border decided anew by the image u8 (H, W, 3).

    A part too thin for that keeps its innermost pixels. Mask and complement are not empty, the image not of one colour.
    """
    from scipy.ndimage import distance_transform_edt
    from skimage.segmentation import random_walker

    seeds = np.zeros(mask.shape, dtype=np.int32)
    for value, region in ((1, mask), (2, ~mask)):
        depth = distance_transform_edt(region)
        seeds[depth > min(margin, depth.max() / 2)] = value
    if seeds.all():
        return mask
    # Solved directly: with edges this strong the iterative modes stop early and warn.
    return random_walker(image / 255.0, seeds, beta=BETA, mode="bf", channel_axis=-1) == 1


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask bool (h, w) at (H, W) = ``size``: where it is above one half, resized bilinearly with antialiasing."""
    return np.array(Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.BILINEAR)) > 127


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boolean arrays of one shape; 0 if both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 0.0
