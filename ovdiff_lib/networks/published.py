"""The published weights that profiles name: licence, size, how to get them; and of which architecture each is."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

MB = 10**6
HUB_SKIP = '--exclude "*.h5" --exclude "*.msgpack"'  # the same weights for other frameworks

SD_FILES = ("model_index.json", "scheduler/*", "tokenizer/*", "feature_extractor/*", "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/config.json", "text_encoder/model.safetensors")
MAE_LICENCE = "its card: Apache-2.0; its authors: CC BY-NC 4.0, not for commercial use"
CUTLER_URL = "http://dl.fbaipublicfiles.com/cutler/checkpoints/cutler_cascade_final.pth"


@dataclass(frozen=True)
class Published:
    """``size`` in bytes of what is fetched (four a parameter; None if not known); ``url`` of a single file; ``options``
    of ``hf download``."""

    licence: str
    size: int | None = None
    url: str = ""
    options: str = HUB_SKIP


PUBLISHED: dict[str, Published] = {
    # The repository also holds the whole model as single files, in other precisions and formats, ten times as much.
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        "CreativeML OpenRAIL-M: use restrictions, to be passed on", 4265 * MB,
        options=" ".join(f'--include "{name}"' for name in SD_FILES)),
    "openai/clip-vit-base-patch16": Published("MIT", 599 * MB),
    "facebook/dino-vitb8": Published("Apache-2.0", 343 * MB),
    "facebook/vit-mae-large": Published(MAE_LICENCE, 1318 * MB),
    "facebook/vit-mae-base": Published(MAE_LICENCE, 448 * MB),
    "facebook/sam-vit-huge": Published("Apache-2.0", 2564 * MB),
    "IDEA-Research/grounding-dino-tiny": Published("Apache-2.0", 689 * MB),
    "nvidia/groupvit-gcc-yfcc": Published("NVIDIA Source Code License: research, not for commercial use", 223 * MB),
    "timm/vit_base_patch16_clip_224.openai": Published("MIT", 599 * MB, options=""),
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
    return f"hf download {identifier} {(known.options if known else HUB_SKIP)}".rstrip()


MODEL_TYPES = {"clip": "clip", "dino": "vit", "mae": "vit_mae", "sam": "sam",
               "grounding": "grounding-dino", "groupvit": "groupvit"}
"""Field of ``profile.models`` -> ``model_type`` in that folder's config.json. Weights of another architecture often
load, in part or in whole, and give features of something else."""


def published(source: str) -> Published | None:
    """What is known of a hub id, or of a path by its file name."""
    return PUBLISHED.get(source) or PUBLISHED.get(Path(source).name)
