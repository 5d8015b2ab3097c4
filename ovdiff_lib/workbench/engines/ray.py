"""The engine of more than one machine: Ray Data over a pool of actors, one task each at a time.

Ray restarts actors that are lost and runs their tasks again without limit; :class:`Attempts` puts a limit to tasks that kill their
worker every time. Ray is imported when an engine starts, and only then.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.workbench.engines.base import Engine, Make, Outcome, Runner, check_workers, described

ATTEMPTS = 4
"""How often a task is begun at most; each time but the last its worker was lost."""

MEMORY = 2**29
"""Bytes of the object store of a Ray that is started here: what workers are made from, and their results."""

LONGEST = 40
"""Characters of a folder under which Ray's sockets still have names that the system takes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """How a cluster is divided: ``workers``, and for each of them ``cpus`` and ``gpus``."""

    workers: int
    cpus: int
    gpus: float


class RayEngine(Engine):
    """Workers on the machines of a Ray cluster.

    Args:
        workers: how many (default: as many as there is room for, each with one CPU, or with its GPUs).
        address: of a running cluster, "HOST:PORT" or "auto" for the one that this machine belongs to; default the environment variable
            ``RAY_ADDRESS``, and without that a Ray on this machine alone that is started for the work and ended after it.
        gpus_per_worker: GPUs that a worker has for itself, also a part of one such as 0.5; None is one where the cluster has GPUs. Without
            any a worker computes on the CPU.

    A Ray that this process is connected to already is used as it is, and stays. The project, the models, the data and the library must
    be found under the same paths on all machines.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, gpus_per_worker: float | None = 0) -> None:
        super().__init__()
        if workers is not None:
            check_workers(workers)
        if gpus_per_worker is not None and (gpus_per_worker < 0 or (gpus_per_worker > 1 and gpus_per_worker % 1)):
            raise InputError(f"The number of GPUs of a worker is {gpus_per_worker}; give 0, a part of 1, or a whole number.")
        self.workers, self.address, self.gpus = workers, address, gpus_per_worker
        self._connected, self._folder = False, None

    def _start(self) -> None:
        ray = import_ray()
        if ray.is_initialized():
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        self._connected = True
        try:
            if address != "local":
                ray.init(address=address, **quiet)
            else:
                _have_token()
                usual = tempfile.gettempdir()
                self._folder = tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) <= LONGEST else "/tmp")
                ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, object_store_memory=MEMORY,
                         _temp_dir=self._folder, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            self._stop()
            what = "Ray could not be started on this machine" if address == "local" else f"There is no Ray cluster at {address}"
            raise OVDiffError(f"{what} ({described(error)}); check the address (--address, RAY_ADDRESS), or use the engine local."
                              ) from None
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        if self._connected:
            import_ray().shutdown()
            self._connected = False
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _outcomes(self, make: Make, tasks: Sequence[Any]) -> Iterator[Outcome]:
        ray = import_ray()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = divide(nodes, self.workers, self.gpus, len(tasks))
        logger.info("Ray: %d workers with %d CPUs and %g GPUs each, on %d machines.", share.workers, share.cpus, share.gpus, len(nodes))
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
        rows = [{"index": index, "task": ray.cloudpickle.dumps(task)} for index, task in enumerate(tasks)]
        worker = {"make": make, "threads": share.cpus, "attempts": attempts, "folder": os.getcwd()}
        # A block and an actor's turn for each task: with more in flight, one would wait behind another while a worker is idle.
        outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Actor, fn_constructor_kwargs=worker, batch_size=1, batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=share.workers, max_tasks_in_flight_per_actor=1),
            **({"num_gpus": share.gpus} if share.gpus else {"num_cpus": share.cpus}))
        outcomes.context.enable_progress_bars = False
        try:
            with _quiet():
                for batch in outcomes.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                    yield from map(pickle.loads, batch["outcome"])
        except ray.exceptions.RayError as error:
            raise OVDiffError(f"Ray could not go on with the work ({described(error)}); check that the project is installed on all"
                              " machines, and run again: what is stored is kept.") from error
        finally:
            ray.kill(attempts)


class Actor:
    """One of Ray's workers: ``{"index": i64 (1,), "task": pickles (1,)}`` -> ``{"outcome": pickles of Outcome (1,)}``."""

    def __init__(self, make: Make, threads: int, attempts: Any, folder: str) -> None:
        import ray

        self._runner, self._attempts = Runner(make, threads), attempts
        if not ray.get_gpu_ids():  # those of the machine belong to others; PyTorch has not looked yet
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if Path(folder).is_dir():  # paths that are meant from where the command runs
            os.chdir(folder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import ray

        packed = np.empty(len(batch["index"]), object)
        for place, (number, task) in enumerate(zip(batch["index"], batch["task"], strict=True)):
            index = int(number)
            if ray.get(self._attempts.begin.remote(index)) > ATTEMPTS:
                outcome = Outcome(index, error=f"The worker was lost {ATTEMPTS} times at this, killed or out of memory; use fewer workers.")
            else:
                outcome = self._runner(index, pickle.loads(task))
            packed[place] = ray.cloudpickle.dumps(outcome)
        return {"outcome": packed}


class Attempts:
    """An actor that counts how often each task was begun, since workers that are lost cannot."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        """Count one more beginning of task ``index``; returns how many there were with this one."""
        self._begun[index] += 1
        return self._begun[index]


def divide(nodes: Sequence[Mapping[str, float]], workers: int | None, gpus: float | None, tasks: int) -> Share:
    """How ``nodes``, the resources ("CPU", "GPU") of each machine, are shared by at most ``tasks`` workers.

    ``workers`` None: all that fit. ``gpus`` None: one each where there are GPUs. A worker needs its GPUs on one machine, or without any a
    CPU. Raises ``InputError`` when they do not fit, for which Ray would wait for ever.
    """
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    if gpus is None:
        gpus = 1 if total["GPU"] else 0

    def room(cpus: int) -> int:
        """Workers with ``cpus`` and ``gpus`` each that fit; a GPU's worker shares the CPUs that there are."""
        wanted = {"CPU": cpus, "GPU": gpus}
        return sum(min(int(node.get(kind, 0) / each + 1e-6) for kind, each in wanted.items() if each) for node in nodes)

    least = 0 if gpus else 1
    most = room(least)
    if most < (workers or 1):
        each = f"{gpus:g} GPU{'s' * (gpus > 1)}" if gpus else "one CPU"
        raise InputError(f"{workers or 1} workers with {each} each do not fit the Ray cluster, which has {total['CPU']:g} CPUs and"
                         f" {total['GPU']:g} GPUs on {len(nodes)} machines and room for {most}; ask for fewer workers or GPUs, or let more"
                         " machines join it.")
    count = min(workers or most, tasks)
    cpus = 1
    while room(cpus + 1) >= count:
        cpus += 1
    return Share(count, cpus, gpus)


def _have_token() -> None:
    """See that there is a secret by which a Ray's processes know each other: without one Ray writes one into the user's home."""
    chosen = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    disabled = os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"
    if not chosen and not disabled and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # stays: Ray reads it once in a process


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data tells of each of its runs; what goes wrong comes as an exception besides."""
    log = logging.getLogger("ray.data")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def import_ray() -> Any:
    """The module ``ray`` with ``ray.data``. Raises ``OVDiffError`` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks on actors that are restarted, as these are meant to be
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise OVDiffError(f'The engine ray needs Ray, which is not installed ({error}); run `pip install "ovdiff-lib[ray]"` or use the'
                          " engine local.") from None
    return ray
