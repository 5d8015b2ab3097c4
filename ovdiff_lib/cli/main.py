"""The command line: ``ovdiff segment | build | evaluate | convert | doctor | vocabulary | run | reproduce | compare-tables``.

Errors a user can cause end in one sentence on stderr and exit code 2; what was carried out with a bad result (a notebook that failed,
tables that differ) ends with exit code 1; ctrl-C ends with exit code 130 and leaves no half-written file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ovdiff_lib.cli.options import _lines, _names, _ovdiff, _stuff_options, _vocabulary
from ovdiff_lib.errors import InputError, OVDiffError, counted
from ovdiff_lib.profiles.reading import parse_assignments


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``ovdiff`` command; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options) or 0
    except OVDiffError as error:
        print(f"ovdiff: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ovdiff: interrupted; what is finished is kept, run the same command again to go on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ovdiff", description="Training-free open-vocabulary segmentation from words (OVDiff).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--profile", default="mini", help="mini, paper, official, or a profile file (default: mini)")
        sub.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                         help="replace a profile field; may be repeated")
        sub.add_argument("--library", type=Path, help="folder that keeps support sets and prototypes (default: the user's cache folder)")
        return sub

    segment = command("segment", _segment, "Label the pixels of an image, or of every image in a folder.")
    segment.add_argument("image", type=Path, help="an image (PNG, JPEG, WebP) or a folder of them")
    segment.add_argument("--classes", required=True, help='class names, for example "cat, sofa"')
    segment.add_argument("--stuff", default="", help='which of them are stuff regions, for example "grass, sky"')
    _stuff_options(segment)
    segment.add_argument("--out", type=Path, default=Path("out"), help="folder for label maps, overlays and JSON (default: out)")

    build = command("build", _build, "Build the prototypes of classes into the library.")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--classes", help='class names, for example "cat, sofa"')
    source.add_argument("--classes-file", type=Path, help="text file with one class name a line")
    build.add_argument("--stuff", default="", help="which of them are stuff regions")
    _stuff_options(build)
    from ovdiff_lib.cli.options import add_engine_options

    add_engine_options(build)

    from ovdiff_lib.cli.evaluate import add_commands

    add_commands(commands, command, _ovdiff)
    from ovdiff_lib.cli.notebooks import add_command

    add_command(command)
    from ovdiff_lib.cli.benchmark import add_command as add_benchmark

    add_benchmark(command)
    _stuff_options(commands.choices["evaluate"])

    doctor = command("doctor", _doctor, "Say which models, libraries and data a profile needs, what is here, and how to get the rest.")
    doctor.add_argument("--data", action="append", default=[], metavar="[NAME=]FOLDER", help="a data set's folder; may be repeated")
    doctor.add_argument("--json", type=Path, help="write the report to this file too")

    from ovdiff_lib.cli.vocabulary import add_commands as add_vocabulary_commands

    add_vocabulary_commands(command)

    from ovdiff_lib.cli.library import add_commands as add_library_commands

    add_library_commands(commands)

    from ovdiff_lib.cli.notebooks import add_commands as add_notebook_commands

    add_notebook_commands(commands, command)
    return parser


def _segment(options: argparse.Namespace) -> None:
    import tqdm

    from ovdiff_lib.cli.results import output_stems, write_segmentation
    from ovdiff_lib.files import check_output, shown
    from ovdiff_lib.images import list_images, read_image
    from ovdiff_lib.matching.windows import check_image

    vocabulary = _vocabulary(_names(options.classes), options)
    paths = list_images(options.image)
    if len(paths) == 1:
        check_image(read_image(paths[0]))  # a broken image is reported before classes are built
    ovdiff = _ovdiff(options)
    check_output(options.out)
    bank = ovdiff.build(vocabulary)
    broken, read = [], []

    def images():
        for path, stem in zip(paths, output_stems(paths), strict=True):
            try:
                image = read_image(path)
                check_image(image)
            except InputError as error:
                broken.append(str(error) if shown(path) in str(error) else f"{shown(path)}: {error}")
                bar.update()
                continue
            read.append(stem)
            yield image

    with tqdm.tqdm(total=len(paths), desc="segmenting", unit="image", disable=len(paths) == 1) as bar:
        for number, result in enumerate(ovdiff.segment_many(images(), bank)):
            written = write_segmentation(result, options.out, read[number], ovdiff.profile)
            bar.update()
    for message in broken:
        print(f"ovdiff: {message}", file=sys.stderr)
    if broken:
        raise InputError(f"{len(broken)} of {len(paths)} images could not be segmented; the others are in {shown(options.out)}.")
    example = f" ({shown(written[0].name)}, ...)" if len(paths) == 1 else ""
    print(f"{len(paths)} image{'s' * (len(paths) > 1)} segmented; results in {shown(options.out)}{example}")


def _build(options: argparse.Namespace) -> None:
    from ovdiff_lib.cli.options import build_with, engine_of

    vocabulary = _vocabulary(_lines(options.classes_file) if options.classes_file else _names(options.classes), options)
    ovdiff = _ovdiff(options)
    engine, started = engine_of(options, ovdiff.profile), time.time()
    if engine:
        build_with(engine, ovdiff, vocabulary)
    bank = ovdiff.build(vocabulary)
    for name in bank.extractors:
        counts = sum(len(p) for p in bank.prototypes[name])
        print(f"{counted(len(bank.vocabulary), 'class', 'classes')}, {counted(counts, 'prototype')} of extractor {name!r}, "
              f"{time.time() - started:.0f} s, in {ovdiff.library.root}")


def _doctor(options: argparse.Namespace) -> int:
    from ovdiff_lib.profiles.reading import load_profile
    from ovdiff_lib.workbench.doctor import examine, render

    report = examine(load_profile(options.profile, parse_assignments(options.set, "--set")), options.data, options.library)
    if options.json:
        from ovdiff_lib.files import write_atomic

        write_atomic(options.json, report.to_json().encode())
    print(render(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
