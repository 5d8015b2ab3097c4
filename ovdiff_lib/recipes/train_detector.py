"""Train the mini detector as CutLER does (Wang et al., 2023): by the masks that MaskCut finds in unlabelled scenes.

First MaskCut runs over some training scenes (resumable, in the work folder), then the detector is trained on what it
found, with copy-paste and DropLoss; without CutLER's rounds of self-training. No label is read.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou, masks_to_boxes

from ovdiff_lib.errors import InputError
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.segmenters.detector import CONFIG, build_detector, save_detector
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.build import forked_map
from ovdiff_lib.workbench.console import parse_assignments

DROP_IOU = 0.01  # CutLER's DROPLOSS_IOU_THRESH
CANVASES = (80, 96, 112, 128)  # pixels; CutLER varies the size of the images too
PASTE_RATIO = (0.3, 1.0)  # CutLER's COPY_PASTE_MIN_RATIO, COPY_PASTE_MAX_RATIO
ZOOM = 1.6  # a view shows at least 1 / ZOOM of a scene's sides
LEAST_AREA = 16  # pixels of a view; a mask with less left is no object any more


def boxes_of(masks: Tensor) -> Tensor:
    """(x0, y0, x1, y1) f32 (M, 4) of bool or u8 (M, H, W), none empty: outer edges, one pixel has a box of side 1."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0], device=masks.device)


def views(images: np.ndarray | Tensor, masks: list[np.ndarray], canvas: int, paste: float, generator: torch.Generator
          ) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Augmented images f32 (B, 3, canvas, canvas) and torchvision's targets, of u8 (B, H, W, 3) and bool (M, H, W).

    Every scene is zoomed into around one of its objects and mirrored half the time. With probability ``paste`` some
    objects of the next scene, shrunk by :data:`PASTE_RATIO`, are pasted at a random place (CutLER's copy-paste).
    """
    (count, height, width, _), most, device = images.shape, max(len(m) for m in masks), generator.device
    pixels = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 255
    layers = torch.zeros(count, most, height, width, device=device)
    for i, found in enumerate(masks):
        layers[i, :len(found)] = torch.from_numpy(found).to(device)
    numbers, everyone = torch.tensor([len(m) for m in masks], device=device), torch.arange(count, device=device)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return training.uniform(generator, low, high, count, *shape)

    def warp(x: Tensor, scale: Tensor, mirror: Tensor, centre: Tensor) -> Tensor:
        return training.looked_at(x, canvas, torch.stack([scale * mirror, scale], dim=1), centre)

    def mirrored() -> Tensor:
        return torch.where(draw(0, 1) < 0.5, -1.0, 1.0)

    boxes = boxes_of(layers[everyone, (draw(0, 1) * numbers).long()])
    middle = (boxes[:, :2] + boxes[:, 2:]) / torch.tensor([width, height], device=device) - 1
    scale, mirror = 1 / draw(1, ZOOM), mirrored()
    low = torch.maximum(scale[:, None] - 1, middle - scale[:, None])
    high = torch.minimum(1 - scale[:, None], middle + scale[:, None])
    centre = low + (high - low) * draw(0, 1, 2)
    # The middle of a bent object need not belong to it: a view that lost all masks shows the whole scene instead.
    lost = ((warp(layers, scale, mirror, centre) > 0.5).sum((2, 3)) < LEAST_AREA).all(1)
    scale, centre = torch.where(lost, 1.0, scale), torch.where(lost[:, None], 0.0, centre)
    shown, shown_masks = warp(pixels, scale, mirror, centre), warp(layers, scale, mirror, centre)

    ratio = draw(*PASTE_RATIO)
    # Some of the next scene's masks: the first of a random order, at least one.
    order = draw(0, 1, most)
    partner = numbers.roll(-1, 0)
    order[torch.arange(most, device=device) >= partner[:, None]] = 2  # none is there
    some = order.argsort(1).argsort(1) < 1 + (draw(0, 1) * partner).long()[:, None]
    picked = layers.roll(-1, 0) * some[:, :, None, None]
    # The shrunken scene covers the canvas from place - ratio to place + ratio.
    place, mirror = draw(-1, 1, 2) * (1 - ratio[:, None]), mirrored()
    toward = -place / ratio[:, None] * torch.stack([mirror, torch.ones_like(mirror)], dim=1)
    added = warp(picked, 1 / ratio, mirror, toward) * (draw(0, 1) < paste)[:, None, None, None]
    cover = added.amax(1, keepdim=True)
    shown = torch.lerp(shown, warp(pixels.roll(-1, 0), 1 / ratio, mirror, toward), cover)
    binary = torch.cat([(shown_masks > 0.5) & (cover <= 0.5), added > 0.5], dim=1)
    return shown, [as_target(layer, whole) for layer, whole in zip(binary, shown_masks > 0.5, strict=True)]


def as_target(masks: Tensor, otherwise: Tensor) -> dict[str, Tensor]:
    """Boxes, labels and masks of those bool (M, H, W) of at least LEAST_AREA pixels, of ``otherwise`` if none."""
    kept = masks[masks.sum((1, 2)) >= LEAST_AREA]
    kept = kept if len(kept) else otherwise[otherwise.any((1, 2))]
    labels = torch.ones(len(kept), dtype=torch.int64, device=masks.device)
    return {"boxes": boxes_of(kept), "labels": labels, "masks": kept.to(torch.uint8)}


class DropLossHeads(RoIHeads):
    """Region heads with CutLER's DropLoss: regions whose IoU with every pseudo-mask's box is at most :data:`DROP_IOU`
    give no loss, as they may show an object MaskCut missed. The mean is over the others (CutLER: over all)."""

    IGNORED = -100  # by cross-entropy

    def select_training_samples(self, proposals, targets):
        """As torchvision's: (regions, matched indices, labels, regression targets), a list entry each per image."""
        proposals, matched, labels, regression = super().select_training_samples(proposals, targets)
        for i, target in enumerate(targets):
            near = (box_iou(proposals[i], target["boxes"]) > DROP_IOU).any(1)
            labels[i] = torch.where(near, labels[i], self.IGNORED)
        return proposals, matched, labels, regression


def losses(model: MaskRCNN, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    """Sum of the five losses of Mask R-CNN in training mode."""
    model.transform.min_size = (min(images.shape[-2:]),)  # the views have their size already
    return torch.stack(list(model(list(images), targets).values())).sum()


def main(argv: list[str] | None = None) -> None:
    parser = training.options(__doc__, steps=4000, batch=16, minutes=25, lr=1e-3)
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes that MaskCut looks at")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="change a value of profile mini, whose settings and models MaskCut gets")
    args = training.start(parser, argv)
    images = np.load(args.data / "train_images.npy", mmap_mode="r")
    segmenter = build_segmenter(load_profile("mini", parse_assignments(args.set) | {"masks.segmenter": "maskcut"}))
    scenes = np.random.default_rng(args.seed).permutation(len(images))[:args.scenes].tolist()
    workers = len(os.sched_getaffinity(0)) if training.DEVICE.type == "cuda" else 1  # beside a GPU all cores look

    def some(places: range) -> Iterator[np.ndarray]:
        chosen = (np.array(images[scenes[i]]) for i in places)
        return forked_map(lambda image: segmenter.propose(image, ""), chosen, workers, chunksize=1)

    masks = training.in_chunks(args, "pseudo_masks", (len(scenes), *images.shape[1:3]), 100, some)
    usable = [i for i, found in enumerate(masks) if len(found)]
    print(f"{len(scenes)} scenes, {len(usable)} with masks, {sum(map(len, masks))} masks", flush=True)
    if len(usable) < args.batch:
        raise InputError(f"Only {len(usable)} scenes have pseudo-masks; {args.batch} are needed.")
    images = training.load_array(args.data / "train_images.npy")
    model = build_detector(CONFIG)
    model.roi_heads.__class__ = DropLossHeads  # the same heads, with another choice of samples
    model = model.to(training.DEVICE, memory_format=torch.channels_last).train()
    run = training.Run(args, model, len(usable), decay=0.998, warmup=100)

    def loss(draw: training.Draw) -> Tensor:
        rows = [usable[i] for i in draw.index]
        draw.picker.shuffle(rows)  # the indices come sorted; partners should not be
        shown = training.rows(images, np.array([scenes[i] for i in rows]))
        batch, targets = views(shown, [masks[i] for i in rows], draw.picker.choice(CANVASES), 1.0, draw.generator)
        with training.mixed():
            return losses(model, batch, targets)

    run.fit(loss, row=50)
    save_detector(training.halved(run.average), CONFIG, args.out)


if __name__ == "__main__":
    main()
