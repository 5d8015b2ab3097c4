"""The command line: every command by name.

Errors a user can cause end in one sentence on stderr and exit code 2; what was carried out with a bad result (a
notebook that failed, tables that differ) ends with exit code 1; ctrl-C with 130, and leaves no half-written file.
"""

import argparse
import inspect
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from ovdiff_lib.cli import evaluate, inspecting, library, notebooks, segment
from ovdiff_lib.errors import OVDiffError

COMMANDS = {
    "segment": segment.segment, "build": segment.build, "evaluate": evaluate.evaluate, "ladder": evaluate.ladder,
    "convert": evaluate.convert, "run": notebooks.run, "reproduce": notebooks.reproduce,
    "compare-tables": notebooks.compare_tables, "benchmark": inspecting.benchmark, "doctor": inspecting.doctor,
    "vocabulary": inspecting.vocabulary, "tune": inspecting.tune,
    "library": {"list": library.show, "verify": library.verify, "export": library.export, "import": library.add,
                "remove": library.remove}}
GROUPS = {"library": "Show, check, share and clear the prototype library."}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``ovdiff`` command; returns the exit code."""
    before, sys.unraisablehook = sys.unraisablehook, _again
    try:
        parser = argparse.ArgumentParser(
            prog="ovdiff", description="Training-free open-vocabulary segmentation from words (OVDiff).")
        _add(parser, COMMANDS)
        options = parser.parse_args(arguments)
        return options.run(options) or 0
    except OVDiffError as error:
        said, code = str(error), 2
    except BrokenProcessPool:
        said, code = ("a process was killed, most often for want of memory; what is finished is kept, run the same "
                      "command again with fewer --workers."), 2
    except KeyboardInterrupt:
        said, code = "interrupted; what is finished is kept, run the same command again to go on.", 130
    finally:
        sys.unraisablehook = before
    tqdm.write(f"ovdiff: {said}", file=sys.stderr)  # a bar that is still there gets a line of its own
    return code


def _again(lost: "sys.UnraisableHookArgs") -> None:
    """Python drops an interrupt that comes while it frees something (as imports do): it comes again, a moment later."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    timer = threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,))
    timer.daemon = True
    timer.start()


def _add(parser: argparse.ArgumentParser, commands: dict) -> None:
    below = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run in commands.items():
        text = GROUPS.get(name) or inspect.getdoc(run)
        command = below.add_parser(name, help=text, description=text)
        if name in GROUPS:
            _add(command, run)
            continue
        command.set_defaults(run=run)
        for add in run.arguments:
            add(command)


if __name__ == "__main__":
    sys.exit(main())
