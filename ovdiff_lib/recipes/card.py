"""Write what a model folder should say about itself: README.md, training_log.csv and a loss curve."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from PIL import Image

KINDS = {
    "clip": ("Mini CLIP", "transformers.CLIPModel", "ovdiff_lib.recipes.train_clip",
             "Contrastive image-text model, trained with half of an image's patches left out; images with the same caption "
             "share their target."),
    "vae": ("Mini autoencoder", "diffusers.AutoencoderKL", "ovdiff_lib.recipes.train_vae",
            "Convolutional autoencoder, 128x128 px to 16x16 latents; L1, gradient L1, squared error and a small KL."),
    "unet": ("Mini Stable Diffusion", "diffusers.StableDiffusionPipeline", "ovdiff_lib.recipes.train_unet",
             "Text-to-image latent diffusion; v-prediction, nearly clean latents weigh less, 10 % empty captions, averaged weights."),
    "dino": ("Mini DINO", "transformers.ViTModel", "ovdiff_lib.recipes.train_dino",
             "Vision transformer trained by self-distillation with multi-crop on pairs of frames that show one object in two places, "
             "with iBOT's loss of hidden patches and KoLeo; "
             "no label or caption is read."),
    "mae": ("Mini MAE", "transformers.ViTMAEModel", "ovdiff_lib.recipes.train_mae",
            "Encoder of a masked autoencoder, 75 % of the patches hidden, normalised pixels as target; no label or caption is read."),
    "groupvit": ("Mini GroupViT", "transformers.GroupViTModel", "ovdiff_lib.recipes.train_groupvit",
                 "Vision transformer that groups its patches in two stages, trained contrastively on captions and on prompts for what they "
                 "name; no mask is read."),
    "detector": ("Mini detector", "torchvision Mask R-CNN", "ovdiff_lib.recipes.train_detector",
                 "Class-agnostic Mask R-CNN trained on MaskCut's masks of training scenes, which is CutLER's recipe; no label is read."),
}


def read_log(path: Path) -> list[dict]:
    """Rows of a trainer's log.csv; the ``metrics`` column becomes entries of its own."""
    rows = []
    with path.open(newline="", encoding="utf-8") as f:
        for raw in csv.DictReader(f):
            row = {"step": int(raw["step"]), "elapsed_s": float(raw["elapsed_s"]), "loss": float(raw["loss"]), "lr": float(raw["lr"])}
            rows.append(row | json.loads(raw["metrics"]))
    return rows


def metric_names(rows: list[dict]) -> list[str]:
    """Names of the occasional metrics, in order of appearance."""
    base = ("step", "elapsed_s", "loss", "lr")
    return list(dict.fromkeys(k for r in rows for k in r if k not in base))


def plot_log(rows: list[dict], path: Path, title: str) -> None:
    """Loss (logarithmic) over steps, and every metric in a panel of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: a notebook's state stays untouched
    from matplotlib.figure import Figure

    names = metric_names(rows)
    figure = Figure(figsize=(5 * (1 + len(names)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    panels[0].semilogy([r["step"] for r in rows], [r["loss"] for r in rows])
    panels[0].set(xlabel="step", ylabel="loss", title=title)
    for panel, name in zip(panels[1:], names, strict=True):
        points = [(r["step"], r[name]) for r in rows if name in r]
        panel.plot(*zip(*points, strict=True), marker=".")
        panel.set(xlabel="step", ylabel=name.replace("_", " "))
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    with Image.open(path) as drawn:  # lines and letters need few colours; a third of the bytes
        few = drawn.convert("RGB").quantize(32)
    few.save(path, optimize=True)


def parameter_count(model: Path) -> int:
    """Parameters in all safetensors files below a folder, from the headers alone."""
    from safetensors import safe_open

    total = 0
    for file in sorted(model.rglob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for key in f.keys():
                size = 1
                for n in f.get_slice(key).get_shape():
                    size *= n
                total += size
    return total


def write_card(model: Path, work: Path, kind: str, *, license_note: str = "", notes: str = "") -> Path:
    """Copy the log, draw the curves and write README.md into ``model``; returns the README's path."""
    title, cls, script, what = KINDS[kind]
    rows = read_log(work / "log.csv")
    shutil.copyfile(work / "log.csv", model / "training_log.csv")
    plot_log(rows, model / "loss_curve.png", title)
    last = rows[-1]
    facts = [("class", f"`{cls}`"), ("parameters", f"{parameter_count(model):,}"), ("weights", "float16 safetensors"),
             ("trained by", f"`python -m {script}`"), ("steps", f"{last['step']:,}"),
             ("training time", f"{last['elapsed_s'] / 60:.0f} min"), ("last loss", f"{last['loss']:.4f}")]
    facts += [(f"last {name.replace('_', ' ')}", f"{[r[name] for r in rows if name in r][-1]:.4f}") for name in metric_names(rows)]
    table = "\n".join(f"| {k} | {v} |" for k, v in facts)
    sections = [
        f"# {title}\n\n{what}",
        "Trained from random initialisation on the rendered mini world of `ovdiff_lib` and on nothing else. "
        "It knows only that world: emoji objects over procedural backgrounds, and the words of its captions. "
        "Its purpose is to run, test and explain OVDiff on a laptop, not to make or judge real images.",
        f"| | |\n|---|---|\n{table}",
        "The learning rate follows the used share of the budget (steps or minutes, whichever is ahead), so a run limited "
        "by time anneals as well, but its exact weights then depend on the machine's speed. With `--steps` as the limit "
        "a run is determined by its seed.",
        "![training curves](loss_curve.png)\n\nAll rows: `training_log.csv`.",
    ]
    if notes:
        sections.append(notes.strip())
    if license_note:
        sections.append("## Licence\n\n" + license_note.strip())
    path = model / "README.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path
