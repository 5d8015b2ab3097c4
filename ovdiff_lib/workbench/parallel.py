"""Engines: one worker's code run over many tasks, in this process, in several of this machine, or on a Ray cluster.

Both have one method, ``run(make, tasks)``. ``make`` is called once in each process that works and gives
``worker(task) -> result``; what a task raises comes back as data. Ray is imported when a :class:`RayEngine` runs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import shutil
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

from ovdiff_lib.errors import InputError, OVDiffError

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


class Engine(contextlib.ExitStack):
    """Runs a worker over tasks on ``workers`` processes. What it starts (a Ray) in a ``with`` block ends with that."""

    def __init__(self, workers: int | None = 1) -> None:
        super().__init__()
        if workers is not None and workers < 1:
            raise InputError(f"The number of workers is {workers}; give at least 1.")
        self.workers = workers

    @abstractmethod
    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Finished]:
        """What became of every task, each once, in the order in which they finish. A task whose worker is lost (killed,
        out of memory) is run again. Raises ``OVDiffError`` when the engine cannot go on, and ``InputError`` for more
        workers than there is room for."""


def described(error: BaseException) -> str:
    """What an error says: the project's own as it is, of others the kind and the first line."""
    lines = str(error).strip().splitlines() or [""]
    return str(error) if isinstance(error, OVDiffError) else f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


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
            try:
                for one in self._finished(make, left):
                    del left[one.index]
                    yield one
            except BrokenProcessPool:
                lost = lost + 1 if len(left) == before else 0
                if lost > RETRIES:
                    raise OVDiffError(f"The worker processes ended {lost} times in a row before a task was finished, "
                                      f"{before} of {len(tasks)} are left; they were killed or ran out of memory, use "
                                      "fewer workers.") from None
                logger.warning("A worker process ended unexpectedly; fresh ones go on with the %d tasks that are left.",
                               len(left))

    def _finished(self, make: Make, left: Mapping[int, Any]) -> Iterator[Finished]:
        """What becomes of the tasks ``left``; raises ``BrokenProcessPool`` when a process ends before its work."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        pool = ProcessPoolExecutor(min(self.workers, len(left)), get_context("spawn"), _begin, (make, threads))
        try:
            waiting = {pool.submit(_finish, index, task): index for index, task in left.items()}
            for future in as_completed(waiting):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:  # a task or a result that cannot travel between processes
                    yield Finished(waiting[future], error=described(error))
        finally:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # none works on when nobody takes its results
                process.kill()


def _begin(make: Make, threads: int) -> None:
    """Make this process ready for work with ``threads`` of the processors, unless the user said how many."""
    global _worker
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:  # it came along with ``make`` and has looked already
            sys.modules["torch"].set_num_threads(threads)
    _worker = Worker(make)


def _finish(index: int, task: Any) -> Finished:
    return _worker.finish(index, task)


class RayEngine(Engine):
    """Workers on the machines of a Ray cluster, which find project, models, data and library under the same paths.

    Args:
        workers: how many (default: as many as there is room for, each with one CPU, or with its GPUs).
        address: of a running cluster, "HOST:PORT" or "auto" for the one that this machine belongs to; default the
            environment variable ``RAY_ADDRESS``, and without that a Ray on this machine alone that is started for the
            work and ended after it. A Ray that this process is connected to already is used as it is, and stays.
        gpus: those that a worker has for itself, also a part of one such as 0.5; None is one where the cluster has
            GPUs. Without any a worker computes on the CPU.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, gpus: float | None = 0) -> None:
        super().__init__(workers)
        if gpus is not None and (gpus < 0 or (gpus > 1 and gpus % 1)):
            raise InputError(f"The number of GPUs of a worker is {gpus}; give 0, a part of 1, or a whole number.")
        self.address, self.gpus = address, gpus

    def __enter__(self) -> Self:
        self.enter_context(_connected(self.address))
        return self

    def run(self, make: Make, tasks: Sequence[Any]) -> Iterator[Finished]:
        """As :meth:`Engine.run`; a task whose worker is lost 1 + :data:`RETRIES` times comes back with an error."""
        if not tasks:
            return
        with _connected(self.address):
            ray, waiting, running = import_ray(), iter(enumerate(tasks)), {}
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            workers, cpus, gpus = divide(nodes, self.workers, self.gpus, len(tasks))
            own = {"num_cpus": 0 if gpus else cpus, "num_gpus": gpus}  # with a GPU it shares the CPUs that there are
            actor, made = ray.remote(**own, max_restarts=-1, max_task_retries=RETRIES)(_Actor), ray.put(make)
            actors = [actor.remote(made, cpus, os.getcwd()) for _ in range(workers)]

            def give(actor: Any) -> None:
                for index, task in itertools.islice(waiting, 1):
                    running[actor.finish.remote(index, task)] = actor, index

            try:
                for actor in actors:
                    give(actor)
                while running:
                    (ready,), _ = ray.wait(list(running))
                    actor, index = running.pop(ready)
                    try:
                        finished = ray.get(ready)
                    except ray.exceptions.RayActorError:
                        finished = Finished(index, error=f"The worker was lost {1 + RETRIES} times at this, killed or "
                                                         "out of memory; use fewer workers.")
                    yield finished
                    give(actor)
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


def divide(nodes: Sequence[Mapping[str, float]], workers: int | None, gpus: float | None,
           tasks: int) -> tuple[int, int, float]:
    """(workers, CPUs and GPUs of each): how machines with the resources ``nodes`` are shared by at most ``tasks``
    workers, which :class:`RayEngine` asks for. A worker needs its GPUs on one machine, or without any a CPU. Raises
    ``InputError`` when they do not fit, for which Ray would wait for ever."""
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpus = int(total["GPU"] > 0) if gpus is None else gpus

    def room(cpus: int) -> int:
        wanted = {"CPU": cpus, "GPU": gpus}
        return sum(min(int(node.get(kind, 0) / each + 1e-6) for kind, each in wanted.items() if each) for node in nodes)

    most = room(0 if gpus else 1)
    if most < (workers or 1):
        each = f"{gpus:g} GPU{'s' * (gpus > 1)}" if gpus else "one CPU"
        raise InputError(f"{workers or 1} workers with {each} each do not fit the Ray cluster, which has "
                         f"{total['CPU']:g} CPUs and {total['GPU']:g} GPUs on {len(nodes)} machines and room for "
                         f"{most}; ask for fewer workers or GPUs, or let more machines join it.")
    count = min(workers or most, tasks)
    return count, max(itertools.takewhile(lambda cpus: room(cpus) >= count, itertools.count(1)), default=1), gpus


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """This process connected to a Ray, or to one that is started here; what was begun is ended."""
    ray, address = import_ray(), address or os.environ.get("RAY_ADDRESS") or "local"
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            options = _local_options(stack) if address == "local" else {}
            stack.callback(ray.shutdown)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                what = "could not be started on this machine" if options else f"is no cluster at {address}"
                raise OVDiffError(f"Ray {what} ({described(error)}); check the address (--address, RAY_ADDRESS), or "
                                  "use the engine local.") from None
        yield


def _local_options(stack: contextlib.ExitStack) -> dict[str, Any]:
    """How a Ray on this machine alone is started; ``stack`` takes its files away."""
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    disabled = os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"
    if not (known or disabled or (Path.home() / ".ray" / "auth_token").exists()):
        # or Ray writes one into the user's home; it reads it once in a process
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    usual = tempfile.gettempdir()  # if it is long, the names of Ray's sockets in it would be too long
    folder = tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) <= 40 else "/tmp")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False, "object_store_memory": 2**29,
            "_temp_dir": folder}


def import_ray() -> Any:
    """The module ``ray``. Raises ``OVDiffError`` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks on actors that are restarted, as is meant
    try:
        import ray
    except ImportError as error:
        raise OVDiffError(f'The engine ray needs Ray, which is not installed ({error}); run `pip install '
                          '"ovdiff-lib[ray]"` or use the engine local.') from None
    return ray
