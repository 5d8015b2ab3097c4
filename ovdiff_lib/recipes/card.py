"""Write what a model folder says about itself: README.md, training_log.csv and a loss curve (``cards.yaml`` has the
words)."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import yaml
from safetensors.torch import load_file

from ovdiff_lib import mini
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.recipes.art import drawn_world

WEIGHTS = Path(mini.__file__).parent / "weights"
FOLDERS = {"unet": "stable-diffusion", "vae": "stable-diffusion/vae"}
"""Where a model ships, if not under its own name."""


def plot_log(rows: pd.DataFrame, path: Path, title: str) -> None:
    """Of a trainer's log: loss (logarithmic) over steps, and every metric, of which most rows have none, in a panel of
    its own."""
    shown = rows.drop(columns=["elapsed_s", "lr"]).set_index("step").interpolate()
    panels = shown.plot(subplots=True, layout=(1, -1), figsize=(5 * shown.shape[1], 3.2), grid=True, title=title)
    panels[0, 0].set_yscale("log")
    panels[0, 0].figure.savefig(path, dpi=90, bbox_inches="tight")


def facts(kind: str, name: str, model: Path, rows: pd.DataFrame) -> str:
    """A table of what was trained (a class of this name), and how."""
    last = rows.iloc[-1]
    parameters = sum(x.numel() for file in model.rglob("*.safetensors") for x in load_file(file).values())
    table = {"class": f"`{name}`", "parameters": f"{parameters:,}", "weights": "float16 safetensors",
             "trained by": f"`python -m ovdiff_lib.recipes.train_{kind}`", "steps": f"{last['step']:,.0f}",
             "training time": f"{last['elapsed_s'] / 60:.0f} min", "last loss": f"{last['loss']:.4f}"}
    table |= {f"last {name.replace('_', ' ')}": f"{rows[name].dropna().iloc[-1]:.4f}" for name in rows.columns[4:]}
    return "\n".join(f"| {name} | {value} |" for name, value in table.items())


def write_cards(training: Path, weights: Path, scenes: int) -> None:
    """The card of every model in ``weights``, from its log in ``training`` and from ``weights/quality.json``; they
    learned from this many ``scenes``."""
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
        plot_log(rows, model / "loss_curve.png", card["title"])
        table, quality = facts(kind, card["class"], model, rows), card["quality"].format(**known)
        text = words["card"].format(**known | card | {"table": table, "quality": quality})
        (model / "README.md").write_text(text, encoding="utf-8")
