"""Train the mini detector as CutLER does (Wang et al., 2023): a Mask R-CNN learns from the masks that MaskCut finds in
unlabelled scenes.

First MaskCut runs over some training scenes (resumable, ``pseudo_masks.npz`` in the work folder), then the detector is
trained on what it found, with copy-paste and DropLoss; without CutLER's rounds of self-training. No label is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from ovdiff_lib.errors import InputError
from ovdiff_lib.masks import SEGMENTERS, build_segmenter
from ovdiff_lib.masks.segmenters.detector import CONFIG, build_detector, detect, save_detector
from ovdiff_lib.networks.identity import model_identity
from ovdiff_lib.profiles.reading import load_profile, parse_assignments
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.pseudo_masks import PseudoMasks, boxes_of, views

DROP_IOU = 0.01  # CutLER's DROPLOSS_IOU_THRESH
CANVASES = (80, 96, 112, 128)  # pixels; CutLER varies the size of the images too
HELD_OUT = 64  # scenes with pseudo-masks that are kept from training, to log a quality on


class DropLossHeads(RoIHeads):
    """Region heads with CutLER's DropLoss: regions that touch no pseudo-mask's box give no loss, as they may show an
    object MaskCut missed.

    A sampled region whose IoU with every box is at most :data:`DROP_IOU` gets the label that cross-entropy ignores.
    CutLER divides by the number of all sampled regions; here the mean is over those that are left.
    """

    IGNORED = -100

    @classmethod
    def take_over(cls, heads: RoIHeads) -> DropLossHeads:
        """The same heads (modules and settings are shared) with DropLoss."""
        made = cls.__new__(cls)
        made.__dict__ = heads.__dict__
        return made

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


def box_recall(model: MaskRCNN, scenes: list[tuple[np.ndarray, np.ndarray]], score: float = 0.5) -> float:
    """Share of the boxes of masks bool (M, H, W) that a detection of at least ``score`` meets with IoU 0.5, over
    (image, masks)."""
    met = []
    for image, masks in scenes:
        _, scores, boxes = detect(model, image)
        truth = boxes_of(torch.from_numpy(masks))
        overlap = box_iou(truth, torch.from_numpy(boxes[scores >= score]))
        met += [bool((row >= 0.5).any()) for row in overlap]
    return float(np.mean(met)) if met else 0.0


def pseudo_masks(args: argparse.Namespace) -> PseudoMasks:
    """What the segmenter finds in some training scenes, gathered in the work folder; beside a GPU by all CPU cores."""
    images = np.load(args.data / "train_images.npy", mmap_mode="r")
    profile = load_profile(args.profile, parse_assignments(args.set) | {"masks.segmenter": args.segmenter})
    segmenter = build_segmenter(profile)
    models, settings = SEGMENTERS[args.segmenter].depends_on(profile, "masks")
    identities = {name: model_identity(value) for name, value in models.items()}
    first = hashlib.sha256(np.ascontiguousarray(images[0])).hexdigest()[:16]
    key = json.dumps([args.segmenter, identities, settings, first], sort_keys=True)
    # A prefix of one permutation: asking for more scenes later keeps the ones that are done.
    scenes = np.random.default_rng(args.seed).permutation(len(images))[:args.scenes].tolist()

    def propose(scene: int) -> np.ndarray:
        training.pause_if_due(args)
        return segmenter.propose(np.array(images[scene]), "")

    workers = len(os.sched_getaffinity(0)) - 1 if training.DEVICE.type == "cuda" else 1
    store = PseudoMasks(args.work / "pseudo_masks.npz", key, images.shape[1:3])
    return store.gather(scenes, propose, workers=max(1, workers))


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.options(__doc__, steps=4000, batch=16, minutes=25, lr=1e-3)
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes that MaskCut looks at")
    parser.add_argument("--segmenter", default="maskcut", help="what makes the pseudo-masks")
    parser.add_argument("--profile", default="mini", help="whose settings and models the segmenter gets")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="change a value of the profile")
    parser.add_argument("--paste", type=float, default=1.0, help="share of the views with pasted objects")
    args = training.start(parser, argv)
    store = pseudo_masks(args)
    usable = [i for i in range(len(store)) if len(store.packed[i])]
    held_out, usable = usable[:HELD_OUT], usable[HELD_OUT:]
    if len(usable) < args.batch:
        raise InputError(f"Only {len(usable) + len(held_out)} scenes have pseudo-masks; "
                         f"{args.batch + HELD_OUT} are needed.")
    found = len(usable) + len(held_out)
    print(f"{len(store)} scenes, {found} with masks, {sum(map(len, store.packed))} masks", flush=True)
    images = training.load_array(args.data / "train_images.npy")
    checks = [(images[store.scenes[i]].cpu().numpy(), store[i]) for i in held_out]
    model = build_detector(CONFIG)
    model.roi_heads = DropLossHeads.take_over(model.roi_heads)
    model = model.to(training.DEVICE, memory_format=torch.channels_last).train()
    run = training.Run(args, model, len(usable), decay=0.998, warmup=100)

    def loss(draw: training.Draw) -> Tensor:
        rows = [usable[i] for i in draw.index]
        draw.picker.shuffle(rows)  # the indices come sorted; partners should not be
        scenes = training.rows(images, np.array([store.scenes[i] for i in rows]))
        canvas = draw.picker.choice(CANVASES)
        batch, targets = views(scenes, [store[i] for i in rows], canvas, args.paste, draw.generator)
        with training.mixed(args):
            return losses(model, batch, targets)

    run.fit(loss, measure=lambda: {"box_recall": box_recall(run.average, checks)}, every=500, row=50)
    run.average.load_state_dict(training.round_weights(run.average.state_dict()))
    save_detector(run.average.cpu(), CONFIG, args.out)


if __name__ == "__main__":
    main()
