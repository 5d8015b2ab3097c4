"""What an entry of the prototype library holds: support sets, masks and prototypes as files, and back.

    support      images_000.png ...   the support images, one below the other in strips that an image viewer opens
                 arrays.safetensors   attribution f32, seeds i64
    masks        arrays.safetensors   foreground and background, a bit a pixel
    prototypes   arrays.safetensors   vectors f32, and what each is

Each kind gives its files and a description of plain data; the reader gets both back and raises ``ValueError`` for what
does not fit together. Sums, names and places are :mod:`ovdiff_lib.library.store`'s matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import KINDS, REGIONS, ForegroundBackground, Prototypes, SupportSet

ARRAYS = "arrays.safetensors"

STRIP_PIXELS = 2**24
"""Pixels of a strip of support images at most (64 images of 512 x 512), unless one image alone has more."""

Files = dict[str, bytes]
Described = dict[str, Any]


def identify(made_from: Described) -> str:
    """The key of an entry: 32 hexadecimal digits, the hash of everything it was made from, as plain data."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def strip_name(number: int) -> str:
    return f"images_{number:03d}.png"


def support_files(support: SupportSet) -> tuple[Files, Described]:
    """Files and description of a support set."""
    images = support.images
    step = _strip_length(images.shape)
    files = {strip_name(i): _png(images[start : start + step]) for i, start in enumerate(range(0, len(images), step))}
    files[ARRAYS] = _arrays({"attribution": support.attribution, "seeds": support.seeds})
    category = {"name": support.category.name, "prompt": support.category.prompt, "kind": support.category.kind}
    return files, {"category": category, "images": list(images.shape), "provenance": support.provenance}


def support_from(files: Files, described: Described) -> SupportSet:
    """The support set of its files."""
    shape = _shape(described["images"], 4)
    step = _strip_length(shape)
    if -(-shape[0] // step) != len(files) - 1:  # looked at before memory is taken
        raise ValueError(f"{len(files) - 1} strips for images of {shape}")
    images = np.empty(shape, np.uint8)
    for i, start in enumerate(range(0, shape[0], step)):
        _read_png(files[strip_name(i)], images[start : start + step])
    arrays = load(files[ARRAYS])
    category = Category(**described["category"])
    support = SupportSet(category, images, arrays["attribution"], arrays["seeds"], described["provenance"])
    _check_array("attribution", support.attribution, np.float32, 3)
    if not len(support.seeds) == len(support.attribution) == len(images):
        raise ValueError(f"{len(images)} images, {len(support.attribution)} maps and {len(support.seeds)} seeds")
    return support


def masks_files(masks: ForegroundBackground) -> tuple[Files, Described]:
    """Files and description of the masks of a support set."""
    packed = {"foreground": np.packbits(masks.foreground), "background": np.packbits(masks.background)}
    return {ARRAYS: _arrays(packed)}, {"masks": list(masks.foreground.shape), "source": list(masks.source)}


def masks_from(files: Files, described: Described) -> ForegroundBackground:
    """The masks of their files."""
    shape, arrays = _shape(described["masks"], 3), load(files[ARRAYS])
    count = math.prod(shape)
    regions = []
    for name in ("foreground", "background"):
        if arrays[name].shape != (-(-count // 8),):
            raise ValueError(f"{arrays[name].shape} bytes of {name} for masks of {shape}")
        regions.append(np.unpackbits(arrays[name], count=count).astype(bool).reshape(shape))
    if len(described["source"]) != shape[0]:
        raise ValueError(f"{len(described['source'])} sources of {shape[0]} masks")
    return ForegroundBackground(regions[0], regions[1], tuple(described["source"]))


def prototypes_files(prototypes: Prototypes) -> tuple[Files, Described]:
    """Files and description of the prototypes of one category and extractor."""
    arrays = {
        "vectors": prototypes.vectors,
        "kind": np.array([KINDS.index(k) for k in prototypes.kind], np.uint8),
        "region": np.array([REGIONS.index(r) for r in prototypes.region], np.uint8),
        "image": prototypes.image, "cluster": prototypes.cluster, "assignment": prototypes.assignment,
    }
    return {ARRAYS: _arrays(arrays)}, {}


def prototypes_from(files: Files, described: Described) -> Prototypes:
    """The prototypes of their files."""
    arrays = load(files[ARRAYS])
    _check_array("vectors", arrays["vectors"], np.float32, 2)
    _check_array("assignment", arrays["assignment"], np.int16, 3)
    count = len(arrays["vectors"])
    if any(len(arrays[name]) != count for name in ("kind", "region", "image", "cluster")):
        raise ValueError(f"{count} vectors that are not all described")
    return Prototypes(arrays["vectors"], np.array(KINDS)[arrays["kind"]], np.array(REGIONS)[arrays["region"]],
                      arrays["image"], arrays["cluster"], arrays["assignment"])


CODECS = {"support": (support_files, support_from), "masks": (masks_files, masks_from),
          "prototypes": (prototypes_files, prototypes_from)}
"""The kinds of entries, in the order in which a class is built: what gives their files and what reads them."""


def _check_array(name: str, array: np.ndarray, dtype: type, axes: int) -> None:
    if array.dtype != dtype or array.ndim != axes or not np.isfinite(array).all():
        raise ValueError(f"{name} {array.dtype} {array.shape}, not finite {np.dtype(dtype)} of {axes} axes")


def _shape(found: Any, length: int) -> tuple[int, ...]:
    shape = tuple(found)
    if len(shape) != length or not all(isinstance(side, int) and 0 <= side < 2**31 for side in shape):
        raise ValueError(f"the shape {str(found)[:60]}")
    return shape


def _strip_length(shape: tuple[int, ...]) -> int:
    return max(1, STRIP_PIXELS // max(1, shape[1] * shape[2]))


def _png(images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 1: of drawings about as small as the slow levels make them.
    Image.fromarray(np.ascontiguousarray(images).reshape(-1, images.shape[2], 3)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _read_png(data: bytes, into: np.ndarray) -> None:
    """Decode a strip into images u8 (n, H, W, 3); its size is looked at before it is decoded."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as strip:
        if strip.mode != "RGB" or (strip.height, strip.width) != (into.shape[0] * into.shape[1], into.shape[2]):
            raise ValueError(f"a strip of {strip.height} x {strip.width} pixels for images of {into.shape}")
        into[...] = np.asarray(strip).reshape(into.shape)


def _arrays(arrays: dict[str, np.ndarray]) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


# ------------------------------------------------------------------ an entry's files; entry.json vouches for them

FORMAT = 2
"""Layout of an entry; entries of another format count as missing."""

META = "entry.json"
KEY = re.compile(r"[0-9a-f]{8,64}")
FILE = re.compile(r"arrays\.safetensors|images_\d{3,6}\.png")


class Broken(Exception):
    """An entry that must not be used; the message says why."""


def encode(kind: str, key: str, value: Any, made_from: Described | None = None) -> Files:
    """The files of an entry, ``entry.json`` among them; the other way round, :func:`read`."""
    files, described = CODECS[kind][0](value)
    return {**files, META: write_meta(kind, key, files, described, made_from)}


def write_meta(kind: str, key: str, files: Files, described: Described, made_from: Described | None = None) -> bytes:
    """The text of ``entry.json`` for these files."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    origin = {"made_from": made_from} if made_from else {}
    body = {"format": FORMAT, "kind": kind, "key": key, "sha256": sums, **origin, **described}
    return json.dumps({"body": body, "sha256": _digest(body)}, indent=1).encode()


def read_meta(path: Path, kind: str, key: str) -> Described:
    """The description of the entry in the folder ``path``; ``FileNotFoundError`` if there is no such folder, ``Broken``
    unless its sum, format, kind, key and file names hold."""
    if not path.exists():
        raise FileNotFoundError(path)
    data = _bytes(path / META)
    try:
        meta = json.loads(data)
        body = meta["body"]
        if _digest(body) != meta["sha256"]:
            raise Broken(f"the sum of {META} does not match")
        if (body["format"], body["kind"], body["key"]) != (FORMAT, kind, key):
            raise Broken(f"{META} is of format {body['format']}, kind {body['kind']} and key {body['key']}")
        if "made_from" in body:
            if identify(body["made_from"]) != key:
                raise Broken("its key is not the hash of what it says it was made from")
            # Shown to users: text, and nothing that steers a terminal.
            Category(body["made_from"]["step"], body["made_from"]["prompt"])
        if bad := [name for name in body["sha256"] if not FILE.fullmatch(name)]:
            raise Broken(f"{META} names a file {bad[0][:40]!r}")
        return body
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"{META}: {type(error).__name__}: {error}") from None


def read_files(path: Path, kind: str, key: str) -> tuple[Files, Described]:
    """Files and description of an entry whose sums hold; raises as :func:`read_meta`."""
    body = read_meta(path, kind, key)
    files = {name: _bytes(path / name) for name in body["sha256"]}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != body["sha256"][name]:
            raise Broken(f"the sum of {name} does not match")
    return files, body


def read(path: Path, kind: str, key: str) -> Any:
    """What an entry holds; raises as :func:`read_meta`, and ``Broken`` for files that do not fit together."""
    files, body = read_files(path, kind, key)
    try:
        return CODECS[kind][1](files, body)
    except (OSError, ValueError, KeyError, TypeError, IndexError, SyntaxError, MemoryError, InputError, SafetensorError,
            Image.DecompressionBombError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise InputError(f"The library entry {path.parent} may not be read ({error.strerror}); check its permissions."
                         ) from None
    except FileNotFoundError:
        raise Broken(f"{path.name} is missing") from None
    except OSError as error:
        raise Broken(f"{type(error).__name__}: {error}") from None


def _digest(body: Described) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
