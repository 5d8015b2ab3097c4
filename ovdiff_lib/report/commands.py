"""``ovdiff report``: the command line of this package."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ovdiff_lib.profiles import load_profile
from ovdiff_lib.profiles.profile import parse_assignments


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command: ``command(name, run, help)`` adds one with the options of a profile."""
    report = command("report", run_report, "Gather tables, figures, claims and notebooks of a profile on one page.")
    report.add_argument("--out", type=Path, default=Path("outputs"), help="outputs folder (default: outputs)")
    report.add_argument("--notebooks", type=Path, default=Path("notebooks"),
                        help="folder of the notebooks; those that have not run are named on the page (default: notebooks)")


def run_report(options: argparse.Namespace) -> None:
    """Write ``OUT/<profile>/report/index.html`` and print where it is."""
    from ovdiff_lib.report.report import build_report

    profile = load_profile(options.profile, parse_assignments(options.set, "--set"))
    page = build_report(options.out / profile.name, profile, options.notebooks)
    print(f"report: {page} (open it in a browser; it needs no server)")
