"""CutLER (Wang et al., 2023) as segmenter, Gamma of the paper's Sec. 3.2: its published Cascade Mask R-CNN in stock
detectron2.

detectron2 is imported only when the segmenter is built. What CutLER's own heads add matters in training alone.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import complete, load_network

if TYPE_CHECKING:
    from ovdiff_lib.profiles.schema import Profile


SHORT_SIDE, LONG_SIDE = 800, 1333
"""Pixels that an image's short side is resized to, and the most that its long side may then have."""

CONFIG: dict[str, Any] = {
    "MODEL.MASK_ON": True,
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],  # RGB
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.NORM": "BN",  # trained as SyncBN, which has the same weights but runs on GPUs only
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.NORM": "BN",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.NMS_THRESH": 0.65,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,  # masks.cutler_score applies to what comes out
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "INPUT.FORMAT": "RGB",
    "TEST.DETECTIONS_PER_IMAGE": 100,
}
"""Where CutLER's network differs from detectron2's defaults."""


_BROKEN = (pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError, TypeError, struct.error)
"""What torch's unpickler raises on other files, besides the errors that loading any model may raise."""


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
        """The segmenter of a profile, its checkpoint once the checksum agrees. Raises ``ProfileError`` and
        ``ModelNotAvailable``."""
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
        return np.array([masks[i] for i in order if scores[i] >= self.score and masks[i].any()], dtype=bool).reshape(-1, height, width)


def input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) at which the network sees an image of that size: short side 800, unless the long one would exceed
    1333."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def check_checksum(identifier: str, expected: str) -> None:
    """The checkpoint is a pickle, so it is opened only if its SHA-256 is the one the user vouches for;
    ``ModelNotAvailable`` if not.

    ``ProfileError`` if there is no such checksum in the profile.
    """
    path = resolve_model(identifier)
    if not isinstance(path, Path) or not path.is_file():
        raise ModelNotAvailable(f"models.cutler is {identifier!r}, which is no file; set it to the path of CutLER's checkpoint, "
                                "cutler_cascade_final.pth.")
    if not expected:
        raise ProfileError("models.cutler_sha256 is not set, and a pickled checkpoint is opened only if its SHA-256 is known to be right; "
                           "set it to the checksum of the checkpoint that you trust.")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected.strip().lower():
        raise ModelNotAvailable(f"The checkpoint {path} has the SHA-256 {actual}, not models.cutler_sha256 ({expected}), so it was not "
                                "opened; fetch it again or correct the checksum.")


def build_network(device: torch.device | str, overrides: dict[str, Any] | None = None) -> torch.nn.Module:
    """The network with random weights, eval mode; ``overrides`` go over :data:`CONFIG`. ``ProfileError`` without
    detectron2."""
    get_cfg, build_model = _detectron2()
    config = get_cfg()
    values = {**CONFIG, "MODEL.DEVICE": str(device), "MODEL.WEIGHTS": "", **(overrides or {})}
    config.merge_from_list([item for pair in values.items() for item in pair])
    return build_model(config).eval()


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, read without running what a pickle may ask for. ``ValueError`` if it holds anything
    else."""
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"it is not a checkpoint of tensors, {reason}") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    kinds = (torch.Tensor, np.ndarray, np.generic)
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, kinds) for value in weights.values()):
        raise ValueError("it holds no table of weights under 'model'")
    return {name: torch.as_tensor(value, device="cpu") for name, value in weights.items()}


def _load(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> torch.nn.Module:
    weights = read_checkpoint(Path(source))
    model = build_network(device)
    found = model.load_state_dict(weights, strict=False)
    # Counters of batches are statistics of training that nothing reads.
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    return complete("CutLER", (model, {"missing_keys": missing}))


def _numpy_globals() -> list:
    """What unpickling plain arrays takes: detectron2 writes some checkpoints with arrays instead of tensors."""
    known: list = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?"))]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # of numpy 2 and of numpy 1, which wrote the published files
        known += [(getattr(np._core.multiarray, name), f"{module}.{name}") for name in ("_reconstruct", "scalar")]
    return known


def _detectron2() -> tuple[Callable, Callable]:
    try:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
    except ImportError as error:
        raise ProfileError(f"The segmenter 'cutler' needs detectron2, which cannot be imported here ({error}); create the conda "
                           "environment of environment.yml, where conda-forge provides it, or set masks.segmenter to 'maskcut', "
                           "'detector' or 'threshold', which need none.") from None
    return get_cfg, build_model
