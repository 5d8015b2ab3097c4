"""Which classes are countable things and which are regions of stuff, for the "stuff" filter (Sec. 3.4, App. C.6).

The paper asked ChatGPT; its answers (Table C.8) and the split of COCO-Stuff ship as tables.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pandas

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError

FOLDER = Path(__file__).parent
TABLES = {"c8": FOLDER / "things_c8.csv", "coco-stuff": FOLDER / "things_coco_stuff.csv"}
"""Shipped tables: "c8" is Table C.8, with a note where its print is unclear; COCO-Stuff: 80 things, 91 stuff."""

SPELLINGS = {
    "aeroplane": "airplane", "diningtable": "table", "dining table": "table", "pottedplant": "plant",
    "potted plant": "plant", "tvmonitor": "monitor", "tv monitor": "monitor", "computer mouse": "mouse",
}
"""Names of VOC and Context, and their usual prompts, as Table C.8 words them."""

SHOWN = 12
"""Unknown names that an error lists."""


def kinds(names: Vocabulary | Iterable[str | Category] | str, source: str | Path = "c8",
          default: str | None = None) -> dict[str, str]:
    """"thing" or "stuff" for each name.

    ``source`` is a shipped table ("c8", "coco-stuff") or the path of a CSV file with the columns class and label. Names
    are compared without case; a table that lacks a class's name is asked for its prompt, then for another spelling of
    either. Names that are not known get ``default``; without one they raise ``InputError``.
    """
    table, found = _read(source), {}
    for category in Vocabulary.of(names):
        words = [_key(category.name), _key(category.prompt)]
        words += [SPELLINGS[word] for word in words if word in SPELLINGS]
        found[category.name] = next((table[word] for word in words if word in table), default)
    unknown = [repr(name) for name, kind in found.items() if kind is None]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise InputError(f"The table {str(source)!r} does not say of {', '.join(unknown[:SHOWN])}{more} whether it is a"
                         " thing or stuff; use a table that does, or a default.")
    return found


def with_kinds(names: Vocabulary | Iterable[str | Category] | str, source: str | Path = "c8",
               default: str | None = None) -> Vocabulary:
    """The vocabulary of these names with the kinds that :func:`kinds` finds; names and prompts stay."""
    vocabulary = Vocabulary.of(names)
    found = kinds(vocabulary, source, default)
    return Vocabulary(tuple(dataclasses.replace(c, kind=found[c.name]) for c in vocabulary))


def _read(source: str | Path) -> dict[str, str]:
    """Name -> kind of a table; ``InputError`` if it is not there, not text, or not such a table."""
    try:
        read = pandas.read_csv(TABLES.get(str(source), source), dtype=str, usecols=["class", "label"], index_col=False,
                               keep_default_na=False, encoding="utf-8-sig").map(_key)
        if len(wrong := read[~read["label"].isin(["thing", "stuff"])]):
            raise ValueError(f"line {wrong.index[0] + 2} says {wrong['label'].iloc[0]!r}, neither thing nor stuff")
        read = read.drop_duplicates()
        if len(both := read[read["class"].duplicated()]):
            raise ValueError(f"it calls {both['class'].iloc[0]!r} both thing and stuff")
    except (OSError, ValueError) as error:
        raise InputError(f"The thing / stuff table {str(source)!r} cannot be used ({str(error).splitlines()[0]}); name"
                         " c8, coco-stuff, or a CSV file whose first line is class,label.") from None
    return dict(zip(read["class"], read["label"], strict=True))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", " ".join(name.split())).casefold()
