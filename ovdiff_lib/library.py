"""The prototype library: support sets and prototypes kept on disk between runs, found by the hash of everything they depend on.

    root/support/<key>/      arrays.safetensors, entry.json        root/prototypes/<key>/ ...        root/locks/<key>.lock

An entry is written beside its place, flushed, then renamed, so it is there whole or not at all, whatever kills the process. Reading checks
SHA-256 sums; an entry that is torn or was edited is set aside as ``<key>.broken``, logged by name, and counts as missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.images import fsync_folder
from ovdiff_lib.types import KINDS, REGIONS, Category, Prototypes, SupportSet

FORMAT = 1
"""Layout of an entry; entries of another format count as missing."""

ENTRY_KINDS = ("support", "prototypes")
ARRAYS, META = "arrays.safetensors", "entry.json"

logger = logging.getLogger(__name__)
T = TypeVar("T")


def default_root() -> Path:
    """The folder named by the environment variable ``OVDIFF_LIBRARY``, else ``~/.cache/ovdiff``."""
    return Path(os.environ.get("OVDIFF_LIBRARY") or Path.home() / ".cache" / "ovdiff").expanduser()


@dataclass(frozen=True)
class Entry:
    """One stored entry: ``kind`` of :data:`ENTRY_KINDS`, its ``key``, folder ``path`` and size in ``bytes``."""

    kind: str
    key: str
    path: Path
    bytes: int


class _Broken(Exception):
    """An entry that must not be used; the message says why."""


class Library:
    """A content-addressed store below ``root`` (default: :func:`default_root`). Nothing is created before the first write.

    Keys are hex digests (8 to 64 digits) that the caller computes; class names never become file names. Writing raises ``InputError``, in
    one sentence, where the disk is full or the folder may not be written.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()
        self._held = threading.local()

    # ------------------------------------------------------------------ entries

    def get_support(self, key: str) -> SupportSet | None:
        """The support set stored under ``key``, or None if there is none that is whole."""
        return self._get("support", key, _support_from)

    def put_support(self, key: str, support: SupportSet, *, replace: bool = False) -> None:
        """Store a support set; one that is there already stays, unless ``replace``."""
        arrays = {"images": support.images, "attribution": support.attribution, "seeds": support.seeds}
        category = {"name": support.category.name, "prompt": support.category.prompt, "kind": support.category.kind}
        self._put("support", key, arrays, {"category": category, "provenance": support.provenance}, _support_from, replace)

    def get_prototypes(self, key: str) -> Prototypes | None:
        """The prototypes stored under ``key``, or None if there are none that are whole."""
        return self._get("prototypes", key, _prototypes_from)

    def put_prototypes(self, key: str, prototypes: Prototypes) -> None:
        """Store the prototypes of one category and extractor; those that are there already stay."""
        arrays = {
            "vectors": prototypes.vectors,
            "kind": np.array([KINDS.index(k) for k in prototypes.kind], np.uint8),
            "region": np.array([REGIONS.index(r) for r in prototypes.region], np.uint8),
            "image": prototypes.image, "cluster": prototypes.cluster, "assignment": prototypes.assignment,
        }
        self._put("prototypes", key, arrays, {}, _prototypes_from)

    def entries(self) -> list[Entry]:
        """All entries, broken ones set aside not included, sorted by kind and key."""
        return [Entry(kind, path.name, path, sum(f.stat().st_size for f in path.iterdir()))
                for kind in ENTRY_KINDS for path in sorted((self.root / kind).glob("*")) if re.fullmatch(r"[0-9a-f]{8,64}", path.name)]

    def verify(self) -> list[Entry]:
        """Check every entry's sums; sets aside and returns those that are broken."""
        readers = {"support": self.get_support, "prototypes": self.get_prototypes}
        return [entry for entry in self.entries() if readers[entry.kind](entry.key) is None]

    def remove(self, key: str) -> int:
        """Delete the entries under ``key``; returns how many there were."""
        found = [path for kind in ENTRY_KINDS if (path := self._path(kind, key)).exists()]
        with self.lock(key), self._writing():
            for path in found:
                # Renamed first: a deletion that is cut short leaves no half entry behind.
                gone = path.with_name(f".{key}.{secrets.token_hex(4)}.part")
                path.rename(gone)
                shutil.rmtree(gone)
        return len(found)

    # ------------------------------------------------------------------ locking

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold ``key`` alone among all processes and threads, so that what it names is built once. May be nested.

        The system frees it when the process ends, however it ends. Raises ``InputError`` where the library may not be written.
        """
        held: dict[str, int] = self._held.__dict__.setdefault("keys", {})
        if held.get(_checked(key)):
            yield
            return
        with self._writing():
            path = self.root / "locks" / f"{key}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "wb")
        with file:
            with self._writing():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("Waiting for another process that builds %s in %s.", key, self.root)
                    fcntl.flock(file, fcntl.LOCK_EX)
            held[key] = 1
            try:
                yield
            finally:
                del held[key]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"The library folder {self.root} cannot be written ({error.strerror or error}); free space, or name another"
                             " folder with OVDIFF_LIBRARY.") from None

    # ------------------------------------------------------------------ reading and writing

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / _checked(key)

    def _get(self, kind: str, key: str, make: Callable[[dict[str, np.ndarray], dict[str, Any]], T]) -> T | None:
        path = self._path(kind, key)
        try:
            return make(*_read(path))
        except FileNotFoundError:
            return None
        except _Broken as broken:
            logger.warning("The library entry %s is broken (%s); it is set aside and built again.", path, broken)
        # Under the lock, and read again: meanwhile another process may have put a whole entry in its place.
        with self.lock(key):
            try:
                return make(*_read(path))
            except FileNotFoundError:
                return None
            except _Broken:
                with self._writing():
                    path.rename(path.with_name(f"{key}.{secrets.token_hex(4)}.broken"))
                return None

    def _put(self, kind: str, key: str, arrays: dict[str, np.ndarray], described: dict[str, Any], make: Callable,
             replace: bool = False) -> None:
        from safetensors.numpy import save

        path = self._path(kind, key)
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        body = {"format": FORMAT, "kind": kind, "key": key, "sha256": {ARRAYS: hashlib.sha256(data).hexdigest()}, **described}
        meta = json.dumps({"body": body, "sha256": _digest(body)}, indent=1)
        with self.lock(key):
            if not replace and self._get(kind, key, make) is not None:
                return
            temporary = path.with_name(f".{key}.{os.getpid()}-{secrets.token_hex(4)}.part")
            try:
                with self._writing():
                    for left in path.parent.glob(f".{key}.*.part"):  # of a writer that was killed: the lock is ours
                        shutil.rmtree(left)
                    temporary.mkdir(parents=True)
                    for name, content in ((ARRAYS, data), (META, meta.encode())):
                        with open(temporary / name, "xb") as file:
                            file.write(content)
                            file.flush()
                            os.fsync(file.fileno())
                    fsync_folder(temporary)
                    if path.exists():
                        # A name that the next writer clears away, should this one die between the two renames.
                        path.rename(path.with_name(f".{key}.{secrets.token_hex(4)}.part"))
                    temporary.rename(path)
                    for left in path.parent.glob(f".{key}.*.part"):
                        shutil.rmtree(left)
                    fsync_folder(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename


def _checked(key: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{8,64}", key):
        raise InputError(f"{key[:80]!r} is no library key; a key is 8 to 64 hexadecimal digits.")
    return key


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and description of an entry whose sums hold; ``FileNotFoundError`` if there is no entry, ``_Broken`` if it is not whole."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not path.exists():
        raise FileNotFoundError(path)
    try:
        meta = json.loads((path / META).read_bytes())
        data = (path / ARRAYS).read_bytes()
        body = meta["body"]
        if _digest(body) != meta["sha256"]:
            raise _Broken(f"the sum of {META} does not match")
        if body["format"] != FORMAT or body["key"] != path.name:
            raise _Broken(f"{META} is of format {body['format']} and key {body['key']}")
        if hashlib.sha256(data).hexdigest() != body["sha256"][ARRAYS]:
            raise _Broken(f"the sum of {ARRAYS} does not match")
        return load(data), body
    except PermissionError as error:
        raise InputError(f"The library entry {path} may not be read ({error.strerror}); check its permissions.") from None
    except FileNotFoundError as error:
        raise _Broken(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _Broken(f"{type(error).__name__}: {error}") from None


def _support_from(arrays: dict[str, np.ndarray], body: dict[str, Any]) -> SupportSet:
    return SupportSet(Category(**body["category"]), arrays["images"], arrays["attribution"], arrays["seeds"], body["provenance"])


def _prototypes_from(arrays: dict[str, np.ndarray], body: dict[str, Any]) -> Prototypes:
    return Prototypes(arrays["vectors"], np.array(KINDS)[arrays["kind"]], np.array(REGIONS)[arrays["region"]],
                      arrays["image"], arrays["cluster"], arrays["assignment"])
