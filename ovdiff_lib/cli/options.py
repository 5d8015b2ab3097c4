"""How commands declare what they take, what several of them take, and what that stands for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.library.codec import KEY
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.console import parse_assignments
from ovdiff_lib.workbench.parallel import Engine, LocalEngine, RayEngine

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff
    from ovdiff_lib.types import PrototypeBank


def argument(*names: str, **settings: Any) -> Callable[[argparse.ArgumentParser], Any]:
    """Adds an argument, as ``ArgumentParser.add_argument`` takes it, to a command's parser."""
    return lambda parser: parser.add_argument(*names, **settings)


def takes(*arguments: Callable[[argparse.ArgumentParser], Any], profile: bool = True) -> Callable:
    """Decorator of a command, a function of its options: what it takes, with ``profile`` first :data:`PROFILE`."""
    def declare(run: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
        run.arguments = (*(PROFILE if profile else ()), *arguments)
        return run

    return declare


LIBRARY = argument("--library", type=Path,
                   help="folder of support sets and prototypes (default: $OVDIFF_LIBRARY, else the user's cache)")

PROFILE = (
    argument("--profile", default="mini", help="mini, paper, official, or a profile file (default: mini)"),
    argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
             help="replace a profile field; may be repeated"),
    LIBRARY)

ENGINE = (
    argument("--engine", choices=["local", "ray"], default="local",
             help="local: this machine (default); ray: the Ray cluster at $RAY_ADDRESS, all of whose machines must see "
                  "library, models and data under the same paths, or a Ray on this machine"),
    argument("--workers", type=int, help="processes side by side (default: local 1, ray as many as there is room for)"))


def _classes(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--classes", help='class names, for example "cat, sofa"')
    source.add_argument("--class", dest="own", action="append", metavar="NAME[=FOLDER]",
                        help="a class by itself, drawn, or with the pictures in FOLDER in place of drawings "
                             "(room_mask.png: the mask of room.jpg; or none has one), or those that "
                             "`ovdiff library list` shows with this key; may be repeated")


STUFF = argument("--stuff", default="", help='which of them are stuff regions, for example "grass, sky"')

CLASSES = (_classes, STUFF)
"""The classes by their names, or one by one, with pictures of one's own; and which of them are stuff."""


def profile_of(options: argparse.Namespace) -> Profile:
    """The profile that the options name, its fields replaced."""
    return load_profile(options.profile, parse_assignments(options.set))


def ovdiff_of(options: argparse.Namespace) -> OVDiff:
    """The method that the options ask for; nothing is loaded yet."""
    from ovdiff_lib.pipeline import OVDiff

    return OVDiff(profile_of(options), library=options.library)


def vocabulary_of(options: argparse.Namespace, ovdiff: OVDiff) -> Vocabulary:
    """The classes with kinds and the pictures that ``--class`` names, by folder, for ``ovdiff`` to keep, or by key."""
    given = [one.partition("=")[::2] for one in getattr(options, "own", None) or ()]
    vocabulary = Vocabulary.of(options.classes or [name for name, _ in given], options.stuff)
    known = {category.name.casefold() for category in vocabulary}
    for name in options.stuff.split(","):
        if name.strip() and Category(name).name.casefold() not in known:
            raise InputError(f"--stuff names {name!r}, which is not among the classes; add it there or remove it.")
    if not given:
        return vocabulary
    from ovdiff_lib.keys import for_pictures
    from ovdiff_lib.library.own import with_pictures

    sources: dict[str, str | Category | Path] = {}
    for category, (_, source) in zip(vocabulary, given, strict=True):
        stored = KEY.fullmatch(source) and not Path(source).exists()
        sources[category.name] = (replace(category, pictures=source) if stored else Path(source) if source
                                  else category.prompt)
    return with_pictures(ovdiff, sources, {}, options.stuff, for_pictures)


def engine_of(options: argparse.Namespace, profile: Profile) -> Engine | None:
    """The engine that the options ask for; None is one step after the other in this process."""
    if options.engine == "ray":
        device = profile.models.device
        # "auto" takes the GPU that Ray gives, where there is one.
        return RayEngine(options.workers, None if device == "auto" else device.startswith("cuda"))
    engine = LocalEngine(1 if options.workers is None else options.workers)
    return engine if engine.workers > 1 else None


def built(ovdiff: OVDiff, vocabulary: Vocabulary, engine: Engine | None = None) -> PrototypeBank:
    """The bank of a vocabulary, when it is known that nothing lacks to draw its classes; those are built by the workers
    of ``engine``, if there is one, whatever becomes of the others: ``OVDiffError`` after one that failed."""
    from ovdiff_lib.workbench.doctor import check_ready
    from ovdiff_lib.workbench.evaluation.workers import build_classes

    check_ready(ovdiff, vocabulary, here=not isinstance(engine, RayEngine))
    root = ovdiff.library.root
    failures = build_classes(engine, ovdiff.profile, vocabulary, None, root, ovdiff.progress) if engine else ()
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    if failures:
        raise OVDiffError(f"{len(failures)} of {len(vocabulary)} classes could not be built; the others are in {root}.")
    return ovdiff.build(vocabulary)
