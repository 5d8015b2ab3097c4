"""Nothing is fetched unless ``models.download`` says so: with every connection refused and recorded, commands run and none was tried.

The guard is an audit hook of the interpreter, which sees what Python's sockets do by whatever name they are called. It comes in through
``sitecustomize``, so processes started by the command have it too. No variable that tells the model libraries to stay offline is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentences import assigned
from tiny import tiny_overrides

GUARD = """
import os, socket, sys

def _guard(event, arguments):
    if not event.startswith("socket.") or event in ("socket.__new__", "socket.bind", "socket.gethostname"):
        return
    where = arguments[1] if event in ("socket.connect", "socket.sendto", "socket.sendmsg") else arguments
    if isinstance(where, (str, bytes)):  # the path of a Unix socket
        return
    with open(os.environ["TRIED"], "a") as file:
        file.write(f"{event} {where!r}\\n")
    raise OSError(101, "Network is unreachable")

sys.addaudithook(_guard)
"""

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DIFFUSERS_OFFLINE", "HF_HUB_CACHE", "OVDIFF_LIBRARY")


class Guarded:
    """Runs Python in a fresh interpreter under the guard; ``tried()`` says what it wanted to reach."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "tried.txt"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(GUARD)
        self.environment = {k: v for k, v in os.environ.items() if k not in OFFLINE} | {
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[1])]), "TRIED": str(self.log),
            "HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=self.environment, cwd=self.folder,
                              timeout=600)

    def tried(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def guarded(tmp_path) -> Guarded:
    return Guarded(tmp_path)


REACHING = """
import socket, urllib.request
inet, unix = socket.socket, lambda: socket.socket(socket.AF_UNIX)
for reach in (lambda: urllib.request.build_opener(urllib.request.ProxyHandler({})).open("http://192.0.2.1/", timeout=1),
              lambda: socket.create_connection(("192.0.2.1", 80), 1), lambda: socket.getaddrinfo("example.org", 443),
              lambda: socket.gethostbyname("example.org"), lambda: inet().connect_ex(("192.0.2.1", 80)),
              lambda: inet(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))):
    try:
        reach()
    except OSError:
        print("refused")
server, client = unix(), unix()
server.bind("unix")
server.listen()
client.connect("unix")
print("local")
"""


def test_the_guard_sees_every_way_out_and_lets_unix_sockets_pass(guarded):
    run = guarded.run("-c", REACHING)
    assert run.stdout.split() == ["refused"] * 6 + ["local"] and len(guarded.tried()) == 6, run.stderr
    seen = {line.split()[0].removeprefix("socket.") for line in guarded.tried()}
    assert seen == {"connect", "getaddrinfo", "gethostbyname", "sendto"}


COMMANDS = """
import contextlib, io, json, sys
from ovdiff_lib.cli.main import main
told = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def commands(guarded: Guarded, *each: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of ``ovdiff`` with each list of arguments, one after the other in one fresh interpreter."""
    run = guarded.run("-c", COMMANDS, json.dumps(each))
    assert run.returncode == 0, run.stderr
    return [tuple(row) for row in json.loads(run.stdout.splitlines()[-1])]


HUB = {"models.diffusion": "nobody/diffusion", "models.clip": "nobody/clip", "models.dino": "nobody/dino", "models.mae": "nobody/mae",
       "models.sam": "nobody/sam", "models.grounding": "nobody/grounding", "models.groupvit": "nobody/groupvit",
       "models.open_clip": "nobody/open_clip"}


def test_segment_build_and_doctor_reach_for_nothing(guarded, tiny_models):
    small = np.random.default_rng(0).integers(0, 256, (4, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((70, 40), Image.NEAREST).save(guarded.folder / "a.png")
    everything = {**tiny_overrides(tiny_models), "features.extractors": ["sd", "clip-keys", "dino", "mae", "open-clip-tokens"],
                  "support.size": 2}
    tiny, library = assigned(everything), ["--library", str(guarded.folder / "library")]
    segmented, built, missing, paper, official, mini = commands(
        guarded, ["segment", "a.png", "--classes", "cat, dog", "--out", "out", *tiny, *library],
        ["build", "--classes", "sofa", *tiny, *library], ["build", "--classes", "cat", *library, *assigned(HUB)],
        ["doctor", "--profile", "paper"], ["doctor", "--profile", "official"], ["doctor"])
    assert segmented[0] == 0 and "1 image segmented" in segmented[1] and (guarded.folder / "out" / "a_labels.png").is_file(), segmented
    assert built[0] == 0 and built[1].startswith("1 class, "), built
    code, out, err = missing
    assert code == 2 and out == "" and err.startswith("ovdiff: The model 'nobody/diffusion'") and err.count("\n") == 1, err
    for code, out, err in (paper, official):
        assert code == 1 and "Missing:" in out and "hf download" in out and err == ""
    assert mini[0] == 0 and "Everything needed is here." in mini[1]
    assert guarded.tried() == []


LOADING = """
import json, sys
from loaders import LOADERS
from ovdiff_lib.errors import ModelNotAvailable
from ovdiff_lib.profiles.reading import load_profile
profile, told = load_profile("mini", json.loads(sys.argv[1])), {}
for name in sys.argv[2:]:
    try:
        LOADERS[name](profile)
    except ModelNotAvailable as error:
        told[name] = str(error)
print(json.dumps(told))
"""


def test_models_that_are_missing_are_not_looked_for_elsewhere(guarded):
    run = guarded.run("-c", LOADING, json.dumps(HUB), *(key.split(".")[1] for key in HUB))
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert set(told) == {key.split(".")[1] for key in HUB}
    for name, text in told.items():
        assert "\n" not in text and text.endswith("."), text
        assert "models.download" in text and ("hf download" in text or "fetch https://" in text), (name, text)
    assert guarded.tried() == []


def test_with_models_download_the_hub_is_asked(guarded):
    """So the guard would have seen it; and no network is one sentence too."""
    run = guarded.run("-c", LOADING, json.dumps({**HUB, "models.download": True}), "clip")
    assert run.returncode == 0, run.stderr
    text = json.loads(run.stdout.splitlines()[-1])["clip"]
    assert "from the hub" in text and "\n" not in text and text.endswith(".")
    assert any(line.startswith("socket.") for line in guarded.tried())
