"""Products with features of which some layers are coarser grids, enlarged: they are made on the coarse cells.

A diffusion model's layers have all to 1/64 of the latent's cells, and enlarging is linear: where U enlarges the coarse
features F, the products (U F) V^T with prototypes V are U (F V^T).
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

FACTORS = (8, 4, 2)
"""How many times coarser along a side the grids are that are looked for."""


class Layered:
    """Features of n windows f32 (n, h, w, D), raw; ``factors`` i64 (D,) say of each channel how many times coarser the
    grid is that it was enlarged from, 1 if it was not."""

    def __init__(self, features: torch.Tensor, factors: torch.Tensor) -> None:
        cells, shape, self.coarse, enlarging = features.flatten(1, 2), features.shape[1:3], [], []  # (n, h w, D)
        norm = cells.norm(dim=2, keepdim=True).clamp_min(1e-12)
        self.channels = factors == 1
        self.fine = (cells[..., self.channels] / norm).flatten(0, 1)
        for factor in factors[~self.channels].unique().tolist():
            larger, smaller = _bilinear(shape, factor, features.device)
            self.coarse.append((factors == factor, smaller @ cells[..., factors == factor]))
            enlarging.append(larger / norm)
        self.enlarging = torch.cat(enlarging, 2) if enlarging else None  # (n, h w, cells of all coarse grids)

    @property
    def nbytes(self) -> int:
        """Of what is kept in place of the features."""
        return sum(t.nbytes for t in (self.fine, self.enlarging, *(c for _, c in self.coarse)) if t is not None)

    def cosines(self, vectors: torch.Tensor) -> torch.Tensor:
        """Cosines f32 (n h w, p) to unit vectors f32 (p, D)."""
        fine = self.fine @ vectors[:, self.channels].T
        if self.enlarging is None:
            return fine
        coarse = torch.cat([cells @ vectors[:, channels].T for channels, cells in self.coarse], 1)
        return torch.baddbmm(fine.unflatten(0, (len(coarse), -1)), self.enlarging, coarse).flatten(0, 1)


def factors_of(features: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """How many times coarser the grid is that each layer, of ``widths`` channels, was enlarged from to (h, w), by the
    features f32 (n, h, w, D): i64 (D,), 1 where none of :data:`FACTORS` gives them back, enlarged."""
    shape, layers = features.shape[1:3], features.flatten(1, 2).split(list(widths), dim=2)

    def fits(layer: torch.Tensor, factor: int) -> bool:
        if any(side % factor for side in shape):
            return False
        larger, smaller = _bilinear(shape, factor, features.device)
        return bool((larger @ (smaller @ layer) - layer).norm() <= 1e-5 * layer.norm())

    found = [next((factor for factor in FACTORS if fits(layer, factor)), 1) for layer in layers]
    found, counts = (torch.tensor(n, dtype=torch.long, device=features.device) for n in (found, widths))
    return found.repeat_interleave(counts)


@cache
def _bilinear(shape: tuple[int, int], factor: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What enlarges a grid that is ``factor`` times coarser to ``shape`` (h, w), f32 (h w, cells), and its inverse on
    what was enlarged, f32 (cells, h w)."""
    grid = [side // factor for side in shape]
    cells = torch.eye(grid[0] * grid[1], dtype=torch.float64, device="cpu").unflatten(1, (1, *grid))
    enlarging = F.interpolate(cells, tuple(shape), mode="bilinear", align_corners=False).flatten(1).T
    return enlarging.to(device, torch.float32), torch.linalg.pinv(enlarging).to(device, torch.float32)
