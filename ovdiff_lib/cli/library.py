"""``ovdiff library list | verify | export | import | remove``: the prototype library on the command line."""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ovdiff_lib.categories import Category
from ovdiff_lib.cli.options import argument, takes
from ovdiff_lib.errors import InputError, counted
from ovdiff_lib.files import check_output_file, size_text, write_json
from ovdiff_lib.library.store import Entry, Library

PLACE = argument("--library", type=Path,
                 help="the library's folder (default: $OVDIFF_LIBRARY, else the user's cache folder)")
CHOICE = (argument("--classes", help='entries of these words alone, for example "cat, sofa"'),
          argument("--keys", help="entries of these keys, or beginnings of keys, alone"))

Found = list[tuple[Entry, dict[str, Any]]]
"""Entries and what they say of themselves."""


@takes(PLACE, *CHOICE, argument("--json", type=Path, help="write every entry with all it was made from to this file"),
       profile=False)
def show(options: argparse.Namespace) -> None:
    """What is in the library, a line a class."""
    library = _there(options)
    found = chosen(library, options)
    if options.json:
        write_json(options.json, [{"kind": e.kind, "key": e.key, "bytes": e.bytes, "used": e.used, **described}
                                  for e, described in found])
    rows, by_words = [("words", "images", "prototypes of", "entries", "size", "last used")], defaultdict(list)
    for entry, described in found:
        by_words[words_of(described)].append((entry, described))
    for words, group in sorted(by_words.items()):
        images = max((described["images"][0] for entry, described in group if entry.kind == "support"), default="-")
        steps = {described.get("made_from", {}).get("step", "?") for entry, described in group
                 if entry.kind == "prototypes"}
        day = time.strftime("%Y-%m-%d", time.localtime(max(entry.used for entry, _ in group)))
        rows.append((words, str(images), ", ".join(sorted(steps)) or "-", str(len(group)), _size(group), day))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if found else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{counted(len(by_words), 'class', 'classes')}, {_amount(found)} in {library.root}")
    if left := library.leftovers():
        print(f"{counted(len(left), 'leftover')} of interrupted runs or broken entries; "
              "`ovdiff library remove --leftovers` deletes them.")


@takes(PLACE, profile=False)
def verify(options: argparse.Namespace) -> int:
    """Read every entry and check its sums; broken ones are set aside. Exit code 1 if there are any."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    library = _there(options)
    total = len(library.entries())
    with logging_redirect_tqdm():  # what is said of a broken entry has a line of its own
        broken = library.verify(progress=True)
    for entry in broken:
        print(f"broken, set aside: {entry.path}")
    again = " What is broken is built again when it is next wanted." if broken else ""
    print(f"{total - len(broken)} of {total} entries in {library.root} are whole.{again}")
    return 1 if broken else 0


@takes(PLACE, *CHOICE, argument("file", type=Path, help="a .tar, or .tar.gz or .tar.xz to compress it"),
       argument("--overwrite", action="store_true", help="replace the file if it is there"),
       argument("--prototypes-only", action="store_true",
                help="leave support images and masks out: enough to segment with"), profile=False)
def export(options: argparse.Namespace) -> None:
    """Write entries into one file that `import` reads."""
    from ovdiff_lib.library.sharing import export_entries

    library = _there(options)
    if not options.file.absolute().parent.is_dir():
        raise InputError(f"There is no folder {options.file.absolute().parent}; make it, or give a file in another.")
    check_output_file(options.file)
    if options.file.exists() and not options.overwrite:
        raise InputError(f"{options.file} is there already; give another name, or --overwrite to replace it.")
    found = [one for one in chosen(library, options) if one[0].kind == "prototypes" or not options.prototypes_only]
    export_entries([entry for entry, _ in found], options.file, progress=True)
    print(f"{_amount(found)}, in {options.file}")


@takes(PLACE, argument("file", type=Path, help="a file that `export` wrote"), profile=False)
def add(options: argparse.Namespace) -> None:
    """Add the entries of an exported file, once all of them have been verified."""
    from ovdiff_lib.library.sharing import import_archive

    library = Library(options.library)
    done = import_archive(library, options.file, progress=True)
    new, kept = counted(done[True], "new entry", "new entries"), counted(done[False], "entry", "entries")
    print(f"{new} in {library.root}; {kept} were here already.")


@takes(PLACE, *CHOICE,
       argument("--unused-for", type=float, metavar="DAYS", help="those that nobody read for so many days"),
       argument("--all", action="store_true", help="every entry"),
       argument("--leftovers", action="store_true",
                help="what killed runs left and entries that were set aside as broken"),
       argument("--dry-run", action="store_true", help="say what would go, and delete nothing"), profile=False)
def remove(options: argparse.Namespace) -> None:
    """Delete entries, or what interrupted runs left."""
    library, days = _there(options), options.unused_for
    some = options.classes or options.keys or days is not None
    if not (some or options.all or options.leftovers):
        raise InputError("Say what to remove: --classes, --keys, --unused-for DAYS, --all or --leftovers; --dry-run "
                         "shows it first.")
    if days is not None and not 0 < days < math.inf:
        raise InputError(f"--unused-for is {days:g}; give a number of days above 0, or --all for every entry.")
    if options.all and some:
        raise InputError("--all means every entry; leave it out to remove those of --classes, --keys or --unused-for "
                         "alone.")
    gone = "would go" if options.dry_run else "removed"
    if some or options.all:
        latest = math.inf if days is None else time.time() - days * 86400
        found = [one for one in chosen(library, options) if one[0].used < latest]
        for entry, described in found:
            if options.dry_run:
                print(f"{entry.kind} {entry.key}  {words_of(described)}")
            else:
                library.remove(entry.key, entry.kind)
        print(f"{_amount(found)}, {gone} from {library.root}")
    if options.leftovers:
        left = library.leftovers()
        if options.dry_run:
            print(*left, sep="\n")
        count = len(left) if options.dry_run else library.sweep()
        print(f"{counted(count, 'leftover')}, {gone} from {library.root}")


def words_of(described: dict[str, Any]) -> str:
    """The words an entry was made for."""
    return described.get("made_from", {}).get("prompt") or described.get("category", {}).get("prompt") or "(not said)"


def chosen(library: Library, options: argparse.Namespace) -> Found:
    """The entries of the words in --classes and the beginnings of keys in --keys, if given, but for broken ones, which
    `verify` finds. ``InputError`` for words and keys that no entry has."""
    found = library.described()
    for what, given, fits in (
            ("words", options.classes, lambda _, described, name: words_of(described) == Category(name).prompt),
            ("key", options.keys, lambda entry, _, name: entry.key.startswith(name))):
        wanted = [name.strip() for name in (given or "").split(",") if name.strip()]
        for name in wanted:
            if not any(fits(*one, name) for one in found):
                raise InputError(f"No entry of the library {library.root} has the {what} {name!r}; `ovdiff library "
                                 "list` shows what there is.")
        if given is not None:
            found = [one for one in found if any(fits(*one, name) for name in wanted)]
    return found


def _there(options: argparse.Namespace) -> Library:
    """The library that the options name; ``InputError`` without its folder: that is rather a slip than an empty one."""
    library = Library(options.library)
    if not library.root.is_dir():
        raise InputError(f"There is no library folder {library.root}; name one with --library, or build classes, which "
                         "makes it.")
    return library


def _amount(found: Found) -> str:
    return f"{counted(len(found), 'entry', 'entries')}, {_size(found)}"


def _size(found: Found) -> str:
    return size_text(sum(entry.bytes for entry, _ in found))
