"""Which classes are countable things and which are regions of stuff, for the "stuff" filter (Sec. 3.4, App. C.6).

The paper asked ChatGPT; its answers (Table C.8) and the split of COCO-Stuff ship as tables.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError

C8 = Path(__file__).with_name("things_c8.csv")
TABLES = {"c8": C8, "gpt": C8, "coco-stuff": C8.with_name("things_coco_stuff.csv")}
"""Shipped tables: "c8" (or "gpt", who answered) is Table C.8, with a note where its print is unclear; COCO-Stuff: 80
things, 91 stuff."""

SPELLINGS = {
    "aeroplane": "airplane", "diningtable": "table", "dining table": "table", "pottedplant": "plant",
    "potted plant": "plant", "tvmonitor": "monitor", "tv monitor": "monitor", "computer mouse": "mouse",
}
"""Names of VOC and Context, and their usual prompts, as Table C.8 words them."""

KINDS = ("thing", "stuff")
SHOWN = 12

Source = str | Path | Mapping[str, str] | Callable[[str], str | None]


def kinds(names: Vocabulary | Iterable[str | Category] | str, source: Source = "c8",
          default: str | None = None) -> dict[str, str]:
    """"thing" or "stuff" for each name.

    ``source`` is a shipped table ("c8", "coco-stuff"), the path of a CSV file with the columns class and label, a dict,
    or a function of a name (None: not known). Names are compared without case; a table that lacks a class's name is
    asked for its prompt. Names that are not known get ``default``; without one they raise ``InputError``.
    """
    if default not in (None, *KINDS):
        raise InputError(f"The default kind is {default!r}; it must be 'thing' or 'stuff'.")
    look, origin = _reader(source)
    found = {category.name: look(category) or default for category in Vocabulary.of(names)}
    for name, label in found.items():
        if label not in (None, *KINDS):
            raise InputError(f"{origin} calls {name!r} {label!r}; it must say 'thing' or 'stuff'.")
    unknown = [repr(name) for name, label in found.items() if label is None]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise InputError(f"{origin} does not say of {', '.join(unknown[:SHOWN])}{more} whether it is a thing or stuff;"
                         " use a table that does, or a default.")
    return found


def with_kinds(names: Vocabulary | Iterable[str | Category] | str, source: Source = "c8",
               default: str | None = None) -> Vocabulary:
    """The vocabulary of these names with the kinds that :func:`kinds` finds; names and prompts stay."""
    vocabulary = Vocabulary.of(names)
    found = kinds(vocabulary, source, default)
    return Vocabulary(tuple(dataclasses.replace(c, kind=found[c.name]) for c in vocabulary))


def _reader(source: Source) -> tuple[Callable[[Category], str | None], str]:
    """How a category is looked up, and what the source is called in errors."""
    if isinstance(source, Mapping):
        table, spellings, origin = {_key(name): label for name, label in source.items()}, {}, "The table of kinds"
    elif callable(source):
        return lambda category: source(category.name), f"The function {getattr(source, '__name__', 'given')}"
    elif source in TABLES:
        table, spellings, origin = _read(TABLES[source]), SPELLINGS, f"The table {source!r}"
    else:
        table, spellings, origin = _read(Path(source)), {}, f"The table {source}"

    def look(category: Category) -> str | None:
        words = [_key(category.name), _key(category.prompt)]
        return next((table[word] for word in [*words, *map(spellings.get, words)] if word in table), None)

    return look, origin


def _read(path: Path) -> dict[str, str]:
    """Name -> label of a CSV file; ``InputError`` if it is not there, not text, or not such a table."""
    columns = "give a CSV file whose first line is class,label"
    if not path.is_file():
        raise InputError(f"There is no thing / stuff table {str(path)!r}; name c8, coco-stuff, or {columns}.")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The thing / stuff table {path} cannot be read ({error}); {columns}.") from None
    table: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        name, label = ((row.get(column) or "").strip() for column in ("class", "label"))
        if not name or not label:
            raise InputError(f"Line {number} of the thing / stuff table {path} lacks a class or a label; {columns}.")
        if table.setdefault(_key(name), label) != label:
            raise InputError(f"The thing / stuff table {path} calls {name!r} both thing and stuff; keep one.")
    if not table:
        raise InputError(f"The thing / stuff table {path} holds no class; {columns}.")
    return table


def _key(name: str) -> str:
    return Category(name).name.casefold()
