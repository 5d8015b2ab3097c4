"""Engines: one worker's code run over many tasks, in this process, in several of this machine, or on a Ray cluster.

Both have one method, ``run(make, tasks)``. ``make`` is called once in each process that works and gives
``worker(task) -> result``; what a task raises comes back as data. Ray is imported when a :class:`RayEngine` runs.
"""

import contextlib
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.workbench.console import described, end_with_parent

Make = Callable[[], Callable[[Any], Any]]  # makes a worker; can be pickled, as tasks and results can
RETRIES = 3  # how often Ray begins a task again whose worker was lost, and this machine its processes with no task done

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What became of task number ``index``: its ``result``, or in ``error`` a sentence that says why there is none."""

    index: int
    result: Any = None
    error: str = ""


class Engine:
    """Runs a worker over tasks on ``workers`` processes: ``run(make, tasks)`` gives what became of every task, each
    once, in the order in which they finish. A task whose worker is lost (killed, out of memory) is run again. Raises
    ``OVDiffError`` when the engine cannot go on, and ``InputError`` for more workers than there is room for."""

    def __init__(self, workers: int | None = 1) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"The number of workers is {workers}; give at least 1.")
        self.workers = workers


class Worker:
    """Does tasks, by what ``make`` gives, which is made at the first."""

    def __init__(self, make: Make) -> None:
        self.make, self.work = make, None

    def finish(self, index: int, task: Any) -> Finished:
        try:
            self.work = self.work or self.make()
            return Finished(index, self.work(task))
        except Exception as error:  # whatever it is, the other tasks do not depend on it
            logger.debug("Task %d failed.", index, exc_info=True)
            return Finished(index, error=described(error))


class LocalEngine(Engine):
    """``workers`` processes of this machine, each with its share of the processors; one is this process itself."""

    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Finished]:
        """As :meth:`Engine.run`. When a process is killed all are started again and go on with what is unfinished."""
        if self.workers == 1:
            yield from itertools.starmap(Worker(make).finish, enumerate(tasks))
            return
        left, lost = dict(enumerate(tasks)), 0
        while left:
            before = len(left)
            for one in self._finished(make, left):
                del left[one.index]
                yield one
            lost = lost + 1 if len(left) == before else 0
            if lost > RETRIES:
                raise OVDiffError(f"The worker processes were killed or ran out of memory {lost} times in a row; "
                                  f"{len(left)} of {len(tasks)} tasks are left. Use fewer workers.")
            if left:
                logger.warning("A worker process ended unexpectedly; fresh ones do the %d tasks left.", len(left))

    def _finished(self, make: Make, left: Mapping[int, Any]) -> Iterator[Finished]:
        """What becomes of the tasks ``left``; of some nothing, when a process ends before its work."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        pool, waiting = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, (make, threads)), {}
        try:
            with contextlib.suppress(BrokenProcessPool):  # one has ended already
                for index, task in left.items():
                    waiting[pool.submit(_finish, index, task)] = index
            for future in as_completed(waiting):
                error = future.exception()  # else of a task or a result that cannot travel between processes
                if not isinstance(error, BrokenProcessPool):
                    yield Finished(waiting[future], error=described(error)) if error else future.result()
        finally:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # none works on when nobody takes its results
                process.kill()


def _begin(make: Make, threads: int) -> None:
    """Make this process ready for work with ``threads`` of the processors, unless the user said how many."""
    end_with_parent()
    global _worker
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)  # it may have looked already
    _worker = Worker(make)


def _finish(index: int, task: Any) -> Finished:
    return _worker.finish(index, task)


class RayEngine(Engine):
    """Workers on the machines of a Ray cluster (:func:`connected`), which find project, models, data and library under
    the same paths. ``workers``: default all there is room for, each with a CPU or, by ``gpu`` (None: if any), a GPU."""

    def __init__(self, workers: int | None = None, gpu: bool | None = False) -> None:
        super().__init__(workers)
        self.gpu = gpu

    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Finished]:
        """As :meth:`Engine.run`; a task whose worker is lost 1 + :data:`RETRIES` times comes back with an error."""
        if not tasks:
            return
        ray = connected()
        from ray.util import ActorPool

        workers, threads, gpu = divide(ray.cluster_resources(), self.workers, self.gpu, len(tasks))
        own = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": 1, "num_gpus": 0}
        actor = ray.remote(**own, max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD")(_Actor)
        made = ray.put(make)
        actors = [actor.remote(made, threads, gpu, os.getcwd()) for _ in range(workers)]
        pool, left = ActorPool(actors), set(range(len(tasks)))
        try:
            for one in enumerate(tasks):
                pool.submit(lambda actor, one: actor.finish.remote(*one), one)
            while pool.has_next():
                try:
                    finished = pool.get_next_unordered()
                except ray.exceptions.RayActorError:  # which does not say whose it was
                    continue
                left.remove(finished.index)
                yield finished
            for index in left:
                yield Finished(index, error=f"The worker was lost {1 + RETRIES} times at this, killed or out of memory;"
                                            " use fewer workers.")
        except ray.exceptions.RayError as error:
            raise OVDiffError(f"Ray could not go on with the work ({described(error)}); check that the project is "
                              "installed on all machines, and run again: what is stored is kept.") from error
        finally:
            for actor in actors:
                ray.kill(actor)


class _Actor(Worker):
    def __init__(self, make: Make, threads: int, gpu: bool, folder: str) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if not gpu:  # those of the machine belong to others; PyTorch has not looked yet
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if Path(folder).is_dir():  # paths that are meant from where the command runs
            os.chdir(folder)
        super().__init__(make)


def divide(total: Mapping[str, float], workers: int | None, gpu: bool | None, tasks: int) -> tuple[int, int, bool]:
    """(workers, threads of each, a GPU for each?): how a cluster that has ``total`` is shared by at most ``tasks``
    workers. Raises ``InputError`` for more than fit, for which Ray would wait for ever."""
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    gpu = gpus > 0 if gpu is None else gpu
    most = gpus if gpu else cpus
    if most < (workers or 1):
        raise InputError(f"{workers or 1} workers with a {'GPU' if gpu else 'CPU'} each do not fit the Ray cluster, "
                         f"which has {cpus} CPUs and {gpus} GPUs; ask for fewer, or let more machines join it.")
    count = min(workers or most, tasks)
    return count, max(1, cpus // count), gpu


def connected() -> Any:
    """The module ``ray``, this process connected to a cluster: the one that it is connected to already, else that of
    the environment variable ``RAY_ADDRESS``, else one on this machine alone, which ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks on actors that are restarted, as is meant
    try:
        import ray
    except ImportError as error:
        raise OVDiffError(f'The engine ray needs Ray, which is not installed ({error}); run `pip install '
                          '"ovdiff-lib[ray]"` or use the engine local.') from None
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one into the user's home
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise OVDiffError(f"Ray cannot be reached or started, address {address} ({described(error)}); check "
                          "RAY_ADDRESS, or use the engine local.") from None
    return ray
