"""Make the mini world anew, from nothing: art, scenes, models (``make mini-world``); ``--ship`` puts the result in
place of what ships.

Two streams of stages run side by side, on one GPU if there is one, else on one CPU core each. Every stage resumes where
it stopped, so the command can be interrupted, or told to stop after some ``--piece`` minutes, and run again with the
same arguments. ``--hours`` is what all of it may take; each stage gets its share and its learning rate anneals over
that. With ``glyphs.npz`` in the work folder (``--stop glyphs`` writes it) nothing is fetched.

    python -m ovdiff_lib.recipes.rebuild --work DIR --hours 30                    # two CPU cores
    python -m ovdiff_lib.recipes.rebuild --work DIR --hours 0.4 --piece 9         # a GPU machine without network, three times
    python -m ovdiff_lib.recipes.rebuild --work DIR --hours 30 --ship             # draw what ships, measure, write the cards
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes.art import build_glyphs, drawn_world
from ovdiff_lib.recipes.card import write_card
from ovdiff_lib.recipes.quality import WEIGHTS
from ovdiff_lib.recipes.training import DEVICE, PAUSED

SHARES = {"clip": 0.12, "vae": 0.18, "unet": 0.60, "dino": 0.45, "mae": 0.16, "detector": 0.14, "groupvit": 0.15}
"""Part of the time that each model is trained for. A stream adds up to 0.9: the rest is for drawing scenes and their
latents, compiling, and what MaskCut finds for the detector to learn from."""

STREAMS = (("clip", "vae", "unet"), ("dino", "mae", "detector", "groupvit"))
"""What is trained one after the other; the streams run side by side."""

FOLDERS = {"unet": "stable-diffusion", "vae": "stable-diffusion/vae"}
"""Where a model ships, if not under its own name."""

SCENES = 100_000
"""Training scenes; there are a third as many pairs of frames."""

# A GPU is fed larger batches, with learning rates that grow less than they do.
LARGE = {
    "clip": ("--batch", "1024", "--lr", "2e-3"),
    "vae": ("--batch", "256", "--lr", "2e-3"),
    "unet": ("--batch", "512", "--lr", "2e-3"),
    "dino": ("--batch", "256", "--lr", "2e-3"),
    "mae": ("--batch", "1024", "--lr", "2e-3"),
    "detector": ("--batch", "64", "--lr", "2e-3", "--scenes", "3000"),
    "groupvit": ("--batch", "512", "--lr", "3e-3"),
}


def command(name: str, work: Path, hours: float, *more: str) -> list[str]:
    """The trainer of a model as arguments of ``python -m``."""
    out = work / "models"
    needs = {"unet": ("--vae", str(out / "vae"), "--clip", str(out / "clip")), "detector": ("--set", f"models.dino={out / 'dino'}"),
             "groupvit": ("--clip", str(out / "clip"))}
    large = LARGE[name] if DEVICE.type == "cuda" else ()
    return [f"ovdiff_lib.recipes.train_{name}", "--data", str(work / "scenes"), "--out", str(out / name), "--work",
            str(work / "training" / name), "--steps", "1000000000", "--minutes", f"{60 * hours * SHARES[name]:.2f}", *needs.get(name, ()),
            *large, *more]


def train(work: Path, hours: float, piece: float, more: tuple[str, ...] = ()) -> bool:
    """Run both streams of stages for at most ``piece`` minutes; whether all of them are finished. A failed stage
    ends the command."""
    end, running, waiting = time.monotonic() + 60 * piece, {}, [list(stream) for stream in STREAMS]
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def finished(name: str) -> bool:
        return (work / "training" / name / "finished").exists()

    while True:
        for number, stream in enumerate(waiting):
            process = running.get(number)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                name = stream[0]
                if process.returncode == 0:
                    (work / "training" / name / "finished").touch()
                elif process.returncode != PAUSED:
                    for other in running.values():
                        other.terminate()
                    raise SystemExit(f"Training of {name} failed; its last words are in {logs / name}.log.")
                del running[number]
            while stream and finished(stream[0]):
                stream.pop(0)
            left = (end - time.monotonic()) / 60
            ready = stream and (stream[0] != "groupvit" or finished("clip"))  # whose tokenizer it shares
            if ready and left > 0.5:
                arguments = command(stream[0], work, hours, "--piece", f"{left - 0.4:.2f}", *more)
                print("python -m " + " ".join(arguments), flush=True)
                with (logs / f"{stream[0]}.log").open("a") as log:
                    running[number] = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log)
        if not running:
            return not any(waiting)
        time.sleep(1)


def assemble(work: Path, weights: Path = WEIGHTS) -> None:
    """Copy the trained models to where the profile looks for them: ``weights/stable-diffusion``, ``weights/clip``
    and so on."""
    out = work / "models"
    for name in ("unet", "clip", "dino", "mae", "detector", "groupvit"):
        source, target = out / name, weights / FOLDERS.get(name, name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


DATA_NOTE = """## Data

{scenes} scenes of the mini world at 128x128 px (`python -m ovdiff_lib.recipes.build`, seed 0): {nouns} nouns in {styles} drawing styles,
{glyphs} glyphs, over eight kinds of surroundings; one object in two thirds, two or three in most others; four captions a scene. None of
them is in the splits tune, val and wild, and no held glyph is in them."""

LICENCE = """Apache-2.0, as the project. Its training scenes are composed of openly licensed emoji art: Microsoft Fluent Emoji (MIT), Noto
Emoji and FxEmojis (Apache-2.0), EmojiTwo and Streamline Emojis (CC-BY 4.0); see NOTICE."""


def write_cards(training: Path, weights: Path = WEIGHTS, remarks: dict[str, str] | None = None) -> None:
    """Model cards from the training logs and the measurements of :mod:`ovdiff_lib.recipes.quality`; ``remarks`` adds
    text by kind."""
    measured = json.loads((weights / "quality.json").read_text(encoding="utf-8"))
    by_class = measured["drawn_recognised_by_class"]
    weakest = ", ".join(f"{noun} {100 * share:.0f} %" for noun, share in sorted(by_class.items(), key=lambda item: item[1])[:5])
    single, drawn = f"{measured['single_object_images']} single-object {measured['split']}", measured["images_drawn_per_class"]
    nouns, attribution, images = len(by_class), measured["attribution"], f"{measured['images']} {measured['split']} images"
    percent = {key: f"**{100 * value:.1f} %**" for key, value in measured.items() if isinstance(value, float)}
    psnr = f"{measured['vae_psnr_db']:.2f} dB"
    quality = {
        "clip": f"Zero-shot top-1 over {nouns} nouns on {single} images: {percent['clip_zero_shot_top1']}.",
        "vae": f"Reconstruction of {images} at short side 128: **{psnr}** PSNR.",
        "unet": f"Images drawn for \"A good picture of a ...\" ({drawn} for each of {nouns} nouns) that the mini CLIP recognises: "
                f"{percent['drawn_recognised']} (weakest: {weakest}). On {single} images with noise, the noun's "
                f"attribution meets the object with a mean IoU of **{attribution['iou']:.2f}** at the best threshold, and is higher inside "
                f"than outside in {100 * attribution['inside']:.1f} %. VAE: {psnr} PSNR.",
    }
    near, recall = measured["neighbour_top1"], measured["proposal_recall"]
    others = ", ".join(f"{name} {100 * value:.1f} %" for name, value in near.items() if name != "chance")
    for kind in ("dino", "mae"):
        quality[kind] = (f"Leave-one-out 5-nearest-neighbour accuracy of the noun on {single} images, an image's "
                         f"vector being the mean of its keys: **{100 * near[kind]:.1f} %** (chance {100 * near['chance']:.1f} %; all "
                         f"extractors: {others}).")
    facet = load_profile("mini").masks.maskcut_facet
    quality["dino"] += f" MaskCut over the {facet} of its last layer: mean best IoU with objects **{recall['maskcut']:.3f}**."
    quality["detector"] = (f"Mean best IoU of its proposals with objects: **{recall['detector']:.3f}** (MaskCut, which it "
                           f"learned from: {recall['maskcut']:.3f}).")
    groups = measured["groupvit"]
    quality["groupvit"] = (f"Zero-shot top-1 over {nouns} nouns on {single} images: "
                           f"**{100 * groups['zero_shot_top1']:.1f} %**. Mean IoU on mini-voc ({measured['split']}): "
                           f"**{100 * groups['mini_voc_miou']:.1f} %** with the background threshold that is best there, "
                           f"{groups['background_threshold']:.2f} (its class for the whole image as the label of every pixel: "
                           f"{100 * groups['whole_image_miou']:.1f} %).")
    world = drawn_world()
    glyphs = sum(len(t.glyphs.get(s, ())) for t in world.things for s in world.train_styles) - sum(len(t.held) for t in world.things)
    data = DATA_NOTE.format(scenes=f"{SCENES:,}", nouns=len(world.things), styles=len(world.train_styles), glyphs=glyphs)
    for kind in quality:
        folder = weights / FOLDERS.get(kind, kind)
        notes = f"## Quality\n\nMeasured by `python -m ovdiff_lib.recipes.quality`. {quality[kind]}\n\n{data}"
        if remarks and kind in remarks:
            notes += f"\n\n## This run\n\n{remarks[kind]}"
        write_card(folder, training / kind, kind, license_note=LICENCE, notes=notes)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for art, scenes and checkpoints (default: work)")
    parser.add_argument("--hours", type=float, help="time for everything (default: 0.4 on a GPU, 30 without)")
    parser.add_argument("--piece", type=float, default=float("inf"), help="minutes after which this call stops; call it again to go on")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--stop", choices=("glyphs", "scenes"), help="do no more than this")
    parser.add_argument("--ship", action="store_true", help="put splits, weights and cards in place of those of this checkout")
    args = parser.parse_args(argv)
    began, hours = time.monotonic(), args.hours or (0.4 if DEVICE.type == "cuda" else 30)
    build_glyphs(drawn_world(), args.work)
    if args.stop == "glyphs":
        return
    drawing = ["ovdiff_lib.recipes.build", "--work", str(args.work), "--train", str(args.scenes), "--frames", str(args.scenes // 3),
               *(["--ship"] if args.ship else [])]
    subprocess.run([sys.executable, "-m", *drawing], check=True)
    if args.stop == "scenes":
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not train(args.work, hours, args.piece - (time.monotonic() - began) / 60):
        raise SystemExit("Paused: run the same command again to go on.")
    if args.ship:
        assemble(args.work)
        subprocess.run([sys.executable, "-m", "ovdiff_lib.recipes.quality"], check=True)
        write_cards(args.work / "training")


if __name__ == "__main__":
    main()
