"""Files that are whole or not there."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ovdiff_lib.errors import InputError


def shown(path: str | Path) -> str:
    """A path on one line: what cannot be seen, would steer the terminal or is no text is written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path``, in folders made if missing; it takes its place, on disk, when the block ends.

    Readers see the old file or the new one, whatever happens between. ``InputError`` where it cannot be written.
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
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # gone already after the rename
            temporary.unlink()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` as :func:`written_whole` says."""
    with written_whole(path) as file:
        file.write(data)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> InputError:
    """What a user is told of a path that cannot be written."""
    return InputError(f"{shown(path)} cannot be written ({error.strerror or error}); free space or choose a folder "
                      "that you may write to.")
