"""What a run will cost: sizes that follow from a profile, and the times that the paper measured (Sec. 4.2, App. C.5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovdiff_lib.inventory import Model
from ovdiff_lib.profiles import Profile
from ovdiff_lib.published import published


def expected(profile: Profile, models: tuple[Model, ...]) -> dict[str, str]:
    """Sizes that follow from the profile, and the paper's times where it runs the paper's generator."""
    support = profile.support
    rows = prototype_rows(profile)
    widths = {name: channels(profile, name, models) for name in profile.features.extractors}
    sizes = {name: prototype_bytes(profile, width) for name, width in widths.items() if width}
    known = sum(m.size or 0 for m in models if m.needed)
    table = {"weights on disk": f"{size_text(known)} for the models in use"}
    missing = [m for m in models if m.needed and not m.here]
    if missing:
        unknown = sum(m.size is None for m in missing)
        table["weights on disk"] += (f", {size_text(sum(m.size or 0 for m in missing))} of them to fetch"
                                     + (f" and {unknown} of unknown size" if unknown else ""))
    table["support images on disk"] = f"at most {size_text(support.size * support.image_size**2 * 3)} a class"
    if sizes:
        shown = " + ".join(f"{size_text(size)} ({name})" for name, size in sizes.items())
        table["prototypes on disk"] = f"{shown} a class, {rows} float32 vectors each"
    if published(profile.models.diffusion):
        latent = profile.features.sd_input_size // 8
        if "sd" in sizes:
            held = support.size * latent**2 * widths["sd"] * 4
            table["memory"] = f"{size_text(held)} for the sd features of one class while they are clustered, beside the weights"
        seconds = 110 * support.size * support.steps / (32 * 30)
        table["time to build"] = (f"about {seconds:.0f} s a class with sd on a GPU of 37 TFLOP/s such as an A40 (the paper: 110 s for 32 "
                                  "images of 30 steps)")
        table["time to segment"] = "about 0.6 s an image on a 2080 Ti with sd and 21 classes (the paper)"
    return table


def prototype_rows(profile: Profile) -> int:
    """Prototypes of one class at most (Eq. 2, 3): of each region one of the class, N of the drawings and K of the parts."""
    made = profile.prototypes
    one = ("class" in made.kinds) + profile.support.size * ("instance" in made.kinds) + made.clusters * ("part" in made.kinds)
    return (1 + made.background) * one


def prototype_bytes(profile: Profile, width: int) -> int:
    """Bytes of one class's prototypes of ``width`` channels (App. C.5): 2 x (1 + N + K) x D x 4 with the paper's kinds, in float32."""
    return prototype_rows(profile) * width * 4


def support_bytes(profile: Profile, latent: int) -> int:
    """Bytes of one class's support set: u8 images, f32 attribution of ``latent`` x ``latent`` and one i64 seed an image."""
    support = profile.support
    return support.size * (3 * support.image_size**2 + 4 * latent**2 + 8)


def channels(profile: Profile, extractor: str, models: tuple[Model, ...]) -> int | None:
    """Feature channels of an extractor by the configuration of its model on disk, or as published; None if neither says."""
    from ovdiff_lib.features import EXTRACTORS

    names = [m for m in models if f"extractor {extractor}" in m.used_by]
    if len(names) != 1 or extractor not in EXTRACTORS:
        return None
    model, known = names[0], published(names[0].identifier)
    if model.field == "diffusion":
        blocks = _config(model, "unet/config.json").get("block_out_channels") or (known.channels if known else ())
        return sum(_block(layer, list(blocks)) for layer in profile.features.sd_layers) if len(blocks) else None
    config = _config(model, "config.json")
    width = config.get("vision_config", config).get("hidden_size") if isinstance(config.get("vision_config", config), dict) else None
    return width if isinstance(width, int) else known.channels[0] if known and known.channels else None


def _block(layer: str, blocks: list[int]) -> int:
    """Channels of an attention layer of a UNet by its name, 0 for a name of no such form."""
    kind, _, rest = layer.partition(".")
    number = int(rest.split(".")[0]) if rest.split(".")[0].isdigit() else 0
    ordered = {"down_blocks": blocks, "up_blocks": blocks[::-1], "mid_block": blocks[-1:] * (number + 1)}.get(kind, [])
    return ordered[number] if number < len(ordered) else 0


def _config(model: Model, name: str) -> dict[str, Any]:
    path = Path(model.where) / name
    try:
        table = json.loads(path.read_text(encoding="utf-8")) if model.here and path.is_file() else {}
    except (OSError, ValueError):
        return {}  # the loader will say so; here only a figure is lost
    return table if isinstance(table, dict) else {}


def size_text(size: int | None) -> str:
    """Bytes as a person reads them, in decimal units; "?" for None."""
    if size is None:
        return "?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.{2 if size < 10 * scale else 1 if size < 100 * scale else 0}f} {unit}"
    return f"{size} B"
