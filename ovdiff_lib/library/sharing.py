"""Prototypes to give away: entries of a library in one tar file, and back, checked as if a stranger had made it.

    <kind>/<key>/entry.json and the files it vouches for

An archive is taken whole or not at all. Sums tell whether it was damaged, not who made it.
"""

import io
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import written_whole
from ovdiff_lib.library.codec import FILE, KEY, LAYOUTS, META, Broken, read, read_files
from ovdiff_lib.library.store import Entry, Library, beside

MEMBER = re.compile(rf"({'|'.join(LAYOUTS)})/({KEY.pattern})/({re.escape(META)}|{FILE.pattern})")


def export_entries(entries: Iterable[Entry], path: str | Path) -> None:
    """Write entries into the tar file ``path``.

    Each is verified as it is read; the file is whole or not there, and the same entries make the same bytes. Raises
    ``InputError`` for an entry that is broken, for none at all, and where ``path`` cannot be written.
    """
    entries = list(entries)
    if not entries:
        raise InputError("There is nothing to export; `ovdiff library list` shows what the library has.")
    with written_whole(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for entry in entries:
            try:
                files, _ = read_files(entry.path, entry.kind, entry.key)
            except (Broken, FileNotFoundError) as error:
                raise InputError(f"{entry.path} is broken or gone ({error}), so nothing was exported; `ovdiff library "
                                 "verify` sets it aside.") from None
            for name, data in files.items():
                member = tarfile.TarInfo(f"{entry.kind}/{entry.key}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def import_archive(library: Library, path: str | Path) -> Counter[bool]:
    """Add a tar file's entries to a library; returns how many were new (True), here already (False). ``InputError``,
    and nothing added, for a file that is no whole archive of entries alone that verify, or too large for the disk."""
    staging = Library(beside(library.root / "import"))
    try:
        with library.writing():
            staging.root.mkdir(parents=True)
        _unpack(path, staging.root)
        return Counter(library.place(one.kind, one.key, read_files(one.path, one.kind, one.key)[0])
                       for one in _verified(staging))
    except Broken as broken:
        raise InputError(f"The archive {path} {broken}; nothing was imported. Get the file again, or another that "
                         "`ovdiff library export` wrote.") from None
    finally:
        shutil.rmtree(staging.root, ignore_errors=True)


def _unpack(path: str | Path, staging: Path) -> None:
    """The files of the archive, below ``staging``; ``Broken`` for one that is not of an entry."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not MEMBER.fullmatch(member.name) or not member.isreg() or member.issparse():
                    raise Broken(f"holds {member.name[:80]!r}, which is no file of a library entry")
                archive.extract(member, staging, filter="data")
            if Path(path).stat().st_size < archive.offset + tarfile.BLOCKSIZE:  # tarfile itself does not miss its end
                raise Broken("is cut off")
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, tarfile.TarError) as error:
        reason = f" ({str(error).splitlines()[0][:120]})" if str(error) else ""
        raise Broken(f"cannot be read as an archive of library entries{reason}") from None


def _verified(staging: Library) -> list[Entry]:
    """The entries that were unpacked, in a class's order of building; ``Broken`` unless all are whole."""
    entries = staging.entries()
    if not entries:
        raise Broken("holds no entry")
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
