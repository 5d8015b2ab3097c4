"""The published weights that profiles name: licence, size, how to get them; and what a folder of each holds."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ovdiff_lib.networks.identity import hub_command

MB = 10**6
MAE_LICENCE = "its card: Apache-2.0; its authors: CC BY-NC 4.0, not for commercial use"
CUTLER_URL = "http://dl.fbaipublicfiles.com/cutler/checkpoints/cutler_cascade_final.pth"


@dataclass(frozen=True)
class Published:
    """``size`` in bytes of what is fetched (four a parameter; None if not known); ``url`` of a single file."""

    licence: str
    size: int | None = None
    url: str = ""


PUBLISHED: dict[str, Published] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        "CreativeML OpenRAIL-M: use restrictions, to be passed on", 4265 * MB),
    "openai/clip-vit-base-patch16": Published("MIT", 599 * MB),
    "facebook/dino-vitb8": Published("Apache-2.0", 343 * MB),
    "facebook/vit-mae-large": Published(MAE_LICENCE, 1318 * MB),
    "facebook/vit-mae-base": Published(MAE_LICENCE, 448 * MB),
    "facebook/sam-vit-huge": Published("Apache-2.0", 2564 * MB),
    "IDEA-Research/grounding-dino-tiny": Published("Apache-2.0", 689 * MB),
    "nvidia/groupvit-gcc-yfcc": Published("NVIDIA Source Code License: research, not for commercial use", 223 * MB),
    "timm/vit_base_patch16_clip_224.openai": Published("MIT", 599 * MB),
    "cutler_cascade_final.pth": Published("CC BY-NC-SA 4.0: not for commercial use", 288 * MB, CUTLER_URL),
}
"""By hub id, or by file name for what is no hub model."""


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


def published(source: str) -> Published | None:
    """What is known of a hub id, or of a path by its file name."""
    return PUBLISHED.get(source) or PUBLISHED.get(Path(source).name)


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
