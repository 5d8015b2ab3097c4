"""Prototypes to give away: entries of a library in one tar file, and back, checked as if a stranger had made it.

    index.json                                the entries it holds
    <kind>/<key>/entry.json and the files it vouches for

An archive is taken whole or not at all. Sums tell an archive that was damaged from one that was not; they do not tell
who made it.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import fsync_folder
from ovdiff_lib.library.codec import FILE, KEY, LAYOUTS, META, Broken, read, read_files
from ovdiff_lib.library.store import Entry, Library, beside

INDEX = "index.json"
MEMBER = re.compile(rf"({'|'.join(LAYOUTS)})/({KEY.pattern})/({re.escape(META)}|{FILE.pattern})|{re.escape(INDEX)}")

LONGEST = 2**24
"""Bytes of the longest header or table of an archive; drawings and numbers may be longer."""

MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.xz": "w:xz", ".txz": "w:xz"}
"""Ending of an archive's name, in any case, and how it is written."""


def export_entries(library: Library, entries: Iterable[Entry], path: str | Path, progress: bool = False) -> int:
    """Write entries into the tar file ``path`` (of an ending in :data:`MODES`); returns how many.

    Each is verified as it is read; the file is whole or not there, and the same entries make the same bytes in a .tar.
    Raises ``InputError`` for an entry that is broken, for none at all, for another ending, and where ``path`` cannot be
    written.
    """
    entries, path = list(entries), Path(path)
    if not entries:
        raise InputError("There is nothing to export: no entry of the library was chosen; `ovdiff library list` shows "
                         "what there is.")
    mode = next((mode for suffix, mode in MODES.items() if path.name.lower().endswith(suffix)), None)
    if mode is None:
        raise InputError(f"{path} does not end in {', '.join(MODES)}; name the archive so that its form is known.")
    temporary = beside(path)
    try:
        with open(temporary, "xb") as file, tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
            _add(archive, INDEX, json.dumps([f"{entry.kind}/{entry.key}" for entry in entries]).encode())
            for entry in tqdm(entries, desc="exporting", unit="entry", disable=not progress):
                try:
                    files = read_files(entry.path, entry.kind, entry.key)[0]
                except FileNotFoundError:
                    raise Broken("it was removed or replaced meanwhile") from None
                for name, data in files.items():
                    _add(archive, f"{entry.kind}/{entry.key}/{name}", data)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.absolute().parent)
    except Broken as broken:
        raise InputError(f"The library entry {entry.path} is broken ({broken}), so nothing was exported; run `ovdiff "
                         "library verify`, which sets it aside.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); free space or choose a folder that "
                         "you may write to.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(entries)


def import_archive(library: Library, path: str | Path, progress: bool = False) -> Counter[str]:
    """Add the entries of a tar file to a library; returns how many were "new", were "kept" because they were here
    already, and how many support sets have "grown" because the archive's have more images and the same first ones.

    Raises ``InputError``, and adds nothing, for a file that is no such archive, is torn, holds anything but
    entries, does not verify or would not fit on the disk.
    """
    path, staging = Path(path), beside(library.root / "import")
    if not path.is_file():
        raise InputError(f"There is no archive {path}; give a file that `ovdiff library export` wrote.")
    try:
        with library.writing():
            staging.mkdir(parents=True)
        _unpack(path, staging)
        waiting = tqdm(_verified(staging), desc="importing", unit="entry", disable=not progress)
        return Counter(_place(library, entry) for entry in waiting)
    except Broken as broken:
        raise InputError(f"The archive {path} {broken}; nothing was imported. Get the file again, or another that "
                         "`ovdiff library export` wrote.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Header(tarfile.TarInfo):
    """Member of an archive whose extended headers, which are read whole, are not larger than memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if not self.isreg() and not 0 <= self.size <= LONGEST:
            raise tarfile.ReadError(f"a header of more than {LONGEST >> 20} MiB")
        return super()._proc_member(archive)


def _unpack(path: Path, staging: Path) -> None:
    """The files of the archive, below ``staging``; ``Broken`` for one that is not of an entry."""
    seen, free = set(), shutil.disk_usage(staging).free
    try:
        with tarfile.open(path, tarinfo=_Header) as archive:
            for member in archive:
                free -= member.size
                if not MEMBER.fullmatch(member.name) or not member.isreg():
                    raise Broken(f"holds {member.name[:80]!r}, which is no file of a library entry")
                if member.name in seen:
                    raise Broken(f"holds {member.name!r} twice")
                if free < 0:
                    raise Broken(f"unpacks to more than what is free in {staging.parent}")
                if member.name.endswith(".json") and member.size > LONGEST:
                    raise Broken(f"holds a {member.name} of more than {LONGEST >> 20} MiB")
                seen.add(member.name)
                archive.extract(member, staging, filter="data")
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        reason = f" ({str(error).splitlines()[0][:120]})" if str(error) else ""
        raise Broken(f"cannot be read as an archive of library entries{reason}") from None


def _verified(staging: Path) -> list[Entry]:
    """The entries that were unpacked, in a class's order of building; ``Broken`` unless all are whole."""
    entries = Library(staging).entries()
    # A tar file that was cut off between two files is not torn for the library that reads it.
    try:
        index = json.loads((staging / INDEX).read_bytes())
    except (OSError, ValueError, RecursionError):
        index = None
    said = sorted(map(str, index)) if isinstance(index, list) else None
    if not entries or said != sorted(f"{entry.kind}/{entry.key}" for entry in entries):
        raise Broken(f"does not hold just the entries of its {INDEX}")
    for entry in entries:
        try:
            read(entry.path, entry.kind, entry.key)
            files, body = read_files(entry.path, entry.kind, entry.key)
            if "made_from" not in body:
                raise Broken("it does not say what it was made from")
            if extra := {file.name for file in entry.path.iterdir()} - files.keys():
                raise Broken(f"{min(extra)} is not among its files")
        except Broken as broken:
            raise Broken(f"holds {entry.kind}/{entry.key}, which does not verify ({broken})") from None
    return entries


def _place(library: Library, entry: Entry) -> str:
    """Put an unpacked entry into the library: what became of it."""
    files = {file.name: file.read_bytes() for file in sorted(entry.path.iterdir())}
    with library.lock(entry.key):
        if library.place(entry.kind, entry.key, files):
            return "new"
        if entry.kind == "support":
            here, there = library.get(entry.kind, entry.key), read(entry.path, entry.kind, entry.key)
            first = there.take(range(min(len(here), len(there))))
            same = np.array_equal(here.images, first.images) and np.array_equal(here.seeds, first.seeds)
            if same and len(there) > len(here):
                library.place(entry.kind, entry.key, files, replace=True)
                return "grown"
    return "kept"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))
