"""The options ``--engine``, ``--workers`` and ``--address`` of commands that can use more than one process."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles import Profile
from ovdiff_lib.types import Vocabulary

if TYPE_CHECKING:
    from ovdiff_lib.engines.base import Engine
    from ovdiff_lib.pipeline import OVDiff


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
    from ovdiff_lib.engines import LocalEngine, RayEngine

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
    from ovdiff_lib.engines import build_classes

    check_profile(ovdiff.profile)
    failures = build_classes(ovdiff.profile, vocabulary, None, ovdiff.library.root, engine=engine, progress=ovdiff.progress)
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    if failures:
        raise OVDiffError(f"{len(failures)} of {len(vocabulary)} classes could not be built; the others are in {ovdiff.library.root}.")
