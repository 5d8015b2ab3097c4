"""``ovdiff run | reproduce | compare-tables``: notebooks, and what becomes of their tables."""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ovdiff_lib.cli.options import argument, profile_of, takes
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench import reproduce as runner
from ovdiff_lib.workbench.console import counted, described, end_with_parent, parse_assignments
from ovdiff_lib.workbench.parallel import LocalEngine

OUT = argument("--out", type=Path, default=Path("outputs"), help="outputs folder (default: outputs)")


@takes(argument("notebook", type=Path),
       argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                help="a notebook parameter; may be repeated"), OUT)
def run(options: argparse.Namespace) -> None:
    """Execute one notebook with parameters."""
    parameters = {**_parameters(options), **parse_assignments(options.parameter, "--parameter")}
    folder = Path(str(parameters["output"])).resolve()  # meant from here; the notebook runs in its own folder
    executed = folder / options.notebook.name
    runner.run_notebook(options.notebook, executed, parameters | {"output": str(folder)}, force=True)
    runner.note(folder, options.notebook.stem)
    print(f"executed copy: {executed}   tables and figures: {folder}")


@takes(argument("--only", default="", metavar="03,05", help="only these notebooks, by number or name (default: all)"),
       argument("--force", action="store_true", help="run fresh notebooks again"),
       argument("--workers", type=int,
                help="classes and notebooks at a time (default: the processors, or 1 on a GPU)"),
       argument("--notebooks", type=Path, default=Path("notebooks"),
                help="folder of the notebooks (default: notebooks)"), OUT)
def reproduce(options: argparse.Namespace) -> int:
    """Execute the notebooks, judge the paper's claims on their tables and write the report."""
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers is {options.workers}; give at least 1.")
    profile, parameters = profile_of(options), _parameters(options)
    folder, shown = Path(parameters["output"]), options.out / profile.name
    chosen = runner.notebooks(options.notebooks, options.only.split(",") if options.only else ())
    stale = [n for n in chosen if options.force or not runner.is_fresh(n, folder / n.name, parameters)]
    # In a process of its own: here PyTorch would stay in memory beside notebooks.
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as apart:
        workers = options.workers or apart.submit(processors, profile).result()
        print(runner.expected_time(stale, folder, workers), flush=True)
        if problems := apart.submit(_lacking, profile, stale).result() if stale else ():
            print(*(f"ovdiff: {problem}" for problem in problems), sep="\n", file=sys.stderr)
            raise OVDiffError(f"Nothing was begun, for want of {counted(len(problems), 'thing')}; see `ovdiff doctor "
                              "--reproduce`, or choose notebooks that need less with --only.")
        if workers > 1 and any(runner.has_tag(n, "long") for n in stale):  # measured on all data sets and seeds
            apart.submit(_draw, profile, folder, workers).result()
    failures = runner.run_all(chosen, folder, parameters, force=options.force, workers=workers)
    for name, write in (("claims", _claims), ("report", _report)):  # after a failure, too: they say what is not there
        try:
            print(f"{name}: {write(shown, options)}", flush=True)
        except Exception as error:
            failures.append(f"The {name} could not be written: {described(error)}")
    print(f"tables: {shown / 'tables'}   figures: {shown / 'figures'}   executed notebooks: {shown}/*.ipynb")
    print(f"{len(failures)} failed, the rest is done:" if failures else "Done.", flush=True)
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    return int(bool(failures))


@takes(argument("first", type=Path, help="a folder of tables, or an outputs folder such as outputs/mini"),
       argument("second", type=Path, help="the folder it is compared with"),
       argument("--tolerance", type=float, default=0.5, help="largest difference of a measured number (default: 0.5)"),
       profile=False)
def compare_tables(options: argparse.Namespace) -> int:
    """Say where two sets of tables differ; exit code 1 if they do."""
    from ovdiff_lib.workbench.tables import compare

    found = compare.compare_tables(options.first, options.second, options.tolerance)
    same = f"The tables are the same (tolerance {options.tolerance:g})."
    print(*found, f"{len(found)} differences" if found else same, sep="\n")
    return int(bool(found))


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    source = options.profile if not Path(options.profile).suffix else str(Path(options.profile).resolve())
    output = (options.out / profile_of(options).name).resolve()
    return {"profile": source, "overrides": parse_assignments(options.set), "output": str(output)}


def _lacking(profile: Profile, notebooks: list[Path]) -> tuple[str, ...]:
    """A sentence for each thing that notebooks need and that is not here; columns that go unmeasured are printed."""
    from ovdiff_lib.workbench.data.datasets import UNMEASURED
    from ovdiff_lib.workbench.doctor import inspect

    report = inspect(profile, notebooks=notebooks)
    for check in report.checks:
        if check.state.endswith(UNMEASURED):
            print(f"{check.state} ({check.what}).", flush=True)
    return report.problems


def processors(profile: Profile) -> int:
    """Processes that a profile's networks can use side by side: the processors, or one where they run on a GPU."""
    from ovdiff_lib.networks.loading import resolve_device

    return 1 if resolve_device(profile).type != "cpu" else len(os.sched_getaffinity(0))


def _draw(profile: Profile, folder: Path, workers: int) -> None:
    """Build the classes that the notebooks share, on all processors; what cannot be built they will say."""
    from ovdiff_lib.workbench.evaluation.bench import Bench
    from ovdiff_lib.workbench.evaluation.workers import build_classes

    started, anew, data = time.time(), not (folder / "cache").exists(), profile.evaluation
    bench = Bench(profile, {"features.extractors": data.extractors}, library=folder / "cache")
    try:
        sets = map(bench.dataset, (data.voc, data.context, data.object))
        categories = [category for dataset in sets for category in dataset.vocabulary]
    except OVDiffError as error:
        print(f"Classes are built as the notebooks need them: {error}", flush=True)
        return
    build_classes(LocalEngine(workers), bench.profile, categories, bench.seeds, bench.library,
                  also=[{"masks.segmenter": "threshold"}])  # rows of Tables 1 and 3 that begin with the same features
    if anew:
        runner.note(folder, runner.CLASSES, {"seconds": round(time.time() - started, 1)})


def _claims(folder: Path, options: argparse.Namespace) -> str:
    from ovdiff_lib.workbench.tables.claims import counts, judge, write_claims

    path = write_claims(folder).with_suffix(".md")
    return f"{path} ({', '.join(f'{verdict} {number}' for verdict, number in counts(judge(folder)).items())})"


def _report(folder: Path, options: argparse.Namespace) -> str:
    from ovdiff_lib.workbench.page.page import build_report

    page = build_report(folder, profile_of(options), options.notebooks)
    return f"{page} (open it in a browser; it needs no server)"
