"""The command line: ``ovdiff segment | build``, and the commands of the other modules here.

Errors a user can cause end in one sentence on stderr and exit code 2; what was carried out with a bad result (a
notebook that failed, tables that differ) ends with exit code 1; ctrl-C ends with exit code 130 and
leaves no half-written file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ovdiff_lib.cli import benchmark, doctors, evaluate, library, notebooks
from ovdiff_lib.cli.options import (
    add_class_options,
    add_engine_options,
    add_profile_options,
    build_with,
    engine_of,
    ovdiff_of,
    vocabulary_of,
)
from ovdiff_lib.errors import InputError, OVDiffError, counted


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
    parser = argparse.ArgumentParser(
        prog="ovdiff", description="Training-free open-vocabulary segmentation from words (OVDiff).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def bare(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = bare(name, run, text)
        add_profile_options(sub)
        return sub

    segment = command("segment", run_segment, "Label the pixels of an image, or of every image in a folder.")
    segment.add_argument("image", type=Path, help="an image (PNG, JPEG, WebP) or a folder of them")
    add_class_options(segment)
    segment.add_argument("--out", type=Path, default=Path("out"),
                         help="folder for label maps, overlays and JSON (default: out)")
    build = command("build", run_build, "Build the prototypes of classes into the library.")
    add_class_options(build)
    add_engine_options(build)
    evaluate.add_commands(command, bare)
    notebooks.add_commands(command, bare)
    benchmark.add_command(command)
    doctors.add_commands(command)
    library.add_commands(bare)
    return parser


def run_segment(options: argparse.Namespace) -> None:
    """Write the results of every image; those that cannot be read are named, and the others done."""
    import tqdm

    from ovdiff_lib.cli.results import output_stems, write_segmentation
    from ovdiff_lib.files import check_output, shown
    from ovdiff_lib.images import list_images, read_image
    from ovdiff_lib.matching.windows import check_image

    vocabulary, paths = vocabulary_of(options), list_images(options.image)
    if len(paths) == 1:
        check_image(read_image(paths[0]))  # a broken image is reported before classes are built
    ovdiff = ovdiff_of(options)
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
        raise InputError(f"{len(broken)} of {len(paths)} images could not be segmented; the others are in "
                         f"{shown(options.out)}.")
    example = f" ({shown(written[0].name)}, ...)" if len(paths) == 1 else ""
    print(f"{counted(len(paths), 'image')} segmented; results in {shown(options.out)}{example}")


def run_build(options: argparse.Namespace) -> None:
    """Build the classes, side by side where the options ask for it, and say how many prototypes there are."""
    vocabulary, ovdiff = vocabulary_of(options), ovdiff_of(options)
    engine, started = engine_of(options, ovdiff.profile), time.time()
    if engine:
        build_with(engine, ovdiff, vocabulary)
    bank = ovdiff.build(vocabulary)
    for name in bank.extractors:
        counts = sum(len(p) for p in bank.prototypes[name])
        print(f"{counted(len(bank.vocabulary), 'class', 'classes')}, {counted(counts, 'prototype')} of extractor "
              f"{name!r}, {time.time() - started:.0f} s, in {ovdiff.library.root}")


if __name__ == "__main__":
    sys.exit(main())
