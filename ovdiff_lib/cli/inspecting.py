"""``ovdiff doctor | vocabulary | benchmark``: is what a profile needs here, are these classes a good choice, and what
does it cost?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ovdiff_lib.cli.options import argument, classes, ovdiff_of, profile_of, takes, vocabulary_of
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import check_output_file, write_atomic
from ovdiff_lib.profiles.reading import parse_assignments

JSON = argument("--json", type=Path, help="write the report to this file too")


@takes(argument("--data", action="append", default=[], metavar="[NAME=]FOLDER",
                help="a data set's folder; may be repeated"), JSON)
def doctor(options: argparse.Namespace) -> int:
    """Say which models, libraries and data a profile needs, what is here, and how to get the rest."""
    from ovdiff_lib.workbench.doctor import inspect

    report = inspect(profile_of(options), options.data, options.library)
    if options.json:
        write_atomic(options.json, report.to_json().encode())
    print(report)
    return 1 if report.problems else 0


@takes(argument("names", nargs="?", metavar="CLASSES", help='class names, for example "mouse, picture"'),
       *classes(required=False),
       argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                help="from which value on something is worth a look or bad (--limit collide_bad=0.4; the report lists "
                     "all); may be repeated"), JSON)
def vocabulary(options: argparse.Namespace) -> int:
    """Say which classes collide, which words are ambiguous or unknown and which are badly drawn, before any image is
    segmented; exit code 1 if a class is not fine."""
    from ovdiff_lib.workbench.vocabulary.examine import examine
    from ovdiff_lib.workbench.vocabulary.report import Limits

    if [options.names, options.classes, options.classes_file].count(None) != 2:
        raise InputError('Name the classes once: ovdiff vocabulary "cat, sofa", or --classes, or --classes-file FILE.')
    options.classes = options.classes if options.names is None else options.names
    limits, words = Limits.of(parse_assignments(options.limit, "--limit")), vocabulary_of(options)
    ovdiff = ovdiff_of(options)
    if options.json:
        check_output_file(options.json)  # before classes are drawn
    report = examine(ovdiff, words, limits=limits)
    if options.json:
        write_atomic(options.json, report.to_json().encode())
    print(report)
    return int(any(c.verdict != "fine" for c in report.classes))


@takes(argument("--only", metavar="NAME,...", action="append",
                help="only these scenarios; a wrong name lists them (default: all but `sampling-full-size` and "
                     "`kmeans-full-size`, which need 7 GB of memory and some minutes)"),
       argument("--repeats", type=int, default=3, help="rounds of a scenario; ratios are of medians (default: 3)"))
def benchmark(options: argparse.Namespace) -> int:
    """Time and memory as ratios against a named alternative that runs in the same session. Exit code 1 if a bound is
    missed or a scenario fails, else 0."""
    from ovdiff_lib.networks.loading import resolve_device
    from ovdiff_lib.workbench.cost.instruments import machine
    from ovdiff_lib.workbench.cost.scenarios import run

    if options.library:
        raise InputError("The benchmark builds in a temporary library, so that nothing is read that was built before; "
                         "leave out --library.")
    profile = profile_of(options)
    only = [name.strip() for name in ",".join(options.only or ()).split(",") if name.strip()] or None
    if options.only is not None and not only:
        raise InputError("--only names no scenario; name some, or leave it out for all.")
    here, failed = machine(resolve_device(profile)), False
    print(f"profile {profile.name}, {', '.join(f'{name} {value}' for name, value in here.items())}", flush=True)
    try:
        for name, ratios, error in run(profile, only, options.repeats):
            print("\n".join(map(str, ratios)) if not error else f"{name}: FAILED: {error}", flush=True)
            failed |= bool(error) or any(ratio.met is False for ratio in ratios)
    except KeyboardInterrupt:
        print("ovdiff: interrupted; what was measured is printed above.", file=sys.stderr)
        return 130
    return int(failed)
