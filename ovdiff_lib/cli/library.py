"""``ovdiff library list | verify | export | import | remove``: the prototype library on the command line."""

import argparse
from pathlib import Path
from typing import Any

from ovdiff_lib.categories import Category
from ovdiff_lib.cli.options import LIBRARY, argument, takes
from ovdiff_lib.errors import InputError
from ovdiff_lib.library.codec import LAYOUTS
from ovdiff_lib.library.sharing import export_entries, import_archive
from ovdiff_lib.library.store import Entry, Library
from ovdiff_lib.workbench.console import counted, size_text

CHOICE = argument("--classes", default="", help='entries of these words alone, for example "cat, sofa"')


@takes(LIBRARY, CHOICE, profile=False)
def show(options: argparse.Namespace) -> None:
    """What is in the library, a line a class: how many entries of each kind, and their size."""
    import pandas as pd

    library = Library(options.library)
    found = _chosen(library, options)
    rows = [{"words": _words(described), entry.kind: 1, "size": entry.bytes} for entry, described in found]
    table = pd.DataFrame(rows, columns=["words", *LAYOUTS, "size"]).groupby("words").sum()
    if rows:
        print(table.to_string(float_format="{:.0f}".format, formatters={"size": size_text}))
    print(f"{counted(len(table), 'class', 'classes')}, {_amount(found)} in {library.root}")
    if left := library.leftovers():
        print(f"{counted(len(left), 'leftover')} of interrupted runs or broken entries; "
              "`ovdiff library remove --leftovers` deletes them.")


@takes(LIBRARY, profile=False)
def verify(options: argparse.Namespace) -> int:
    """Read every entry and check its sums; broken ones are set aside, to be built again (exit code 1)."""
    library = Library(options.library)
    total, broken = len(library.entries()), library.verify()
    print(f"{total - len(broken)} of {total} entries in {library.root} are whole.")
    return int(bool(broken))


@takes(LIBRARY, CHOICE, argument("file", type=Path, help="the .tar to write"),
       argument("--prototypes-only", action="store_true",
                help="leave support images and masks out: enough to segment with"), profile=False)
def export(options: argparse.Namespace) -> None:
    """Write entries into one file that `import` reads, in place of one that is there."""
    library = Library(options.library)
    found = [one for one in _chosen(library, options) if one[0].kind == "prototypes" or not options.prototypes_only]
    export_entries([entry for entry, _ in found], options.file)
    print(f"{_amount(found)}, in {options.file}")


@takes(LIBRARY, argument("file", type=Path, help="a file that `export` wrote"), profile=False)
def add(options: argparse.Namespace) -> None:
    """Add the entries of an exported file, once all of them have been verified."""
    library = Library(options.library)
    done = import_archive(library, options.file)
    new, kept = counted(done[True], "new entry", "new entries"), counted(done[False], "entry", "entries")
    print(f"{new} in {library.root}; {kept} were here already.")


@takes(LIBRARY, CHOICE,
       argument("--leftovers", action="store_true",
                help="what killed runs left and entries that were set aside as broken"), profile=False)
def remove(options: argparse.Namespace) -> None:
    """Delete entries, or what interrupted runs left."""
    library = Library(options.library)
    if not (options.classes or options.leftovers):
        raise InputError(f"Say what to remove: --classes or --leftovers; all is in the folder {library.root}.")
    found = _chosen(library, options) if options.classes else []
    for entry, _ in found:
        library.remove(entry.kind, entry.key)
    swept = library.sweep() if options.leftovers else 0
    print(f"{_amount(found)} and {counted(swept, 'leftover')} removed from {library.root}")


def _words(described: dict[str, Any], alone: bool = False) -> str:
    """The words an entry was made for; of own pictures, unless ``alone``, with their key, as ``--class`` takes both."""
    origin = described.get("made_from", {})
    pictures = described["key"] if origin.get("step") == "pictures" else origin.get("pictures")
    words = origin.get("prompt") or described.get("category", {}).get("prompt") or "(not said)"
    return words if alone or not pictures else f"{words}={pictures}"


def _chosen(library: Library, options: argparse.Namespace) -> list[tuple[Entry, dict[str, Any]]]:
    """Entries, those of --classes if given, with what they say of themselves; ``InputError`` for words none has."""
    found = library.described()
    wanted = [Category(name).prompt for name in options.classes.split(",") if name.strip()]
    for words in wanted:
        if not any(_words(described, alone=True) == words for _, described in found):
            raise InputError(f"No entry of {library.root} has the words {words!r}; `ovdiff library list` shows all.")
    return [one for one in found if not options.classes or _words(one[1], alone=True) in wanted]


def _amount(found: list[tuple[Entry, dict[str, Any]]]) -> str:
    return f"{counted(len(found), 'entry', 'entries')}, {size_text(sum(entry.bytes for entry, _ in found))}"
