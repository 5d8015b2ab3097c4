"""Glyphs of the mini world: fetch the openly licensed art by package name and rasterise it with exact alpha.

Only a rebuild of the world (``make mini-world``) runs this module; using the project never does. NOTICE names each set and its licence.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ovdiff_lib.mini.world import World

GLYPH_SIZE = 192
"""Side of the square canvas a glyph is rasterised to, in pixels."""

PACKAGES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@svgmoji/noto@3.2.0",
    "twemoji": "@twemoji/svg@15.0.0",
}
"""Drawing style -> npm package (name@version) that holds it."""


def fetch(folder: Path) -> None:
    """Download and unpack every package of :data:`PACKAGES` below ``folder`` with npm; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, package in PACKAGES.items():
        target = folder / style
        if target.exists():
            continue
        try:
            run = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("npm was not found. The art of the mini world is fetched with npm: install Node.js and try again.") from None
        if run.returncode:
            raise RuntimeError(f"npm could not fetch {package}: {run.stderr.strip().splitlines()[-1:]}. Check the network and try again.")
        archive = folder / run.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(target.with_suffix(".part"), filter="data")
        target.with_suffix(".part").rename(target)
        archive.unlink()


def _normal(code: str) -> str:
    """Code points in the one spelling that works for all sets: lower case, joined by '-', variation selectors dropped."""
    return "-".join(part for part in code.lower().replace("_", "-").split("-") if part != "fe0f")


def _svg(inner: str, view_box: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view_box}">{inner}</svg>'


def _rasterise(svg: str) -> Image.Image:
    import resvg_py  # needed for a rebuild of the world only

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=GLYPH_SIZE, height=GLYPH_SIZE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _load_style(folder: Path, style: str, codes: set[str]) -> dict[str, Image.Image]:
    root = folder / style / "package"
    if style == "fluent-3d":
        paths = {_normal(p.stem): p for p in (root / "assets").glob("*.webp")}
        return {c: Image.open(paths[c]).convert("RGBA").resize((GLYPH_SIZE,) * 2, Image.LANCZOS) for c in codes if c in paths}
    if style == "twemoji":
        paths = {_normal(p.stem): p for p in root.glob("*.svg")}
        return {c: _rasterise(paths[c].read_text()) for c in codes if c in paths}
    if style == "fluent-flat":
        names = {_normal(c): n for c, n in json.loads((root / "chars.json").read_text()).items()}
        icons = json.loads((root / "icons.json").read_text())["icons"]
        return {c: _rasterise(_svg(icons[names[c]]["body"], "0 0 32 32")) for c in codes if c in names and names[c] in icons}
    sprite = (root / "sprites" / "all.svg").read_text()
    found = {}
    icon = r'<svg (?:[a-z:]+="[^"]*" )*?viewBox="([^"]+)" (?:xml:space="preserve" )?id="([^"]+)"[^>]*>(.*?)</svg>'
    for piece in re.finditer(icon, sprite, re.S):
        code = _normal(piece[2])
        if code in codes:
            found[code] = _rasterise(_svg(piece[3], piece[1]))
    return found


def _crop(glyph: Image.Image) -> np.ndarray:
    """Trim transparent margins so that the size of an object is the size of what is seen; returns u8 (H, W, 4)."""
    array = np.asarray(glyph)
    rows, columns = np.nonzero(array[..., 3] > 8)
    return array[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].copy()


def build_glyphs(world: World, folder: Path) -> dict[tuple[str, str], list[np.ndarray]]:
    """Glyphs of every (noun, style) of the world as cropped u8 (H, W, 4) arrays with straight alpha.

    Raises ``RuntimeError`` naming the noun and style when a set draws none of a noun's codes.
    """
    fetch(folder)
    codes = {_normal(c) for thing in world.things for c in thing.codes}
    glyphs = {}
    for style in PACKAGES:
        drawn = _load_style(folder, style, codes)
        for thing in world.things:
            found = [_crop(drawn[_normal(c)]) for c in thing.codes if _normal(c) in drawn]
            if not found:
                raise RuntimeError(f"The art set {style} has no glyph for {thing.name!r} ({', '.join(thing.codes)}); "
                                   "choose another code in world.yaml.")
            glyphs[thing.name, style] = found
    return glyphs
