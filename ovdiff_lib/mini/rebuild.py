"""Rebuild the mini world from nothing: art, scenes, models, measurements, model cards (``make mini-world``).

Every stage resumes where it stopped, so the command can be interrupted and run again. It takes about three hours on two CPU cores and needs
npm for the art. The result replaces ``mini/data`` and ``mini/weights`` of this checkout.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from ovdiff_lib.mini.quality import WEIGHTS

MINUTES = {"clip": 24, "vae": 24, "decoder": 30, "unet": 80}
"""Training time of each model; the learning rate anneals over it."""


def stages(work: Path) -> list[list[str]]:
    """The commands in order, as arguments of ``python -m``."""
    data, out, run = work / "scenes", work / "models", work / "training"

    def train(script: str, name: str, *more: str) -> list[str]:
        return [f"ovdiff_lib.mini.{script}", "--data", str(data), "--out", str(out / name), "--work", str(run / name),
                "--steps", "1000000", "--minutes", str(MINUTES[name]), *more]

    return [
        ["ovdiff_lib.mini.build", "--work", str(work)],
        train("train_clip", "clip", "--threads", "2"),
        train("train_vae", "vae", "--threads", "2"),
        train("train_vae", "decoder", "--threads", "2", "--decoder-of", str(out / "vae"), "--lr", "6e-4"),
        train("train_unet", "unet", "--vae", str(out / "vae"), "--clip", str(out / "clip")),
    ]


def assemble(work: Path, weights: Path = WEIGHTS) -> None:
    """Put the trained models together: ``weights/stable-diffusion`` with the refined decoder, ``weights/clip``."""
    out = work / "models"
    for source, target in ((out / "unet", weights / "stable-diffusion"), (out / "clip", weights / "clip")):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    if (out / "decoder").exists():
        shutil.rmtree(weights / "stable-diffusion" / "vae")
        shutil.copytree(out / "decoder", weights / "stable-diffusion" / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for art, scenes and checkpoints (default: work)")
    arguments = parser.parse_args()
    for stage in stages(arguments.work):
        print("python -m " + " ".join(stage), flush=True)
        subprocess.run([sys.executable, "-m", *stage], check=True)
    assemble(arguments.work)
    subprocess.run([sys.executable, "-m", "ovdiff_lib.mini.quality"], check=True)
    subprocess.run([sys.executable, "-m", "ovdiff_lib.mini.card", "--training", str(arguments.work / "training")], check=True)


if __name__ == "__main__":
    main()
