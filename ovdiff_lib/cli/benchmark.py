"""``ovdiff benchmark``: the command line of the ratios."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.reading import parse_assignments


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command: ``command(name, run, help)`` adds one with the options of a profile."""
    text = ("Time and memory as ratios against a named alternative that runs in the same session. Exit code 1 if a "
            "bound is missed or a scenario fails, else 0.")
    benchmark = command("benchmark", run_benchmark, text)
    benchmark.add_argument("--only", metavar="NAME,...", action="append",
                           help="only these scenarios; a wrong name lists them (default: all but `sampling-full-size` "
                                "and `kmeans-full-size`, which need 7 GB of memory and some minutes)")
    benchmark.add_argument("--repeats", type=int, default=3,
                           help="rounds of a scenario; ratios are of medians (default: 3)")


def run_benchmark(options: argparse.Namespace) -> int:
    """Print every scenario's ratios as they come; exit code 1 for a missed bound or a failure."""
    from ovdiff_lib.networks.loading import resolve_device
    from ovdiff_lib.profiles.reading import load_profile
    from ovdiff_lib.workbench.cost.instruments import machine
    from ovdiff_lib.workbench.cost.scenarios import run

    if options.library:
        raise InputError("The benchmark builds in a temporary library, so that nothing is read that was built before; "
                         "leave out --library.")
    profile = load_profile(options.profile, parse_assignments(options.set, "--set"))
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
