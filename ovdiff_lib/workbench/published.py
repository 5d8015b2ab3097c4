"""The published weights that profiles name: licence, size, how to get them; and what a folder of each holds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd

from ovdiff_lib.networks.identity import hub_command

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), index_col="model", keep_default_na=False)
"""By hub id, or by file name for what is no hub model: ``licence``, ``megabytes`` of what is fetched (four bytes a
parameter), ``url`` of a single file."""


def how_to_get(identifier: str) -> str:
    """The shell command that fetches a model, "" for a path of which nothing is known."""
    if identifier.startswith("package:"):
        return "make mini-world"
    known = published(identifier)
    if known is not None and known.url:
        return f"curl -L --create-dirs -o {shlex.quote(str(Path(identifier).expanduser()))} {known.url}"
    if Path(identifier).is_absolute() or identifier[:1] in (".", "~") or identifier.count("/") > 1:
        return ""
    return hub_command(identifier)


def published(source: str) -> pd.Series | None:
    """What is known of a hub id, or of a path by its file name."""
    return next((PUBLISHED.loc[name] for name in (source, Path(source).name) if name in PUBLISHED.index), None)


def _weights(stem: str, pickled: str) -> tuple[str, ...]:
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json", pickled, f"{pickled}.index.json"


_TRANSFORMER = (("config.json",), _weights("model", "pytorch_model.bin"))
_DIFFUSER = _weights("diffusion_pytorch_model", "diffusion_pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")

FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "diffusion": (
        ("model_index.json",), ("scheduler/scheduler_config.json",), tuple(f"tokenizer/{name}" for name in _TOKENIZER),
        *((f"{part}/config.json",) for part in ("unet", "vae", "text_encoder")),
        *(tuple(f"{part}/{name}" for name in _DIFFUSER) for part in ("unet", "vae")),
        tuple(f"text_encoder/{name}" for name in _TRANSFORMER[1])),
    **dict.fromkeys(("dino", "mae", "detector"), _TRANSFORMER),
    **dict.fromkeys(("clip", "groupvit"), (*_TRANSFORMER, _TOKENIZER)),
    "open_clip": (("open_clip_config.json",), ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
    "sam": (*_TRANSFORMER, ("preprocessor_config.json",)),
    "grounding": (*_TRANSFORMER, ("preprocessor_config.json",), _TOKENIZER),
}
"""Field of ``profile.models`` -> what a folder must hold: of each tuple one file."""


def lacking(name: str, folder: Path) -> list[str]:
    """Of the model of a field ``models.<name>`` the first name of each tuple of which ``folder`` holds no file."""
    return [names[0] for names in FILES.get(name, ()) if not any((folder / one).is_file() for one in names)]
