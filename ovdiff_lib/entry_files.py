"""The files of an entry of the prototype library and the description that vouches for them, ``entry.json``.

The description holds the SHA-256 sum of every file and its own, what the entry's key is the hash of, and plain data about the kind.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ovdiff_lib.entries import READERS, Described, Files, identify
from ovdiff_lib.errors import InputError
from ovdiff_lib.types import Category

FORMAT = 2
"""Layout of an entry; entries of another format count as missing."""

META = "entry.json"
KEY = re.compile(r"[0-9a-f]{8,64}")
FILE = re.compile(r"arrays\.safetensors|images_\d{3,6}\.png")


class Broken(Exception):
    """An entry that must not be used; the message says why."""


def write_meta(kind: str, key: str, files: Files, described: Described, made_from: Described | None = None) -> bytes:
    """The text of ``entry.json`` for these files; the other way round, :func:`check_meta`."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    body = {"format": FORMAT, "kind": kind, "key": key, "sha256": sums, **({"made_from": made_from} if made_from else {}), **described}
    return json.dumps({"body": body, "sha256": _digest(body)}, indent=1).encode()


def check_meta(data: bytes, kind: str, key: str) -> Described:
    """The description in the text of an entry's ``entry.json``; ``Broken`` unless its sum, format, kind, key and file names hold."""
    try:
        meta = json.loads(data)
        body = meta["body"]
        if _digest(body) != meta["sha256"]:
            raise Broken(f"the sum of {META} does not match")
        if (body["format"], body["kind"], body["key"]) != (FORMAT, kind, key):
            raise Broken(f"{META} is of format {body['format']}, kind {body['kind']} and key {body['key']}")
        if "made_from" in body and identify(body["made_from"]) != key:
            raise Broken("its key is not the hash of what it says it was made from")
        if "made_from" in body:
            Category(body["made_from"]["step"], body["made_from"]["prompt"])  # shown to users: text, and nothing that steers a terminal
        if bad := [name for name in body["sha256"] if not FILE.fullmatch(name)]:
            raise Broken(f"{META} names a file {bad[0][:40]!r}")
        return body
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"{META}: {type(error).__name__}: {error}") from None


def read_meta(path: Path) -> Described:
    """:func:`check_meta` of the entry in the folder ``path``; ``FileNotFoundError`` if there is no such folder."""
    if not path.exists():
        raise FileNotFoundError(path)
    return check_meta(_bytes(path / META), path.parent.name, path.name)


def read_files(path: Path) -> tuple[Files, Described]:
    """Files and description of an entry whose sums hold; ``FileNotFoundError`` if there is no entry, ``Broken`` if it is not whole."""
    body = read_meta(path)
    files = {name: _bytes(path / name) for name in body["sha256"]}
    return check_files(files, body), body


def check_files(files: Files, body: Described) -> Files:
    """``files`` if their sums are those of the description; else ``Broken``."""
    for name, sha256 in body["sha256"].items():
        if name not in files or hashlib.sha256(files[name]).hexdigest() != sha256:
            raise Broken(f"the sum of {name} does not match" if name in files else f"{name} is missing")
    return files


def read_entry(path: Path) -> Any:
    """What an entry holds; raises as :func:`read_files`."""
    return decode(*read_files(path))


def decode(files: Files, body: Described) -> Any:
    """What the files of an entry hold; ``Broken`` if they do not fit together."""
    from PIL import Image
    from safetensors import SafetensorError

    try:
        return READERS[body["kind"]](files, body)
    except (OSError, ValueError, KeyError, TypeError, IndexError, SyntaxError, MemoryError, InputError, SafetensorError,
            Image.DecompressionBombError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise InputError(f"The library entry {path.parent} may not be read ({error.strerror}); check its permissions.") from None
    except FileNotFoundError:
        raise Broken(f"{path.name} is missing") from None
    except OSError as error:
        raise Broken(f"{type(error).__name__}: {error}") from None


def _digest(body: Described) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
