"""What all engines share: a task's outcome, how a worker is run over tasks, and the check that none is lost."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self

from ovdiff_lib.errors import InputError, OVDiffError

Make = Callable[[], Callable[[Any], Any]]
"""Makes a worker: called once in each process that works, gives ``worker(task) -> result``. Can be pickled, as tasks and results can."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of task number ``index``: its ``result``, or in ``error`` one sentence that says why there is none ("" if it went well).

    ``trace`` is the traceback of an error that is no :class:`~ovdiff_lib.errors.OVDiffError`.
    """

    index: int
    result: Any = None
    error: str = ""
    trace: str = ""


class Runner:
    """One process's worker, made at its first task; what it raises becomes an outcome. ``threads``: how many its numerical libraries use,
    in a process that is the worker's alone."""

    def __init__(self, make: Make, threads: int | None = None) -> None:
        self._make, self._threads, self._worker = make, threads, None

    def __call__(self, index: int, task: Any) -> Outcome:
        try:
            if self._worker is None:
                self._worker = self._made()
            return Outcome(index, self._worker(task))
        except OVDiffError as error:
            return Outcome(index, error=str(error))
        except Exception as error:  # whatever it is, the other tasks do not depend on it
            return Outcome(index, error=described(error), trace=traceback.format_exc())

    def _made(self) -> Callable[[Any], Any]:
        if self._threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)  # for what is not imported yet
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
        return self._make()


def described(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_workers(workers: int) -> None:
    """``InputError`` for fewer than one worker."""
    if workers < 1:
        raise InputError(f"The number of workers is {workers}; give at least 1.")


class Engine(ABC):
    """Runs a worker over tasks. In a ``with`` block what it starts (a Ray) is kept between runs and ended with the block."""

    def __init__(self) -> None:
        self._entered = 0

    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Outcome]:
        """The outcome of every task, each once, in the order in which they finish.

        A task whose worker is lost (killed, out of memory, its machine gone) is run again. Raises ``OVDiffError`` when the engine cannot
        work or a task came back neither with a result nor with an error, ``InputError`` for more workers than there is room for.
        """
        if not tasks:
            return
        left = set(range(len(tasks)))
        with self, closing(self._outcomes(make, tasks)) as outcomes:
            for outcome in outcomes:
                if outcome.index not in left:
                    raise OVDiffError(f"Task {outcome.index} came back twice; run again, what is stored is kept.")
                left.remove(outcome.index)
                if outcome.trace:
                    logger.debug("Task %d failed:\n%s", outcome.index, outcome.trace)
                yield outcome
        if left:
            raise OVDiffError(f"{len(left)} of {len(tasks)} tasks came back neither with a result nor with an error; run again,"
                              " what is stored is kept.")

    def __enter__(self) -> Self:
        if not self._entered:
            self._start()
        self._entered += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self._entered -= 1
        if not self._entered:
            self._stop()

    def _start(self) -> None:  # noqa: B027 - an engine that starts nothing has nothing to do here
        """Start what several runs share."""

    def _stop(self) -> None:  # noqa: B027
        """End what :meth:`_start` started."""

    @abstractmethod
    def _outcomes(self, make: Make, tasks: Sequence[Any]) -> Iterator[Outcome]:
        """The outcomes of one run, of at least one task."""
