"""Which classes are countable things and which are regions of stuff, for the "stuff" filter (Sec. 3.4, App. C.6).

The paper asked ChatGPT; its answers (Table C.8) and the split of COCO-Stuff ship as tables. Anything else that knows will do.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError

FOLDER = Path(__file__).parent
TABLES = {"c8": FOLDER / "things_c8.csv", "gpt": FOLDER / "things_c8.csv", "coco-stuff": FOLDER / "things_coco_stuff.csv"}
"""Shipped tables: "c8" (or "gpt", who answered) is Table C.8, with a note where its print is unclear; COCO-Stuff: 80 things, 91 stuff."""

SPELLINGS = {
    "aeroplane": "airplane", "diningtable": "table", "dining table": "table", "pottedplant": "plant", "potted plant": "plant",
    "tvmonitor": "monitor", "tv monitor": "monitor", "computer mouse": "mouse",
}
"""Names of VOC and Context, and their usual prompts, as Table C.8 words them."""

KINDS = ("thing", "stuff")
SHOWN = 12

Source = str | Path | Mapping[str, str] | Callable[[str], str]


def kinds(names: Vocabulary | Iterable[str | Category] | str, source: Source = "c8", default: str | None = None) -> dict[str, str]:
    """"thing" or "stuff" for each name.

    ``source`` is a shipped table ("c8", "coco-stuff"), the path of a CSV file with the columns class and label, a dict, or a function of
    a name that returns one of the two, or None for a name it does not know. Names are compared without case; a table that lacks
    a class's name is asked for its prompt. ``default`` is for names that are in neither; without one they raise ``InputError``,
    as does a label that is none.
    """
    if default not in (None, *KINDS):
        raise InputError(f"The default kind is {default!r}; it must be 'thing' or 'stuff'.")
    look, origin = _reader(source)
    found, unknown = {}, []
    for category in Vocabulary.of(names):
        label = look(category)
        label = default if label is None else label
        if label is None:
            unknown.append(category.name)
        elif label not in KINDS:
            raise InputError(f"{origin} calls {category.name!r} {label!r}; it must say 'thing' or 'stuff'.")
        else:
            found[category.name] = label
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise InputError(f"{origin} does not say whether {', '.join(map(repr, unknown[:SHOWN]))}{more} "
                         f"{'is a thing' if len(unknown) == 1 else 'are things'} or stuff; use a table that does, or a default.")
    return found


def with_kinds(names: Vocabulary | Iterable[str | Category] | str, source: Source = "c8", default: str | None = None) -> Vocabulary:
    """The vocabulary of these names with the kinds that :func:`kinds` finds; names and prompts stay."""
    vocabulary = Vocabulary.of(names)
    found = kinds(vocabulary, source, default)
    return Vocabulary(tuple(dataclasses.replace(c, kind=found[c.name]) for c in vocabulary))


def _reader(source: Source) -> tuple[Callable[[Category], str | None], str]:
    """How a category is looked up, and what the source is called in errors."""
    if isinstance(source, Mapping):
        return _lookup({_key(name): label for name, label in source.items()}), "The table of kinds"
    if callable(source):
        return lambda category: source(category.name), f"The function {getattr(source, '__name__', 'given')}"
    if source in TABLES:
        return _lookup(_read(TABLES[source]), SPELLINGS), f"The table {source!r}"
    return _lookup(_read(Path(source))), f"The table {source}"


def _lookup(table: dict[str, str], spellings: Mapping[str, str] | None = None) -> Callable[[Category], str | None]:
    def look(category: Category) -> str | None:
        words = [_key(category.name), _key(category.prompt)]
        words += [spellings[word] for word in words if word in (spellings or {})]
        return next((table[word] for word in words if word in table), None)

    return look


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
        name, label = (row.get(column) for column in ("class", "label"))
        if not (name or "").strip() or not (label or "").strip():
            raise InputError(f"Line {number} of the thing / stuff table {path} lacks a class or a label; {columns}.")
        if table.setdefault(_key(name), label.strip()) != label.strip():
            raise InputError(f"The thing / stuff table {path} calls {name.strip()!r} both thing and stuff; keep one.")
    if not table:
        raise InputError(f"The thing / stuff table {path} holds no class; {columns}.")
    return table


def _key(name: str) -> str:
    return Category(name).name.casefold()
