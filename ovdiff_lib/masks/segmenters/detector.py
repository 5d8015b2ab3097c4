"""A small class-agnostic Mask R-CNN (He et al., 2017) as segmenter: CutLER's recipe at the size of the mini world.

The network, torchvision's with a residual backbone and heads of its own, learned from MaskCut's masks alone
(``recipes.train_detector``). A model is a folder with ``config.json`` (:data:`CONFIG`) and ``model.safetensors``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import complete, load_network
from ovdiff_lib.profiles.schema import Profile

if TYPE_CHECKING:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.resnet import BasicBlock

CONFIG: dict[str, Any] = {
    "widths": [32, 64, 96, 128],  # channels at strides 4, 8, 16, 32
    "blocks": [1, 1, 1, 1],  # residual blocks of each stride
    "pyramid": 64,  # channels of the feature pyramid
    "short_side": 128,  # pixels an image's short side is resized to
    "long_side": 512,  # but its long side never exceeds this
    "anchors": [16, 32, 64, 112],  # side of the anchors of each stride, pixels of the resized image
    "ratios": [0.5, 1.0, 2.0],  # height over width of the anchors
    "canonical": 112,  # a box of this side is pooled at stride 16, of half of it at stride 8
    "box_head": 128,  # width of the two fully connected layers
    "mask_head": [64, 64, 64],  # channels of its convolutions
    "detections": 20,  # most proposals an image
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225]}
"""The shipped network; a folder's ``config.json`` holds the same fields."""

STRIDES = (4, 8, 16, 32)
SMALLEST = 8
"""Least short side of a resized image, pixels: below it the deepest features are less than one cell."""


def residual(before: int, after: int, stride: int) -> BasicBlock:
    """A block of ResNet (He et al., 2016), group-normalised: the same alone and in a batch."""
    from torchvision.models.resnet import BasicBlock

    block = BasicBlock(before, after, stride, norm_layer=lambda width: nn.GroupNorm(width // 8, width))
    if stride > 1:
        # Pooling before the 1 x 1 convolution, not a stride in it: better (He et al., 2019), and oneDNN's gradient of
        # the strided one corrupts memory for few channels in channels_last.
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        block.downsample = nn.Sequential(pool, nn.Conv2d(before, after, 1))
    return block


class Backbone(nn.Module):
    """Residual stages at :data:`STRIDES` with a feature pyramid: (B, 3, H, W) to four maps of equal channels."""

    def __init__(self, widths: list[int], blocks: list[int], pyramid: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        norm = nn.GroupNorm(widths[0] // 8, widths[0])
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), norm, nn.ReLU(True))
        self.stages = nn.ModuleList(
            nn.Sequential(residual(before, after, 2), *(residual(after, after, 1) for _ in range(count - 1)))
            for before, after, count in zip([widths[0], *widths], widths, blocks, strict=False))
        self.pyramid = FeaturePyramidNetwork(widths, pyramid)
        self.out_channels = pyramid

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps, x = {}, self.stem(x)
        for level, stage in enumerate(self.stages):
            maps[str(level)] = x = stage(x)
        return self.pyramid(maps)


def build_detector(config: dict[str, Any]) -> MaskRCNN:
    """A torchvision ``MaskRCNN`` with random weights and two classes, background and object.

    ``config`` has the fields of :data:`CONFIG`; ``ValueError`` for others, missing ones and values of another type.
    """
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import initLevelMapper

    _check(config)
    channels, width, masks = config["pyramid"], config["box_head"], config["mask_head"]
    names = [str(level) for level in range(len(STRIDES))]

    def pool(size: int) -> MultiScaleRoIAlign:
        made = MultiScaleRoIAlign(names, size, 2, canonical_scale=config["canonical"])
        # Left alone it guesses the strides from the first image, wrongly if that one is narrow, and keeps the guess.
        made.scales, made.map_levels = [1 / stride for stride in STRIDES], initLevelMapper(2, 5, config["canonical"])
        return made

    anchors = AnchorGenerator(tuple((side,) for side in config["anchors"]), (tuple(config["ratios"]),) * len(STRIDES))
    return MaskRCNN(
        Backbone(config["widths"], config["blocks"], channels),
        min_size=config["short_side"], max_size=config["long_side"],
        image_mean=config["image_mean"], image_std=config["image_std"], rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=150, rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=60, rpn_batch_size_per_image=128,
        box_roi_pool=pool(7), box_head=TwoMLPHead(channels * 7 * 7, width), box_predictor=FastRCNNPredictor(width, 2),
        box_detections_per_img=config["detections"], box_batch_size_per_image=32, mask_roi_pool=pool(14),
        mask_head=MaskRCNNHeads(channels, masks, 1), mask_predictor=MaskRCNNPredictor(masks[-1], masks[-1], 2))


def _check(config: Any) -> None:
    if not isinstance(config, dict) or set(config) != set(CONFIG):
        wrong = min(set(config) ^ set(CONFIG)) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"its configuration lacks {wrong} or should not have it")
    for name, default in CONFIG.items():
        value = config[name]
        lists, defaults = (v if isinstance(v, list) else [v] for v in (value, default))
        alike = type(value) is type(default) and all(type(v) is type(defaults[0]) and v > 0 for v in lists)
        if not alike or not lists or (name not in ("ratios", "mask_head") and len(lists) != len(defaults)):
            raise ValueError(f"{name} of its configuration is {value!r}, it should be like {default!r}")


def save_detector(model: MaskRCNN, config: dict[str, Any], folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (float16) to ``folder``."""
    from safetensors.torch import save

    half = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", save(half))
    write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_detector(folder: Path | str, device: torch.device | str = "cpu") -> MaskRCNN:
    """The network of ``folder``, float32, eval mode. ``OSError`` or ``ValueError`` for missing or wrong files."""
    from safetensors.torch import load_file

    if not isinstance(folder, Path) or not folder.is_dir():
        raise ValueError("a detector is a folder with config.json and model.safetensors")
    model = build_detector(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    # What ships was saved when the blocks had names of their own.
    weights = {name.replace(".norm", ".bn").replace(".shortcut", ".downsample"): value.float()
               for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return complete(model).to(device)


def paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks f32 (M, h, w), stretched over their boxes f32 (M, 4), at every pixel centre: f32 (M, H, W), 0 outside.

    Bilinear, as detectron2 pastes masks: no rounding of boxes to whole pixels, which matters at 64 px.
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, dtype=torch.float32, device=boxes.device) + 0.5 for side in size)
    x, y = (columns - x0) / (x1 - x0) * 2 - 1, (rows - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=-1)
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0]


@undisturbed()
def detect_many(model: MaskRCNN, images: np.ndarray, score: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each of the images u8 (n, H, W, 3), in one batch, by a model in eval mode: masks bool (M, H, W) of at least
    ``score``, their scores f32 (M,), descending, and their boxes f32 (M, 4) as (x0, y0, x1, y1).

    Images are resized by ``short_side`` and ``long_side``, antialiased where they shrink. A pixel is in a mask from
    probability 0.5. Raises ``InputError`` for images so elongated that nothing of their short side would be left.
    """
    from torchvision.models.detection.image_list import ImageList

    height, width = images.shape[1:3]
    short, long = model.transform.min_size[-1], model.transform.max_size
    scale = min(short / min(height, width), long / max(height, width))
    if min(height, width) * scale < SMALLEST:
        raise InputError(f"The image of {height} x {width} pixels is too elongated for the detector; use one whose "
                         f"sides differ by a factor of at most {long // SMALLEST}.")
    resized = (round(height * scale), round(width * scale))
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(pixels, resized, mode="bilinear", antialias=True)
    # Padded to a multiple of the largest stride.
    batch = model.transform.batch_images([model.transform.normalize(one) for one in pixels])
    listed = ImageList(batch, [resized] * len(images))
    features = model.backbone(batch)
    regions, _ = model.rpn(listed, features)
    # Those below the score do not reach the mask head, which takes most of the time. Those above are the same: neither
    # suppression nor the largest number looks at what comes later. torchvision keeps what is above its threshold.
    model.roi_heads.score_thresh = max(0.0, float(np.nextafter(np.float32(score), np.float32(-1))))
    found = model.roi_heads(features, regions, listed.image_sizes)[0]
    stretch = torch.tensor([width / resized[1], height / resized[0]] * 2, dtype=torch.float32, device=device)
    detections = []
    for one in found:
        boxes = one["boxes"] * stretch
        masks = paste(one["masks"][:, 0], boxes, (height, width)) >= 0.5
        detections.append(tuple(value.cpu().numpy() for value in (masks, one["scores"], boxes)))
    return detections


class DetectorSegmenter:
    """Masks of a class-agnostic Mask R-CNN of at least some score.

    The network computes in float32 whatever ``models.dtype`` says: it is small, and half precision moves box corners.
    """

    name = "detector"

    def __init__(self, model: MaskRCNN, score: float) -> None:
        """``score`` in [0, 1] is the least a mask must have."""
        self.model, self.score = model, score

    @classmethod
    def build(cls, profile: Profile) -> DetectorSegmenter:
        """From ``models.detector`` and ``masks.detector_score``. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        model = load_network(profile, "detector", lambda source, device, dtype, options: load_detector(source, device))
        return cls(model, profile.masks.detector_score)

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        """bool (M, H, W), best first; empty masks and those below the score are left out. ``words`` are not read."""
        return self.propose_many(image[None], words)[0]

    def propose_many(self, images: np.ndarray, words: str) -> list[np.ndarray]:
        """:meth:`propose` of each of the images u8 (n, H, W, 3), in one batch."""
        if type(self).propose is not DetectorSegmenter.propose:  # of a class derived from this one, which knows better
            return [self.propose(image, words) for image in images]
        return [masks[masks.any(axis=(1, 2))] for masks, _, _ in detect_many(self.model, images, self.score)]
