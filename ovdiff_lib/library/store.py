"""The prototype library: support sets, masks and prototypes kept on disk between runs, found by the hash of everything they were made from.

    root/support/<key>/ images_000.png, arrays.safetensors, entry.json        root/masks/<key>/ ...        root/prototypes/<key>/ ...
    root/locks/<key>.lock

An entry is written beside its place, flushed, then renamed, so it is there whole or not at all, whatever kills the process. Reading checks
SHA-256 sums; an entry that is torn or was edited is set aside as ``<key>.broken``, logged by name, and counts as missing.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import fsync_folder
from ovdiff_lib.library import codec as kinds
from ovdiff_lib.library.codec import KEY, META, Broken, Described, Files, read_entry, read_meta, write_meta
from ovdiff_lib.types import ForegroundBackground, Prototypes, SupportSet

ENTRY_KINDS = tuple(kinds.READERS)

logger = logging.getLogger(__name__)


def default_root() -> Path:
    """The folder named by the environment variable ``OVDIFF_LIBRARY``, else ``~/.cache/ovdiff``."""
    return Path(os.environ.get("OVDIFF_LIBRARY") or Path.home() / ".cache" / "ovdiff").expanduser()


@dataclass(frozen=True)
class Entry:
    """One stored entry: ``kind`` of :data:`ENTRY_KINDS`, its ``key``, folder ``path``, size in ``bytes``, and when it was last read or
    written (``used``, seconds since 1970)."""

    kind: str
    key: str
    path: Path
    bytes: int
    used: float


class Library:
    """A content-addressed store below ``root`` (default: :func:`default_root`). Nothing is created before the first write.

    Keys are hex digests (8 to 64 digits) that the caller computes (:func:`~ovdiff_lib.library.codec.identify`); class names never become file
    names. ``made_from`` is what a key is the hash of, kept with the entry; an entry whose table has another hash is broken. Writing raises
    ``InputError``, in one sentence, where the disk is full or the folder may not be written.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()
        self._held = threading.local()

    # ------------------------------------------------------------------ entries

    def get_support(self, key: str) -> SupportSet | None:
        """The support set stored under ``key``, or None if there is none that is whole."""
        return self._get("support", key)

    def put_support(self, key: str, support: SupportSet, *, made_from: Described | None = None, replace: bool = False) -> None:
        """Store a support set; one that is there already stays, unless ``replace``."""
        self._put("support", key, *kinds.support_files(support), made_from, replace)

    def get_masks(self, key: str) -> ForegroundBackground | None:
        """The masks stored under ``key``, or None if there are none that are whole."""
        return self._get("masks", key)

    def put_masks(self, key: str, masks: ForegroundBackground, *, made_from: Described | None = None) -> None:
        """Store the masks of a support set; those that are there already stay."""
        self._put("masks", key, *kinds.masks_files(masks), made_from)

    def get_prototypes(self, key: str) -> Prototypes | None:
        """The prototypes stored under ``key``, or None if there are none that are whole."""
        return self._get("prototypes", key)

    def put_prototypes(self, key: str, prototypes: Prototypes, *, made_from: Described | None = None) -> None:
        """Store the prototypes of one category and extractor; those that are there already stay."""
        self._put("prototypes", key, *kinds.prototypes_files(prototypes), made_from)

    def entries(self) -> list[Entry]:
        """All entries, broken ones set aside not included, sorted by kind and key."""
        found = []
        for kind in ENTRY_KINDS:
            for path in sorted((self.root / kind).glob("*")):
                if KEY.fullmatch(path.name):
                    with suppress(FileNotFoundError, NotADirectoryError):  # removed by another process meanwhile
                        files = [f.stat() for f in path.iterdir()]
                        used = max((f.st_mtime for f in files), default=path.stat().st_mtime)
                        found.append(Entry(kind, path.name, path, sum(f.st_size for f in files), used))
        return found

    def describe(self, entry: Entry) -> Described:
        """What an entry says of itself, checked against its sum; its files are not read. ``InputError`` if that cannot be had."""
        try:
            return read_meta(entry.path)
        except (FileNotFoundError, Broken) as error:
            raise InputError(f"The library entry {entry.path} is broken ({error}); run `ovdiff library verify`, which sets it aside."
                             ) from None

    def verify(self, progress: bool = False) -> list[Entry]:
        """Check every entry's sums and that its files can be read; sets aside and returns those that are broken."""
        return [entry for entry in tqdm(self.entries(), desc="verifying", unit="entry", disable=not progress)
                if self._get(entry.kind, entry.key, touch=False) is None]

    def remove(self, key: str, kind: str | None = None) -> int:
        """Delete the entries under ``key``, of one kind or of all; returns how many there were."""
        found = [path for name in ENTRY_KINDS if kind in (None, name) and (path := self._path(name, key)).exists()]
        with self.lock(key), self.writing():
            for path in found:
                self._delete(path)
        return len(found)

    def leftovers(self) -> list[Path]:
        """What interrupted writers and broken entries left behind: no entry, and in nobody's use once its key can be locked."""
        torn = [path for kind in ENTRY_KINDS for path in (self.root / kind).glob("*") if re.search(r"\.(part|broken)$", path.name)]
        return sorted([*torn, *self.root.glob(".import-*")])

    def sweep(self) -> tuple[int, int]:
        """Delete :meth:`leftovers` and the lock files that nobody holds; returns how many leftovers and how many bytes they had."""
        count = size = 0
        for path in self.leftovers():
            key = path.name.removeprefix(".import-").lstrip(".").partition(".")[0]
            with self.writing(), self._try_lock(key) as free:
                if free and path.exists():
                    count, size = count + 1, size + sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                    shutil.rmtree(path)
        for path in (self.root / "locks").glob("*.lock"):
            with self.writing(), self._try_lock(path.stem) as free:
                if free:
                    path.unlink(missing_ok=True)
        return count, size

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
        file = self._locked(key, wait=True)
        with file:
            held[key] = 1
            try:
                yield
            finally:
                del held[key]

    @contextmanager
    def _try_lock(self, key: str) -> Iterator[bool]:
        """Hold ``key`` if nobody does, else go on without it: whether it is held."""
        if self._held.__dict__.setdefault("keys", {}).get(_checked(key)):
            yield False
            return
        file = self._locked(key, wait=False)
        if file is None:
            yield False
            return
        with file:
            yield True

    def _locked(self, key: str, wait: bool):
        """The lock file of ``key``, open and locked; None if another has it and ``wait`` is false."""
        path = self.root / "locks" / f"{key}.lock"
        while True:
            with self.writing():
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "wb")
                try:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        if not wait:
                            file.close()
                            return None
                        logger.info("Waiting for another process that builds %s in %s.", key, self.root)
                        fcntl.flock(file, fcntl.LOCK_EX)
                    # Swept away while we waited, a file is no lock any more: the next process makes a new one.
                    with suppress(FileNotFoundError):
                        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                            return file
                    file.close()
                except BaseException:
                    file.close()
                    raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What the system says against writing into the library becomes ``InputError`` here."""
        try:
            yield
        except OSError as error:
            raise InputError(f"The library folder {self.root} cannot be written ({error.strerror or error}); free space, or name another"
                             " folder with OVDIFF_LIBRARY.") from None

    # ------------------------------------------------------------------ reading and writing

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / _checked(key)

    def _get(self, kind: str, key: str, touch: bool = True) -> Any:
        path = self._path(kind, key)
        try:
            found = read_entry(path)
        except FileNotFoundError:
            return None
        except Broken as broken:
            logger.warning("The library entry %s is broken (%s); it is set aside and built again.", path, broken)
        else:
            if touch:
                with suppress(OSError):  # of a library that may only be read, nobody removes what is not used
                    os.utime(path / META)
            return found
        # Under the lock, and read again: meanwhile another process may have put a whole entry in its place.
        with self.lock(key):
            try:
                return read_entry(path)
            except FileNotFoundError:
                return None
            except Broken:
                with self.writing():
                    path.rename(path.with_name(f"{key}.{secrets.token_hex(4)}.broken"))
                return None

    def _put(self, kind: str, key: str, files: Files, described: Described, made_from: Described | None, replace: bool = False) -> None:
        _checked(key)
        self.place(kind, key, {**files, META: write_meta(kind, key, files, described, made_from)}, replace)

    def place(self, kind: str, key: str, files: Files, replace: bool = False) -> bool:
        """Put the files of a whole entry in their place; False if one is there already and stays, as it does unless ``replace``."""
        path = self._path(kind, key)
        with self.lock(key):
            if not replace and self._get(kind, key) is not None:
                return False
            temporary = path.with_name(f".{key}.{os.getpid()}-{secrets.token_hex(4)}.part")
            try:
                with self.writing():
                    for left in path.parent.glob(f".{key}.*.part"):  # of a writer that was killed: the lock is ours
                        shutil.rmtree(left)
                    temporary.mkdir(parents=True)
                    for name, content in files.items():
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
        return True

    @staticmethod
    def _delete(path: Path) -> None:
        # Renamed first: a deletion that is cut short leaves no half entry behind.
        gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        path.rename(gone)
        shutil.rmtree(gone)


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise InputError(f"{key[:80]!r} is no library key; a key is 8 to 64 hexadecimal digits.")
    return key
