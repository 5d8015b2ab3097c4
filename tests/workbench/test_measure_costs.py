"""Measuring: the instruments against clocks and sizes that are known, the steps against the method itself."""

import numpy as np
import pytest
import torch

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost import instruments, steps
from ovdiff_lib.workbench.cost.instruments import alternate, measured

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances where a test sets ``clock[0]``."""
    now = [0.0]
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: now[0])
    return now


# ---- instruments

def test_median_spread_and_result(clock):
    def square(x, seconds):
        clock[0] += seconds
        return x * x

    found = measured(square, [(2, 3.0), (3, 1.0), (4, 2.5)])
    assert found.seconds == (3.0, 1.0, 2.5) and found.median == 2.5 and found.n == 3 and found.result == 16
    assert found.std == pytest.approx(np.std([3, 1, 2.5], ddof=1)) and measured(lambda: None).std is None
    for nothing in (lambda: measured(square, []), lambda: alternate([square], 0, CPU)):
        with pytest.raises(InputError):
            nothing()


def test_all_ways_take_turns_after_a_warm_up(clock):
    calls = []

    def way(name, seconds):
        def call(number):
            calls.append((name, number))
            clock[0] += seconds * max(number, 1)
            return name * number
        return call

    ways = way("a", 1.0), way("b", 2.0), way("c", 3.0)
    ours, theirs, third = alternate(ways, 3, CPU)
    assert calls == [(name, number) for number in range(4) for name in "abc"]
    assert (ours.seconds, theirs.seconds, third.seconds) == ((1, 2, 3), (2, 4, 6), (3, 6, 9)) and theirs.result == "bbb"
    ours, theirs, third = alternate(ways, 3, CPU, budget=6)
    assert (ours.n, theirs.seconds, third.seconds) == (3, (2, 4), (3, 6))  # six seconds were spent


@pytest.mark.skipif(not instruments.reset_peak(), reason="this system cannot set the peak of memory back")
def test_peak_memory_is_that_of_each_way():
    size = 200 * 2**20
    large, small = alternate((lambda _: int(np.ones(size, np.uint8).sum()), lambda _: None), 2, CPU)
    assert 0.95 * size < large.added < 1.5 * size and large.device is None
    assert small.added < size / 4 and small.peak < large.peak - size / 2  # the array is gone, and with it the peak


@pytest.mark.skipif(not instruments.reset_peak(), reason="this system cannot set the peak of memory back")
def test_memory_that_an_earlier_step_left_free_does_not_hide_what_a_step_takes():
    """Pieces too small for a mapping of their own stay with the process when they are gone."""
    def pieces(_):
        return sum(len(one) for one in [b"x" * 2**16 for _ in range(2**11)])

    found, = alternate((pieces,), 3, CPU)
    assert found.added > 100 * 2**20


def test_without_the_systems_files_memory_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(instruments, "STATUS", tmp_path / "status")
    monkeypatch.setattr(instruments, "CLEAR", tmp_path / "none" / "clear_refs")
    found = measured(lambda: None)
    assert not instruments.reset_peak() and found.peak >= found.held > 50 * 2**20


# ---- steps

@pytest.fixture(scope="module")
def drawing(tiny_profile):
    return steps.measure_drawing(tiny_profile, Category("dog"), [3, 1, 3], repeats=2)


@pytest.fixture(scope="module")
def bank(tiny_profile, tmp_path_factory):
    profile = tiny_profile.override({"features.extractors": ["sd", "dino"]})
    return OVDiff(profile, library=tmp_path_factory.mktemp("library"), progress=False).build(["dog", "cat", "sofa"])


def test_drawings_are_those_of_the_method(tiny_profile, drawing):
    assert list(drawing) == [1, 3] and all(step.n == 2 and min(step.seconds) > 0 for step in drawing.values())
    expected = sample_support(load_diffusion(tiny_profile), Category("dog"), tiny_profile, progress=False)
    np.testing.assert_array_equal(drawing[3].result.images, expected.images)
    np.testing.assert_array_equal(drawing[1].result.images, expected.images[:1])


def test_steps_and_prototypes_of_a_class_are_those_of_the_method(tiny_profile, drawing, bank):
    building = steps.measure_building(tiny_profile, drawing[3], ["sd", "dino"], repeats=2)
    assert list(building) == [(name, clustering) for name in ("sd", "dino") for clustering in (True, False)]
    for (name, clustering), took in building.items():
        assert list(took) == ["drawing", "masks", "features", "prototypes"] and all(step.n == 2 for step in took.values())
        assert took["drawing"] is drawing[3] and steps.seconds(took) == sum(step.median for step in took.values())
        made = took["prototypes"].result
        assert set(made.kind) == {"class", "instance"} | ({"part"} if clustering else set())
        if clustering:
            np.testing.assert_allclose(made.vectors, bank.prototypes[name][0].vectors, rtol=1e-4, atol=1e-5)


def test_kinds_of_parts_alone_still_leave_something_to_average(tiny_profile, drawing):
    found = steps.measure_building(tiny_profile.override({"prototypes.kinds": ["part"]}), drawing[1], ["dino"])
    assert [set(found["dino", part]["prototypes"].result.kind) for part in (True, False)] == [{"part"}, {"class"}]


def pictures(*shapes):
    return [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, shape in enumerate(shapes)]


def test_every_image_is_segmented_once_after_the_first(tiny_profile, bank):
    images, seen = pictures((64, 96), (80, 64), (64, 70)), []
    methods = {"one": lambda image, part: seen.append((image.shape[:2], len(part.vocabulary))), "other": lambda image, part: None}
    found = steps.measure_segmenting(methods, bank, [1, 3], images, tiny_profile)
    assert [(count, step.n) for count, step in found["one"]] == [(1, 2), (3, 2)] and list(found) == ["one", "other"]
    assert seen == [(image.shape[:2], count) for count in (1, 3) for image in images]
