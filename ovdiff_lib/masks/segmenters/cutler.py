"""CutLER (Wang et al., 2023), Gamma of the paper's Sec. 3.2: its published Cascade Mask R-CNN in stock detectron2.

detectron2 is imported only when the segmenter is built. What CutLER's own heads add matters in training alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import complete, load_network
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
    "TEST": {"DETECTIONS_PER_IMAGE": 100}}
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
        """The segmenter of a profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        _detectron2()
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


def build_network(device: torch.device | str, overrides: dict[str, Any] | None = None) -> torch.nn.Module:
    """The network with random weights, eval mode; ``overrides`` go over :data:`CONFIG`."""
    get_cfg, build_model = _detectron2()
    config = get_cfg()
    values = {f"{section}.{field}": value for section, fields in CONFIG.items() for field, value in fields.items()}
    values |= {"MODEL.DEVICE": str(device), "MODEL.WEIGHTS": "", **(overrides or {})}
    config.merge_from_list([item for pair in values.items() for item in pair])
    return build_model(config).eval()


def _load(source: Path | str, device: torch.device, _dtype: torch.dtype, _options: dict) -> torch.nn.Module:
    weights, network = read_checkpoint(source), build_network(device)
    missing, _ = network.load_state_dict(weights, strict=False)  # the rest is of training
    # Counters of batches are statistics of training that nothing reads.
    return complete(network, [name for name in missing if not name.endswith("num_batches_tracked")])


def read_checkpoint(path: Path | str) -> dict[str, torch.Tensor]:
    """The table of weights in a file of ``torch.save``, under "model" or bare. ``ValueError`` if it holds no such.

    Only tensors, arrays and plain containers are unpickled, so that nothing is run that a pickle may ask for.
    """
    # detectron2 writes some checkpoints with arrays instead of tensors; this is what unpickling plain ones takes.
    known: list = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?"))]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2's name, and that in published files
        known += [(getattr(np._core.multiarray, name), f"{module}.{name}") for name in ("_reconstruct", "scalar")]
    try:
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has no one error for damaged files: a wrong byte may lead anywhere
        raise ValueError("it is damaged, or not a checkpoint of tensors alone") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    kinds = (torch.Tensor, np.ndarray, np.generic)
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, kinds) for value in weights.values()):
        raise ValueError("it holds no table of tensors, neither at its top nor under 'model'")
    return {name: torch.as_tensor(value, device="cpu") for name, value in weights.items()}


def _detectron2() -> tuple[Callable, Callable]:
    try:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
    except ImportError as error:
        raise ProfileError(f"The segmenter 'cutler' needs detectron2, which cannot be imported here ({error}); create "
                           "the conda environment of environment.yml, which has it, or set masks.segmenter to "
                           "'maskcut', 'detector' or 'threshold', which need none.") from None
    return get_cfg, build_model
