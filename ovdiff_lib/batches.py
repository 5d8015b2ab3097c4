"""How many items a network takes at a time: a number of the profile, or as many as the GPU's free memory holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

ON_CPU = 8
"""Items of a batch on a CPU, where more bring nothing."""

MOST = 64
"""Items of a batch on a GPU at most: beyond it the cores are busy anyway."""

SHARE = 0.8
"""Of the free memory that a batch may take; the rest is for what the allocator cannot use."""


def batches(count: int, size: int | None, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive batches of ``count`` items, ``size`` items each.

    ``size`` None: on a CPU :data:`ON_CPU`. On a GPU the first batch is one item, and what it took of the memory until the next batch
    is asked for says how many fit into what is free; each further batch is measured as well, since the first may have allocated what
    later ones share. Items are alike in size. Results do not depend on the batches, up to rounding.
    """
    gpu = size is None and device.type == "cuda"
    start, step = 0, size or (1 if gpu else ON_CPU)
    while start < count:
        stop = min(count, start + step)
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        yield start, stop
        if gpu:
            an_item = max(1, torch.cuda.max_memory_allocated(device) - held) / (stop - start)
            # What PyTorch keeps of its own is free for the next batch too.
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            step = max(1, min(MOST, int(SHARE * free / an_item)))
        start = stop
