"""Instruments: seconds and memory of a call and of several that take turns; the machine."""

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ovdiff_lib.errors import InputError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: what memory the process holds, and where its highest value is set back."""


@dataclass(frozen=True)
class Measured:
    """A step that ran ``n`` times, with memory in bytes of the run that added most."""

    seconds: tuple[float, ...]  # of wall clock, each run
    result: Any  # the last
    held: int  # resident memory of the whole process before that run
    peak: int  # its highest during it (since the process began where the system cannot set it back: not Linux)
    device: int | None = None  # PyTorch's peak on a GPU, None on a CPU

    n = property(lambda self: len(self.seconds))
    median = property(lambda self: statistics.median(self.seconds))
    std = property(lambda self: statistics.stdev(self.seconds) if self.n > 1 else None)
    """Sample standard deviation, None for one run."""
    added = property(lambda self: self.peak - self.held if self.device is None else self.device)
    """The GPU's peak where there is one, else what the run added to what the process held."""

    def then(self, later: Self) -> Self:
        """This and a later run of the same step as one."""
        most = max(self, later, key=lambda step: step.added)
        return Measured(self.seconds + later.seconds, later.result, most.held, most.peak, most.device)


def measured(function: Callable[..., Any], items: Iterable[tuple] = ((),), *,
             device: torch.device | None = None) -> Measured:
    """Call ``function(*item)`` for every item, one after the other, and measure each call. ``device``: whose work is
    awaited before the clock is read, and whose memory is looked at. ``InputError`` when there is no item."""
    runs = (_once(function, item, device) for item in items)
    if (first := next(runs, None)) is None:
        raise InputError("There is nothing to measure: the number of repeats, sizes or images is 0; give at least 1.")
    return functools.reduce(Measured.then, runs, first)


def alternate(ways: Sequence[Callable[[int], Any]], rounds: int, device: torch.device,
              budget: float = math.inf) -> list[Measured]:
    """Call every way with 1, then every way with 2, ... ``rounds``: a machine that is busy for a while slows them all.

    Before, all are called with 0, to warm up (and may do less), uncounted. After ``budget`` seconds a way is left out.
    """
    if rounds < 1:
        raise InputError(f"The number of repeats is {rounds}; give at least 1.")
    for way in ways:
        way(0)
    found = [_once(way, (1,), device) for way in ways]
    for number in range(2, rounds + 1):
        for i, way in enumerate(ways):
            if sum(found[i].seconds) < budget:
                found[i] = found[i].then(_once(way, (number,), device))
    return found


def _once(function: Callable[..., Any], given: tuple, device: torch.device | None) -> Measured:
    gpu = device is not None and device.type == "cuda"
    gc.collect()
    with contextlib.suppress(AttributeError):  # elsewhere than in Linux's usual C library
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free goes back: a call which needs it is seen to take it
    reset_peak()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    held, started = _memory("VmRSS"), time.perf_counter()
    result = function(*given)
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - started
    on_gpu = torch.cuda.max_memory_allocated(device) if gpu else None
    return Measured((seconds,), result, held, max(held, _memory("VmHWM")), on_gpu)


def machine(device: torch.device) -> dict[str, Any]:
    """Where times were measured, for a table's details."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def reset_peak() -> bool:
    """Set the process's highest resident memory back to what it holds now. False where the system cannot do that."""
    try:
        CLEAR.write_text("5")  # of this process alone: VmHWM becomes VmRSS
    except OSError:
        return False
    return True


def _memory(field: str) -> int:
    """Bytes of a field of the process's status; its highest resident memory where the system has no such file."""
    try:
        return int(STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
