"""Measuring: the instruments against clocks and sizes that are known, the steps against the method itself."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.cost import instruments as measuring
from ovdiff_lib.workbench.cost import steps as measure_costs
from ovdiff_lib.workbench.cost.instruments import Measured, joined, linear_fit, measured, peak_rate, teraflops_hours
from ovdiff_lib.workbench.cost.steps import measure_building, measure_drawing, measure_segmenting, measure_windows


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by what is appended to the list, one entry for each call that is measured."""
    steps, now = [], [0.0]

    def read():
        now[0] += steps.pop(0) if read.running else 0.0
        read.running = not read.running
        return now[0]

    read.running = False
    monkeypatch.setattr(measuring.time, "perf_counter", read)
    return steps


# ---- instruments

def test_median_spread_and_result(clock):
    clock += [3.0, 1.0, 2.5, 4.0]
    given = []
    found = measured(lambda x: given.append(x) or x * x, [(2,), (3,), (4,)])
    assert found.seconds == (3.0, 1.0, 2.5) and found.median == 2.5 and found.n == 3
    assert found.std == pytest.approx(np.std([3, 1, 2.5], ddof=1)) and found.result == 16 and given == [2, 3, 4]
    assert measured(lambda: None).std is None


def test_runs_of_one_step_are_joined():
    runs = [Measured((1.0,), "a", 10, 30), Measured((5.0, 2.0), "b", 20, 50, 7), Measured((3.0,), "c", 30, 40, 6)]
    assert joined(runs) == Measured((1.0, 5.0, 2.0, 3.0), "c", 20, 50, 7)
    assert joined(runs[:1]) == runs[0]
    for nothing in (lambda: joined([]), lambda: measured(lambda: None, [])):
        with pytest.raises(InputError):
            nothing()


@pytest.mark.skipif(not measuring.reset_peak(), reason="this system cannot set the peak of memory back")
def test_peak_memory_is_that_of_the_step():
    size = 200 * 2**20
    large = measured(lambda: int(np.ones(size, np.uint8).sum()))
    assert 0.95 * size < large.peak - large.held < 1.5 * size and large.device is None
    small = measured(lambda: None)  # the array is gone, and with it the peak
    assert small.peak < large.peak - size / 2


def test_without_the_systems_files_memory_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "STATUS", tmp_path / "status")
    monkeypatch.setattr(measuring, "CLEAR", tmp_path / "none" / "clear_refs")
    found = measured(lambda: None)
    assert not measuring.reset_peak() and found.peak >= found.held > 50 * 2**20


def test_a_line_through_points():
    x, y = [4, 8, 16, 32], [2.1, 3.8, 8.4, 15.9]
    expected, fit = stats.linregress(x, y), linear_fit(x, y)
    assert (fit.slope, fit.intercept, fit.r2) == pytest.approx((expected.slope, expected.intercept, expected.rvalue**2))
    assert fit(8) == pytest.approx(8 * expected.slope + expected.intercept)
    assert linear_fit([16, 32, 64], [55, 110, 213]).r2 > 0.999  # the paper's
    with pytest.raises(InputError):
        linear_fit([8, 8], [1, 2])


def test_the_papers_compute(clock):
    clock += [0.5, 0.25, 1.0]
    assert peak_rate(torch.device("cpu"), size=32, repeats=3) == 2 * 32**3 / 0.25  # of the fastest product
    assert teraflops_hours(110, 37.4e12) == pytest.approx(1.14, abs=0.005)  # an A40's float32 peak


# ---- steps

@pytest.fixture(scope="module")
def drawing(tiny_profile):
    return measure_drawing(tiny_profile, Category("dog"), [3, 1, 3], repeats=2)


@pytest.fixture(scope="module")
def building(tiny_profile, drawing):
    return measure_building(tiny_profile, drawing[3], ["sd", "dino"], repeats=2)


@pytest.fixture(scope="module")
def bank(tiny_profile, tmp_path_factory):
    profile = tiny_profile.override({"features.extractors": ["sd", "dino"]})
    return OVDiff(profile, library=tmp_path_factory.mktemp("library"), progress=False).build(["dog", "cat", "sofa"])


def test_drawings_are_those_of_the_method(tiny_profile, drawing):
    assert list(drawing) == [1, 3] and all(step.n == 2 and min(step.seconds) > 0 for step in drawing.values())
    expected = sample_support(load_diffusion(tiny_profile), Category("dog"), tiny_profile, progress=False)
    np.testing.assert_array_equal(drawing[3].result.images, expected.images)
    np.testing.assert_array_equal(drawing[1].result.images, expected.images[:1])


def test_sizes_take_turns(tiny_profile, monkeypatch):
    """Round after round, each size until its time is spent; the first drawing, of one step, is not counted."""
    drawn, now = [], [0.0]

    def draw(_pipe, _category, profile, size, _progress=True, progress=True):
        drawn.append((size, profile.support.steps))
        now[0] += size

    monkeypatch.setattr(measure_costs, "sample_support", draw)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    found = measure_costs.measure_drawing(tiny_profile, Category("dog"), [4, 1, 2], repeats=3, budget=4)
    assert drawn == [(1, 1), *((size, 2) for size in (1, 2, 4, 1, 2, 1))]
    assert {size: step.seconds for size, step in found.items()} == {1: (1, 1, 1), 2: (2, 2), 4: (4,)}


def test_prototypes_are_those_of_the_method(building, bank):
    for name in ("sd", "dino"):
        made = building.clustered[name].result
        np.testing.assert_allclose(made.vectors, bank.prototypes[name][0].vectors, rtol=1e-4, atol=1e-5)
        assert set(building.averaged[name].result.kind) == {"class", "instance"} and set(made.kind) == {"class", "instance", "part"}


def test_steps_of_a_class(building, drawing):
    with_parts, without = building.steps("sd"), building.steps("sd", False)
    assert list(with_parts) == ["drawing", "masks", "features", "prototypes"]
    assert with_parts["drawing"] is drawing[3] and with_parts["features"] is without["features"]
    assert building.seconds("sd", False) == sum(step.median for step in without.values())
    assert all(step.n == 2 for step in with_parts.values())


def test_kinds_of_parts_alone_still_leave_something_to_average(tiny_profile, drawing):
    profile = dataclasses.replace(tiny_profile, prototypes=dataclasses.replace(tiny_profile.prototypes, kinds=["part"]))
    found = measure_building(profile, drawing[1], ["dino"])
    assert set(found.averaged["dino"].result.kind) == {"class"} and set(found.clustered["dino"].result.kind) == {"part"}


def pictures(*shapes):
    return [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, shape in enumerate(shapes)]


def test_every_image_is_segmented_once_after_the_first(tiny_profile, bank):
    images, seen = pictures((64, 96), (80, 64), (64, 70)), []
    methods = {"one": lambda image, part: seen.append((image.shape[:2], len(part.vocabulary))), "other": lambda image, part: None}
    found = measure_segmenting(methods, bank, [1, 3], images, tiny_profile)
    assert [(count, step.n) for count, step in found["one"]] == [(1, 2), (3, 2)] and list(found) == ["one", "other"]
    assert seen == [(image.shape[:2], count) for count in (1, 3) for image in images]


def test_windows_are_those_that_the_images_were_cut_into(tiny_profile, bank):
    images = pictures((64, 64), (64, 112), (96, 64))
    found = measure_windows(tiny_profile, bank, images)
    assert list(found) == ["windows of 64, stride 32", *(f"windows of 64 and 48, stride {s}" for s in (32, 16, 8))]
    for (name, (mean, step)), stride in zip(found.items(), (32, 32, 16, 8), strict=True):
        scales = (64,) if "and" not in name else (64, 48)
        by_hand = [sum(len(windows(shape, size, stride)) for size in scales) for shape in ((64, 112), (96, 64))]
        assert mean == np.mean(by_hand) and step.n == 2
        assert step.result.labels.shape == (96, 64)
