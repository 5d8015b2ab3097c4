"""How commands declare what they take, what several of them take, and what that stands for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.reading import load_profile, parse_assignments
from ovdiff_lib.profiles.schema import Profile

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff
    from ovdiff_lib.workbench.parallel import Engine

Argument = Callable[[argparse.ArgumentParser], Any]
"""Adds an argument to a command's parser."""


def argument(*names: str, **settings: Any) -> Argument:
    """An argument, as ``ArgumentParser.add_argument`` takes it."""
    return lambda parser: parser.add_argument(*names, **settings)


def takes(*arguments: Argument, profile: bool = True) -> Callable:
    """Decorator of a command, a function of its options: what it takes, first :data:`PROFILE` unless ``profile`` is
    False. Its docstring is the command's help."""
    def declare(run: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
        run.arguments = (*(PROFILE if profile else ()), *arguments)
        return run

    return declare


PROFILE = (
    argument("--profile", default="mini", help="mini, paper, official, or a profile file (default: mini)"),
    argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
             help="replace a profile field; may be repeated"),
    argument("--library", type=Path,
             help="folder that keeps support sets and prototypes (default: the user's cache folder)"))

STUFF = (
    argument("--stuff-from", metavar="c8|coco-stuff|FILE",
             help="which classes are stuff: the paper's Table C.8, the split of COCO-Stuff, or a CSV file with "
                  "class,label"),
    argument("--stuff-default", choices=["thing", "stuff"],
             help="with --stuff-from: what classes are that it does not name"))

ENGINE = (
    argument("--engine", choices=["local", "ray"], default="local",
             help="local: processes of this machine (default); ray: a Ray cluster, all of whose machines must see the "
                  "library, the models and the data under the same paths (a network file system)"),
    argument("--workers", type=int,
             help="processes that work side by side (default: local 1, ray as many as there is room for)"),
    argument("--address", help="with --engine ray: a running cluster, HOST:PORT or auto (default: $RAY_ADDRESS, or a "
                               "Ray on this machine alone, started for the work)"))


def classes(required: bool = True) -> tuple[Argument, ...]:
    """``--classes`` or ``--classes-file``, and which of them are stuff."""
    def add(parser: argparse.ArgumentParser) -> None:
        source = parser.add_mutually_exclusive_group(required=required)
        source.add_argument("--classes", help='class names, for example "cat, sofa"')
        source.add_argument("--classes-file", type=Path, help="text file with one class name a line")

    stuff = argument("--stuff", default="", help='which of them are stuff regions, for example "grass, sky"')
    return (add, stuff, *STUFF)


def profile_of(options: argparse.Namespace) -> Profile:
    """The profile that the options name, its fields replaced."""
    return load_profile(options.profile, parse_assignments(options.set))


def ovdiff_of(options: argparse.Namespace) -> OVDiff:
    """The method that the options ask for; nothing is loaded yet."""
    from ovdiff_lib.pipeline import OVDiff

    return OVDiff(profile_of(options), library=options.library)


def vocabulary_of(options: argparse.Namespace) -> Vocabulary:
    """The classes with their kinds: stuff are those that --stuff names; of the others --stuff-from says it."""
    names = options.classes.split(",") if options.classes and options.classes.strip() else []
    if options.classes_file:
        try:
            names = options.classes_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"The classes file {options.classes_file} cannot be read; give a UTF-8 text file with one "
                             "class a line.") from None
        names = [line for line in names if line.strip()]
    marked = [Category(name).name for name in options.stuff.split(",") if name.strip()]
    vocabulary = Vocabulary.of(names, marked)
    if missing := [name for name in marked if name.casefold() not in {n.casefold() for n in vocabulary.names}]:
        raise InputError(f"--stuff names {missing[0]!r}, which is not among the classes; add it there or remove it.")
    return with_stuff(vocabulary, options, {c.name for c in vocabulary if c.kind == "stuff"})


def with_stuff(vocabulary: Vocabulary, options: argparse.Namespace, known: Container[str] = ()) -> Vocabulary:
    """The vocabulary with the kinds that --stuff-from gives its classes, but for those of the names ``known``."""
    from ovdiff_lib.workbench.data.things import kinds

    if options.stuff_default and not options.stuff_from:
        raise InputError("--stuff-default says what classes are that a table does not name; use it together with "
                         "--stuff-from.")
    asked = [category for category in vocabulary if category.name not in known]
    found = kinds(asked, options.stuff_from, options.stuff_default) if options.stuff_from and asked else {}
    return Vocabulary(tuple(replace(c, kind=found.get(c.name, c.kind)) for c in vocabulary))


def engine_of(options: argparse.Namespace, profile: Profile) -> Engine | None:
    """The engine that the options ask for; None is one step after the other in this process."""
    from ovdiff_lib.workbench.parallel import LocalEngine, RayEngine

    if options.address and options.engine != "ray":
        raise InputError("--address names a Ray cluster; use it together with --engine ray.")
    if options.engine == "ray":
        device = profile.models.device
        # "auto" takes the GPU that Ray gives, where there is one.
        return RayEngine(options.workers, options.address, None if device == "auto" else int(device.startswith("cuda")))
    engine = LocalEngine(1 if options.workers is None else options.workers)
    return engine if engine.workers > 1 else None


def build_with(engine: Engine, ovdiff: OVDiff, vocabulary: Vocabulary) -> None:
    """Build every class into the library of ``ovdiff``, whatever becomes of the others; ``OVDiffError`` after one that
    failed."""
    from ovdiff_lib.keys import check_profile
    from ovdiff_lib.workbench.evaluation.workers import build_classes

    check_profile(ovdiff.profile)
    root = ovdiff.library.root
    failures = build_classes(ovdiff.profile, vocabulary, None, root, engine=engine, progress=ovdiff.progress)
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    if failures:
        raise OVDiffError(f"{len(failures)} of {len(vocabulary)} classes could not be built; the others are in {root}.")
