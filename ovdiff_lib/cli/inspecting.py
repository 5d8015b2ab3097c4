"""``ovdiff doctor | vocabulary | tune | benchmark``: what is here, which classes and thresholds fit, what it costs."""

import argparse
from pathlib import Path

from ovdiff_lib.cli.options import STUFF, argument, ovdiff_of, profile_of, takes, vocabulary_of
from ovdiff_lib.errors import InputError


@takes(argument("--data", action="append", default=[], metavar="NAME:FOLDER",
                help="a data set and its folder; may be repeated"),
       argument("--reproduce", type=Path, nargs="?", const="notebooks", metavar="NOTEBOOKS",
                help="look for all that `ovdiff reproduce` needs, by its folder of notebooks (default: notebooks), "
                     "and try each network that is here with one cheap step"))
def doctor(options: argparse.Namespace) -> int:
    """Say what a profile needs, what of it is here, and how to get the rest; exit code 1 if something is missing."""
    from ovdiff_lib.workbench.doctor import inspect
    from ovdiff_lib.workbench.reproduce import notebooks

    chosen = notebooks(options.reproduce) if options.reproduce else ()
    report = inspect(profile_of(options), options.data, options.library, chosen, bool(options.reproduce))
    print(report)
    return int(bool(report.problems))


@takes(argument("classes", help='class names, for example "cat, mouse"'), STUFF)
def vocabulary(options: argparse.Namespace) -> int:
    """Say which classes collide, are ambiguous, unknown or badly drawn; exit code 1 if a class is not fine."""
    from ovdiff_lib.workbench.vocabulary.examine import examine

    ovdiff = ovdiff_of(options)
    report = examine(ovdiff, vocabulary_of(options, ovdiff))
    print(report)
    return int(any(c.verdict != "fine" for c in report.classes))


@takes(argument("--images", type=int, help="images of each data set to choose by (default: 48)"))
def tune(options: argparse.Namespace) -> None:
    """Choose the extractors' thresholds on cosines, on the profile's split for that; print trials, profile lines."""
    from ovdiff_lib.library.store import Library
    from ovdiff_lib.workbench.evaluation import tuning
    from ovdiff_lib.workbench.evaluation.bench import Bench

    images = tuning.IMAGES if options.images is None else options.images
    bench = Bench(profile_of(options), library=Library(options.library).root, seeds=[0], images=images)
    if not bench.profile.evaluation.tune:
        raise InputError("The profile names no split to choose settings on; set evaluation.tune.")
    tried = tuning.tune(bench)
    for one in tried:
        print(one.field, one.extractor, f"({images} images of {bench.profile.evaluation.tune})")
        for i, (label, value, miou) in enumerate(zip(one.labels, one.values, one.miou, strict=True)):
            print(f"  {value:9.5f}  {label:32}  mIoU {miou:5.1f}{'  chosen' * (i == one.best)}")
    print("", tuning.lines_of(tried), sep="\n", end="")


@takes(argument("--only", metavar="NAME,...", type=lambda names: [name.strip() for name in names.split(",")],
                help="only these scenarios; a wrong name lists them (default: all but `sampling-full-size` and "
                     "`kmeans-full-size`, which need 7 GB of memory and some minutes)"),
       argument("--repeats", type=int, default=3, help="rounds of a scenario; ratios are of medians (default: 3)"))
def benchmark(options: argparse.Namespace) -> int:
    """Times as ratios against a named alternative that runs in the same session; exit code 1 if a bound is missed."""
    from ovdiff_lib.networks.loading import resolve_device
    from ovdiff_lib.workbench.cost.instruments import machine
    from ovdiff_lib.workbench.cost.scenarios import run

    profile, missed = profile_of(options), False
    here = machine(resolve_device(profile))
    print(f"profile {profile.name},", ", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    for ratio in run(profile, options.only, options.repeats):
        print(ratio, flush=True)
        missed |= ratio.met is False
    return int(missed)
