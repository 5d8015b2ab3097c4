"""Engines: every task comes back once, whatever fails or dies; several processes build and count what one does."""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Toy, refused
from workers import Fatal, Inverse, Slow

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.cli.main import main
from ovdiff_lib.cli.notebooks import processors
from ovdiff_lib.cli.options import ENGINE, engine_of
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.library.store import Library
from ovdiff_lib.workbench.evaluation import workers as working
from ovdiff_lib.workbench.evaluation.measure import evaluate, label_predictor
from ovdiff_lib.workbench.evaluation.workers import ClassBuilder, build_classes, evaluate_on
from ovdiff_lib.workbench.parallel import Engine, LocalEngine, RayEngine, divide

# ---- workers and data of these tests and of test_ray.py; at the top of a module, so that other processes can import them

class FatalBuilder(ClassBuilder):
    """Builds classes, but the system kills it once, when the class "boat" is half done: its support set is drawn, nothing else."""

    def __call__(self, task) -> None:
        killed = self.root / "killed"
        if task[0].name == "boat" and not killed.exists():
            OVDiff(self.profile, library=self.root, progress=False).support(task[0])
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(task)


class Torn(Toy):
    """Its fourth image cannot be read."""

    def __getitem__(self, index):
        if index == 3:
            raise InputError("It is torn; copy it again.")
        return super().__getitem__(index)


def check_every_task_comes_back(engine: Engine, folder: Path) -> dict:
    """The contract of ``run``: each task once, its result or its error as data, the worker made once in each process."""
    tasks = [4, 0, 3, -5, 12, 99, 6, 1]
    outcomes = {o.index: o for o in engine.run(partial(Inverse, folder), tasks)}
    assert sorted(outcomes) == list(range(8))
    good = [0, 2, 4, 6, 7]
    assert [outcomes[i].result[0] for i in good] == [3, 4, 1, 2, 12] and all(not outcomes[i].error for i in good)
    assert outcomes[1].error == "ZeroDivisionError: division by zero" and outcomes[1].result is None
    assert outcomes[3].error == "The number -5 is negative; give a positive one."
    # Besides those that had no number of their process to give, nobody else was made.
    assert {f"made-{outcomes[i].result[1]}" for i in good} <= {path.name for path in folder.iterdir()}
    assert len(list(folder.iterdir())) <= (engine.workers or 1)
    return outcomes


# ---- the interface

@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_comes_back(workers, tmp_path):
    outcomes = check_every_task_comes_back(LocalEngine(workers), tmp_path)
    assert (tmp_path / f"made-{os.getpid()}").exists() == (workers == 1)
    if workers == 2:  # what cannot travel between processes
        assert outcomes[5].result is None and "pickle" in outcomes[5].error and "\n" not in outcomes[5].error


def test_nothing_to_do():
    assert all(list(engine.run(None, [])) == [] for engine in (LocalEngine(1), LocalEngine(2), RayEngine(1)))


def test_a_run_that_nobody_listens_to_leaves_no_process(tmp_path):
    run = LocalEngine(2).run(Slow, [0, 600, 600])
    next(run)
    run.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def share():
    return lambda task: torch.get_num_threads()


def test_a_worker_uses_its_share_of_the_processors(monkeypatch, tiny_profile):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {one.result for one in LocalEngine(2).run(share, range(2))} == {expected} and processors(tiny_profile) >= 1


# ---- processes that die

def test_a_process_that_is_killed_loses_nothing(tmp_path, caplog):
    outcomes = list(LocalEngine(2).run(partial(Fatal, tmp_path), range(9)))
    assert (tmp_path / "killed").exists()
    assert sorted((o.index, o.result, o.error) for o in outcomes) == [(i, 2 * i, "") for i in range(9)]
    assert "ended unexpectedly" in caplog.text


def test_a_task_that_kills_every_time_is_given_up(tmp_path):
    with pytest.raises(OVDiffError, match="3 of 3"):
        list(LocalEngine(2).run(partial(Fatal, tmp_path), [13, 13, 13]))


# ---- building

def check_library(profile, root, names):
    """``root`` holds whole entries of these classes and what one process builds, and nothing else was left."""
    made = OVDiff(profile, library=root, progress=False)
    stored = {(e.kind, e.key) for e in made.library.entries()}
    bank, alone = made.build(names), OVDiff(profile, library=root / "alone", progress=False).build(names)
    assert {(e.kind, e.key) for e in made.library.entries()} == stored and made.library.verify() == []
    for extractor, row in bank.prototypes.items():
        for one, other in zip(row, alone.prototypes[extractor], strict=True):
            np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-4)
    assert not list(root.glob(".shared-*"))


def test_two_workers_build_what_one_builds_though_one_is_killed(tiny_profile, tmp_path, monkeypatch):
    monkeypatch.setattr(working, "ClassBuilder", FatalBuilder)
    words = [Category("dog"), Category("boat"), Category("hound", "dog")]  # the last is the first by another name
    also = {"prototypes.clusters": 1}
    assert build_classes(LocalEngine(2), tiny_profile, words, [0, 1], tmp_path, progress=False, also=[also]) == []
    assert (tmp_path / "killed").exists()
    kinds = [e.kind for e in Library(tmp_path).entries()]
    assert kinds.count("support") == kinds.count("prototypes") / 2 == 4  # two classes, two seeds
    for seed, one in itertools.product((0, 1), ({}, also)):
        profile = tiny_profile.override({"support.seed": seed, "prototypes.seed": seed, **one})
        check_library(profile, tmp_path, ["dog", "boat"])


def test_the_profile_says_the_seeds_and_what_cannot_be_built_is_said(tiny_profile, tmp_path):
    profile = tiny_profile.override({"support.seed": 3, "prototypes.seed": 5})
    long = Category("a name that is far too long for the text encoder of this small model", "q" * 60)  # a token each
    for seeds in (None, [3]):
        (sentence,) = build_classes(LocalEngine(1), profile, [Category("dog"), long], seeds, tmp_path, progress=False)
        assert "tokens" in sentence and ("seed 3" in sentence) == bool(seeds) and "\n" not in sentence
        if seeds is None:
            check_library(profile, tmp_path, ["dog"])


def test_a_library_that_is_not_shared_is_noticed(tiny_profile, tmp_path):
    """As on a machine where the folder of this name is another one: the file that marks it is not there."""
    refused(str(tmp_path), ClassBuilder, tiny_profile, tmp_path, tmp_path / ".shared-1234")


# ---- evaluating

def check_evaluation(engine, profile, folder, background=True):
    """Seven images of nine are counted as in one process, and one that fails is named; no score is given then."""
    dataset = Toy(9, has_background=background)
    ovdiff = OVDiff(profile, {"support.size": 2}, library=folder, progress=False)
    bank = ovdiff.build(dataset.vocabulary)
    expected = evaluate(label_predictor(ovdiff, bank, dataset), dataset, limit=7, progress=False)
    result = evaluate_on(engine, ovdiff.profile, bank, dataset, limit=7, progress=False)
    assert (result.by_image() == expected.by_image()).all() and result.confusion.sum() > 0
    assert (result.miou, result.images, result.class_names) == (expected.miou, 7, expected.class_names)
    with pytest.raises(OVDiffError, match=r"Image 3 of toy could not be evaluated.*: It is torn; copy it again"):
        evaluate_on(engine, ovdiff.profile, bank, Torn(9), progress=False)


@pytest.mark.parametrize(("workers", "background"), [(1, True), (1, False), (2, True)])
def test_counts_of_workers_are_those_of_one_run(tiny_profile, tmp_path, workers, background):
    check_evaluation(LocalEngine(workers), tiny_profile, tmp_path, background)


# ---- how a cluster is shared

@pytest.mark.parametrize(("total", "workers", "gpu", "tasks", "expected"), [
    ({"CPU": 8.0, "memory": 1.0}, None, None, 99, (8, 1, False)), ({"CPU": 8.0}, 3, False, 99, (3, 2, False)),
    ({"CPU": 8.0}, 8, False, 2, (2, 4, False)),  # fewer tasks than workers
    ({"CPU": 24.0, "GPU": 2.0}, None, None, 99, (2, 12, True)), ({"CPU": 24.0, "GPU": 2.0}, None, False, 99, (24, 1, False)),
    ({"CPU": 1.0, "GPU": 4.0}, None, True, 99, (4, 1, True))])  # GPUs decide, CPUs are shared
def test_a_cluster_is_divided(total, workers, gpu, tasks, expected):
    assert divide(total, workers, gpu, tasks) == expected


@pytest.mark.parametrize(("total", "workers", "gpu", "words"), [
    ({"CPU": 8.0}, 1, True, ("a GPU each", "8 CPUs and 0 GPUs")),
    ({"CPU": 9.0, "GPU": 1.0}, 10, False, ("10 workers with a CPU each", "9 CPUs")), ({}, None, None, ("0 CPUs",))])
def test_more_than_a_cluster_has_is_refused(total, workers, gpu, words):
    refused(words, divide, total, workers, gpu, 99)


def test_ray_that_is_not_installed(without, tmp_path):
    without("ray")
    with pytest.raises(OVDiffError, match="pip install"):
        list(RayEngine(1).run(partial(Inverse, tmp_path), [1]))


# ---- the command line

def test_options_choose_the_engine(tiny_profile):
    parser = argparse.ArgumentParser()
    for add in ENGINE:
        add(parser)

    def chosen(arguments: str, device: str = "cpu"):
        profile = replace(tiny_profile, models=replace(tiny_profile.models, device=device))
        return engine_of(parser.parse_args(arguments.split()), profile)

    assert chosen("") is None and chosen("--workers 1") is None
    two = chosen("--workers 2")
    assert isinstance(two, LocalEngine) and two.workers == 2
    for device, gpu in (("auto", None), ("cpu", False), ("cuda", True), ("cuda:0", True), ("mps", False)):
        ray = chosen("--engine ray --workers 3", device)
        assert isinstance(ray, RayEngine) and (ray.workers, ray.gpu) == (3, gpu)


def test_build_with_two_workers_says_what_it_could_not_build(tiny, capfd, monkeypatch):
    long = ["build", "--classes", f"cat, {'q' * 60}, dog", "--workers", "2", *tiny]  # a token for each letter
    assert main(long) == 2 and "67 tokens" in capfd.readouterr().err  # seen before anything is drawn
    monkeypatch.setattr("ovdiff_lib.workbench.doctor.check_ready", lambda *_, **__: None)
    assert main(long) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ovdiff: ")]
    assert len(sentences) == 2 and "tokens" in sentences[0] and "1 of 3 classes" in sentences[1]
    assert main(["build", "--classes", "cat, dog", *tiny]) == 0
    assert capfd.readouterr().out.startswith("2 classes, ")


def small_dataset(monkeypatch):
    """The data sets of the mini world with their first two classes alone, to save the time of drawing all."""
    from ovdiff_lib.workbench.data.datasets import load_dataset as original

    def small(name, split="val", **_):
        dataset = original(name, split)
        dataset.vocabulary = Vocabulary(dataset.vocabulary.categories[:2])
        dataset.table[(dataset.table >= 3) & (dataset.table != 255)] = 0
        return dataset

    for module in ("workbench.data.datasets", "cli.evaluate"):
        monkeypatch.setattr(f"ovdiff_lib.{module}.load_dataset", small)


def test_evaluate_with_two_workers_writes_the_table_that_one_process_writes(tiny, tmp_path, monkeypatch, capsys):
    small_dataset(monkeypatch)
    tables = []
    for extra in (["--workers", "2"], []):
        path = tmp_path / f"result-{len(tables)}.json"
        assert main(["evaluate", "mini-voc", "--limit", "9", "--json", str(path), *tiny, *extra]) == 0
        tables.append(json.loads(path.read_text()))
    assert tables[0] == tables[1] and len(tables[0]) == 4  # background, two classes and the mean
    assert any(tables[0].values())
    first, second = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert list(first) == list(second)


def test_processes_end_with_their_parent(tmp_path):
    (tmp_path / "program.py").write_text("""
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from ovdiff_lib.workbench.console import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
""")
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    with pytest.raises(ProcessLookupError):
        for _ in range(300):
            os.kill(child, 0)
            time.sleep(0.1)
