"""Measure the models of the mini world on images none of them was trained on; the numbers go on their model cards.

``python -m ovdiff_lib.recipes.quality`` prints them and writes ``mini/weights/quality.json``. Scenes are those of the
split ``tune``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.features import build_extractors
from ovdiff_lib.files import write_json
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.masks import SEGMENTERS, Segmenter
from ovdiff_lib.mini.world import IGNORE, load_world
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.recipes.card import WEIGHTS
from ovdiff_lib.recipes.sheet import MaskedScene, attribution_iou, draw, object_mask, recognised, sheet
from ovdiff_lib.recipes.train_vae import psnr
from ovdiff_lib.workbench.baselines.groupvit import GroupViT, load_groupvit
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.measure import Method, above, evaluate, measure

FOLDERS = {"diffusion": "stable-diffusion"} | {name: name for name in ("clip", "dino", "mae", "detector", "groupvit")}
"""Field of ``profile.models`` -> folder of a set of mini models."""


def labels_of(labels: np.ndarray) -> np.ndarray:
    """The labels of objects in a label map."""
    return np.setdiff1d(np.unique(labels), (0, IGNORE))


def single_object_scenes(split: str) -> list[MaskedScene]:
    """Images of one object, the object's mask, and its noun."""
    data, found = load_dataset("mini-object", split), []
    for sample in data:
        shown = labels_of(sample.labels)
        if len(shown) == 1:
            mask = object_mask(sample.labels, shown[0])
            found.append((sample.image, mask, data.vocabulary.names[shown[0] - 1]))
    return found


def vae_psnr(profile: Profile, split: str) -> float:
    """Mean PSNR in dB of the reconstruction of images whose short side is what the profile draws at."""
    pipe, values = load_diffusion(profile), []
    step = pipe.vae_scale_factor
    for sample in load_dataset("mini-object", split):
        image = resize_short_side(sample.image, profile.support.image_size)
        height, width = (side // step * step for side in image.shape[:2])
        pixels = torch.from_numpy(np.array(image[None, :height, :width])).to(pipe.device)
        values.append(psnr(pipe.vae, pixels))
    return float(np.mean(values))


def clip_top1(profile: Profile, scenes: list[MaskedScene]) -> float:
    """Share of single-object images whose noun, of all mini-object nouns, CLIP ranks first."""
    judge = CategoryFilter.build(profile)
    vocabulary = Vocabulary.of(load_world().vocabulary("mini-object"))
    return float(np.mean([vocabulary.names[int(judge.scores(image, vocabulary).argmax())] == noun
                          for image, _, noun in scenes]))


def neighbour_top1(profile: Profile, scenes: list[MaskedScene], neighbours: int = 5) -> dict[str, float]:
    """Leave-one-out k-nearest-neighbour accuracy of the noun on single-object images, for every extractor and for
    chance.

    An image's vector is the mean of its features; neighbours vote with their cosine. Chance is the share of the
    commonest noun.
    """
    truth = torch.from_numpy(np.unique([noun for _, _, noun in scenes], return_inverse=True)[1])
    counts, accuracy = torch.bincount(truth), {}
    accuracy["chance"] = float(counts.max() / len(truth))
    names = ["sd", "dino", "mae", "clip-keys", "clip-tokens"]
    for name, extractor in build_extractors(profile.override({"features.extractors": names})).items():
        means = [extractor(resize_short_side(image, profile.matching.short_side)[None], np.array([i])).mean((1, 2))
                 for i, (image, _, _) in enumerate(tqdm(scenes, desc=name, unit="image"))]
        unit = torch.nn.functional.normalize(torch.cat(means), dim=1)
        value, index = (unit @ unit.T).fill_diagonal_(-1).topk(neighbours)
        votes = torch.zeros(len(truth), len(counts)).scatter_add_(1, truth[index], value)
        accuracy[name] = float((votes.argmax(1) == truth).float().mean())
    return accuracy


def best_ious(proposals: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """For each label of an object in u8 (H, W), the highest IoU of a proposal, bool (M, H, W), with its pixels; 0
    without proposals.

    Ignored pixels count for nothing. Objects of one noun that share an image share a label and count as one.
    """
    known, found = labels != IGNORE, {}
    for label in labels_of(labels):
        truth = labels == label
        both = (proposals & truth).sum(axis=(1, 2))
        either = ((proposals | truth) & known).sum(axis=(1, 2))
        found[int(label)] = float((both / either).max(initial=0))
    return found


def object_ious(segmenter: Segmenter, split: str = "val", limit: int | None = None) -> list[tuple[str, float]]:
    """Noun and best IoU of a proposal, for every object of (the first ``limit``) images of mini-object; a segmenter
    that reads words is given the nouns that an image shows."""
    data = load_dataset("mini-object", split)
    names, rows = data.vocabulary.names, []
    for index in tqdm(range(min(limit or len(data), len(data))), desc=segmenter.name, unit="image"):
        sample = data[index]
        masks = segmenter.propose(sample.image, " and ".join(names[label - 1] for label in labels_of(sample.labels)))
        rows += [(names[label - 1], value) for label, value in best_ious(masks, sample.labels).items()]
    return rows


def groupvit_quality(profile: Profile, split: str, scenes: list[MaskedScene]) -> dict[str, float]:
    """Of the GroupViT: share of single-object images whose noun, of all mini-object nouns, it ranks first for the
    whole image; its mean IoU on mini-voc with the background threshold that is best there, which is named too; and,
    to show what its groups are worth, the mean IoU of the class it ranks first for the whole image as the label of
    every pixel."""
    dataset, vocabulary = load_dataset("mini-voc", split), Vocabulary.of(load_world().vocabulary("mini-object"))
    groupvit = GroupViT(*load_groupvit(profile), profile.matching, profile.support.prompt)

    def first(image: np.ndarray, texts: torch.Tensor) -> int:
        return int((groupvit.groups(image[None])[2] @ texts.T).argmax())

    texts, classes = (groupvit.text_embeddings(words) for words in (vocabulary, dataset.vocabulary))
    right = [vocabulary.names[first(image, texts)] == noun for image, _, noun in scenes]
    thresholds = [step / 50 for step in range(1, 50)]
    searched = Method({}, lambda data: lambda sample: above(
        groupvit.scores(sample.image, data.vocabulary), thresholds), len(thresholds))
    best = max(measure({"GroupViT": searched}, dataset)["GroupViT"], key=lambda result: result.miou)
    flat = evaluate(lambda image: np.full(image.shape[:2], 1 + first(image, classes)), dataset)
    return {"zero_shot_top1": float(np.mean(right)), "mini_voc_miou": best.miou,
            "background_threshold": thresholds[best.variant], "whole_image_miou": flat.miou}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=12, help="images drawn for each noun")
    parser.add_argument("--models", type=Path, default=WEIGHTS,
                        help=f"folder with {', '.join(FOLDERS.values())} (default: what ships)")
    parser.add_argument("--split", default="tune", help="scenes that are measured on (default: tune)")
    args = parser.parse_args()
    profile = load_profile("mini", {f"models.{field}": str(args.models / name) for field, name in FOLDERS.items()})
    split, scenes = args.split, single_object_scenes(args.split)
    drawings = draw(profile, list(load_world().vocabulary("mini-object")), args.per_class)
    sheet({noun: images[:4] for noun, images in drawings.items()}).save(args.models / "drawings.webp", quality=85)
    drawn = recognised(profile, drawings)
    recall = {name: float(np.mean([value for _, value in object_ious(SEGMENTERS[name](profile), split)]))
              for name in ("maskcut", "detector")}
    measured = {
        "split": split, "vae_psnr_db": vae_psnr(profile, split), "clip_zero_shot_top1": clip_top1(profile, scenes),
        "drawn_recognised": float(np.mean(list(drawn.values()))), "drawn_recognised_by_class": drawn,
        "attribution": attribution_iou(profile, scenes), "neighbour_top1": neighbour_top1(profile, scenes),
        "proposal_recall": recall, "groupvit": groupvit_quality(profile, split, scenes),
        "images_drawn_per_class": args.per_class, "images": len(load_dataset("mini-object", split)),
        "single_object_images": len(scenes),
    }
    # Four digits are what the cards, and a reader, can use.
    measured = json.loads(json.dumps(measured), parse_float=lambda text: round(float(text), 4))
    print(json.dumps(measured, indent=1))
    write_json(args.models / "quality.json", measured)


if __name__ == "__main__":
    main()
