"""Instruments: seconds and memory of a call, the machine's peak rate, a line through times."""

from __future__ import annotations

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

import numpy as np
import torch

from ovdiff_lib.errors import InputError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: what memory the process holds, and where its highest value is set back."""


@dataclass(frozen=True)
class Measured:
    """A step that ran ``n`` times: ``seconds`` of wall clock each, the last ``result``, and memory in bytes.

    ``held`` is the resident memory of the whole process before the first run and ``peak`` its highest during the runs
    (since the process began where the system cannot set it back: not Linux). ``device``: PyTorch's peak on a GPU, None
    on a CPU.
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
        """The GPU's peak where there is one, else what the runs added to what the process held."""
        return self.peak - self.held if self.device is None else self.device


def measured(function: Callable[..., Any], items: Iterable[tuple] = ((),), *,
             device: torch.device | None = None) -> Measured:
    """Call ``function(*item)`` for every item, one after the other, and measure each call. ``device``: whose work is
    awaited before the clock is read, and whose memory is looked at. ``InputError`` when there is no item."""
    gpu = device is not None and device.type == "cuda"
    reset_peak()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    held, seconds, result = _memory("VmRSS"), [], None
    for item in items:
        started = time.perf_counter()
        result = function(*item)
        if gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    if not seconds:
        raise InputError("There is nothing to measure: the number of repeats, sizes or images is 0; give at least 1.")
    on_gpu = torch.cuda.max_memory_allocated(device) if gpu else None
    return Measured(tuple(seconds), result, held, max(held, _memory("VmHWM")), on_gpu)


def joined(runs: Sequence[Measured]) -> Measured:
    """Measurements of one step as one: all seconds, the last result, the memory of that with the highest peak."""
    if not runs:
        raise InputError("There is nothing to measure: the number of repeats is 0; give at least 1.")
    highest, on_gpu = max(runs, key=lambda run: run.peak), [run.device for run in runs if run.device is not None]
    seconds = tuple(s for run in runs for s in run.seconds)
    return Measured(seconds, runs[-1].result, highest.held, highest.peak, max(on_gpu, default=None))


@dataclass(frozen=True)
class LinearFit:
    """y = ``slope`` x + ``intercept`` by least squares; ``r2`` is the share of y's variance that the line explains."""

    slope: float
    intercept: float
    r2: float

    def __call__(self, x: Any) -> Any:
        return self.slope * np.asarray(x, float) + self.intercept


def linear_fit(x: Sequence[float], y: Sequence[float]) -> LinearFit:
    """The line through the points. ``InputError`` for fewer than two different x."""
    if len(set(x)) < 2:
        raise InputError(f"A line needs points of at least two different sizes, not {list(x)}; name more sizes.")
    return LinearFit(*map(float, np.polyfit(x, y, 1)), float(np.corrcoef(x, y)[0, 1] ** 2))


def peak_rate(device: torch.device, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of ``repeats`` float32 matrix products (size, size) x (size, size), after one that warms
    up: it stands where the paper's formula has the theoretical peak of a GPU."""
    left, right = (torch.rand(size, size, generator=torch.Generator().manual_seed(i)).to(device) for i in (0, 1))
    torch.mm(left, right)
    return 2 * size**3 / min(measured(torch.mm, [(left, right)] * repeats, device=device).seconds)


def teraflops_hours(seconds: float, rate: float) -> float:
    """The paper's measure of compute (Sec. 4.2, footnote 1): time x peak FLOP/s of one device, in TFLOP/s-hours."""
    return seconds / 3600 * rate / 1e12


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
