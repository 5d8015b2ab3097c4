"""Instruments: seconds and memory of a call and of several that take turns; the machine."""

from __future__ import annotations

import contextlib
import ctypes
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
from typing import Any

import torch

from ovdiff_lib.errors import InputError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: what memory the process holds, and where its highest value is set back."""


@dataclass(frozen=True)
class Measured:
    """A step that ran ``n`` times: ``seconds`` of wall clock each, the last ``result``, and memory in bytes of the run
    that added most.

    ``held`` is the resident memory of the whole process before that run and ``peak`` its highest during it (since the
    process began where the system cannot set it back: not Linux). ``device``: PyTorch's peak on a GPU, None on a CPU.
    """

    seconds: tuple[float, ...]
    result: Any
    held: int
    peak: int
    device: int | None = None

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def std(self) -> float | None:
        """Sample standard deviation, None for one run."""
        return statistics.stdev(self.seconds) if self.n > 1 else None

    @property
    def added(self) -> int:
        """The GPU's peak where there is one, else what the run added to what the process held."""
        return self.peak - self.held if self.device is None else self.device


def measured(function: Callable[..., Any], items: Iterable[tuple] = ((),), *,
             device: torch.device | None = None) -> Measured:
    """Call ``function(*item)`` for every item, one after the other, and measure each call. ``device``: whose work is
    awaited before the clock is read, and whose memory is looked at. ``InputError`` when there is no item."""
    found = None
    for item in items:
        found = _further(found, function, item, device)
    if found is None:
        raise InputError("There is nothing to measure: the number of repeats, sizes or images is 0; give at least 1.")
    return found


def alternate(ways: Sequence[Callable[[int], Any]], rounds: int, device: torch.device,
              budget: float = math.inf) -> list[Measured]:
    """Call every way with 1, then every way with 2, ... ``rounds``: a machine that is busy for a while slows them all.

    Before, all are called with 0, to warm up (a way may do less then), and not counted. A way that took ``budget``
    seconds is left out of further rounds.
    """
    if rounds < 1:
        raise InputError(f"The number of repeats is {rounds}; give at least 1.")
    for way in ways:
        way(0)
    found: list[Measured | None] = [None for _ in ways]
    for number in range(1, rounds + 1):
        for i, way in enumerate(ways):
            if found[i] is None or sum(found[i].seconds) < budget:
                found[i] = _further(found[i], way, (number,), device)
    return found


def _further(before: Measured | None, function: Callable[..., Any], given: tuple,
             device: torch.device | None) -> Measured:
    """Measure one call, and put it to what was measured of the step before."""
    gpu = device is not None and device.type == "cuda"
    give_back()
    reset_peak()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    held, started = _memory("VmRSS"), time.perf_counter()
    result = function(*given)
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - started
    on_gpu = torch.cuda.max_memory_allocated(device) if gpu else None
    run = Measured((seconds,), result, held, max(held, _memory("VmHWM")), on_gpu)
    if before is None:
        return run
    most = max(before, run, key=lambda step: step.added)
    return Measured(before.seconds + run.seconds, result, most.held, most.peak, most.device)


def machine(device: torch.device) -> dict[str, Any]:
    """Where times were measured, for a table's details."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def give_back() -> None:
    """Memory that is free goes back to the system, so that a call which needs it is seen to take it."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # elsewhere than in Linux's usual C library
        ctypes.CDLL(None).malloc_trim(0)


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
