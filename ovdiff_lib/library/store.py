"""The prototype library: support sets, masks and prototypes kept on disk, found by the hash of all they were made from.

    root/<kind>/<key>/ entry.json and the files it vouches for       root/locks/<key>.lock

An entry is written beside its place, flushed, then renamed, so it is there whole or not at all, whatever kills the
process. Reading checks SHA-256 sums; an entry that is torn or was edited is set aside as ``<key>.<number>.broken``,
logged by name, and counts as missing. Locks only spare work: where a file system's do nothing, no entry is lost.
"""

import errno
import logging
import os
import platform
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import fsync_folder
from ovdiff_lib.library.codec import KEY, LAYOUTS, Broken, Described, Files, encode, read, read_meta
from ovdiff_lib.types import SupportSet

HOST = re.sub(r"\W", "", platform.node()) or "host"
OWNER = re.compile(r"\.(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{8}\.part")
DAY = 86_400

logger = logging.getLogger(__name__)
_making = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """One stored entry: its ``kind`` (support, masks or prototypes), ``key``, folder ``path`` and size in ``bytes``."""

    kind: str
    key: str
    path: Path
    bytes: int


class Library:
    """A content-addressed store below ``root``, which the first write makes; the default is the folder that the
    environment variable ``OVDIFF_LIBRARY`` names, else ``~/.cache/ovdiff``.

    Keys are hex digests that the caller computes (:mod:`ovdiff_lib.keys`) of ``made_from``, which is kept with the
    entry. Writing raises ``InputError`` where the disk is full or the folder may not be written.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        default = os.environ.get("OVDIFF_LIBRARY") or Path.home() / ".cache" / "ovdiff"
        self.root = Path(default if root is None else root).expanduser()

    # ------------------------------------------------------------------ entries

    def has(self, kind: str, key: str) -> bool:
        """Whether there is something under ``key``; whether it is whole, :meth:`get` says."""
        return self._path(kind, key).is_dir()

    def get(self, kind: str, key: str) -> Any:
        """What is stored under ``key``, or None if there is nothing that is whole."""
        path = self._path(kind, key)
        try:
            return read(path, kind, key)
        except FileNotFoundError:
            return None
        except Broken as broken:
            logger.warning("The library entry %s is broken (%s); it is set aside and built again.", path, broken)
        with self.lock(key), self.writing(), suppress(FileNotFoundError):
            try:
                return read(path, kind, key)  # another process may just have put a whole one there
            except Broken:
                path.rename(path.with_name(f"{key}.{secrets.token_hex(4)}.broken"))
        return None

    def put(self, kind: str, key: str, value: Any, made_from: Described | None = None, replace: bool = False) -> None:
        """Store a support set, masks or prototypes; what is there already stays, unless ``replace``."""
        self.place(kind, key, encode(kind, key, value, made_from), replace)

    def get_or_make(self, kind: str, key: str, make: Callable[[], Any], made_from: Described | None = None) -> Any:
        """What is stored under ``key``, else ``make()``, which is stored: once among all processes and threads."""
        return self._get_or(kind, key, lambda found: found is not None, lambda found: make(), made_from)

    def get_or_grow(self, key: str, count: int, draw: Callable[[int, int], SupportSet],
                    made_from: Described | None = None) -> SupportSet:
        """The first ``count`` images of a support set; ``draw(start, missing)`` makes those that are not there yet.

        Image i depends on its number, not on how many there are: a smaller set is the beginning of a larger one.
        """
        def grow(have: SupportSet | None) -> SupportSet:
            return have.joined(draw(len(have), count - len(have))) if have else draw(0, count)

        found = self._get_or("support", key, lambda have: have and len(have) >= count, grow, made_from)
        return found.take(range(count))

    def given(self, category: Category) -> SupportSet:
        """The support set of a category with pictures of one's own; ``InputError`` if it is not here."""
        if (found := self.get("support", category.pictures)) is None:
            raise InputError(f"The library {self.root} lacks the pictures {category.pictures} of {category.name!r}; "
                             "give them again, or import what was exported with them.")
        return replace(found, category=category)

    def _get_or(self, kind: str, key: str, enough: Callable[[Any], bool], make: Callable[[Any], Any],
                made_from: Described | None) -> Any:
        if enough(found := self.get(kind, key)):
            return found
        with self.lock(key):
            if not enough(found := self.get(kind, key)):  # another process may have made it meanwhile
                found = make(found)
                self.put(kind, key, found, made_from, replace=True)
        return found

    def entries(self) -> list[Entry]:
        """All entries, broken ones set aside not included, sorted by kind and key."""
        found = []
        for kind in LAYOUTS:
            for path in sorted(p for p in (self.root / kind).glob("*") if KEY.fullmatch(p.name)):
                with suppress(FileNotFoundError, NotADirectoryError):  # removed by another process meanwhile
                    found.append(Entry(kind, path.name, path, sum(f.stat().st_size for f in path.iterdir())))
        return found

    def described(self) -> list[tuple[Entry, Described]]:
        """Every entry with what it says of itself, but for those that :meth:`verify` would set aside."""
        found = []
        for entry in self.entries():
            with suppress(FileNotFoundError, Broken, InputError):
                found.append((entry, read_meta(entry.path, entry.kind, entry.key)))
        return found

    def verify(self) -> list[Entry]:
        """Check that every entry is whole; sets aside and returns those that are broken."""
        return [entry for entry in self.entries() if self.get(entry.kind, entry.key) is None]

    def remove(self, kind: str, key: str) -> None:
        """Delete what is stored under ``key``, if anything is."""
        with self.lock(key), self.writing():
            _discard(self._path(kind, key))

    def leftovers(self) -> list[Path]:
        """What interrupted writers and broken entries left behind, but for what a process may still be writing."""
        left = [*self.root.glob(".import*"), *(path for kind in LAYOUTS for path in (self.root / kind).glob("*"))]
        return sorted(path for path in left if path.suffix in (".part", ".broken") and _abandoned(path))

    def sweep(self) -> int:
        """Delete :meth:`leftovers`; returns how many there were."""
        left = self.leftovers()
        with self.writing():
            for path in left:
                _discard(path)
        return len(left)

    # ------------------------------------------------------------------ locking and writing

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold ``key`` alone among all processes and threads, so that what it names is built once. May be nested. The
        system frees it when the process ends. Raises ``InputError`` where the library may not be written."""
        with ExitStack() as held:
            with self.writing():
                path = self._path("locks", key).with_suffix(".lock")
                path.parent.mkdir(parents=True, exist_ok=True)
                with _making:  # two threads must get the same object, or a nested lock would wait for the outer one
                    lock = FileLock(path, is_singleton=True)
                held.enter_context(lock)
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What the system says against writing into the library becomes ``InputError`` here."""
        try:
            yield
        except OSError as error:
            raise InputError(f"The library folder {self.root} cannot be written ({error.strerror or error}); free "
                             "space, or name another folder with OVDIFF_LIBRARY.") from None

    def place(self, kind: str, key: str, files: Files, replace: bool = False) -> bool:
        """Put the files of an entry in their place; False if a whole one is there and stays, unless ``replace``."""
        path = self._path(kind, key)
        with self.lock(key):
            if not replace and self.get(kind, key) is not None:
                return False
            temporary = beside(path)
            try:
                with self.writing():
                    temporary.mkdir(parents=True)
                    for name, content in files.items():
                        with open(temporary / name, "xb") as file:
                            file.write(content)
                            file.flush()
                            os.fsync(file.fileno())
                    fsync_folder(temporary)
                    _replace(temporary, path)
                    for left in filter(_abandoned, path.parent.glob(f".{key}.*.part")):
                        shutil.rmtree(left, ignore_errors=True)
                    fsync_folder(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename
        return True

    def _path(self, kind: str, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise InputError(f"{key[:80]!r} is no library key; a key is 8 to 64 hexadecimal digits.")
        return self.root / kind / key


def beside(path: Path) -> Path:
    """A new name in the folder of ``path`` for what this process is writing, which nobody sweeps while it lives."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{secrets.token_hex(4)}.part")


def _discard(path: Path) -> None:
    gone = beside(path)  # renamed first: a deletion that is cut short leaves no half entry behind
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(gone)
        shutil.rmtree(gone)


def _replace(source: Path, target: Path) -> None:
    while True:  # where locks do nothing another writer may be faster
        try:
            source.rename(target)
            return
        except OSError as error:  # unless nothing is there, or an empty folder
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            _discard(target)


def _abandoned(path: Path) -> bool:
    """Whether nobody is writing at a leftover: its process on this machine is gone, or it is a day old."""
    owner = OWNER.search(path.name)
    try:
        if owner and owner["host"] == HOST:
            with suppress(PermissionError):  # a process that may not be asked is somebody else's
                os.kill(int(owner["pid"]), 0)
        return path.suffix == ".broken" or time.time() - path.stat().st_mtime > DAY
    except ProcessLookupError:
        return True
    except FileNotFoundError:
        return False
