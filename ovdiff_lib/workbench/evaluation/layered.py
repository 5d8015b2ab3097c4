"""Products with features of which some layers are coarser grids, enlarged: they are made on the coarse cells.

A diffusion model's layers have 1/4 to 1/64 of the latent's cells, and enlarging is linear: where U enlarges the coarse
features F, the cosines (U F) V^T to prototypes V are U (F V^T), which takes a third of the time in profile ``mini``.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

FACTORS = (8, 4, 2)
"""Of how much coarser grids are looked for; what is on none of them is taken as it is."""


class Layered:
    """Unit features of n windows (h, w, D), of whose channels ``factors`` (D,) say how much coarser their grid is."""

    def __init__(self, features: torch.Tensor, factors: torch.Tensor) -> None:
        cells, self.coarse, enlarging = features.flatten(1, 2), [], []  # (n, h w, D)
        norm = cells.norm(dim=2, keepdim=True).clamp_min(1e-12)
        self.channels = factors == 1
        self.fine = (cells[..., self.channels] / norm).flatten(0, 1)
        for factor in factors[~self.channels].unique().tolist():
            larger, smaller = _bilinear(features.shape[1:3], factor, features.device)
            self.coarse.append((factors == factor, smaller @ cells[..., factors == factor]))
            enlarging.append(larger / norm)
        self.enlarging = torch.cat(enlarging, 2)  # (n, h w, cells of all coarse grids)

    nbytes = property(lambda self: sum(t.nbytes for t in (self.fine, self.enlarging, *(c for _, c in self.coarse))))

    def cosines(self, vectors: torch.Tensor) -> torch.Tensor:
        """Cosines f32 (n h w, p) to unit vectors f32 (p, D)."""
        coarse = torch.cat([cells @ vectors[:, channels].T for channels, cells in self.coarse], 1)
        fine = (self.fine @ vectors[:, self.channels].T).unflatten(0, (len(coarse), -1))
        return torch.baddbmm(fine, self.enlarging, coarse).flatten(0, 1)


def factors_of(features: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """How much coarser than (h, w) the grid is that layers of ``widths`` channels were enlarged from, by features of
    windows f32 (n, h, w, D): i64 (D,), 1 of those that were not."""
    def fits(layer: torch.Tensor, factor: int) -> bool:
        if any(side % factor for side in shape):
            return False
        enlarging, shrinking = _bilinear(shape, factor, features.device)
        return bool((enlarging @ (shrinking @ layer) - layer).norm() <= 1e-5 * layer.norm())

    shape, layers = features.shape[1:3], features.flatten(1, 2).split(list(widths), dim=2)
    found = [next((factor for factor in FACTORS if fits(layer, factor)), 1) for layer in layers]
    return torch.tensor(found).repeat_interleave(torch.tensor(list(widths))).to(features.device)


@cache
def _bilinear(shape: tuple[int, int], factor: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What enlarges a grid that is ``factor`` times coarser to ``shape`` (h, w), f32 (h w, cells), and its inverse on
    what was enlarged, f32 (cells, h w)."""
    grid = [side // factor for side in shape]
    cells = torch.eye(grid[0] * grid[1], dtype=torch.float64, device="cpu").unflatten(1, (1, *grid))
    enlarging = F.interpolate(cells, tuple(shape), mode="bilinear", align_corners=False).flatten(1).T
    return enlarging.to(device, torch.float32), torch.linalg.pinv(enlarging).to(device, torch.float32)
