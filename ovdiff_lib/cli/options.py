"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.profiles.reading import load_profile, parse_assignments
from ovdiff_lib.profiles.schema import Profile

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff
    from ovdiff_lib.workbench.parallel import Engine


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="mini, paper, official, or a profile file (default: mini)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="replace a profile field; may be repeated")
    parser.add_argument("--library", type=Path,
                        help="folder that keeps support sets and prototypes (default: the user's cache folder)")


def profile_of(options: argparse.Namespace) -> Profile:
    """The profile that the options name, its fields replaced."""
    return load_profile(options.profile, parse_assignments(options.set))


def ovdiff_of(options: argparse.Namespace) -> OVDiff:
    """The method that the options ask for; nothing is loaded yet."""
    from ovdiff_lib.pipeline import OVDiff

    return OVDiff(profile_of(options), library=options.library)


def add_stuff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stuff-from", metavar="c8|coco-stuff|FILE",
                        help="which classes are stuff: the paper's Table C.8, the split of COCO-Stuff, or a CSV file "
                             "with class,label")
    parser.add_argument("--stuff-default", choices=["thing", "stuff"],
                        help="with --stuff-from: what classes are that it does not name")


def add_class_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """``--classes`` or ``--classes-file``, and which of them are stuff."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--classes", help='class names, for example "cat, sofa"')
    source.add_argument("--classes-file", type=Path, help="text file with one class name a line")
    parser.add_argument("--stuff", default="", help='which of them are stuff regions, for example "grass, sky"')
    add_stuff_options(parser)


def vocabulary_of(options: argparse.Namespace) -> Vocabulary:
    """The classes with their kinds: stuff are those that --stuff names; of the others --stuff-from says it."""
    from ovdiff_lib.workbench.data.things import kinds

    check_stuff_options(options)
    marked = [Category(s).name for s in options.stuff.split(",") if s.strip()]
    vocabulary = Vocabulary.of(_names(options), marked)
    missing = [s for s in marked if s.casefold() not in {n.casefold() for n in vocabulary.names}]
    if missing:
        raise InputError(f"--stuff names {missing[0]!r}, which is not among the classes; add it to --classes or remove "
                         "it.")
    others = [c for c in vocabulary if c.kind != "stuff"]
    if options.stuff_from and others:
        found = kinds(others, options.stuff_from, options.stuff_default)
        vocabulary = Vocabulary(tuple(Category(c.name, c.prompt, found.get(c.name, c.kind)) for c in vocabulary))
    return vocabulary


def _names(options: argparse.Namespace) -> list[str]:
    if not options.classes_file:
        return options.classes.split(",") if options.classes.strip() else []
    try:
        return [line for line in options.classes_file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise InputError(f"The classes file {options.classes_file} cannot be read; give a UTF-8 text file with one "
                         "class a line.") from None


def check_stuff_options(options: argparse.Namespace) -> None:
    """``InputError`` for ``--stuff-default`` without the table that it completes."""
    if options.stuff_default and not options.stuff_from:
        raise InputError("--stuff-default says what classes are that a table does not name; use it together with "
                         "--stuff-from.")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How many processes do the work, and where."""
    parser.add_argument("--engine", choices=["local", "ray"], default="local",
                        help="local: processes of this machine (default); ray: a Ray cluster, all of whose machines "
                             "must see the library, the models and the data under the same paths (a network file "
                             "system)")
    parser.add_argument("--workers", type=int,
                        help="processes that work side by side (default: local 1, ray as many as there is room for)")
    parser.add_argument("--address",
                        help="with --engine ray: a running cluster, HOST:PORT or auto (default: $RAY_ADDRESS, or a Ray "
                             "on this machine alone, started for the work)")


def engine_of(options: argparse.Namespace, profile: Profile) -> Engine | None:
    """The engine that the options ask for; None is one step after the other in this process. Raises ``InputError`` for
    options that do not go together."""
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
    """Build every class of the vocabulary into the library of ``ovdiff``. The others are built when one fails; each
    that fails is named on stderr, then ``OVDiffError`` is raised."""
    from ovdiff_lib.checks import check_profile
    from ovdiff_lib.workbench.evaluation.workers import build_classes

    check_profile(ovdiff.profile)
    failures = build_classes(ovdiff.profile, vocabulary, None, ovdiff.library.root, engine=engine,
                             progress=ovdiff.progress)
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    if failures:
        raise OVDiffError(f"{len(failures)} of {len(vocabulary)} classes could not be built; the others are in "
                          f"{ovdiff.library.root}.")


def write_json(path: Path, table: Any) -> None:
    """A table as readable JSON, whole or not at all."""
    write_atomic(path, (json.dumps(table, ensure_ascii=False, indent=1) + "\n").encode())
