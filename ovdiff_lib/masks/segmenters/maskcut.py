"""MaskCut (Wang et al., 2023, "Cut and Learn"): proposals from normalised cuts of DINO features, CutLER's teacher.

A cut separates the most salient object from the rest; its patches are painted out, and the next sees what is left.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ovdiff_lib.errors import OVDiffError, ProfileError
from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.masks.segmenters.refine import iou, refine, resize_mask
from ovdiff_lib.networks.instruments import captured, normalised, undisturbed
from ovdiff_lib.networks.loading import last_projection, load_dino
from ovdiff_lib.profiles.schema import Masks, Profile

FACETS = {"keys": "k_proj", "queries": "q_proj", "values": "v_proj"}
WEAK = 1e-5  # affinity of two patches whose cosine is not above tau: small, but the graph stays connected
LARGEST_OVERLAP, SMALLEST_AREA = 0.5, 0.01
"""A later cut counts only up to this IoU with the one before and above this share of the patches."""


class MaskCut:
    """Keys, or another facet, of the last layer of DINO, a ``ViTModel`` of transformers, cut ``maskcut_rounds`` times.

    Images become squares of ``maskcut_size`` pixels.
    """

    name = "maskcut"

    def __init__(self, model: torch.nn.Module, settings: Masks) -> None:
        """``ProfileError`` for a ``maskcut_size`` below two patches."""
        self.model, self.settings, self.patch = model, settings, model.config.patch_size
        if settings.maskcut_size < 2 * self.patch:
            raise ProfileError(f"masks.maskcut_size is {settings.maskcut_size}; it must be at least {2 * self.patch}, "
                               "two patches of this DINO.")
        self.side = settings.maskcut_size // self.patch * self.patch
        self.source = last_projection(model, FACETS[settings.maskcut_facet])

    @classmethod
    def build(cls, profile: Profile) -> MaskCut:
        """The segmenter of a profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        return cls(load_dino(profile), profile.masks)

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W), M <= ``maskcut_rounds``, for u8 (H, W, 3): without holes, none empty."""
        square = np.array(Image.fromarray(image).resize((self.side, self.side), Image.Resampling.LANCZOS))
        found = []
        for mask in cut(self.features(square), self.settings.maskcut_rounds, self.settings.maskcut_tau):
            fine = refine(mask, square)
            if fine is not None:
                found.append(resize_mask(fine, image.shape[:2]))
        masks = np.array(found, dtype=bool).reshape(-1, *image.shape[:2])
        return masks[masks.any(axis=(1, 2))]

    @undisturbed()
    def features(self, square: np.ndarray) -> np.ndarray:
        """The facet f32 (h, w, D) of an image u8 (side, side, 3), one a patch, heads side by side."""
        pixels = normalised(square[None], next(self.model.parameters()), (IMAGENET_MEAN, IMAGENET_STD))
        with captured({"facet": self.source}) as outputs:
            self.model(pixels, interpolate_pos_encoding=True)
        facet = outputs["facet"][0, 1:].float()  # without the class token
        if not torch.isfinite(facet).all():
            raise OVDiffError("DINO gave features that are not finite; use models.dtype float32 or check its weights.")
        return facet.unflatten(0, (self.side // self.patch,) * 2).cpu().numpy()


def cut(features: np.ndarray, rounds: int, tau: float) -> list[np.ndarray]:
    """At most ``rounds`` disjoint, non-empty patch masks, bool (h, w) each, of features (h, w, D), most salient first.

    A later cut that overlaps the one before or is tiny is dropped and ends the search: nothing is painted out for it,
    so the next cut would be the same one again. Patches that are all alike have no cut.
    """
    grid = features.shape[:2]
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    covered, before, masks = np.zeros(grid, dtype=bool), None, []
    for _ in range(rounds):
        unit[covered.reshape(-1)] = 0  # cosine 0 with every patch
        joined = unit @ unit.T > tau
        if joined.all():
            break
        mask = salient_part(cut_vector(joined), grid)
        if before is not None and (iou(mask, before) > LARGEST_OVERLAP or mask.mean() <= SMALLEST_AREA):
            break
        if (new := mask & ~covered).any():
            masks.append(new)
        before, covered = mask, covered | mask
    return masks


def cut_vector(joined: np.ndarray) -> np.ndarray:
    """Second smallest generalised eigenvector x, f64 (n,), of (D - A) x = lambda D x, positive where largest in size.

    ``joined`` bool (n, n), n >= 3, symmetric, says which pairs have affinity 1 in A, all others have :data:`WEAK`; D =
    diag(row sums of A). With y = sqrt(D) x this is the second largest eigenvector of D^-1/2 A D^-1/2.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    n, affinity = len(joined), np.where(joined, 1.0, WEAK)
    scale = 1 / np.sqrt(affinity.sum(axis=1))
    normalised = scale[:, None] * affinity * scale
    try:
        _, vectors = eigsh(normalised, k=2, which="LA", v0=np.random.default_rng(0).standard_normal(n))
    except ArpackNoConvergence:  # several eigenvalues at the top that nearly agree
        _, vectors = eigh(normalised, subset_by_index=(n - 2, n - 1))
    x = scale * vectors[:, 0]
    return x if x[np.abs(x).argmax()] > 0 else -x


def salient_part(vector: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """bool ``grid``: the side of the cut that is the object, as the connected part around its most extreme patch.

    ``vector`` f64 (h * w,) is what :func:`cut_vector` returns. The object is the side above the mean, which has the
    extreme entry, unless three of the image's corners lie in it.
    """
    from scipy.ndimage import label

    side = (vector > vector.mean()).reshape(grid)
    if side[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
        side, vector = ~side, -vector
    parts, _ = label(side)  # 4-connected
    return (parts == parts.reshape(-1)[vector.argmax()]) & side
