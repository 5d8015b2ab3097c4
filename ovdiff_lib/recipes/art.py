"""Glyphs of the mini world: fetch the openly licensed art by package name and rasterise it with exact alpha.

With ``glyphs.npz`` a machine without network can draw every scene. NOTICE names the sets that ship, and their licences.
"""

import io
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy import ndimage

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import written_whole
from ovdiff_lib.mini.world import World, read_world

GLYPH_SIZE = 128  # longer side of a glyph, in pixels; no object is drawn larger at the size of the models
CANVAS = 224  # side of the canvas that vector art is rasterised to before it is trimmed

PACKAGES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@svgmoji/noto@3.2.0",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "emojione": "@iconify-json/emojione@1.2.3",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
    "twemoji": "@twemoji/svg@15.0.0"}
"""Drawing style -> npm package (name@version) that holds it."""


@cache
def drawn_world() -> World:
    """The world that is drawn: the table of nouns with their glyphs."""
    return read_world(Path(__file__).with_name("world.yaml"))


def fetch(folder: Path) -> None:
    """Download every package of :data:`PACKAGES` to a folder below ``folder`` with npm; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, package in PACKAGES.items():
        target = folder / style
        if target.exists():
            continue
        try:
            run = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise InputError("npm, which fetches the art, is missing: install Node.js, or bring glyphs.npz.") from None
        if run.returncode:
            reason = " ".join(run.stderr.strip().splitlines()[-1:])
            raise InputError(f"npm could not fetch {package}: {reason}. Check the network and try again.")
        archive = folder / run.stdout.strip().splitlines()[-1]
        shutil.unpack_archive(archive, target.with_suffix(".part"), filter="data")
        target.with_suffix(".part").rename(target)
        archive.unlink()


def _normal(code: str) -> str:
    """Code points in the spelling that works for all sets: lower case, joined by '-', no variation selectors."""
    return "-".join(part for part in code.lower().replace("_", "-").split("-") if part != "fe0f")


def _rasterise(svg: str) -> Image.Image:
    """A picture of a whole SVG."""
    import resvg_py  # needed for a rebuild of the world only

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=CANVAS, height=CANVAS))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def load_style(folder: Path, style: str, keys: set[str]) -> dict[str, Image.Image]:
    """Those of the glyphs ``keys`` that an art set has, as RGBA pictures of their whole canvas."""
    root = folder / style / "package"
    if style == "fluent-3d":
        paths = {_normal(p.stem): p for p in (root / "assets").glob("*.webp")}
        return {k: Image.open(paths[k]).convert("RGBA") for k in keys & paths.keys()}
    if style == "twemoji":
        paths = {_normal(p.stem): p for p in root.glob("*.svg")}
        return {k: _rasterise(paths[k].read_text()) for k in keys & paths.keys()}
    if style == "noto":
        icons = {_normal(icon.get("id")): icon for icon in ElementTree.parse(root / "sprites" / "all.svg").getroot()
                 if icon.get("id")}
        return {k: _rasterise(ElementTree.tostring(icons[k], "unicode")) for k in keys & icons.keys()}
    table = json.loads((root / "icons.json").read_text())
    # Only fluent-flat has code points; the keys of the others are names.
    names = {_normal(code): name for code, name in json.loads((root / "chars.json").read_text()).items()}
    aliases = {k: row["parent"] for k, row in table.get("aliases", {}).items()}
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, found = f'<svg {space} viewBox="0 0 {table["width"]} {table["height"]}">', {}
    for key in keys:
        name = names.get(key, key)
        if row := table["icons"].get(aliases.get(name, name)):
            found[key] = _rasterise(f"{head}{row['body']}</svg>")
    return found


def trim(glyph: Image.Image, box: tuple[float, ...] = (0, 0, 1, 1)) -> np.ndarray:
    """What is seen of a glyph inside ``box``, without small things beside it (notes, drops): straight-alpha u8."""
    left, top, right, bottom = np.array(box) * (*glyph.size, *glyph.size)
    array = np.array(glyph.crop((round(left), round(top), round(right), round(bottom))))
    parts, _ = ndimage.label(array[..., 3] > 8)
    sizes = np.bincount(parts.ravel())[1:]
    array[~np.isin(parts, 1 + np.flatnonzero(sizes >= 0.4 * sizes.max()))] = 0
    rows, columns = np.nonzero(array[..., 3] > 8)
    picture = Image.fromarray(array[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    scale = GLYPH_SIZE / max(picture.size)
    return np.asarray(picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS))


def build_glyphs(world: World, work: Path) -> dict[str, np.ndarray]:
    """Every glyph, "style/key" -> straight-alpha u8 (H, W, 4), from ``work/glyphs.npz``, which is made if missing."""
    store = work / "glyphs.npz"
    wanted = {style: {k for t in world.things for k in t.glyphs.get(style, ())} for style in PACKAGES}
    if not store.exists():
        fetch(work / "art")
        found = {}
        for style, keys in wanted.items():
            for key, picture in load_style(work / "art", style, keys).items():
                found[f"{style}/{key}"] = trim(picture, world.crops.get(f"{style}/{key}", (0, 0, 1, 1)))
        with written_whole(store) as file:
            np.savez_compressed(file, **dict(sorted(found.items())))
    with np.load(store) as arrays:
        glyphs = dict(arrays)
    missing = sorted({f"{style}/{key}" for style, keys in wanted.items() for key in keys} - set(glyphs))
    if missing:
        raise InputError(f"No art set has the glyphs {', '.join(missing)}: choose others in recipes/world.yaml, or "
                         f"delete {store.name} if it is older than that file.")
    return glyphs
