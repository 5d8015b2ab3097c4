"""Results of one thread, whatever other threads do and whatever the caller set in torch before."""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch
from sentences import refused

from ovdiff_lib import OVDiff, pipeline
from ovdiff_lib.errors import ModelNotAvailable, OVDiffError
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.networks import loading
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.support.sampler import sample_support

CLASSES = ["cat", "boat", "chest of drawers"]
OVERRIDES = {"support.size": 2, "features.extractors": ["sd", "dino", "clip-keys"], "masks.segmenter": "maskcut",
             "matching.refine": "pamr", "filters.category_top": 3}
IMAGES = [np.random.default_rng(n).integers(0, 256, (40 + 9 * n, 71 - 7 * n, 3), dtype=np.uint8) for n in range(4)]


@contextlib.contextmanager
def setting(change, inside, back):
    change(inside)
    try:
        yield
    finally:
        change(back)


def multiply_in(precision):
    torch.backends.mkldnn.matmul.fp32_precision = precision


STATES = {
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": lambda: setting(torch.set_default_device, "meta", None), "with meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16), "inference": torch.inference_mode, "gradients": torch.enable_grad,
    "products in bfloat16": lambda: setting(multiply_in, "bf16", torch.backends.mkldnn.matmul.fp32_precision),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False)}


@pytest.fixture
def make(tiny_profile, tmp_path):
    """``make(library)``: a new object with the tiny models."""
    return lambda library="library": OVDiff(tiny_profile, OVERRIDES, library=tmp_path / library, progress=False)


@pytest.fixture(scope="module")
def alone(tiny_profile, tmp_path_factory):
    """What one thread makes, torch as it comes: the bank, and a segmentation of each image."""
    ovdiff = OVDiff(tiny_profile, OVERRIDES, library=tmp_path_factory.mktemp("alone"), progress=False)
    bank = ovdiff.build(CLASSES, stuff=["boat"])
    return bank, [ovdiff.segment(image, bank) for image in IMAGES]


def assert_same_bank(found, wanted, classes=slice(None)):
    for name, rows in wanted.prototypes.items():
        for one, other in zip(found.prototypes[name], rows[classes], strict=True):
            assert one.vectors.dtype == np.float32
            assert all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(other)), name


def assert_same(found, wanted):
    assert found.kept_scores.dtype == np.float32 and found.kept == wanted.kept
    for name in ("labels", "kept_scores", "winner", "filter_scores"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("objects", [1, 4])
def test_four_threads_segment_as_one_does(make, alone, objects):
    bank, wanted = alone
    shared = [make() for _ in range(objects)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: shared[n % objects].segment(IMAGES[n % 4], bank), range(12)))
    for n, one in enumerate(found):
        assert_same(one, wanted[n % 4])


def test_threads_draw_and_build_different_classes_as_one_does(make, alone, monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {})  # nothing is loaded yet
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda name: make().build([name]), CLASSES))
    for i, bank in enumerate(built):
        assert_same_bank(bank, alone[0], slice(i, i + 1))


def test_threads_that_want_the_same_class_draw_it_once(make, alone, monkeypatch):
    drawn = []
    monkeypatch.setattr(pipeline, "sample_support", lambda *a, **k: (drawn.append(1), sample_support(*a, **k))[1])
    shared = [make(), make()]
    with ThreadPoolExecutor(4) as pool:
        banks = list(pool.map(lambda n: shared[n % 2].build([CLASSES[0]]), range(4)))
    for bank in banks:
        assert_same_bank(bank, alone[0], slice(1))
    assert len(drawn) == 1


def test_threads_load_a_network_once(tiny_profile, monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {})
    at_once = threading.Barrier(4)

    def load(_):
        at_once.wait()
        return loading.load_diffusion(tiny_profile)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(load, range(4))))) == 1


@pytest.mark.parametrize("state", STATES)
def test_what_the_caller_set_changes_nothing(make, alone, monkeypatch, state):
    loaded = make()
    loaded.segment(IMAGES[1], alone[0])
    monkeypatch.setattr(loading, "_loaded", {})  # the other's networks are loaded in that state
    with STATES[state]():
        ovdiff = make()
        bank = ovdiff.build(CLASSES, stuff=["boat"])
        found = [ovdiff.segment(image, bank) for image in IMAGES]
        own = ovdiff.build_from({"cat": IMAGES})
        assert_same(loaded.segment(IMAGES[0], alone[0]), alone[1][0])
    assert_same_bank(bank, alone[0])
    assert_same_bank(own, make("undisturbed").build_from({"cat": IMAGES}))
    for one, other in zip(found, alone[1], strict=True):
        assert_same(one, other)
    assert_same(ovdiff.segment(IMAGES[0], bank), alone[1][0])  # nothing of that state is left in caches


@pytest.mark.parametrize("state", STATES)
def test_steps_by_themselves(state):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2000, 600)).astype(np.float32)  # more than a sample holds, in more channels than it keeps
    image, scores = IMAGES[1], torch.from_numpy(rng.normal(size=(2, *IMAGES[1].shape[:2])).astype(np.float32))
    wanted = *kmeans(points, 3), pamr(image, scores, 2)
    with STATES[state]():
        found = *kmeans(points, 3), pamr(image, scores, 2)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.device.type == "cpu" and torch.equal(one, other)


def test_the_callers_state_and_random_numbers_are_left_alone(make, monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {})
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ovdiff = make("new")
    ovdiff.segment(IMAGES[0], ovdiff.build(CLASSES))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def seen():
    return (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.parametrize("state", STATES)
def test_a_state_comes_back_also_after_an_error(state):
    with STATES[state]():
        before = seen()
        with pytest.raises(KeyError), undisturbed(), undisturbed():
            assert seen() == (torch.float32, torch.device("cpu"), False, False, False, "ieee")
            raise KeyError
        assert seen() == before


def test_it_is_entered_by_one_thread_at_a_time():
    inside, most = [], []

    @undisturbed()
    def work(n):
        inside.append(n)
        with undisturbed():
            most.append(len(inside))
            threading.Event().wait(0.002)
        inside.remove(n)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert most == [1] * 12


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 10.75 GiB, none free"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.5 GB, max allowed: 18.1 GB)"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_a_full_device_is_one_sentence_that_names_what_to_lower(make, alone, monkeypatch, error):
    def full(*_, **__):
        raise error

    ovdiff, image, bank = make(), IMAGES[0], alone[0]
    for place, name, run, field in [
            (ovdiff.diffusion.unet, "forward", lambda: ovdiff.support("dog"), "lower support.batch_size, or use"),
            (ovdiff.extractors["sd"], "_extract", lambda: ovdiff.segment(image, bank), "lower features.batch_size, or use"),
            (ovdiff.matcher, "_match", lambda: ovdiff.segment(image, bank), "lower matching.batch_size, or use"),
            (ovdiff.category_filter.clip, "get_image_features", lambda: ovdiff.segment(image, bank), "; use")]:
        with monkeypatch.context() as patched, refused(OVDiffError, "The device ran out of memory (", f"{field} a device with more."):
            patched.setattr(place, name, full)
            run()


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ModelNotAvailable("It ran out of memory.")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, undisturbed("support.batch_size"):
        raise error
    assert caught.value is error
