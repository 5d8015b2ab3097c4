"""The engine of one machine: this process, or several fresh ones."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ovdiff_lib.errors import OVDiffError
from ovdiff_lib.workbench.engines.base import Engine, Make, Outcome, Runner, check_workers, described

RESTARTS = 3
"""How often in a row the processes are started again without a task finished in between."""

logger = logging.getLogger(__name__)

_process: dict[str, Runner] = {}


class LocalEngine(Engine):
    """``workers`` processes of this machine, each with its share of the processors; one worker is this process itself.

    When a process is killed all are started again and go on with what is unfinished.
    """

    def __init__(self, workers: int = 1) -> None:
        super().__init__()
        check_workers(workers)
        self.workers = workers

    def _outcomes(self, make: Make, tasks: Sequence[Any]) -> Iterator[Outcome]:
        if self.workers == 1:
            yield from map(Runner(make), range(len(tasks)), tasks)
            return
        left, broken = dict(enumerate(tasks)), 0
        while left:
            before = len(left)
            for outcome in self._pool(make, left):
                del left[outcome.index]
                yield outcome
            if left:
                broken = broken + 1 if len(left) == before else 1
                if broken > RESTARTS:
                    raise OVDiffError(f"The worker processes ended {broken} times in a row before a task was finished, {len(left)} of"
                                      f" {len(tasks)} tasks are left; they were killed or ran out of memory, use fewer workers.")
                logger.warning("A worker process ended unexpectedly; fresh ones go on with the %d tasks that are left.", len(left))

    def _pool(self, make: Make, tasks: dict[int, Any]) -> Iterator[Outcome]:
        """Outcomes from a pool of processes, of all tasks or, when a process is lost, of those that were finished by then."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        # Fresh processes, not copies of this one: threads of a copied process hang.
        with ProcessPoolExecutor(min(self.workers, len(tasks)), multiprocessing.get_context("spawn"), _begin, (make, threads)) as pool:
            try:
                running = {}
                for index, task in tasks.items():
                    try:
                        running[pool.submit(_run, index, task)] = index
                    except BrokenProcessPool:  # while tasks are still handed out; the rest waits for the next pool
                        break
                for future in as_completed(running):
                    error = future.exception()
                    if error is None:
                        yield future.result()
                    elif not isinstance(error, BrokenProcessPool):  # a task or result that cannot be sent to another process
                        if not isinstance(error, Exception):
                            raise error
                        yield Outcome(running[future], error=described(error))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _begin(make: Make, threads: int) -> None:
    _process["runner"] = Runner(make, threads)


def _run(index: int, task: Any) -> Outcome:
    return _process["runner"](index, task)
