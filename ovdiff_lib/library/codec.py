"""What an entry of the prototype library holds: support sets, masks and prototypes as files, and back.

    images_000.png, foreground_000.png ...   pictures, one below the other in strips that an image viewer opens
    arrays.safetensors                       every other array
    entry.json                               the rest, what the entry was made from, and the sums of all files

The fields of a class and their arrays are declared in :data:`LAYOUTS`; reading holds files to it, whoever wrote them.
Names and places are :mod:`ovdiff_lib.library.store`'s matter.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load, save

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import KINDS, REGIONS, ForegroundBackground, Prototypes, SupportSet

FORMAT = 3
"""Layout of an entry; entries of another format count as broken."""

LAYOUTS: dict[str, tuple[type, dict[str, str]]] = {
    "support": (SupportSet, {"images": "u1 N H W 3", "attribution": "f4 N h w", "seeds": "i8 N"}),
    "masks": (ForegroundBackground, {"foreground": "b1 N H W", "background": "b1 N H W"}),
    "prototypes": (Prototypes, {"vectors": "f4 P D", "kind": "u1 P", "region": "u1 P", "image": "i4 P",
                                "cluster": "i4 P", "assignment": "i2 N h w"})}
"""The kinds of entries, in the order in which a class is built: their class, and dtype and axes of each of its arrays.
An axis has one length in all arrays of an entry."""

PICTURES = {"u1 N H W 3": "RGB", "b1 N H W": "1"}
"""Layouts that are stored as PNG, and Pillow's mode of them."""

WORDS = {"kind": KINDS, "region": REGIONS}
"""Arrays of words: stored are their numbers in these."""

STRIP_PIXELS = 2**24
"""Pixels of a strip of pictures at most (64 images of 512 x 512), unless one picture alone has more."""

ARRAYS, META = "arrays.safetensors", "entry.json"
KEY = re.compile(r"[0-9a-f]{8,64}")
FILE = re.compile(r"arrays\.safetensors|(images|foreground|background)_\d{3,6}\.png")

Files = dict[str, bytes]
Described = dict[str, Any]


class Broken(Exception):
    """An entry that must not be used; the message says why."""


def identify(made_from: Described) -> str:
    """The key of an entry: 32 hexadecimal digits, the hash of everything it was made from, as plain data."""
    return _sum(made_from)[:32]


def encode(kind: str, key: str, value: Any, made_from: Described | None = None) -> Files:
    """The files of an entry, ``entry.json`` among them; the other way round, :func:`read`."""
    files, arrays, described = {}, {}, {}
    layouts = LAYOUTS[kind][1]
    for name, content in vars(value).items():
        if content is None:  # attribution of own pictures
            described[name] = None
        elif layouts.get(name) in PICTURES:
            described[name] = list(content.shape)
            files |= {strip: _png(content[start:stop]) for strip, start, stop in _strips(name, content.shape)}
        elif name in layouts:
            content = [WORDS[name].index(word) for word in content] if name in WORDS else content
            arrays[name] = np.ascontiguousarray(content, dtype=layouts[name].split()[0])
        else:
            described[name] = dataclasses.asdict(content) if dataclasses.is_dataclass(content) else content
    if arrays:
        files[ARRAYS] = save(arrays)
    return {**files, META: write_meta(kind, key, files, described, made_from)}


def write_meta(kind: str, key: str, files: Files, described: Described, made_from: Described | None = None) -> bytes:
    """The text of ``entry.json`` for these files."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    origin = {"made_from": made_from} if made_from else {}
    body = {"format": FORMAT, "kind": kind, "key": key, "sha256": sums, **origin, **described}
    return json.dumps({"body": body, "sha256": _sum(body)}, indent=1).encode()


def read_meta(path: Path, kind: str, key: str) -> Described:
    """What an entry says; ``FileNotFoundError`` without it, ``Broken`` for a wrong sum, format, kind, key or name."""
    if not path.exists():
        raise FileNotFoundError(path)
    data = _bytes(path / META)
    try:
        meta = json.loads(data)
        body = meta["body"]
        if _sum(body) != meta["sha256"]:
            raise Broken(f"the sum of {META} does not match")
        if (body["format"], body["kind"], body["key"]) != (FORMAT, kind, key):
            raise Broken(f"{META} is of format {body['format']}, kind {body['kind']} and key {body['key']}")
        if "made_from" in body:
            if identify(body["made_from"]) != key:
                raise Broken("its key is not the hash of what it says it was made from")
            # Shown to users: text, and nothing that steers a terminal.
            origin = body["made_from"]
            Category(origin["step"], origin["prompt"], pictures=origin.get("pictures", ""))
        if bad := [name for name, _ in body["sha256"].items() if not FILE.fullmatch(name)]:
            raise Broken(f"{META} names a file {bad[0][:40]!r}")
        return body
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"{META}: {type(error).__name__}: {error}") from None


def read_files(path: Path, kind: str, key: str) -> tuple[Files, Described]:
    """All files of an entry whose sums hold, and its description; raises as :func:`read_meta`."""
    body = read_meta(path, kind, key)
    files = {name: _bytes(path / name) for name in (META, *body["sha256"])}
    for name, expected in body["sha256"].items():
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise Broken(f"the sum of {name} does not match")
    return files, body


def read(path: Path, kind: str, key: str) -> Any:
    """What an entry holds; raises as :func:`read_meta`, and ``Broken`` for files that do not fit together."""
    files, body = read_files(path, kind, key)
    try:
        return _decode(kind, files, body)
    except Exception as error:  # whatever decoders raise of what a stranger made
        raise Broken(f"{type(error).__name__}: {error}") from None


def _decode(kind: str, files: Files, described: Described) -> Any:
    made_of, layouts = LAYOUTS[kind]
    arrays, sizes, made = load(files[ARRAYS]) if ARRAYS in files else {}, {"3": 3}, {}
    for name, layout in layouts.items():
        if name == "attribution" and described.get(name, ...) is None:
            made[name] = None
            continue
        dtype, *axes = layout.split()
        array = _pictures(name, files, described[name], PICTURES[layout]) if layout in PICTURES else arrays[name]
        sides = zip(axes, array.shape, strict=True)  # ValueError if there are more of one
        same = all(sizes.setdefault(axis, side) == side for axis, side in sides)
        if not same or array.dtype != dtype or not np.isfinite(array).all():
            raise ValueError(f"{name} {array.dtype} {array.shape}, not finite {layout}")
        made[name] = np.array(WORDS[name])[array] if name in WORDS else array
    if kind == "support":
        made["category"] = Category(**described["category"])
    if kind == "masks":
        made["source"] = tuple(described["source"])
        if len(made["source"]) != sizes["N"]:
            raise ValueError(f"{len(made['source'])} sources of {sizes['N']} masks")
    return made_of(**made)


def _strips(name: str, shape: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Of pictures of a shape the name of each strip, and which of them it begins and ends with."""
    step = max(1, STRIP_PIXELS // max(1, shape[1] * shape[2]))
    for number, start in enumerate(range(0, shape[0], step)):
        yield f"{name}_{number:03d}.png", start, min(start + step, shape[0])


def _png(pictures: np.ndarray) -> bytes:
    buffer, (_, _, width, *channels) = io.BytesIO(), pictures.shape
    # Level 1: of drawings about as small as the slow levels make them.
    Image.fromarray(np.ascontiguousarray(pictures).reshape(-1, width, *channels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _pictures(name: str, files: Files, shape: Sequence[int], mode: str) -> np.ndarray:
    """The pictures of a shape; the size of each strip is looked at before memory is taken."""
    found = []
    for strip, start, stop in _strips(name, shape):
        with Image.open(io.BytesIO(files[strip]), formats=["PNG"]) as picture:
            if picture.mode != mode or picture.size != (shape[2], (stop - start) * shape[1]):
                raise ValueError(f"{strip} is {picture.mode} of {picture.size}, not {mode} for pictures of {shape}")
            found.append(np.asarray(picture).reshape(stop - start, *shape[1:]))
    return np.concatenate(found)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise InputError(f"The library entry {path.parent} may not be read ({error.strerror}); check its permissions."
                         ) from None
    except OSError as error:
        raise Broken(f"{path.name}: {error.strerror}") from None


def _sum(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
