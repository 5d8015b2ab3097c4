"""Step 2c, Sec. 3.3: masked support features to class, instance and part prototypes (Eq. 2 and 3)."""

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.profiles.schema import PrototypeSettings
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.types import ForegroundBackground, Prototypes


@undisturbed()
def build_prototypes(features: torch.Tensor | np.ndarray, masks: ForegroundBackground, settings: PrototypeSettings,
                     resize: str = "area") -> Prototypes:
    """Prototypes of one category from its support features f32 (N, h, w, D), raw, and masks bool (N, H, W).

    Of each region, foreground first (Eq. 3): the class prototype, the mean of all masked features; an instance
    prototype (Eq. 2) of each image with a mask; ``settings.clusters`` part prototypes, k-means centroids of them (fewer
    where they are fewer). A cell of both regions counts for both, recorded as foreground. ``OVDiffError`` if none is.
    """
    features = torch.as_tensor(features).cpu()  # which has float64, and memory for a set
    if features.ndim != 4 or len(features) != len(masks.foreground):
        raise InputError(f"Support features of shape {tuple(features.shape)} do not go with {len(masks.foreground)} "
                         "masks; give features (N, h, w, D) and masks (N, H, W) of the same images.")
    rows, codes = [], []
    for region in ("foreground", "background") if settings.background else ("foreground",):
        inside = resize_masks(getattr(masks, region), features.shape[1:3], resize)
        if inside.any():
            made, code = _region(features, inside, region, settings)
            rows += made
            codes.append((inside.numpy(), code))
        elif region == "foreground":
            raise OVDiffError(f"None of the {len(features)} support images has any foreground, so the class gets no "
                              "prototypes; word it differently, draw more images, or choose another masks.segmenter.")
    assignment = np.zeros(features.shape[:3], np.int16)
    for inside, code in reversed(codes):  # the foreground overwrites the background
        assignment[inside] = code
    vectors, kinds, regions, images, clusters = zip(*rows, strict=True)
    stacked = torch.stack(vectors).float().cpu().numpy()
    if not np.isfinite(stacked).all():
        raise InputError("The support features hold values that are not finite; check the extractor's weights, or use "
                         "dtype float32.")
    return Prototypes(stacked, np.array(kinds), np.array(regions), np.array(images, np.int32),
                      np.array(clusters, np.int32), assignment)


def _region(features: torch.Tensor, inside: torch.Tensor, region: str, settings: PrototypeSettings):
    """Rows (vector, kind, region, image, cluster) of a region, part code of each feature; ``inside`` is not empty."""
    counts, sign = inside.sum((1, 2)), 1 if region == "foreground" else -1
    images = torch.nonzero(counts)[:, 0].tolist()
    sums = [features[n][inside[n]].sum(0, dtype=torch.float64) for n in images]
    rows = []
    if "class" in settings.kinds:
        rows.append((sum(sums) / counts.sum(), "class", region, -1, 0))
    if "instance" in settings.kinds:
        rows += [(total / counts[n], "instance", region, n, 0) for n, total in zip(images, sums, strict=True)]
    codes = np.full(int(counts.sum()), sign)
    if "part" in settings.kinds:
        centroids, cluster = kmeans(features[inside], settings.clusters, settings.seed)
        rows += [(centroid.double(), "part", region, -1, sign * (1 + k)) for k, centroid in enumerate(centroids)]
        codes = sign * (1 + cluster.cpu().numpy())
    return rows, codes


def resize_masks(masks: np.ndarray, size: tuple[int, int], how: str = "area") -> torch.Tensor:
    """Masks bool (N, H, W) on the feature grid, bool (N, *size). "area": a cell is inside if more than half of it is;
    a mask too thin for that keeps its fullest cells, so no mask vanishes. "bilinear", as the released code: if the mask
    interpolated at the middle of the cell is above 0, which dilates a little."""
    tensor = torch.from_numpy(np.ascontiguousarray(masks))[:, None].float()
    if how == "bilinear":
        return F.interpolate(tensor, size, mode="bilinear", align_corners=False)[:, 0] > 0
    covered = F.adaptive_avg_pool2d(tensor, size)[:, 0]
    inside = covered > 0.5
    fullest = covered.amax((1, 2), keepdim=True)
    return inside | ((fullest <= 0.5) & (fullest > 0) & (covered == fullest))
