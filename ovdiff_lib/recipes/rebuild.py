"""Make the mini world from nothing: art, scenes, models (``make mini-world``); ``--ship`` replaces what ships.

Two streams of stages run side by side, on one GPU if there is one, else on one CPU core each. The same command again
resumes every stage at its last checkpoint. ``--hours`` is what all of it may take; each stage gets its share. With
``glyphs.npz`` in the work folder (``--stop glyphs`` writes it) nothing is fetched.

    python -m ovdiff_lib.recipes.rebuild --work DIR             # art, scenes, models
    python -m ovdiff_lib.recipes.rebuild --work DIR --ship      # draw what ships, measure, write the cards
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import yaml
from safetensors.torch import load_file

from ovdiff_lib.networks.identity import SHIPPED
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes.art import build_glyphs, drawn_world
from ovdiff_lib.recipes.build import build_shipped, build_training
from ovdiff_lib.recipes.training import DEVICE

FOLDERS = {"unet": "stable-diffusion", "vae": "stable-diffusion/vae"}  # where models ship, if not under their own names

SHARES = {"clip": 0.12, "vae": 0.18, "unet": 0.60, "dino": 0.45, "mae": 0.16, "detector": 0.14, "groupvit": 0.15}
"""Part of the time that each model is trained for; a tenth is left for scenes, latents and MaskCut's proposals."""

STREAMS = (("clip", "vae", "unet"), ("dino", "mae", "detector", "groupvit"))
"""What is trained one after the other; the streams run side by side. GroupViT, last, shares CLIP's tokenizer."""

LARGE = {"clip": "--batch 1024 --lr 2e-3", "vae": "--batch 256 --lr 2e-3", "unet": "--batch 512 --lr 2e-3",
         "dino": "--batch 256 --lr 2e-3", "mae": "--batch 1024 --lr 2e-3", "groupvit": "--batch 512 --lr 3e-3",
         "detector": "--batch 64 --lr 2e-3 --scenes 3000"}
"""A GPU is fed larger batches, with learning rates that grow less than they do."""


def command(name: str, work: Path, hours: float) -> list[str]:
    """The trainer of a model as arguments of ``python -m``."""
    out = work / "models"
    needs = {"unet": ("--vae", str(out / "vae"), "--clip", str(out / "clip")),
             "detector": ("--set", f"models.dino={out / 'dino'}"), "groupvit": ("--clip", str(out / "clip"))}
    large = LARGE[name].split() if DEVICE.type == "cuda" else ()
    return [f"ovdiff_lib.recipes.train_{name}", "--data", str(work / "scenes"), "--out", str(out / name), "--work",
            str(work / "training" / name), "--steps", "1000000000", "--minutes", f"{60 * hours * SHARES[name]:.2f}",
            *needs.get(name, ()), *large]


def train(work: Path, hours: float) -> None:
    """Run both streams, but for what is finished. Where a stage fails, the others are still trained; then it ends."""
    interrupted, running = threading.Event(), set()
    (work / "logs").mkdir(parents=True, exist_ok=True)

    def finished(name: str) -> bool:
        done = work / "training" / name / "finished"
        if not done.exists() and not interrupted.is_set():
            arguments = command(name, work, hours)
            print("python -m " + " ".join(arguments), flush=True)
            with (work / "logs" / f"{name}.log").open("a") as log:
                process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log,
                                           env={"OMP_NUM_THREADS": "1"} | os.environ)
                running.add(process)
                if process.wait() == 0:
                    done.touch()
        return done.exists()

    with ThreadPoolExecutor(len(STREAMS)) as pool:
        try:
            found = pool.map(lambda stream: [name for name in stream if not finished(name)], STREAMS)
            failed = sorted(name for names in found for name in names)
        except KeyboardInterrupt:  # nothing goes on unseen
            interrupted.set()
            for process in running:
                process.terminate()
            raise SystemExit("Interrupted: run the same command again to go on from the last checkpoints.") from None
    if failed:
        logs = ", ".join(str(work / "logs" / f"{name}.log") for name in failed)
        raise SystemExit(f"Training of {', '.join(failed)} failed; the last words are in {logs}.")


def assemble(work: Path, weights: Path = SHIPPED) -> None:
    """Copy the trained models to where the profile looks for them, ``weights/clip`` and so on."""
    for name in ("unet", "clip", "dino", "mae", "detector", "groupvit"):
        target = weights / FOLDERS.get(name, name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(work / "models" / name, target)


# ---- what a model folder says about itself: README.md, training_log.csv and a loss curve; cards.yaml has the words

def write_cards(training: Path, weights: Path, scenes: int) -> None:
    """The card of every model in ``weights``, from its log in ``training`` and ``weights/quality.json``."""
    world, words = drawn_world(), yaml.safe_load((Path(__file__).parent / "cards.yaml").read_text(encoding="utf-8"))
    measured = json.loads((weights / "quality.json").read_text(encoding="utf-8"))
    by_class = measured["drawn_recognised_by_class"]
    glyphs = sum(len(t.glyphs.get(style, ())) for t in world.things for style in world.train_styles)
    known = measured | {
        "single": f"{measured['single_object_images']} single-object {measured['split']} images",
        "weakest": ", ".join(f"{noun} {by_class[noun]:.0%}" for noun in sorted(by_class, key=by_class.get)[:5]),
        "extractors": ", ".join(f"{k} {v:.1%}" for k, v in measured["neighbour_top1"].items() if k != "chance"),
        "facet": load_profile("mini").masks.maskcut_facet, "nouns": len(by_class), "nouns_drawn": len(world.things),
        "styles": len(world.train_styles), "glyphs": glyphs - sum(len(t.held) for t in world.things), "scenes": scenes}
    for kind, card in words["kinds"].items():
        model, log = weights / FOLDERS.get(kind, kind), training / kind / "log.jsonl"
        rows = pd.read_json(log, lines=True)
        rows.to_csv(model / "training_log.csv", index=False)
        axis = rows.plot("step", "loss", logy=True, figsize=(5, 3.2), grid=True, title=card["title"])
        axis.figure.savefig(model / "loss_curve.png", dpi=90, bbox_inches="tight")
        last = rows.iloc[-1]
        parameters = sum(x.numel() for file in model.rglob("*.safetensors") for x in load_file(file).values())
        facts = {"class": f"`{card['class']}`", "parameters": f"{parameters:,}", "weights": "float16 safetensors",
                 "trained by": f"`python -m ovdiff_lib.recipes.train_{kind}`", "steps": f"{last['step']:,.0f}",
                 "training time": f"{last['elapsed_s'] / 60:.0f} min", "last loss": f"{last['loss']:.4f}"}
        table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
        text = words["card"].format(**known | card | {"table": table, "quality": card["quality"].format(**known)})
        (model / "README.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="for art, scenes, checkpoints (default: work)")
    parser.add_argument("--hours", type=float, help="time for everything (default: 0.4 on a GPU, 30 without)")
    parser.add_argument("--scenes", type=int, default=100_000, help="training scenes (default: 100,000)")
    parser.add_argument("--stop", choices=("glyphs",), help="do no more than up to these")
    parser.add_argument("--ship", action="store_true", help="replace splits, weights and cards of this checkout")
    args = parser.parse_args(argv)
    hours = args.hours or (0.4 if DEVICE.type == "cuda" else 30)
    world = drawn_world()
    arrays = build_glyphs(world, args.work)
    if args.stop == "glyphs":
        return
    build_training(world, arrays, args.work / "scenes", 128, args.scenes, args.scenes // 3)
    train(args.work, hours)
    if args.ship:
        build_shipped(world, arrays)
        assemble(args.work)
        subprocess.run([sys.executable, "-m", "ovdiff_lib.recipes.quality"], check=True)
        write_cards(args.work / "training", SHIPPED, args.scenes)


if __name__ == "__main__":
    main()
