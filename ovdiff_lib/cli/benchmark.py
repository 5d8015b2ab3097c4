"""``ovdiff benchmark``: the command line of this package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.reading import parse_assignments


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command: ``command(name, run, help)`` adds one with the options of a profile."""
    text = ("Time and memory as ratios against a named alternative that runs in the same session. Exit code 1 if a bound is missed or a "
            "scenario fails, else 0; ctrl-C keeps what was printed and written to --json.")
    benchmark = command("benchmark", run_benchmark, text)
    benchmark.add_argument("--only", metavar="NAME,...", action="append",
                           help="only these scenarios; a wrong name lists them (default: all but `kmeans-support-set`, which needs 13 GB of "
                                "memory)")
    benchmark.add_argument("--full-size", action="store_true",
                           help="also those of the paper's sizes, with random weights (7 GB of memory, some 15 minutes on two cores)")
    benchmark.add_argument("--repeats", type=int, default=3, help="rounds of a scenario; ratios are of medians (default: 3)")
    benchmark.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too, after every scenario")


def run_benchmark(options: argparse.Namespace) -> int:
    """Print every scenario's rows as they come; exit code 1 for a missed bound or a failure."""
    from ovdiff_lib.files import check_output_file
    from ovdiff_lib.networks.loading import resolve_device
    from ovdiff_lib.profiles.reading import load_profile
    from ovdiff_lib.workbench.cost.catalogue import outcomes, select
    from ovdiff_lib.workbench.cost.instruments import machine
    from ovdiff_lib.workbench.cost.render import HEADER, record, render
    from ovdiff_lib.workbench.cost.scene import check_repeats

    if options.library:
        raise InputError("The benchmark builds in a temporary library, so that nothing is read that was built before; leave out --library.")
    profile = load_profile(options.profile, parse_assignments(options.set, "--set"))
    only = [name.strip() for name in ",".join(options.only).split(",") if name.strip()] if options.only is not None else None
    if only == []:
        raise InputError("--only names no scenario; name some, or leave it out for all.")
    select(only, options.full_size)
    check_repeats(options.repeats)
    if options.json:
        check_output_file(options.json)
    here = machine(resolve_device(profile))
    print(f"profile {profile.name}, {', '.join(f'{name} {value}' for name, value in here.items())}; medians of rounds in turns; memory: "
          f"what a round added to what the process held (on a GPU: its peak), and the process's peak\n{HEADER}", flush=True)
    found: list[dict[str, Any]] = []
    try:
        for outcome in outcomes(profile, only, options.full_size, options.repeats):
            print(render(outcome), flush=True)
            found.append(record(outcome))
            if options.json:
                _write(options.json, {"profile": profile.name, "settings": profile.digest(), "machine": here, "scenarios": found})
    except KeyboardInterrupt:
        where = f"; their rows are in {options.json}" if options.json and found else ""
        print(f"ovdiff: interrupted after {len(found)} scenarios{where}.", file=sys.stderr)
        return 130
    return 0 if all(one["passed"] for one in found) else 1


def _write(path: Path, table: dict[str, Any]) -> None:
    from ovdiff_lib.files import write_atomic

    write_atomic(path, (json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
