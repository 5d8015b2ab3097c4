"""The engine ray, on a real Ray of two CPUs: what the engine local gives, nothing lost with a worker, no waiting for what is not there."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from test_engines import FatalBuilder, check_evaluation, check_every_task_comes_back, check_library
from workers import Fatal

import ovdiff_lib
from ovdiff_lib.categories import Category
from ovdiff_lib.cli.main import main
from ovdiff_lib.workbench.evaluation import workers as working
from ovdiff_lib.workbench.evaluation.workers import build_classes
from ovdiff_lib.workbench.parallel import RETRIES, RayEngine

ray = pytest.importorskip("ray")

TESTS = Path(__file__).parents[1] / "workbench"


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [TESTS, TESTS.parent, Path(ovdiff_lib.__file__).parents[1]])))  # of the workers
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.delenv("RAY_AUTH_MODE")  # Ray sets it; with this it is set back
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray would write one into the home of who runs the tests
        yield patch


@pytest.fixture(scope="module")
def cluster(environment):
    """The address of a Ray of two CPUs and no GPU, to which this process is connected."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        context = ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=2**28, _temp_dir=folder,
                           log_to_driver=False)
        yield context.address_info["address"]
        ray.shutdown()


# ---- the interface

def test_every_task_comes_back(cluster, tmp_path):
    check_every_task_comes_back(RayEngine(2), tmp_path)
    assert ray.is_initialized()  # it was there before, so it stays


def test_workers_that_are_killed_lose_nothing(cluster, tmp_path):
    """One is killed once, and one by its task every time: that task is an error, all others are done."""
    outcomes = {o.index: o for o in RayEngine(2).run(partial(Fatal, tmp_path), range(15))}
    assert (tmp_path / "killed").exists()
    assert {i: o.result for i, o in outcomes.items()} == {i: 2 * i if i != 13 else None for i in range(15)}
    assert f"lost {1 + RETRIES} times" in outcomes.pop(13).error and all(not o.error for o in outcomes.values())


# ---- building and evaluating

def test_classes_are_those_of_the_engine_local_though_a_worker_is_killed(cluster, tiny_profile, tmp_path, monkeypatch):
    words = [Category("dog"), Category("boat"), Category("long", "dog " * 60)]
    monkeypatch.setattr(working, "ClassBuilder", FatalBuilder)
    (sentence,) = build_classes(RayEngine(2), tiny_profile, words, None, tmp_path, progress=False)
    assert "'long'" in sentence and "tokens" in sentence and "\n" not in sentence  # what cannot be built, and nothing else
    assert (tmp_path / "killed").exists()
    check_library(tiny_profile, tmp_path, ["dog", "boat"])


def test_counts_are_those_of_one_run_and_an_image_that_fails_is_named(cluster, tiny_profile, tmp_path):
    check_evaluation(RayEngine(2), tiny_profile, tmp_path)


def test_a_gpu_that_is_not_there_is_one_sentence_at_once(cluster, tiny, capsys):
    """Ray itself would wait for ever."""
    assert main(["build", "--classes", "cat", "--engine", "ray", *tiny, "--set", "models.device=cuda"]) == 2
    *bar, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("ovdiff: ") and "0 GPUs" in sentence and all(not line or "classes" in line for line in bar)


# ---- a Ray of others, and one's own

def command(*arguments, **environment):
    """A process of ``python ARGUMENTS``, marked in its environment, which its descendants inherit."""
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **environment}, start_new_session=True)


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes whose environment holds ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def test_a_running_cluster_is_used_and_left_running(cluster, tiny, tmp_path):
    run = command("-m", "ovdiff_lib.cli.main", "build", "--classes", "cat, dog", "--engine", "ray", "--workers", "1", *tiny,
                  RAY_ADDRESS=cluster)
    said, errors = run.communicate(timeout=100)
    assert run.returncode == 0 and said.startswith("2 classes, "), errors
    # Nothing of Ray's own is said on a run that goes well: the bar of the classes, no more.
    ours = ("building classes", "RAY_BACKEND_LOG_LEVEL")  # the second: Ray says that it was told to be quiet
    assert [line for line in errors.splitlines() if line and not any(word in line for word in ours)] == []
    assert ray.get(ray.remote(lambda: 7).remote()) == 7


SLEEPER = """
import signal, sys
from ovdiff_lib.workbench.parallel import RayEngine
from workers import Slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore ctrl-C
try:
    for finished in RayEngine(1).run(Slow, [0, 600]):
        print("done", finished.index, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes as Linux shows them")
def test_ctrl_c_leaves_no_ray_behind(environment):
    environment.delenv("RAY_AUTH_TOKEN")
    mark = f"ovdiff-{os.getpid()}-{time.time_ns()}"
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as folder:
        with command("-c", SLEEPER, OVDIFF_TEST=mark, TMPDIR=folder, HOME=folder) as run:
            try:
                assert run.stdout.readline() == "done 0\n", run.stderr.read()
                working = processes_with(mark)
                assert any("raylet" in line for line in working) and os.listdir(folder), working
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
                _, errors = run.communicate(timeout=60)
            finally:
                run.kill()
        assert run.returncode == 130 and "Traceback" not in errors, errors
        deadline = time.monotonic() + 20
        while processes_with(mark) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_with(mark) == []
        assert os.listdir(folder) == ["ray"]  # Ray's own logs, and no secret in the user's home
