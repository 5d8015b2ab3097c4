"""A sheet of drawings, some for every noun, to look at; and what can be counted on them.

``python -m ovdiff_lib.recipes.sheet --model DIR --out sheet.png`` draws with the settings of a profile and prints, as
JSON, the share of drawings that the judge (a CLIP) recognises, and the attribution's IoU with objects of scenes whose
masks are known (``--work``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from tqdm import tqdm

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.mini.world import IGNORE
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile, parse_assignments
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.recipes.art import build_glyphs, drawn_world
from ovdiff_lib.recipes.build import SEEDS
from ovdiff_lib.recipes.scenes import draw_scene, glyph_table
from ovdiff_lib.support.attribution import class_token_positions, fill_template, record_attribution
from ovdiff_lib.support.sampler import sample_support

MaskedScene = tuple[np.ndarray, np.ndarray, str]
"""An image u8 (H, W, 3) of one object, its mask of :func:`object_mask`, and its noun."""


def draw(profile: Profile, nouns: list[str], count: int) -> dict[str, np.ndarray]:
    """``count`` drawings u8 (count, S, S, 3) for each noun, as the profile draws them."""
    pipe = load_diffusion(profile)
    return {noun: sample_support(pipe, Category(noun), profile, count=count, progress=False).images
            for noun in tqdm(nouns, mininterval=10)}


def sheet(drawings: dict[str, np.ndarray], side: int = 96, columns: int = 3) -> Image.Image:
    """Drawings of one noun side by side with its name below, ``columns`` nouns a row."""
    count = len(next(iter(drawings.values())))
    cell, rows = (side * count + 12, side + 16), -(-len(drawings) // columns)
    page = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    pen = ImageDraw.Draw(page)
    for place, (noun, images) in enumerate(drawings.items()):
        x, y = place % columns * cell[0], place // columns * cell[1]
        for i, image in enumerate(images):
            page.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (x + i * side, y))
        pen.text((x + 2, y + side + 2), noun, fill="black")
    return page


def recognised(profile: Profile, drawings: dict[str, np.ndarray]) -> dict[str, float]:
    """For each noun, the share of its drawings for which the profile's CLIP ranks it first among all of them."""
    judge, vocabulary = CategoryFilter.build(profile), Vocabulary.of(list(drawings))
    return {noun: float(np.mean([int(judge.scores(image, vocabulary).argmax()) == number for image in images]))
            for number, (noun, images) in enumerate(drawings.items())}


def object_mask(labels: np.ndarray, label: int) -> np.ndarray:
    """1 where a label map shows ``label``, NaN where it is ignored, else 0: f32 (H, W)."""
    return np.where(labels == IGNORE, np.nan, labels == label).astype(np.float32)


def masked_scenes(work: Path, count: int, size: int) -> list[MaskedScene]:
    """Scenes of ``size`` px that no training saw."""
    world = drawn_world()
    glyphs, found = glyph_table(world, build_glyphs(world, work), world.train_styles), []
    for index in range(count):
        noun = world.things[index % len(world.things)].name
        scene = draw_scene(world, glyphs, SEEDS["eval"], index, (size, size), noun=noun, objects=1)
        if scene.nouns:
            found.append((scene.image, object_mask(scene.labels, world.label(noun)), noun))
    return found


@torch.no_grad()
def attribution_iou(profile: Profile, scenes: list[MaskedScene], steps: tuple[int, ...] = (800, 600, 400, 200)
                    ) -> dict[str, float]:
    """How well the noun's attribution shows the object, on scenes noised to ``steps`` under the noun's prompt.

    ``iou`` is the mean IoU of the one threshold, of the map scaled to [0, 1], that is best for all scenes; ``inside``
    the share of scenes whose attribution is higher inside the object than outside. Scenes are squashed to the size the
    model draws at.
    """
    pipe, side = load_diffusion(profile), profile.support.image_size
    grid = side // pipe.vae_scale_factor
    cumulative = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
    thresholds, ious, hits = np.arange(1, 20) / 20, [], []
    for i, (image, mask, noun) in enumerate(scenes):
        square = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(square).to(pipe.device).permute(2, 0, 1)[None].to(pipe.vae.dtype) / 127.5 - 1
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


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the StableDiffusionPipeline")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--judge", type=Path, help="folder of a CLIP that looks at the drawings (default: profile's)")
    parser.add_argument("--work", type=Path, help="folder with glyphs.npz, to measure attribution on 86 scenes")
    parser.add_argument("--count", type=int, default=4, help="drawings for each noun")
    parser.add_argument("--nouns", nargs="+", help="default: all of the world")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="change a value of profile mini")
    args = parser.parse_args(argv)
    models = {"models.diffusion": str(args.model)} | ({"models.clip": str(args.judge)} if args.judge else {})
    profile = load_profile("mini", models | parse_assignments(args.set))
    drawings = draw(profile, args.nouns or [t.name for t in drawn_world().things], args.count)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(drawings).save(args.out)
    by_noun = recognised(profile, drawings)
    measured = {"recognised": float(np.mean(list(by_noun.values()))), "by_noun": by_noun}
    if args.work:
        measured["attribution"] = attribution_iou(profile, masked_scenes(args.work, 86, profile.support.image_size))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
