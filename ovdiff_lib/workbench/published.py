"""The published weights that profiles name: licence, size, how to get them; and what a folder of each holds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd

from ovdiff_lib.networks.identity import hub_command

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), index_col="model", keep_default_na=False)
"""By hub id, or by file name for what is no hub model: ``licence``, ``megabytes`` of what is fetched (four bytes a
parameter), ``url`` of a single file."""

FILES = pd.read_csv(Path(__file__).with_name("published_files.csv"), index_col="field")["files"]
"""By field of ``profile.models`` what a folder of it must hold: of each row one file."""


def how_to_get(identifier: str) -> str:
    """The shell command that fetches a model, "" for a path of which nothing is known."""
    if identifier.startswith("package:"):
        return "make mini-world"
    known = published(identifier)
    if known is not None and known.url:
        return f"curl -L --create-dirs -o {shlex.quote(str(Path(identifier).expanduser()))} {known.url}"
    if Path(identifier).is_absolute() or identifier[:1] in (".", "~") or identifier.count("/") > 1:
        return ""
    return hub_command(identifier)


def published(source: str) -> pd.Series | None:
    """What is known of a hub id, or of a path by its file name."""
    return next((PUBLISHED.loc[name] for name in (source, Path(source).name) if name in PUBLISHED.index), None)


def lacking(name: str, folder: Path) -> list[str]:
    """Of the model of a field ``models.<name>`` the first name of each row of which ``folder`` holds no file."""
    rows = FILES[FILES.index == name].str.split()
    return [names[0] for names in rows if not any((folder / one).is_file() for one in names)]
