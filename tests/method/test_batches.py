"""Batches: a number of the profile, or from a GPU's free memory, which a small model of one stands for here."""

import pytest
import torch

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.networks.instruments import MOST, ON_CPU, batches
from ovdiff_lib.profiles.reading import load_profile

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize("count, size, expected", [
    (0, 3, []), (1, 3, [(0, 1)]), (7, 3, [(0, 3), (3, 6), (6, 7)]), (6, 3, [(0, 3), (3, 6)]), (10, None, [(0, ON_CPU), (ON_CPU, 10)])])
def test_batches_cover_everything_in_order(count, size, expected):
    assert list(batches(count, size, CPU)) == expected


class Gpu:
    """What CUDA's counters say of a card with ``free`` bytes, on which n items take ``fixed`` + n x ``item`` bytes while they are worked on
    and leave ``left`` bytes cached."""

    def __init__(self, monkeypatch, free, item, fixed=0, left=0):
        self.free, self.item, self.fixed, self.left, self.peak, self.held = free, item, fixed, left, 0, 1000
        for name, value in {
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.held),
            "max_memory_allocated": lambda device: self.peak, "memory_allocated": lambda device: self.held,
            "memory_reserved": lambda device: self.held + self.cached, "mem_get_info": lambda device: (self.free - self.cached, 10**12),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.cached = 0

    def work(self, n):
        assert self.fixed + n * self.item <= self.free, "out of memory"
        self.peak = self.held + self.fixed + n * self.item
        self.cached = max(self.cached, self.left)


@pytest.mark.parametrize("free, item, fixed, left", [
    (1000, 100, 0, 0), (1000, 100, 300, 0), (1000, 900, 0, 0), (10**9, 1, 0, 0), (1000, 100, 0, 500), (1000, 7, 650, 100)])
def test_a_gpu_is_filled_but_not_overfilled(monkeypatch, free, item, fixed, left):
    gpu = Gpu(monkeypatch, free, item, fixed, left)
    done = []
    for start, stop in batches(200, None, GPU):
        gpu.work(stop - start)
        done += range(start, stop)
        last = stop - start
    assert done == list(range(200))
    assert last <= max(1, min(MOST, int(0.8 * free / item)))


def test_the_second_batch_is_as_large_as_the_first_says(monkeypatch):
    gpu, sizes = Gpu(monkeypatch, 1000, 100), []
    for start, stop in batches(20, None, GPU):
        gpu.work(stop - start)
        sizes.append(stop - start)
    assert sizes == [1, 8, 8, 3]  # 80 % of 1000 bytes hold eight items of 100


def test_null_is_a_batch_size_and_zero_is_not():
    profile = load_profile("mini", {"support.batch_size": None, "features.batch_size": None, "matching.batch_size": None})
    assert profile.features.batch_size is None
    with pytest.raises(ProfileError, match="batch_size"):
        load_profile("mini", {"features.batch_size": 0})
