"""``ovdiff doctor`` (is what a profile needs here?) and ``ovdiff vocabulary`` (are these classes a good choice?)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ovdiff_lib.cli.options import add_class_options, ovdiff_of, profile_of, vocabulary_of
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import check_output_file, write_atomic
from ovdiff_lib.profiles.reading import parse_assignments


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both commands: ``command(name, run, help)`` adds one with the options of a profile."""
    doctor = command("doctor", run_doctor,
                     "Say which models, libraries and data a profile needs, what is here, and how to get the rest.")
    doctor.add_argument("--data", action="append", default=[], metavar="[NAME=]FOLDER",
                        help="a data set's folder; may be repeated")
    vocabulary = command("vocabulary", run_vocabulary,
                         "Say which classes collide, which words are ambiguous or unknown and which are badly drawn, "
                         "before any image is segmented; exit code 1 if a class is not fine.")
    vocabulary.add_argument("names", nargs="?", metavar="CLASSES", help='class names, for example "mouse, picture"')
    add_class_options(vocabulary, required=False)
    vocabulary.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                            help="from which value on something is worth a look or bad (--limit collide_bad=0.4; "
                                 "the report lists all); may be repeated")
    for sub in (doctor, vocabulary):
        sub.add_argument("--json", type=Path, help="write the report to this file too")


def run_doctor(options: argparse.Namespace) -> int:
    """Print the report; 1 if something is missing, else 0."""
    from ovdiff_lib.workbench.doctor import inspect

    report = inspect(profile_of(options), options.data, options.library)
    if options.json:
        write_atomic(options.json, report.to_json().encode())
    print(report)
    return 1 if report.problems else 0


def run_vocabulary(options: argparse.Namespace) -> int:
    """Print the report; 1 if a class is not fine, else 0."""
    from ovdiff_lib.workbench.vocabulary.examine import examine
    from ovdiff_lib.workbench.vocabulary.report import Limits

    given = [source for source in (options.names, options.classes, options.classes_file) if source is not None]
    if len(given) != 1:
        raise InputError('Name the classes once: ovdiff vocabulary "cat, sofa", or --classes, or --classes-file FILE.')
    options.classes = options.classes if options.names is None else options.names
    limits, vocabulary = Limits.of(parse_assignments(options.limit, "--limit")), vocabulary_of(options)
    ovdiff = ovdiff_of(options)
    if options.json:
        check_output_file(options.json)  # before classes are drawn
    report = examine(ovdiff, vocabulary, limits=limits)
    if options.json:
        write_atomic(options.json, report.to_json().encode())
    print(report)
    return int(any(c.verdict != "fine" for c in report.classes))
