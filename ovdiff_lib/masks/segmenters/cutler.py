"""CutLER (Wang et al., 2023) as segmenter, Gamma of the paper's Sec. 3.2: its published Cascade Mask R-CNN in stock
detectron2.

detectron2 is imported only when the segmenter is built. What CutLER's own heads add matters in training alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.networks.checkpoints import fill, read_checkpoint
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import load_network
from ovdiff_lib.profiles.schema import Profile

SHORT_SIDE, LONG_SIDE = 800, 1333
"""Pixels that an image's short side is resized to, and the most that its long side may then have."""

STAGES = ["res2", "res3", "res4", "res5"]

CONFIG: dict[str, dict[str, Any]] = {
    "INPUT": {"FORMAT": "RGB"},
    "MODEL": {"MASK_ON": True, "PIXEL_MEAN": [123.675, 116.280, 103.530], "PIXEL_STD": [58.395, 57.120, 57.375]},  # RGB
    "MODEL.BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
    # Trained as SyncBN, which has the same weights as BN but runs on GPUs only.
    "MODEL.RESNETS": {"DEPTH": 50, "NORM": "BN", "STRIDE_IN_1X1": False, "OUT_FEATURES": STAGES},
    "MODEL.FPN": {"IN_FEATURES": STAGES, "NORM": "BN"},
    "MODEL.ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
    "MODEL.RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "PRE_NMS_TOPK_TEST": 1000, "POST_NMS_TOPK_TEST": 1000,
                  "NMS_THRESH": 0.65},
    "MODEL.ROI_HEADS": {"NAME": "CascadeROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"], "NUM_CLASSES": 1,
                        "SCORE_THRESH_TEST": 0.0},  # masks.cutler_score applies to what comes out
    "MODEL.ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7,
                           "CLS_AGNOSTIC_BBOX_REG": True},
    "MODEL.ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 4, "POOLER_RESOLUTION": 14},
    "TEST": {"DETECTIONS_PER_IMAGE": 100},
}
"""Where CutLER's network differs from detectron2's defaults."""


class CutLER:
    """Masks of at least ``cutler_score``. ``model`` is detectron2's: a list of inputs to a list of {"instances": ...}.

    It computes in float32 whatever ``models.dtype`` says, as detectron2's heads do.
    """

    name = "cutler"

    def __init__(self, model: Callable[[list[dict]], list[dict]], score: float) -> None:
        """``score`` in [0, 1] is the least a mask must have."""
        self.model, self.score = model, score

    @classmethod
    def build(cls, profile: Profile) -> CutLER:
        """The segmenter of a profile, once the checksum agrees. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        _detectron2()
        if profile.models.cutler:
            check_checksum(profile.models.cutler, profile.models.cutler_sha256)
        return cls(load_network(profile, "cutler", _load), profile.masks.cutler_score)

    @undisturbed()
    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W) of an image u8 RGB (H, W, 3), highest score first, none empty. ``words`` are not read."""
        height, width = image.shape[:2]
        rows, columns = input_size(height, width)
        pixels = np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float()
        found = self.model([{"image": tensor, "height": height, "width": width}])[0]["instances"].to("cpu")
        scores, masks = found.scores.numpy(), found.pred_masks.numpy().reshape(-1, height, width)
        order = np.argsort(-scores, kind="stable")
        return masks[[i for i in order if scores[i] >= self.score and masks[i].any()]]


def input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) at which the network sees an image: short side 800, unless the long one would exceed 1333."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def check_checksum(identifier: str, expected: str) -> None:
    """``ModelNotAvailable`` unless the checkpoint, a pickle, has the SHA-256 that the user vouches for;
    ``ProfileError`` without one."""
    path = resolve_model(identifier)
    if not isinstance(path, Path) or not path.is_file():
        raise ModelNotAvailable(f"models.cutler is {identifier!r}, which is no file; set it to the path of CutLER's "
                                "checkpoint, cutler_cascade_final.pth.")
    if not expected:
        raise ProfileError("models.cutler_sha256 is not set, and a pickled checkpoint is opened only if its SHA-256 is "
                           "known; set it to the checksum of the checkpoint that you trust.")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected.strip().lower():
        raise ModelNotAvailable(f"The checkpoint {path} has the SHA-256 {actual}, not {expected} as "
                                "models.cutler_sha256 says, and was not opened; fetch it anew or correct the checksum.")


def build_network(device: torch.device | str, overrides: dict[str, Any] | None = None) -> torch.nn.Module:
    """The network with random weights, eval mode; ``overrides`` go over :data:`CONFIG`."""
    get_cfg, build_model = _detectron2()
    config = get_cfg()
    values = {f"{section}.{field}": value for section, fields in CONFIG.items() for field, value in fields.items()}
    values |= {"MODEL.DEVICE": str(device), "MODEL.WEIGHTS": "", **(overrides or {})}
    config.merge_from_list([item for pair in values.items() for item in pair])
    return build_model(config).eval()


def _load(source: Path, device: torch.device, dtype: torch.dtype, options: dict) -> torch.nn.Module:
    weights = read_checkpoint(source)
    return fill("CutLER", build_network(device), weights, exact=False)


def _detectron2() -> tuple[Callable, Callable]:
    try:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
    except ImportError as error:
        raise ProfileError(f"The segmenter 'cutler' needs detectron2, which cannot be imported here ({error}); create "
                           "the conda environment of environment.yml, which has it, or set masks.segmenter to "
                           "'maskcut', 'detector' or 'threshold', which need none.") from None
    return get_cfg, build_model
