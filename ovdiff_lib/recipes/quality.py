"""Measure the models of the mini world on images none of them was trained on; the numbers go on their model cards.

    python -m ovdiff_lib.recipes.quality    # what ships: prints and writes mini/weights/quality.json and drawings.webp
    python -m ovdiff_lib.recipes.quality --drawings-only --set models.diffusion=work/training/unet/model --out DIR
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from tqdm import tqdm

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.features import build_extractors
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.masks import SEGMENTERS, Segmenter
from ovdiff_lib.mini.world import IGNORE, load_world
from ovdiff_lib.networks.identity import SHIPPED
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.recipes.train_vae import to_signed
from ovdiff_lib.support.attribution import class_token_positions, fill_template, record_attribution
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.analysis.examples import shown_labels
from ovdiff_lib.workbench.baselines.groupvit import GroupViT
from ovdiff_lib.workbench.console import parse_assignments, write_json
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.figures.base import image_grid, square

SPLIT, DRAWN = "tune", 12  # the scenes that are measured on, and how many images are drawn of each noun

MaskedScene = tuple[np.ndarray, np.ndarray, str]
"""An image u8 (H, W, 3) of one object, its mask f32 (H, W), NaN where it is ignored, and its noun."""


def single_object_scenes() -> list[MaskedScene]:
    """Images of one object, the object's mask, and its noun."""
    data, found = load_dataset("mini-object", SPLIT), []
    for sample in data:
        shown = shown_labels(sample)
        if len(shown) == 1:
            mask = np.where(sample.labels == IGNORE, np.nan, sample.labels == shown[0]).astype(np.float32)
            found.append((sample.image, mask, data.vocabulary.names[shown[0] - 1]))
    return found


def vae_psnr(profile: Profile) -> float:
    """Mean PSNR in dB of the reconstruction of images from the latent's mean, as SD uses it."""
    vae, found = load_diffusion(profile).vae, []
    for sample in load_dataset("mini-object", SPLIT):
        target = to_signed(torch.from_numpy(sample.image.copy())[None].to(vae.device))
        output = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        found.append(-10 * float(((output - target) / 2).square().mean().log10()))
    return float(np.mean(found))


def neighbour_top1(profile: Profile, scenes: list[MaskedScene]) -> dict[str, float]:
    """Leave-one-out 5-nearest-neighbour accuracy of the noun on single-object images, votes weighted by cosine, for
    every extractor, an image's vector being the mean of its features; and chance, the share of the commonest noun."""
    truth = torch.from_numpy(np.unique([noun for _, _, noun in scenes], return_inverse=True)[1])
    accuracy = {"chance": float(torch.bincount(truth).max() / len(truth))}
    names = ["sd", "dino", "mae", "clip-keys", "clip-tokens"]
    for name, extractor in build_extractors(profile.override({"features.extractors": names})).items():
        means = [extractor(resize_short_side(image, profile.matching.short_side)[None], np.array([i])).mean((1, 2))
                 for i, (image, _, _) in enumerate(tqdm(scenes, desc=name, unit="image"))]
        unit = F.normalize(torch.cat(means).cpu().float(), dim=1)
        value, index = (unit @ unit.T).fill_diagonal_(-1).topk(5)
        votes = torch.zeros(len(truth), int(truth.max()) + 1).scatter_add_(1, truth[index], value)
        accuracy[name] = float((votes.argmax(1) == truth).float().mean())
    return accuracy


def best_ious(proposals: np.ndarray, labels: np.ndarray) -> list[float]:
    """For each object's label in u8 (H, W) the highest IoU of a proposal, bool (M, H, W), with its pixels, those that
    are ignored left out; 0 without proposals. Objects of one noun that share an image count as one."""
    known, truths = labels != IGNORE, [labels == label for label in np.setdiff1d(labels, (0, IGNORE))]
    return [float(((proposals & truth).sum((1, 2)) / ((proposals | truth) & known).sum((1, 2))).max(initial=0))
            for truth in truths]


def proposal_recall(segmenter: Segmenter) -> float:
    """Mean over all objects of the images of mini-object of :func:`best_ious`."""
    data = tqdm(load_dataset("mini-object", SPLIT), desc=segmenter.name, unit="image")
    return float(np.mean([iou for one in data for iou in best_ious(segmenter.propose(one.image, ""), one.labels)]))


def recognised(profile: Profile, pictures: dict[str, Sequence[np.ndarray]]) -> dict[str, list[bool]]:
    """For each noun, of which of its pictures the profile's CLIP ranks it first among all of them."""
    judge, vocabulary = CategoryFilter.build(profile), Vocabulary.of(list(pictures))
    return {noun: [int(judge(image, vocabulary)[1].argmax()) == number for image in images]
            for number, (noun, images) in enumerate(pictures.items())}


@torch.no_grad()
def attribution_iou(profile: Profile, scenes: list[MaskedScene], steps: tuple[int, ...] = (800, 600, 400, 200)
                    ) -> dict[str, float]:
    """How well the noun's attribution shows the object, on scenes noised to ``steps``: ``iou``, the mean IoU at the one
    threshold of [0, 1] that is best, and ``inside``, the share of scenes where it is higher inside than outside."""
    pipe, side = load_diffusion(profile), profile.support.image_size
    grid = side // pipe.vae_scale_factor
    cumulative = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
    thresholds, ious, hits = np.arange(1, 20) / 20, [], []
    for i, (image, mask, noun) in enumerate(scenes):
        pixels = to_signed(torch.from_numpy(square(image, side))[None].to(pipe.device)).to(pipe.vae.dtype)
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        prompt = pipe.encode_prompt(fill_template(profile.support.prompt, noun), pipe.device, 1, False)[0]
        positions = class_token_positions(pipe.tokenizer, profile.support.prompt, noun)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i)).to(latents)
        with record_attribution(pipe.unet, positions, (grid, grid), guided=False) as recorder:
            for t in steps:
                signal = cumulative[t]
                pipe.unet(signal.sqrt() * latents + (1 - signal).sqrt() * noise, t, encoder_hidden_states=prompt)
        attribution = F.interpolate(recorder.maps()[None], size=mask.shape, mode="bilinear")[0, 0].numpy()
        attribution = (attribution - attribution.min()) / max(float(np.ptp(attribution)), 1e-12)
        known, truth = ~np.isnan(mask), mask == 1
        hits.append(attribution[truth].mean() > attribution[mask == 0].mean())
        chosen = (attribution[None] > thresholds[:, None, None]) & known
        ious.append((chosen & truth).sum((1, 2)) / ((chosen | truth) & known).sum((1, 2)))
    return {"iou": float(np.mean(ious, axis=0).max()), "inside": float(np.mean(hits))}


def groupvit_top1(profile: Profile, scenes: list[MaskedScene], nouns: tuple[str, ...]) -> float:
    """Share of single-object images whose noun, of all these, GroupViT ranks first for the whole image."""
    groupvit = GroupViT.build(profile)
    texts = groupvit.text_embeddings(Vocabulary.of(nouns))
    return float(np.mean([nouns[int((groupvit.groups(image[None])[2] @ texts.T).argmax())] == noun
                          for image, _, noun in scenes]))


def drawing_quality(profile: Profile, scenes: list[MaskedScene], nouns: tuple[str, ...], out: Path) -> dict[str, Any]:
    """What depends on diffusion alone, by :data:`DRAWN` drawings a noun, some of them in out/drawings.webp."""
    pipe = load_diffusion(profile)
    drawings = {noun: sample_support(pipe, Category(noun), profile, count=DRAWN, progress=False).images
                for noun in tqdm(nouns, desc="drawings", mininterval=10)}
    page = image_grid([list(images[:6]) for images in drawings.values()], nouns)
    page.savefig(out / "drawings.webp", pil_kwargs={"quality": 85})
    by_class = {noun: float(np.mean(hits)) for noun, hits in recognised(profile, drawings).items()}
    return {"images_drawn_per_class": DRAWN, "drawn_recognised": float(np.mean(list(by_class.values()))),
            "drawn_recognised_by_class": by_class, "attribution": attribution_iou(profile, scenes)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="change a value of profile mini, such as models.diffusion")
    parser.add_argument("--drawings-only", action="store_true", help="measure the diffusion model alone")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder to write to (default: what ships)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    profile, nouns = load_profile("mini", parse_assignments(args.set)), load_world().vocabulary("mini-object")
    scenes = single_object_scenes()
    measured = {"split": SPLIT, "images": len(load_dataset("mini-object", SPLIT)), "single_object_images": len(scenes),
                **drawing_quality(profile, scenes, nouns, args.out)}
    if not args.drawings_only:
        hits = recognised(profile, {noun: [image for image, _, shown in scenes if shown == noun] for noun in nouns})
        measured |= {
            "vae_psnr_db": vae_psnr(profile), "clip_zero_shot_top1": float(np.mean([*chain(*hits.values())])),
            "neighbour_top1": neighbour_top1(profile, scenes),
            "groupvit_zero_shot_top1": groupvit_top1(profile, scenes, nouns),
            "proposal_recall": {name: proposal_recall(SEGMENTERS[name](profile)) for name in ("maskcut", "detector")}}
    # Four digits are what the cards, and a reader, can use.
    measured = json.loads(json.dumps(measured), parse_float=lambda text: round(float(text), 4))
    print(json.dumps(measured, indent=1))
    write_json(args.out / "quality.json", measured)


if __name__ == "__main__":
    main()
