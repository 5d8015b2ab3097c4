"""What commands are told and say: NAME=VALUE words, outputs that can be written, numbers and errors in words."""

import json
import os
import tempfile
import threading
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import unwritable, write_atomic
from ovdiff_lib.profiles.reading import UNREADABLE

FEATURES = "OVDIFF_FEATURES"
"""Environment variable: where features of windows are kept, while all notebooks run."""

size_text = partial(tqdm.format_sizeof, suffix="B")
"""Bytes as a person reads them, in decimal units."""


def end_with_parent() -> None:
    """Let this process end when its parent is killed: it would work on unseen, or wait for ever for tasks."""
    parent = parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def parse_assignments(pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """Overrides (or notebook parameters) from NAME=VALUE words, values read as YAML. Raises ``InputError``."""
    table = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {pair!r} is not of the form NAME=VALUE, for example support.size=8.")
        try:
            table[name] = yaml.safe_load(value) if value else ""
        except UNREADABLE:
            raise InputError(f"The value of {option} {pair[:200]!r} cannot be read; write a number, true, "
                             "a [list, of, values] or text.") from None
    return table


def check_output(folder: str | Path) -> None:
    """``InputError`` if ``folder``, which need not exist yet, cannot be written to; nothing is left behind."""
    folder = Path(folder)
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise unwritable(folder, error) from None


def write_json(path: Path, table: Any) -> None:
    """A table as readable JSON, whole or not at all."""
    write_atomic(path, (json.dumps(table, ensure_ascii=False, indent=1) + "\n").encode())


def counted(number: int, one: str, many: str = "") -> str:
    """"1 entry", "2 entries"; ``many`` defaults to ``one`` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def described(error: BaseException) -> str:
    """What an error says: the project's own as it is, of others the kind and the first line."""
    lines = str(error).strip().splitlines() or [""]
    return str(error) if isinstance(error, OVDiffError) else f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
