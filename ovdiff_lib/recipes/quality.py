"""Measure the models of the mini world on images none of them was trained on; the numbers go on their model cards.

``python -m ovdiff_lib.recipes.quality`` prints them and writes ``mini/weights/quality.json``. Scenes are those of the split ``tune``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ovdiff_lib import mini
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.files import write_atomic
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.mini.world import IGNORE, load_world
from ovdiff_lib.networks.loading import load_clip, load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.recipes.sheet import attribution_iou, draw, recognised, sheet
from ovdiff_lib.recipes.train_vae import psnr
from ovdiff_lib.workbench.baselines.groupvit import GroupViT, load_groupvit
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.measure import best_of, evaluate, search_threshold

WEIGHTS = Path(mini.__file__).parent / "weights"
FOLDERS = {"diffusion": "stable-diffusion", "clip": "clip", "dino": "dino", "mae": "mae", "detector": "detector", "groupvit": "groupvit"}
"""Field of ``profile.models`` -> folder of a set of mini models."""


def single_object_scenes(split: str) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Images u8 (H, W, 3) of one object, with the object's mask as f32 (H, W) (NaN where ignored) and its noun."""
    world, found = load_world(), []
    vocabulary = world.vocabulary("mini-object")
    for sample in load_dataset("mini-object", split):
        labels = np.setdiff1d(np.unique(sample.labels), (0, IGNORE))
        if len(labels) == 1:
            mask = np.where(sample.labels == IGNORE, np.nan, sample.labels == labels[0]).astype(np.float32)
            found.append((sample.image, mask, vocabulary[labels[0] - 1]))
    return found


def vae_psnr(profile: Profile, split: str) -> float:
    """Mean PSNR in dB of the reconstruction of images whose short side is what the profile draws at."""
    from ovdiff_lib.images import resize_short_side

    pipe, values = load_diffusion(profile), []
    vae, step = pipe.vae, pipe.vae_scale_factor
    for sample in load_dataset("mini-object", split):
        image = resize_short_side(sample.image, profile.support.image_size)
        height, width = (side // step * step for side in image.shape[:2])
        values.append(psnr(vae, image[None, :height, :width]))
    return float(np.mean(values))


def clip_top1(profile: Profile, split: str) -> float:
    """Share of single-object images whose noun, of all mini-object nouns, CLIP ranks first."""
    judge = CategoryFilter(*load_clip(profile), profile)
    vocabulary = Vocabulary.of(load_world().vocabulary("mini-object"))
    scenes = single_object_scenes(split)
    return float(np.mean([vocabulary.names[int(judge.scores(image, vocabulary).argmax())] == noun for image, _, noun in scenes]))


def neighbour_top1(profile: Profile, split: str, neighbours: int = 5) -> dict[str, float]:
    """Leave-one-out k-nearest-neighbour accuracy of the noun on single-object images, for every extractor and for
    chance.

    An image's vector is the mean of its features; neighbours vote with their cosine. Chance is the share of the
    commonest noun.
    """
    from ovdiff_lib.features import build_extractors
    from ovdiff_lib.images import resize_short_side

    scenes = single_object_scenes(split)
    nouns = sorted({noun for _, _, noun in scenes})
    truth = torch.tensor([nouns.index(noun) for _, _, noun in scenes])
    accuracy = {"chance": float(torch.bincount(truth).max() / len(truth))}
    names = ["sd", "dino", "mae", "clip-keys", "clip-tokens"]
    for name, extractor in build_extractors(profile.override({"features.extractors": names})).items():
        means = [extractor(resize_short_side(image, profile.matching.short_side)[None], np.array([i])).mean((1, 2))
                 for i, (image, _, _) in enumerate(tqdm(scenes, desc=name, unit="image"))]
        unit = torch.nn.functional.normalize(torch.cat(means), dim=1)
        value, index = (unit @ unit.T).fill_diagonal_(-1).topk(neighbours)
        votes = torch.zeros(len(truth), len(nouns)).scatter_add_(1, truth[index], value)
        accuracy[name] = float((votes.argmax(1) == truth).float().mean())
    return accuracy


def proposal_recall(profile: Profile, split: str) -> dict[str, float]:
    """Mean over objects of the best IoU among the proposals of MaskCut and of the detector."""
    from ovdiff_lib.masks import SEGMENTERS
    from ovdiff_lib.recipes.proposals import recall

    return {name: recall(SEGMENTERS[name](profile), split=split).best for name in ("maskcut", "detector")}


def groupvit_quality(profile: Profile, split: str) -> dict[str, float]:
    """Of the GroupViT: share of single-object images whose noun, of all mini-object nouns, it ranks first for the
    whole image; its mean IoU on mini-voc with the background threshold that is best there, which is named too; and,
    to show what its groups are worth, the mean IoU of the class it ranks first for the whole image as the label of
    every pixel."""
    dataset, vocabulary = load_dataset("mini-voc", split), Vocabulary.of(load_world().vocabulary("mini-object"))
    groupvit = GroupViT(*load_groupvit(profile), profile.matching, profile.support.prompt)
    texts = groupvit.text_embeddings(vocabulary)
    right = [vocabulary.names[int((groupvit.groups(image[None])[2] @ texts.T).argmax())] == noun
             for image, _, noun in single_object_scenes(split)]
    thresholds = [step / 50 for step in range(1, 50)]
    threshold, found = best_of(search_threshold(lambda image: groupvit.scores(image, dataset.vocabulary), dataset, thresholds))
    classes = groupvit.text_embeddings(dataset.vocabulary)
    flat = evaluate(lambda image: np.full(image.shape[:2], 1 + int((groupvit.groups(image[None])[2] @ classes.T).argmax())), dataset)
    return {"zero_shot_top1": float(np.mean(right)), "mini_voc_miou": found.miou, "background_threshold": threshold,
            "whole_image_miou": flat.miou}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=12, help="images drawn for each noun")
    parser.add_argument("--models", type=Path,
                        help="folder with stable-diffusion/, clip/, dino/, mae/, detector/ and groupvit/ to measure instead of the shipped")
    parser.add_argument("--split", default="tune", help="scenes that are measured on (default: tune)")
    arguments = parser.parse_args()
    folder = arguments.models or WEIGHTS
    profile = load_profile("mini", {f"models.{field}": str(folder / name) for field, name in FOLDERS.items()})
    split = arguments.split
    drawings = draw(profile, list(load_world().vocabulary("mini-object")), arguments.per_class)
    sheet({noun: images[:4] for noun, images in drawings.items()}).save(folder / "drawings.webp", quality=85)
    drawn = recognised(profile, drawings)
    measured = {
        "split": split,
        "vae_psnr_db": round(vae_psnr(profile, split), 2),
        "clip_zero_shot_top1": round(clip_top1(profile, split), 4),
        "drawn_recognised": round(float(np.mean(list(drawn.values()))), 4),
        "drawn_recognised_by_class": {noun: round(share, 3) for noun, share in drawn.items()},
        "attribution": {name: round(value, 4) for name, value in attribution_iou(profile, single_object_scenes(split)).items()},
        "neighbour_top1": {name: round(value, 4) for name, value in neighbour_top1(profile, split).items()},
        "proposal_recall": {name: round(value, 4) for name, value in proposal_recall(profile, split).items()},
        "groupvit": {name: round(value, 4) for name, value in groupvit_quality(profile, split).items()},
        "images_drawn_per_class": arguments.per_class,
        "images": len(load_dataset("mini-object", split)),
        "single_object_images": len(single_object_scenes(split)),
    }
    text = json.dumps(measured, indent=1) + "\n"
    print(text)
    write_atomic(folder / "quality.json", text.encode())


if __name__ == "__main__":
    main()
