"""``ovdiff library list | verify | export | import | remove``: the prototype library on the command line."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ovdiff_lib.categories import Category
from ovdiff_lib.cli.options import write_json
from ovdiff_lib.errors import InputError, counted
from ovdiff_lib.files import check_output_file, size_text
from ovdiff_lib.library.store import Entry, Library


def add_commands(bare: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``library`` with its own commands; ``bare(name, run, help)`` adds a command without options."""
    library = bare("library", None, "Show, check, share and clear the prototype library.")
    own = library.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, choice: bool = True) -> argparse.ArgumentParser:
        sub = own.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--library", type=Path,
                         help="the library's folder (default: $OVDIFF_LIBRARY, else the user's cache folder)")
        if choice:
            sub.add_argument("--classes", help='entries of these words alone, for example "cat, sofa"')
            sub.add_argument("--keys", help="entries of these keys, or beginnings of keys, alone")
        return sub

    show = command("list", _list, "What is in the library, a line a class.")
    show.add_argument("--json", type=Path, help="write every entry with all it was made from to this file")
    command("verify", _verify,
            "Read every entry and check its sums; broken ones are set aside. Exit code 1 if there are any.",
            choice=False)
    export = command("export", _export, "Write entries into one file that `import` reads.")
    export.add_argument("file", type=Path, help="a .tar, or .tar.gz or .tar.xz to compress it")
    export.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    export.add_argument("--prototypes-only", action="store_true",
                        help="leave support images and masks out: enough to segment with")
    imported = command("import", _import, "Add the entries of an exported file, once all of them have been verified.",
                       choice=False)
    imported.add_argument("file", type=Path, help="a file that `export` wrote")
    remove = command("remove", _remove, "Delete entries, or what interrupted runs left.")
    remove.add_argument("--unused-for", type=float, metavar="DAYS", help="those that nobody read for so many days")
    remove.add_argument("--all", action="store_true", help="every entry")
    remove.add_argument("--leftovers", action="store_true",
                        help="what killed runs left and entries that were set aside as broken")
    remove.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")


def words_of(described: dict[str, Any]) -> str:
    """The words an entry was made for."""
    return described.get("made_from", {}).get("prompt") or described.get("category", {}).get("prompt") or "(not said)"


def chosen(library: Library, classes: str | None = None, keys: str | None = None) -> list[tuple[Entry, dict[str, Any]]]:
    """Entries and their descriptions, of the words in ``classes`` and the beginnings of keys in ``keys`` if given.

    Raises ``InputError`` for words and keys that no entry has. Broken entries are left out: `verify` finds them.
    """
    found = []
    for entry in library.entries():
        with contextlib.suppress(InputError):
            found.append((entry, library.describe(entry)))
    for what, given, fits in (("words", classes, lambda _, made, name: words_of(made) == Category(name).prompt),
                              ("key", keys, lambda entry, _, name: entry.key.startswith(name))):
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


def _list(options: argparse.Namespace) -> None:
    library = _there(options)
    found = chosen(library, options.classes, options.keys)
    if options.json:
        write_json(options.json, [{"kind": e.kind, "key": e.key, "bytes": e.bytes, "used": e.used, **described}
                                  for e, described in found])
    rows, by_words = [("words", "images", "prototypes of", "entries", "size", "last used")], defaultdict(list)
    for entry, described in found:
        by_words[words_of(described)].append((entry, described))
    for words, group in sorted(by_words.items()):
        images = max((described["images"][0] for entry, described in group if entry.kind == "support"), default="-")
        made_from = [described.get("made_from", {}) for entry, described in group if entry.kind == "prototypes"]
        steps = {table.get("step", "?") for table in made_from}
        day = time.strftime("%Y-%m-%d", time.localtime(max(entry.used for entry, _ in group)))
        size = _size(entry for entry, _ in group)
        rows.append((words, str(images), ", ".join(sorted(steps)) or "-", str(len(group)), size, day))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if found else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{counted(len(by_words), 'class', 'classes')}, {_amount(found)} in {library.root}")
    if left := library.leftovers():
        print(f"{counted(len(left), 'leftover')} of interrupted runs or broken entries; "
              "`ovdiff library remove --leftovers` deletes them.")


def _verify(options: argparse.Namespace) -> int:
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


def _export(options: argparse.Namespace) -> None:
    from ovdiff_lib.library.sharing import export_entries

    library = _there(options)
    if not options.file.absolute().parent.is_dir():
        raise InputError(f"There is no folder {options.file.absolute().parent}; make it, or give a file in another.")
    check_output_file(options.file)
    if options.file.exists() and not options.overwrite:
        raise InputError(f"{options.file} is there already; give another name, or --overwrite to replace it.")
    entries = [entry for entry, _ in chosen(library, options.classes, options.keys)
               if entry.kind == "prototypes" or not options.prototypes_only]
    count = export_entries(library, entries, options.file, progress=True)
    print(f"{counted(count, 'entry', 'entries')}, {_size(entries)}, in {options.file}")


def _import(options: argparse.Namespace) -> None:
    from ovdiff_lib.library.sharing import import_archive

    library = Library(options.library)
    done = import_archive(library, options.file, progress=True)
    print(f"{counted(done.new, 'new entry', 'new entries')} in {library.root}; "
          f"{counted(done.grown, 'support set')} grew, {counted(done.kept, 'entry', 'entries')} were here already.")


def _remove(options: argparse.Namespace) -> None:
    library = _there(options)
    selected = options.classes or options.keys or options.all or options.unused_for is not None
    if not (selected or options.leftovers):
        raise InputError("Say what to remove: --classes, --keys, --unused-for DAYS, --all or --leftovers; --dry-run "
                         "shows it first.")
    if options.unused_for is not None and not 0 < options.unused_for < math.inf:
        raise InputError(f"--unused-for is {options.unused_for:g}; give a number of days above 0, or --all for every "
                         "entry.")
    if options.all and (options.classes or options.keys or options.unused_for is not None):
        raise InputError("--all means every entry; leave it out to remove those of --classes, --keys or --unused-for "
                         "alone.")
    gone = "would go" if options.dry_run else "removed"
    if selected:
        found = chosen(library, options.classes, options.keys)
        if options.unused_for is not None:
            oldest = time.time() - options.unused_for * 86400
            found = [one for one in found if one[0].used < oldest]
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
        count = len(left) if options.dry_run else library.sweep()[0]
        print(f"{counted(count, 'leftover')}, {gone} from {library.root}")


def _amount(found: list[tuple[Entry, dict[str, Any]]]) -> str:
    return f"{counted(len(found), 'entry', 'entries')}, {_size(entry for entry, _ in found)}"


def _size(entries: Iterable[Entry]) -> str:
    return size_text(sum(entry.bytes for entry in entries))
