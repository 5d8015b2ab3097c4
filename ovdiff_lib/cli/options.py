"""Options that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.reading import parse_assignments
from ovdiff_lib.profiles.schema import Profile

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff
    from ovdiff_lib.workbench.engines.base import Engine




def _ovdiff(options: argparse.Namespace):
    from ovdiff_lib.pipeline import OVDiff

    return OVDiff(options.profile, parse_assignments(options.set, "--set"), library=options.library)


def _names(classes: str) -> list[str]:
    return classes.split(",") if classes.strip() else []


def _lines(path: Path) -> list[str]:
    """The class names of a file with one a line."""
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise InputError(f"The classes file {path} cannot be read; give a UTF-8 text file with one class a line.") from None


def _stuff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stuff-from", metavar="c8|coco-stuff|FILE",
                        help="which classes are stuff: the paper's Table C.8, the split of COCO-Stuff, or a CSV file with class,label")
    parser.add_argument("--stuff-default", choices=["thing", "stuff"], help="with --stuff-from: what classes are that it does not name")


def _vocabulary(classes: list[str], options: argparse.Namespace):
    """The classes with their kinds: stuff are those that --stuff names; of the others --stuff-from says it."""
    from ovdiff_lib.categories import Category, Vocabulary
    from ovdiff_lib.cli.options import check_stuff_options
    from ovdiff_lib.workbench.data.things import kinds

    check_stuff_options(options)
    marked = [Category(s).name for s in options.stuff.split(",") if s.strip()]
    vocabulary = Vocabulary.of(classes, marked)
    missing = [s for s in marked if s.casefold() not in {n.casefold() for n in vocabulary.names}]
    if missing:
        raise InputError(f"--stuff names {missing[0]!r}, which is not among the classes; add it to --classes or remove it.")
    others = [c for c in vocabulary if c.kind != "stuff"]
    if options.stuff_from and others:
        found = kinds(others, options.stuff_from, options.stuff_default)
        vocabulary = Vocabulary(tuple(Category(c.name, c.prompt, found.get(c.name, c.kind)) for c in vocabulary))
    return vocabulary


# ------------------------------------------------------------------ The options ``--engine``, ``--workers`` and ``--address`` of commands that can use more than one process.


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command."""
    parser.add_argument("--engine", choices=["local", "ray"], default="local",
                        help="local: processes of this machine (default); ray: a Ray cluster, all of whose machines must see the library,"
                             " the models and the data under the same paths (a network file system)")
    parser.add_argument("--workers", type=int, help="processes that work side by side (default: local 1, ray as many as there is room for)")
    parser.add_argument("--address", help="with --engine ray: a running cluster, HOST:PORT or auto (default: $RAY_ADDRESS, or a Ray on this"
                                          " machine alone, started for the work)")


def engine_of(options: argparse.Namespace, profile: Profile) -> Engine | None:
    """The engine that the options ask for; None is one step after the other in this process. Raises ``InputError`` for options that do
    not go together."""
    from ovdiff_lib.workbench.engines.local import LocalEngine
    from ovdiff_lib.workbench.engines.ray import RayEngine

    if options.address and options.engine != "ray":
        raise InputError("--address names a Ray cluster; use it together with --engine ray.")
    if options.engine == "ray":
        device = profile.models.device
        # "auto" takes the GPU that Ray gives, where there is one.
        return RayEngine(options.workers, options.address, None if device == "auto" else int(device.startswith("cuda")))
    engine = LocalEngine(1 if options.workers is None else options.workers)
    return engine if engine.workers > 1 else None


def build_with(engine: Engine, ovdiff: OVDiff, vocabulary: Vocabulary) -> None:
    """Build every class of the vocabulary into the library of ``ovdiff``. The others are built when one fails; each that fails is named on
    stderr, then ``OVDiffError`` is raised."""
    from ovdiff_lib.checks import check_profile
    from ovdiff_lib.workbench.evaluation.building import build_classes

    check_profile(ovdiff.profile)
    failures = build_classes(ovdiff.profile, vocabulary, None, ovdiff.library.root, engine=engine, progress=ovdiff.progress)
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    if failures:
        raise OVDiffError(f"{len(failures)} of {len(vocabulary)} classes could not be built; the others are in {ovdiff.library.root}.")


def check_stuff_options(options: argparse.Namespace) -> None:
    """``InputError`` for ``--stuff-default`` without the table that it completes."""
    if getattr(options, "stuff_default", None) and not options.stuff_from:
        raise InputError("--stuff-default says what classes are that a table does not name; use it together with --stuff-from.")
