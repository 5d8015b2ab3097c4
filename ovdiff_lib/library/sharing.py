"""Prototypes to give away: entries of a library in one tar file, and back, checked as if a stranger had made it.

    index.json                                                                                  the entries it holds
    <kind>/<key>/entry.json, <kind>/<key>/arrays.safetensors, <kind>/<key>/images_000.png ...

Importing looks at every name, size and sum and reads every file before the first entry is put in its place: an archive is taken whole or
not at all. Sums tell an archive that was damaged from one that was not; they do not tell who made it.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import secrets
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import fsync_folder
from ovdiff_lib.library.codec import META, READERS, Broken, Files, check_files, check_meta, decode, read_files
from ovdiff_lib.library.store import Entry, Library

MEMBER = re.compile(rf"({'|'.join(READERS)})/([0-9a-f]{{8,64}})/(entry\.json|arrays\.safetensors|images_\d{{3,6}}\.png)")

INDEX = "index.json"

MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.xz": "w:xz", ".txz": "w:xz"}
"""Ending of an archive's name, in any case, and how it is written."""

LONGEST_META = 2**24
"""Bytes of an ``entry.json`` or of the index at most."""

UNREADABLE = (OSError, EOFError, ValueError, OverflowError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What the libraries raise for a file that is no archive or is torn."""


@dataclass(frozen=True)
class Imported:
    """How many entries of an archive were ``new``, made an entry ``grown`` (a support set with more images), or were here already
    (``kept``: what is here stays)."""

    new: int = 0
    grown: int = 0
    kept: int = 0


def export_entries(library: Library, entries: Iterable[Entry], path: str | Path, progress: bool = False) -> int:
    """Write entries into the tar file ``path`` (of an ending in :data:`MODES`); returns how many.

    Each is verified as it is read; the file is whole or not there, and the same entries make the same bytes in a .tar. Raises
    ``InputError`` for an entry that is broken, for none at all, for another ending, and where ``path`` cannot be written.
    """
    entries, path = list(entries), Path(path)
    if not entries:
        raise InputError("There is nothing to export: no entry of the library was chosen; `ovdiff library list` shows what there is.")
    mode = next((mode for suffix, mode in MODES.items() if path.name.lower().endswith(suffix)), None)
    if mode is None:
        raise InputError(f"{path} does not end in {', '.join(MODES)}; name the archive so that its form is known.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with _writing(path), open(temporary, "xb") as file:
            with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
                _add(archive, INDEX, json.dumps([f"{entry.kind}/{entry.key}" for entry in entries]).encode())
                for entry in tqdm(entries, desc="exporting", unit="entry", disable=not progress):
                    for name, data in _whole(entry).items():
                        _add(archive, f"{entry.kind}/{entry.key}/{name}", data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
    return len(entries)


def import_archive(library: Library, path: str | Path, progress: bool = False) -> Imported:
    """Add the entries of a tar file to a library.

    An entry that is here already stays, but for a support set that the archive has with more images and the same first ones. Raises
    ``InputError``, and adds nothing, for a file that is no such archive, is torn, holds anything but entries, does not verify or would
    not fit on the disk.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no archive {path}; give a file that `ovdiff library export` wrote.")
    number = secrets.token_hex(4)
    staging = library.root / f".import-{number}"
    with library.lock(number):  # while it is held, nobody sweeps the folder away
        try:
            counts = {"new": 0, "grown": 0, "kept": 0}
            for kind, key in _unpack(library, path, staging, progress):
                counts[_place(library, kind, key, staging / kind / key)] += 1
            return Imported(**counts)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            (library.root / "locks" / f"{number}.lock").unlink(missing_ok=True)


def _unpack(library: Library, path: Path, staging: Path, progress: bool) -> list[tuple[str, str]]:
    """Every entry of the archive below ``staging``, verified: its (kind, key) pairs in a class's order of building."""
    seen: dict[tuple[str, str], set[str]] = {}
    total, index = 0, None
    try:
        with _unpacked(path) as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:
            for member in tqdm(archive, desc="importing", unit="file", disable=not progress):
                if member.name == INDEX and member.isreg() and index is None:
                    _check_size(library, path, member.size, 0)
                    index = _read(archive.extractfile(member), path, LONGEST_META)
                    continue
                match = MEMBER.fullmatch(member.name)
                if not match or not member.isreg():
                    raise InputError(f"The archive {path} holds {member.name[:80]!r}, which is no file of a library entry; nothing was "
                                     "imported. Use a file that `ovdiff library export` wrote.")
                kind, key, name = match.groups()
                names = seen.setdefault((kind, key), set())
                total += member.size
                _check_size(library, path, member.size if name == META else 0, total)
                if name in names:
                    raise InputError(f"The archive {path} holds {member.name!r} twice; nothing was imported.")
                names.add(name)
                place = staging / kind / key / name
                with library.writing():
                    place.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                with library.writing(), open(place, "xb") as file:
                    while block := _read(source, path):
                        file.write(block)
                    if file.tell() != member.size:
                        raise _torn(path)
    except InputError:
        raise
    except UNREADABLE as error:
        raise _torn(path, error) from None
    # A tar file that was cut off between two files is not torn for the library that reads it.
    if not seen or index != json.dumps([f"{kind}/{key}" for kind, key in seen]).encode():
        raise InputError(f"The archive {path} does not hold just the entries of its {INDEX}; nothing was imported. Get the file again.")
    for (kind, key), names in seen.items():
        try:
            files = {name: (staging / kind / key / name).read_bytes() for name in names}
            if META not in files:
                raise Broken(f"{META} is missing")
            body = check_meta(files.pop(META), kind, key)
            if "made_from" not in body:
                raise Broken("it does not say what it was made from")
            if extra := sorted(set(files) - set(body["sha256"])):
                raise Broken(f"{extra[0]} is not among its files")
            decode(check_files(files, body), body)
        except Broken as broken:
            raise InputError(f"The entry {kind}/{key} in {path} does not verify ({broken}); nothing was imported. Get the archive again."
                             ) from None
    return sorted(seen, key=lambda entry: (list(READERS).index(entry[0]), entry[1]))


class _Bounded:
    """A file of which no more than :data:`LONGEST_META` bytes are read at once: a tar file may have headers of any length, which are read
    whole, and a compressed one of gigabytes is small."""

    def __init__(self, file) -> None:
        self.file, self.seek, self.tell, self.close = file, file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_META:
            raise tarfile.ReadError(f"a header of more than {LONGEST_META >> 20} MiB")
        return self.file.read(size)


def _unpacked(path: Path):
    """The tar file in ``path``, whether compressed or not."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    return lzma.open(path) if start == b"\xfd7zXZ\0" else open(path, "rb")


def _place(library: Library, kind: str, key: str, folder: Path) -> str:
    files: Files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    with library.lock(key):
        if library.place(kind, key, files):
            return "new"
        if kind == "support":
            here, there = library.get_support(key), decode(*read_files(folder))
            n = len(here)
            if len(there) > n and np.array_equal(here.images, there.images[:n]) and np.array_equal(here.seeds, there.seeds[:n]):
                library.place(kind, key, files, replace=True)
                return "grown"
    return "kept"


def _whole(entry: Entry) -> Files:
    try:
        files, _ = read_files(entry.path)
        return {META: (entry.path / META).read_bytes(), **files}
    except (FileNotFoundError, Broken) as broken:
        raise InputError(f"The library entry {entry.path} is broken ({broken}), so nothing was exported; run `ovdiff library verify`, "
                         "which sets it aside.") from None


def _check_size(library: Library, path: Path, meta: int, total: int) -> None:
    nearest = next(place for place in (library.root, *library.root.absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if meta > LONGEST_META or total > free:
        raise InputError(f"The archive {path} unpacks to more than the {free / 1e9:.1f} GB that are free in {nearest}, or holds a "
                         f"description of more than {LONGEST_META >> 20} MiB; nothing was imported.")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))


def _read(source, path: Path, most: int = 2**20) -> bytes:
    try:
        return source.read(most)
    except UNREADABLE as error:
        raise _torn(path, error) from None


def _torn(path: Path, error: Exception | None = None) -> InputError:
    reason = f" ({str(error).splitlines()[0][:120]})" if error and str(error) else ""
    return InputError(f"{path} cannot be read as an archive of library entries{reason}; nothing was imported. Get the file again, or "
                      "export it again.")


@contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); free space or choose a folder that you may write to."
                         ) from None
