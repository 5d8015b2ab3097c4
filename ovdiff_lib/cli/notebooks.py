"""``ovdiff run | reproduce | report | compare-tables``: notebooks, and what becomes of their tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovdiff_lib.cli.options import profile_of
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.profiles.reading import parse_assignments
from ovdiff_lib.profiles.schema import Profile


def add_commands(command: Callable[..., argparse.ArgumentParser], bare: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands: ``command(name, run, help)`` adds one with the options of a profile, ``bare`` one without."""
    run = command("run", _run, "Execute one notebook with parameters.")
    run.add_argument("notebook", type=Path)
    run.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                     help="a notebook parameter; may be repeated")
    reproduce = command("reproduce", _reproduce,
                        "Execute the notebooks, judge the paper's claims on their tables and write the report.")
    reproduce.add_argument("--only", default="", metavar="03,05",
                           help="only these notebooks, by number or name (default: all)")
    reproduce.add_argument("--force", action="store_true", help="run fresh notebooks again")
    reproduce.add_argument("--workers", type=int,
                           help="classes and notebooks at a time (default: the processors, or 1 on a GPU)")
    report = command("report", run_report, "Gather tables, figures, claims and notebooks of a profile on one page.")
    for sub in (reproduce, report):
        sub.add_argument("--notebooks", type=Path, default=Path("notebooks"),
                         help="folder of the notebooks (default: notebooks)")
    for sub in (run, reproduce, report):
        sub.add_argument("--out", type=Path, default=Path("outputs"), help="outputs folder (default: outputs)")
    compare = bare("compare-tables", _compare, "Say where two sets of tables differ; exit code 1 if they do.")
    compare.add_argument("first", type=Path, help="a folder of tables, or an outputs folder such as outputs/mini")
    compare.add_argument("second", type=Path, help="the folder it is compared with")
    compare.add_argument("--tolerance", type=float, default=0.5,
                         help="largest difference of a measured number (default: 0.5)")


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    source = options.profile if not Path(options.profile).suffix else str(Path(options.profile).resolve())
    output = (options.out / profile_of(options).name).resolve()
    return {"profile": source, "overrides": parse_assignments(options.set), "output": str(output)}


def _run(options: argparse.Namespace) -> None:
    from ovdiff_lib.workbench.reproduce import note, run_notebook

    if not options.notebook.exists():
        raise InputError(f"The notebook {options.notebook} does not exist; the ones that ship are in the folder "
                         "notebooks/.")
    parameters = {**_parameters(options), **parse_assignments(options.parameter, "--parameter")}
    # Meant from where the command is run; the notebook itself runs in its own folder.
    parameters["output"] = str(Path(str(parameters["output"])).resolve())
    target = Path(parameters["output"]) / options.notebook.name
    run_notebook(options.notebook, target, parameters, force=True)
    note(target.parent, options.notebook.stem)
    print(f"executed copy: {target}   tables and figures: {target.parent}")


def _reproduce(options: argparse.Namespace) -> int:
    from ovdiff_lib.workbench.evaluation.workers import processors
    from ovdiff_lib.workbench.reproduce import expected_time, has_tag, is_fresh, notebooks, run_all

    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers is {options.workers}; give at least 1.")
    profile, parameters = profile_of(options), _parameters(options)
    workers = options.workers or processors(profile)
    folder, shown = Path(parameters["output"]), options.out / Path(parameters["output"]).name
    chosen = notebooks(options.notebooks, options.only.split(",") if options.only else ())
    stale = [n for n in chosen if options.force or not is_fresh(n, folder / n.name, parameters)]
    print(expected_time(stale, folder, workers) or f"{len(stale)} to run.", flush=True)
    if workers > 1 and any(has_tag(notebook, "long") for notebook in stale):  # those measure on all data sets and seeds
        _draw(profile, folder, workers)
    failures = run_all(chosen, folder, parameters, force=options.force, workers=workers,
                       say=lambda text: print(text, flush=True))
    # Also after a failure: what is there is worth seeing, and the report says what is not.
    for name, write in (("claims", _claims), ("report", _report)):
        try:
            path, remark = write(folder, options)
            print(f"{name}: {shown / path.relative_to(folder)}{remark}", flush=True)
        except Exception as error:
            reason = str(error) if isinstance(error, OVDiffError) else f"{type(error).__name__}: {error}"
            failures.append(f"The {name} could not be written: {reason}")
    print(f"tables: {shown / 'tables'}   figures: {shown / 'figures'}   executed notebooks: {shown}/*.ipynb")
    print(f"{len(failures)} failed, the rest is done:" if failures else "Done.", flush=True)
    for sentence in failures:
        print(f"ovdiff: {sentence}", file=sys.stderr)
    return 1 if failures else 0


def _draw(profile: Profile, folder: Path, workers: int) -> None:
    """Build the classes that the notebooks share, on all processors; what cannot be built they will say."""
    from ovdiff_lib.workbench.evaluation.bench import Bench
    from ovdiff_lib.workbench.evaluation.workers import build_classes
    from ovdiff_lib.workbench.reproduce import CLASSES, note

    started, anew = time.time(), not (folder / "cache").exists()
    bench = Bench(profile, {"features.extractors": profile.evaluation.extractors}, library=folder / "cache")
    try:
        data = profile.evaluation
        sets = [bench.dataset(source) for source in (data.voc, data.context, data.object)]
    except OVDiffError as error:
        print(f"Classes are built as the notebooks need them: {error}", flush=True)
        return
    categories = [category for dataset in sets for category in dataset.vocabulary]
    build_classes(bench.profile, categories, bench.seeds, bench.library, workers)
    if anew:
        note(folder, CLASSES, {"seconds": round(time.time() - started, 1)})


def _claims(folder: Path, options: argparse.Namespace) -> tuple[Path, str]:
    from ovdiff_lib.workbench.tables.claims import counts, judge, write_claims

    path = write_claims(folder).with_suffix(".md")
    return path, f" ({', '.join(f'{verdict} {number}' for verdict, number in counts(judge(folder)).items())})"


def _report(folder: Path, options: argparse.Namespace) -> tuple[Path, str]:
    from ovdiff_lib.workbench.page.page import build_report

    return build_report(folder, profile_of(options), options.notebooks), " (open it in a browser; it needs no server)"


def _compare(options: argparse.Namespace) -> int:
    from ovdiff_lib.workbench.tables.compare import compare_tables

    differences = compare_tables(options.first, options.second, options.tolerance)
    for text in differences:
        print(text)
    same = f"The tables are the same (tolerance {options.tolerance:g})."
    print(f"{len(differences)} differences" if differences else same)
    return 1 if differences else 0


def run_report(options: argparse.Namespace) -> None:
    """Write ``OUT/<profile>/report/index.html`` and print where it is."""
    page, remark = _report(options.out / profile_of(options).name, options)
    print(f"report: {page}{remark}")
