"""Files that are whole or not there, and paths that can be written."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ovdiff_lib.errors import InputError


def check_output(folder: str | Path) -> None:
    """``InputError`` if ``folder``, which need not exist yet, cannot be written to; nothing is left behind."""
    folder = Path(folder)
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def size_text(size: int | None) -> str:
    """Bytes as a person reads them, in decimal units; "?" for None."""
    if size is None:
        return "?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.{2 if size < 10 * scale else 1 if size < 100 * scale else 0}f} {unit}"
    return f"{size} B"


def shown(path: str | Path) -> str:
    """A path on one line: what cannot be seen, would steer the terminal or is no text is written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path``, which takes its place, flushed to disk, when the block ends; missing folders
    are made.

    Readers see the old file or the new one, whatever happens between. Raises ``InputError`` where the folder cannot be
    written.
    """
    path = Path(path)
    # Not tempfile: its files are private to the user, and a renamed one stays so.
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # gone already after the rename
            temporary.unlink()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` as :func:`written_whole` says."""
    with written_whole(path) as file:
        file.write(data)


def write_json(path: Path, table: Any) -> None:
    """A table as readable JSON, whole or not at all."""
    write_atomic(path, (json.dumps(table, ensure_ascii=False, indent=1) + "\n").encode())


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{shown(path)} cannot be written ({error.strerror or error}); free space or choose a folder "
                      "that you may write to.")
