"""Train the mini detector as CutLER does (Wang et al., 2023): a Mask R-CNN learns from the masks that MaskCut finds in
unlabelled scenes.

``python -m ovdiff_lib.recipes.train_detector --data DIR --out DIR --work DIR``

First MaskCut runs over some training scenes (resumable, ``pseudo_masks.npz`` in the work folder), then the detector is
trained on what it found, with copy-paste and DropLoss; without CutLER's rounds of self-training. No label is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json

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
from ovdiff_lib.recipes.pseudo_masks import PseudoMasks, boxes_of, views
from ovdiff_lib.recipes.training import (
    DEVICE,
    EMA,
    Run,
    decayed,
    mixed,
    round_weights,
    seed_everything,
    shuffled_indices,
    training_parser,
    warmup_cosine,
)

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
            if len(target["boxes"]):
                far = box_iou(proposals[i], target["boxes"]).amax(1) <= DROP_IOU
            else:
                far = torch.ones_like(labels[i], dtype=torch.bool)
            labels[i] = torch.where(far, self.IGNORED, labels[i])
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


def pseudo_masks(args: argparse.Namespace, images: np.ndarray) -> PseudoMasks:
    """What the segmenter finds in some training scenes, gathered in the work folder."""
    profile = load_profile(args.profile, parse_assignments(args.set) | {"masks.segmenter": args.segmenter})
    segmenter = build_segmenter(profile)
    models, settings = SEGMENTERS[args.segmenter].depends_on(profile, "masks")
    first = hashlib.sha256(np.ascontiguousarray(images[0])).hexdigest()[:16]
    key = json.dumps([args.segmenter, {name: model_identity(value) for name, value in models.items()}, settings, first], sort_keys=True)
    # A prefix of one permutation: asking for more scenes later keeps the ones that are done.
    scenes = np.random.default_rng(args.seed).permutation(len(images))[:args.scenes].tolist()
    store = PseudoMasks(args.work / "pseudo_masks.npz", key, images.shape[1:3])
    return store.gather(scenes, lambda scene: segmenter.propose(np.array(images[scene]), ""))


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training_parser(__doc__, steps=4000, batch=16, minutes=25)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes that MaskCut looks at")
    parser.add_argument("--segmenter", default="maskcut", help="what makes the pseudo-masks")
    parser.add_argument("--profile", default="mini", help="whose settings and models the segmenter gets")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a value of the profile")
    parser.add_argument("--paste", type=float, default=1.0, help="share of the views with pasted objects")
    args = parser.parse_args(argv)
    seed_everything(args.seed, args.threads)
    images = np.load(args.data / "train_images.npy", mmap_mode="r")
    args.work.mkdir(parents=True, exist_ok=True)
    store = pseudo_masks(args, images)
    usable = [i for i in range(len(store)) if len(store.packed[i])]
    held_out, usable = usable[:HELD_OUT], usable[HELD_OUT:]
    if len(usable) < args.batch:
        raise InputError(f"Only {len(usable) + len(held_out)} scenes have pseudo-masks; {args.batch + HELD_OUT} are needed.")
    print(f"{len(store)} scenes, {len(usable) + len(held_out)} with masks, {sum(map(len, store.packed))} masks", flush=True)
    checks = [(np.array(images[store.scenes[i]]), store[i]) for i in held_out]
    model = build_detector(CONFIG)
    averaged = build_detector(CONFIG).eval().to(DEVICE)
    model.roi_heads = DropLossHeads.take_over(model.roi_heads)
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(decayed(model), lr=args.lr, fused=True)
    ema = EMA(model, 0.998)
    run = Run(args, model, optimizer, lambda p, s: warmup_cosine(p, s, warmup=100), ema)

    def measure() -> dict[str, float]:
        ema.copy_to(averaged)
        return {"box_recall": box_recall(averaged, checks)}

    for step in run:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = [usable[i] for i in shuffled_indices(len(usable), args.batch, args.seed, step)]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]  # the indices come sorted; partners should not be
        canvas = CANVASES[int(torch.randint(len(CANVASES), (1,), generator=generator))]
        scenes = np.stack([images[store.scenes[i]] for i in rows])
        batch, targets = views(scenes, [store[i] for i in rows], canvas, args.paste, generator)
        batch, targets = batch.to(DEVICE), [{name: value.to(DEVICE) for name, value in target.items()} for target in targets]
        with mixed(args):
            loss = losses(model, batch, targets)
        run.update(loss)
        run.record(loss.detach(), every=50, **(measure() if (step + 1) % 500 == 0 else {}))
    quality = measure()
    averaged.load_state_dict(round_weights(averaged.state_dict()))
    save_detector(averaged.cpu(), CONFIG, args.out)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, box recall {quality['box_recall']:.4f}", flush=True)


if __name__ == "__main__":
    main()
