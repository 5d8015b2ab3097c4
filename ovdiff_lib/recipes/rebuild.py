"""Rebuild the mini world from nothing: art, scenes, models, measurements, model cards (``make mini-world``).

Every stage resumes where it stopped, so the command can be interrupted and run again. It takes about four hours on two CPU
cores and needs npm for the art. The result replaces ``mini/data`` and ``mini/weights`` of this checkout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes.card import write_card
from ovdiff_lib.recipes.quality import WEIGHTS

MINUTES = {"clip": 24, "vae": 24, "unet": 110, "dino": 42, "mae": 35, "detector": 25, "groupvit": 38}
"""Training time of each model; the learning rate anneals over it."""


FOLDERS = {"unet": "stable-diffusion", "vae": "stable-diffusion/vae"}
"""Where a model ships, if not under its own name."""


def stages(work: Path) -> list[list[str]]:
    """The commands in order, as arguments of ``python -m``."""
    data, out, run = work / "scenes", work / "models", work / "training"

    def train(script: str, name: str, *more: str) -> list[str]:
        return [f"ovdiff_lib.recipes.{script}", "--data", str(data), "--out", str(out / name), "--work", str(run / name),
                "--steps", "1000000", "--minutes", str(MINUTES[name]), *more]

    return [
        ["ovdiff_lib.recipes.build", "--work", str(work)],
        train("train_clip", "clip", "--threads", "2"),
        train("train_vae", "vae", "--threads", "2"),
        train("train_unet", "unet", "--vae", str(out / "vae"), "--clip", str(out / "clip")),
        train("train_dino", "dino", "--threads", "2"),
        train("train_mae", "mae", "--threads", "2"),
        train("train_detector", "detector", "--threads", "2", "--set", f"models.dino={out / 'dino'}"),
        train("train_groupvit", "groupvit", "--clip", str(out / "clip")),
    ]


def assemble(work: Path, weights: Path = WEIGHTS) -> None:
    """Copy the trained models to where the profile looks for them: ``weights/stable-diffusion``, ``weights/clip`` and so on."""
    out = work / "models"
    for name in ("unet", "clip", "dino", "mae", "detector", "groupvit"):
        source, target = out / name, weights / FOLDERS.get(name, name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


DATA_NOTE = """## Data

80,000 scenes of the mini world at 64x64 px (`python -m ovdiff_lib.recipes.build`, seed 0): 42 nouns in three drawing styles over eight
kinds of surroundings, 24 % with two objects, 6 % with none, up to four captions a scene. None of them is in the val or wild split."""

LICENCE = """Apache-2.0, as the project. Its training scenes are composed of Microsoft Fluent Emoji (MIT) and Noto Emoji (Apache-2.0);
see NOTICE."""


def write_cards(training: Path, weights: Path = WEIGHTS, remarks: dict[str, str] | None = None) -> None:
    """Model cards from the training logs and the measurements of :mod:`ovdiff_lib.recipes.quality`; ``remarks`` adds text by kind."""
    measured = json.loads((weights / "quality.json").read_text(encoding="utf-8"))
    by_class = measured["drawn_recognised_by_class"]
    weakest = ", ".join(f"{noun} {100 * share:.0f} %" for noun, share in sorted(by_class.items(), key=lambda item: item[1])[:5])
    single, drawn = measured["single_object_images"], measured["images_drawn_per_class"]
    percent = {key: f"**{100 * value:.1f} %**" for key, value in measured.items() if isinstance(value, float)}
    psnr = f"{measured['vae_psnr_db']:.2f} dB"
    quality = {
        "clip": f"Zero-shot top-1 over 42 nouns on {single} single-object validation images: {percent['clip_zero_shot_top1']}.",
        "vae": f"Reconstruction of {measured['validation_images']} validation images at short side 64: **{psnr}** PSNR.",
        "unet": f"Images drawn for \"A good picture of a ...\" ({drawn} for each of 42 nouns) that the mini CLIP recognises: "
                f"{percent['drawn_recognised']} (weakest: {weakest}). On {single} single-object validation images inverted to noise, the "
                f"noun's attribution is higher inside the object than outside in {percent['attribution_inside_higher']}. VAE: {psnr} PSNR.",
    }
    near, recall = measured["neighbour_top1"], measured["proposal_recall"]
    others = ", ".join(f"{name} {100 * value:.1f} %" for name, value in near.items() if name != "chance")
    for kind in ("dino", "mae"):
        quality[kind] = (f"Leave-one-out 5-nearest-neighbour accuracy of the noun on {single} single-object validation images, an image's "
                         f"vector being the mean of its keys: **{100 * near[kind]:.1f} %** (chance {100 * near['chance']:.1f} %; all "
                         f"extractors: {others}).")
    facet = load_profile("mini").masks.maskcut_facet
    quality["dino"] += f" MaskCut over the {facet} of its last layer: mean best IoU with validation objects **{recall['maskcut']:.3f}**."
    quality["detector"] = (f"Mean best IoU of its proposals with validation objects: **{recall['detector']:.3f}** (MaskCut, which it "
                           f"learned from: {recall['maskcut']:.3f}).")
    groups = measured["groupvit"]
    quality["groupvit"] = (f"Zero-shot top-1 over 42 nouns on {single} single-object validation images: "
                           f"**{100 * groups['zero_shot_top1']:.1f} %**. Mean IoU on mini-voc (val): "
                           f"**{100 * groups['mini_voc_miou']:.1f} %** with the background threshold that is best there, "
                           f"{groups['background_threshold']:.2f} (its class for the whole image as the label of every pixel: "
                           f"{100 * groups['whole_image_miou']:.1f} %).")
    for kind in quality:
        folder = weights / FOLDERS.get(kind, kind)
        notes = f"## Quality\n\nMeasured by `python -m ovdiff_lib.recipes.quality`. {quality[kind]}\n\n{DATA_NOTE}"
        if remarks and kind in remarks:
            notes += f"\n\n## This run\n\n{remarks[kind]}"
        write_card(folder, training / kind, kind, license_note=LICENCE, notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for art, scenes and checkpoints (default: work)")
    arguments = parser.parse_args()
    for stage in stages(arguments.work):
        print("python -m " + " ".join(stage), flush=True)
        subprocess.run([sys.executable, "-m", *stage], check=True)
    assemble(arguments.work)
    subprocess.run([sys.executable, "-m", "ovdiff_lib.recipes.quality"], check=True)
    write_cards(arguments.work / "training")


if __name__ == "__main__":
    main()
