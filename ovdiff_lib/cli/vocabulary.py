"""``ovdiff vocabulary``: the command line of the vocabulary doctor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.reading import parse_assignments


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command: ``command(name, run, help)`` adds one with the options of a profile."""
    from ovdiff_lib.cli.options import _stuff_options

    text = ("Say which classes collide, which words are ambiguous or unknown and which are badly drawn, before any image is segmented; "
            "exit code 1 if a class is not fine.")
    vocabulary = command("vocabulary", run_vocabulary, text)
    vocabulary.add_argument("names", nargs="?", metavar="CLASSES", help='class names, for example "mouse, keyboard, picture frame"')
    vocabulary.add_argument("--classes", help="the same as an option")
    vocabulary.add_argument("--classes-file", type=Path, help="text file with one class name a line")
    vocabulary.add_argument("--stuff", default="", help="which of them are stuff regions")
    _stuff_options(vocabulary)
    vocabulary.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                            help="from which value on something is worth a look or bad (--limit collide_bad=0.4; the report lists all); "
                                 "may be repeated")
    vocabulary.add_argument("--json", type=Path, help="write the report to this file too")


def run_vocabulary(options: argparse.Namespace) -> int:
    """Print the report; 1 if a class is not fine, else 0."""
    from ovdiff_lib.cli.options import _lines, _names, _ovdiff, _vocabulary
    from ovdiff_lib.files import check_output_file
    from ovdiff_lib.workbench.vocabulary.examine import examine
    from ovdiff_lib.workbench.vocabulary.report import Limits, render

    given = [source for source in (options.names, options.classes, options.classes_file) if source is not None]
    if len(given) != 1:
        raise InputError('Name the classes once: ovdiff vocabulary "cat, sofa", or --classes, or --classes-file FILE.')
    limits = Limits.of(parse_assignments(options.limit, "--limit"))
    vocabulary = _vocabulary(_lines(given[0]) if options.classes_file else _names(given[0]), options)
    ovdiff = _ovdiff(options)
    if options.json:
        check_output_file(options.json)  # before classes are drawn
    report = examine(ovdiff, vocabulary, limits=limits)
    if options.json:
        from ovdiff_lib.files import write_atomic

        write_atomic(options.json, report.to_json().encode())
    print(render(report))
    return int(any(c.verdict != "fine" for c in report.classes))
