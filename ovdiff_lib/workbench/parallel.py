"""Engines: one worker's code run over many tasks, in this process, in several of this machine, or on a Ray cluster.

Both have one method, ``run(make, tasks)``. ``make`` is called once in each process that works and gives
``worker(task) -> result``; what a task raises comes back as data. Ray is imported when a :class:`RayEngine` runs.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError, OVDiffError, described

Make = Callable[[], Callable[[Any], Any]]
"""Makes a worker. Can be pickled, as tasks and results can."""

RETRIES = 3
"""How often Ray begins a task again whose worker was lost, and this machine its processes with no task done."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What became of task number ``index``: its ``result``, or in ``error`` a sentence that says why there is none."""

    index: int
    result: Any = None
    error: str = ""


class Engine(ABC):
    """Runs a worker over tasks on ``workers`` processes."""

    def __init__(self, workers: int | None = 1) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"The number of workers is {workers}; give at least 1.")
        self.workers = workers

    @abstractmethod
    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Finished]:
        """What became of every task, each once, in the order in which they finish. A task whose worker is lost (killed,
        out of memory) is run again. Raises ``OVDiffError`` when the engine cannot go on, and ``InputError`` for more
        workers than there is room for."""


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
        while left and lost <= RETRIES:
            before = len(left)
            for one in self._finished(make, left):
                del left[one.index]
                yield one
            lost = lost + 1 if len(left) == before else 0
            if left:
                logger.warning("A worker process ended unexpectedly; fresh ones go on with the %d tasks that are left.",
                               len(left))
        if left:
            raise OVDiffError(f"The worker processes ended {lost} times in a row before a task was finished; "
                              f"{len(left)} of {len(tasks)} are left. They were killed or ran out of memory; use fewer "
                              "workers.")

    def _finished(self, make: Make, left: Mapping[int, Any]) -> Iterator[Finished]:
        """What becomes of the tasks ``left``; of some nothing, when a process ends before its work."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        pool = ProcessPoolExecutor(min(self.workers, len(left)), get_context("spawn"), _begin, (make, threads))
        try:
            waiting = {}
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
    global _worker
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)  # it may have looked already
    _worker = Worker(make)


def _finish(index: int, task: Any) -> Finished:
    return _worker.finish(index, task)


class RayEngine(Engine):
    """Workers on the machines of a Ray cluster, which find project, models, data and library under the same paths.

    Args:
        workers: how many (default: as many as there is room for, each with one CPU, or with its GPUs).
        address: of a running cluster, "HOST:PORT" or "auto" for the one that this machine belongs to; default the
            environment variable ``RAY_ADDRESS``, and without that a Ray on this machine alone, which ends with this
            process. A Ray that this process is connected to already is used as it is.
        gpus: those that a worker has for itself; None is one where the cluster has GPUs. Without any a worker computes
            on the CPU.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, gpus: int | None = 0) -> None:
        super().__init__(workers)
        self.address, self.gpus = address, gpus

    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Finished]:
        """As :meth:`Engine.run`; a task whose worker is lost 1 + :data:`RETRIES` times comes back with an error."""
        if not tasks:
            return
        ray = connected(self.address)
        from ray.util import ActorPool

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, threads, gpus = divide(nodes, self.workers, self.gpus, len(tasks))
        own = {"num_cpus": 0 if gpus else 1, "num_gpus": gpus}  # with a GPU it shares the CPUs that there are
        actor = ray.remote(**own, max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD")(_Actor)
        made = ray.put(make)
        actors = [actor.remote(made, threads, os.getcwd()) for _ in range(workers)]
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
    """One of Ray's workers."""

    def __init__(self, make: Make, threads: int, folder: str) -> None:
        import ray

        os.environ["OMP_NUM_THREADS"] = str(threads)
        if not ray.get_gpu_ids():  # those of the machine belong to others; PyTorch has not looked yet
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if Path(folder).is_dir():  # paths that are meant from where the command runs
            os.chdir(folder)
        super().__init__(make)


def divide(nodes: Sequence[Mapping[str, float]], workers: int | None, gpus: int | None,
           tasks: int) -> tuple[int, int, int]:
    """(workers, threads and GPUs of each): how machines with the resources ``nodes`` are shared by at most ``tasks``
    workers. A worker needs its GPUs on one machine, or without any a CPU. Raises ``InputError`` when they do not fit,
    for which Ray would wait for ever."""
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpus = int(total["GPU"] > 0) if gpus is None else gpus
    kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
    most = sum(int(node.get(kind, 0) // each) for node in nodes)
    if most < (workers or 1):
        raise InputError(f"Workers with {each} {kind} each: {workers or 1} do not fit the Ray cluster, which has "
                         f"{total['CPU']:g} CPUs and {total['GPU']:g} GPUs on {len(nodes)} machines and room for "
                         f"{most}; ask for fewer, or let more machines join it.")
    count = min(workers or most, tasks)
    return count, max(1, int(total["CPU"] // count)), gpus


def connected(address: str | None) -> Any:
    """The module ``ray``, this process connected to a cluster, or to one that is started here and ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks on actors that are restarted, as is meant
    try:
        import ray
    except ImportError as error:
        raise OVDiffError(f'The engine ray needs Ray, which is not installed ({error}); run `pip install '
                          '"ovdiff-lib[ray]"` or use the engine local.') from None
    if ray.is_initialized():
        return ray
    address, options = address or os.environ.get("RAY_ADDRESS") or "local", {}
    if address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one into the user's home
        usual = tempfile.gettempdir()  # if it is long, the names of Ray's sockets in it would be too long
        folder = tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) <= 40 else "/tmp")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        options = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False,
                   "object_store_memory": 2**29, "_temp_dir": folder}
    atexit.register(ray.shutdown)  # before the folder goes
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        what = "could not be started on this machine" if options else f"is no cluster at {address}"
        raise OVDiffError(f"Ray {what} ({described(error)}); check the address (RAY_ADDRESS), or use the "
                          "engine local.") from None
    return ray
