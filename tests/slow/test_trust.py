"""What users and machines can do to the program ends in one sentence and leaves the library whole.

Here: ``kill -9`` at random moments of a build, ctrl-C, a disk that fills or may only be read, one flipped byte anywhere in the library,
malicious names of classes and files, pickles offered as weights. Elsewhere: two builders at once (test_library.py, test_undisturbed.py),
odd images (test_images.py), any bytes as images and any text as class names (test_fuzz.py), odd weights (test_models.py,
test_features.py, test_detector.py, test_segmenters.py), label files (test_datasets.py), names in reports (test_report_page.py,
test_panel.py), archives (test_library_archive.py), connections (test_offline.py).

Long builds run in a process of their own: this file as a program (:data:`PROGRAMS`). ``OVDIFF_TRUST=1`` kills 50 builds, else it is
:data:`KILLS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import LOADERS
from PIL import Image
from segmenter_models import make_segmenter_models, segmenter_overrides
from sentences import assigned, one_sentence, refused
from tiny import tiny_overrides

from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import InputError, ModelNotAvailable
from ovdiff_lib.library.store import Library
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.reading import load_profile

KILLS = 50 if os.environ.get("OVDIFF_TRUST") else 10
NAMES = ("cat", "dog")
SLOW_DISK = 0.03
"""Seconds that every flush to disk takes longer, so that more of the kills fall into writing."""


def contents(folder: Path) -> dict[str, str]:
    """Path below ``folder`` -> SHA-256 of every file."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder: Path) -> dict[str, str]:
    """The files of the whole entries of a library, and their sums."""
    library = Library(folder)
    return {f"{entry.kind}/{entry.key}/{name}": sha256 for entry in library.entries() for name, sha256 in contents(entry.path).items()}


def left(folder: Path) -> list[str]:
    """What is half written or set aside below ``folder``."""
    return [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".broken"))]


def lines(text: str) -> list[str]:
    """What a command said to the user: lines of the program itself, without progress bars."""
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith("ovdiff: ")]


# ---------------------------------------------------------------------- programs: long builds in a process that may be forked

def forked(work: Callable[[], None]) -> multiprocessing.Process:
    """``work()`` in a copy of this process, which has begun."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def killed_builds(method: Callable[[Path], OVDiff], expected: dict[str, str], duration: float, root: Path, kills: int) -> None:
    """Builds killed after random times, each going on where the last one was killed."""
    rng, killed, finished, halves, stages = random.Random(11), 0, 0, 0, set()
    while killed < kills:
        folder = root / f"killed-{finished}"
        process = forked(lambda: method(folder).build(NAMES))  # noqa: B023  (it runs at once, in the copy)
        time.sleep(rng.uniform(0, duration))
        process.kill()
        process.join()
        assert Library(folder).verify() == [] and not list(folder.rglob("*.broken"))
        found = entries(folder)
        assert found.items() <= expected.items()  # each entry is there as it shall be, or not at all
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            halves += bool(list(folder.rglob("*.part")))
            stages.add(len({name.rsplit("/", 1)[0] for name in found}))
        else:
            assert process.exitcode == 0 and found == expected
            finished += 1
    method(folder).build(NAMES)
    assert entries(folder) == expected
    assert len(stages) >= 2  # kills fell before and after entries were written
    assert kills < 50 or halves  # and into the writing of some


def interrupted_builds(settings: dict, expected: dict[str, str], duration: float, root: Path) -> None:
    """Builds by the command, each going on where the last was interrupted as ctrl-C does, with one sentence."""
    interrupted, finished, rng, log = 0, 0, random.Random(3), root / "said.txt"

    def build() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "w", buffering=1) as said, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(["build", "--classes", ", ".join(NAMES), "--library", str(folder), *assigned(settings)])
        sys.exit(code)

    while interrupted < 4:
        folder = root / f"interrupted-{finished}"
        log.write_text("")
        process = forked(build)
        time.sleep(max(0.05, rng.uniform(0, 0.8**(1 + finished)) * duration))
        os.kill(process.pid, signal.SIGINT)
        process.join()
        said = log.read_text()
        assert Library(folder).verify() == [] and left(folder) == [] and "Traceback" not in said
        if process.exitcode == 0:
            finished += 1
        else:
            assert process.exitcode == 130
            assert lines(said) == ["ovdiff: interrupted; what is finished is kept, run the same command again to go on."], said
            interrupted += 1
    process = forked(build)
    process.join()
    assert process.exitcode == 0 and entries(folder) == expected


def builds(models: str, root: str) -> None:
    """Tiny models, loaded and run once; then builds that are killed and interrupted, each beside an undisturbed one."""
    torch.set_num_threads(1)
    settings = {**tiny_overrides(Path(models)), "features.extractors": ["sd", "clip-keys"], "support.size": 2}
    profile, folder, flush = load_profile("mini", settings), Path(root), os.fsync

    def method(library: Path) -> OVDiff:
        return OVDiff(profile, library=library, progress=False)

    def slowly(handle: int) -> None:
        time.sleep(SLOW_DISK)
        flush(handle)

    method(folder / "undisturbed").build(NAMES)
    os.fsync = slowly
    started = time.monotonic()
    forked(lambda: method(folder / "timed").build(NAMES)).join()
    expected, duration = entries(folder / "undisturbed"), time.monotonic() - started
    killed_builds(method, expected, duration, folder, KILLS)
    interrupted_builds(settings, expected, duration, folder)


def mount(place: Path, options: str) -> None:
    """A small disk in memory at ``place``, or other options for the one that is there (``remount,...``)."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


class Work:
    """Everything that writes files, into one folder; each gives the exit code and what was said on stderr."""

    def __init__(self, models: str, root: Path) -> None:
        self.settings = assigned({**tiny_overrides(Path(models)), "support.size": 2, "filters.category": False})
        self.whole, self.image = root / "whole", root / "picture.png"
        small = np.random.default_rng(0).integers(0, 256, (4, 7, 3), dtype=np.uint8)
        Image.fromarray(small).resize((70, 40), Image.NEAREST).save(self.image)

    def run(self, *arguments: object) -> list:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            code = main([*map(str, arguments)])  # anything raised ends the program, and the test with it
        return [code, err.getvalue()]

    def build(self, folder: Path, name: str = "cat") -> list:
        return self.run("build", "--classes", name, "--library", folder / "library", *self.settings)

    def segment(self, folder: Path, library: Path | None = None) -> list:
        return self.run("segment", self.image, "--classes", "cat", "--out", folder / "out", *self.settings,
                        "--library", library or self.whole / "library")

    def tables(self, folder: Path) -> list:
        from ovdiff_lib.workbench.figures.base import image_grid, save_figure
        from ovdiff_lib.workbench.tables.tables import Cell, write_table

        cells = [Cell(f"row {i}", "VOC", float(i)) for i in range(60)]
        try:
            write_table(folder / "tables" / "05_t.csv", "05_t", cells, load_profile("mini"), "What was run.")
            save_figure(image_grid([[np.asarray(Image.open(self.image).convert("RGB"))]]), folder / "figures" / "05_f.png", "A caption.")
        except InputError as error:
            return [2, f"ovdiff: {error}\n"]
        return [0, ""]

    def notebook(self, folder: Path) -> list:
        return self.run("run", Path(__file__).parents[2] / "notebooks" / "00_quickstart.ipynb", "--out", folder / "outputs")


PLACES = {"build": ("library/support", "library/masks", "library/prototypes"), "segment": ("out",), "tables": ("tables", "figures")}
"""What writes, and where it does so the same bytes each time."""

GROWING = (lambda n: f"size={4 * n}k,nr_inodes=10k", 1), (lambda n: f"size=32m,nr_inodes={n}", 2)
"""How a disk grows: by a page of its space, or by one file or folder that it can hold; and what it begins with."""


def told(result: list, words: str) -> None:
    """A command ended with one sentence that holds ``words``."""
    code, text = result
    assert code == 2 and "Traceback" not in text, result
    said, = lines(text)
    one_sentence(said)
    assert words in said


def filling_disk(work: Work, place: Path) -> None:
    """Everything that writes, on a disk that grows until it is large enough: the same command finishes then."""
    for name in PLACES:
        assert getattr(work, name)(work.whole)[0] == 0
    expected = contents(work.whole)
    for name, (options, first) in itertools.product(PLACES, GROWING):
        mount(place, options(first))
        stored = []
        for n in range(first, 500):
            mount(place, f"remount,{options(n)}")
            result, found = getattr(work, name)(place), contents(place)
            if result[0] == 0:
                break
            told(result, "cannot be written (No space left on device); free space")
            library = Library(place / "library")
            assert library.verify() == [] and left(place) == []
            assert all(found[file] == expected[file] for file in found if file.startswith(PLACES[name]))
            stored.append(len(library.entries()))
        assert stored and result[0] == 0
        assert name != "build" or {0, 1} <= set(stored)  # it filled before the first entry and after others
        assert all(found.get(file) == expected[file] for file in expected if file.startswith(PLACES[name]))
        subprocess.run(["umount", str(place)], check=True)


def read_only_disk(work: Work, place: Path) -> None:
    """What writes and what reads, on a disk that may only be read, though this process is root's."""
    mount(place, "size=32m")
    assert work.build(place)[0] == 0
    before = entries(place / "library")
    mount(place, "remount,ro")
    assert work.build(place)[0] == work.segment(place.parent, place / "library")[0] == 0
    for result in (work.segment(place), work.tables(place), work.notebook(place), work.build(place, "dog")):
        told(result, "Read-only file system")
    mount(place, "remount,rw")
    entry = next(entry for entry in Library(place / "library").entries() if entry.kind == "prototypes")
    flip(entry.path / "arrays.safetensors", 100)
    mount(place, "remount,ro")
    told(work.build(place), "Read-only file system")
    mount(place, "remount,rw")
    assert work.build(place)[0] == 0 and entries(place / "library") == before


def disks(models: str, root: str) -> None:
    """Small disks, in a mount namespace that this process alone has."""
    torch.set_num_threads(1)
    work, place = Work(models, Path(root)), Path(root) / "disk"
    filling_disk(work, place)
    read_only_disk(work, place)


PROGRAMS = {"builds": builds, "disks": disks}


def program(root: Path, models: Path, name: str, before: tuple[str, ...] = ()) -> None:
    """Run a program of :data:`PROGRAMS`, which asserts what it is about, in a folder of its own."""
    modules = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HOME": str(root / "home"),
                   "PYTHONPATH": modules}
    run = subprocess.run([*before, sys.executable, __file__, name, str(models), str(root)], capture_output=True, text=True,
                         env=environment, timeout=900)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-6000:]}"


def flip(path: Path, position: int, mask: int = 0x01) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def test_builds_that_are_killed_or_interrupted_leave_whole_entries(tmp_path, tiny_models):
    program(tmp_path, tiny_models, "builds")


def test_a_disk_that_fills_or_may_only_be_read_is_one_sentence(tmp_path, tiny_models):
    """With mounts of its own; skips where no small disk can be mounted."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare command here, so no small disk can be mounted for one process alone")
    script = f"mount -t tmpfs -o size=64k tmpfs '{tmp_path}' && mount -o remount,ro '{tmp_path}'"
    tried = subprocess.run([unshare, "-m", "sh", "-c", script], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted here ({' '.join(tried.stderr.split())[:120]})")
    program(tmp_path, tiny_models, "disks", (unshare, "-m"))


# ---------------------------------------------------------------------- one byte

def places(size: int) -> list[int]:
    return sorted({0, 1, 8, size // 4, size // 2, 3 * size // 4, size - 2, size - 1} & set(range(size)))


def test_a_flipped_byte_anywhere_is_named_set_aside_and_built_again(tiny_profile, tmp_path, caplog):
    method = OVDiff(tiny_profile, {"support.size": 2}, library=tmp_path / "library", progress=False)
    method.build("cat")
    expected, flipped = entries(method.library.root), 0
    for entry in method.library.entries():
        for path in sorted(entry.path.iterdir()):
            for number, position in enumerate(places(path.stat().st_size)):
                flip(path, position, (0x01, 0x80, 0xFF)[number % 3])
                for other in method.library.entries():  # else nobody reads what was made from the entry
                    if entry.kind != "prototypes" and other.kind == "prototypes":
                        shutil.rmtree(other.path)
                    if entry.kind == "support" and other.kind == "masks":
                        shutil.rmtree(other.path)
                caplog.clear()
                with caplog.at_level(logging.WARNING):
                    method.build("cat")
                where = f"byte {position} of {path.name} of the entry of {entry.kind}"
                assert str(entry.path) in caplog.text and "broken" in caplog.text, where
                aside = [p for p in entry.path.parent.iterdir() if p.name.endswith(".broken")]
                assert [p.name.startswith(entry.key) for p in aside] == [True], where
                assert entries(method.library.root) == expected, where
                assert method.library.verify() == []
                shutil.rmtree(aside[0])
                flipped += 1
    assert flipped >= 6 * len(expected)


# ---------------------------------------------------------------------- names

LEGAL = [
    "../../etc/passwd", "/etc/passwd", "; rm -rf /", "$(touch made)", "`touch made`", "'", "\"quoted\" 'twice'", "a\\..\\b", "--help", "-x",
    "\u202egpj.tac", "🐈", "\U0001f469\u200d\U0001f680", "<script>x()</script>", "<img src=x onerror=x>", "entry.json", "locks",
    "..", "CON", "a_labels.png", "{name}", "{0.__class__}", "%s%n", "a;b|c&d", "猫", "كلب"]
"""Names that are words like any other."""


@pytest.fixture
def sandbox(tmp_path, tiny_models, monkeypatch):
    """A home and a working folder of their own, an image, and ``run(*arguments)`` of the command with the tiny models."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OVDIFF_LIBRARY", raising=False)
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    small = np.random.default_rng(0).integers(0, 256, (4, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((70, 40), Image.NEAREST).save("picture.png")
    settings = {**tiny_overrides(tiny_models), "support.size": 1, "prototypes.clusters": 2, "filters.category": False}
    options = [*assigned(settings), "--library", str(tmp_path / "library")]
    return tmp_path, lambda command, *arguments: main([command, *options, *arguments])


def test_malicious_class_names_are_words_and_write_nothing_elsewhere(sandbox, capsys):
    folder, run = sandbox
    before = contents(folder)
    assert run("segment", "picture.png", f"--classes={','.join(LEGAL)}", "--out", "out", f"--stuff={LEGAL[0]}") == 0
    after = contents(folder)
    new = sorted(name for name in after.keys() - before.keys() if not name.startswith("library/"))
    assert new == ["work/out/picture.json", "work/out/picture_labels.png", "work/out/picture_overlay.png"]
    assert {name: after[name] for name in before} == before
    for name in after:
        if name.startswith("library/"):  # hashes and fixed names only
            parts = Path(name).parts[1:]
            assert parts[0] in ("support", "masks", "prototypes", "locks") and len(parts[1].split(".")[0]) == 32, name
            int(parts[1].split(".")[0], 16)
    record = json.loads(Path("out/picture.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in record["classes"]] == ["background", *LEGAL]
    with Image.open("out/picture_overlay.png") as picture:
        picture.load()
    assert not lines(capsys.readouterr().err)


FILES = [b"a\nb.png", b"-x.png", b"<b>.png", "\u202egpj.png".encode(), b"\x1b[31m.png", b"\xff.png", b"x;touch made.png"]
"""Names of image files, which their maker chose."""


def test_malicious_file_names_are_names_and_steer_no_terminal(sandbox, capsys):
    folder, run = sandbox
    pictures = [Path("in", os.fsdecode(name)) for name in FILES]
    Path("in").mkdir()
    for path in pictures:
        shutil.copy("picture.png", path)
    before = contents(folder)
    assert run("segment", "in", "--classes=cat", "--out", "out") == 0
    said = capsys.readouterr()
    for path in pictures:
        record = json.loads(Path("out", f"{path.stem}.json").read_text(encoding="utf-8"))
        assert record["image"] == os.fsencode(path.stem).decode(errors="replace")
        assert run("segment", f"./{path}", "--classes=cat", "--out", "one") == 0
        one = capsys.readouterr()
        assert one.out.count("\n") == 1 and one.out[:-1].isprintable() and not lines(one.err)
        path.write_bytes(b"no image")
        assert run("segment", f"./{path}", "--classes=cat", "--out", "none") == 2
        one = capsys.readouterr().err
        assert one.count("\n") == 1 and one[:-1].isprintable()
    assert said.out.count("\n") == 1 and not lines(said.err)
    new = {name.split("/")[1] for name in contents(folder).keys() - before.keys() if not name.startswith("library/")}
    assert new == {"out", "one"}


# ---------------------------------------------------------------------- pickles

class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_models) -> Path:
    """Folders of every kind of model."""
    folder = make_segmenter_models(tmp_path_factory.mktemp("models"))
    for name in ("stable-diffusion", "clip", "mae", "open_clip"):
        shutil.copytree(tiny_models / name, folder / name)
    shutil.copytree(Path(sys.modules["ovdiff_lib"].__file__).parent / "mini" / "weights" / "groupvit", folder / "groupvit")
    return folder


FOLDERS = {  # field: folder of the model, and the file of its weights
    "diffusion": ("stable-diffusion", "unet/diffusion_pytorch_model.safetensors"),
    "diffusion: text": ("stable-diffusion", "text_encoder/model.safetensors"),
    "diffusion: vae": ("stable-diffusion", "vae/diffusion_pytorch_model.safetensors"),
    "open_clip": ("open_clip", "open_clip_model.safetensors"),
    **{name: (name, "model.safetensors") for name in ("clip", "dino", "mae", "groupvit", "sam", "grounding", "detector")}}


def weights_with(payload: Payload) -> dict[str, bytes]:
    """A payload among tensors, as torch writes it (new and old layout), and as a bare pickle."""
    content, made = {"conv_in.bias": torch.zeros(3), "x": payload}, {"bare": pickle.dumps({"x": payload})}
    for name, layout in (("new", True), ("old", False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=layout)
        made[name] = buffer.getvalue()
    return made


def test_the_payload_works(tmp_path):
    for name, data in weights_with(Payload(tmp_path / "made")).items():
        if name == "bare":
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        (tmp_path / "made").rmdir()  # so it had been made


@pytest.mark.parametrize("case", FOLDERS)
def test_a_pickle_in_a_folder_of_weights_is_refused_and_not_run(tiny_profile, models, tmp_path, case):
    field, (folder, file) = case.split(":")[0], FOLDERS[case]
    pickled = file.replace("safetensors", "bin") if "pytorch" in file else file.replace("model.safetensors", "pytorch_model.bin")
    whole = tiny_profile.override(segmenter_overrides(models, {"grounding": "grounded-sam"}.get(field, "threshold")))
    assert LOADERS[field](whole.override({f"models.{field}": str(models / folder)})) is not None  # what follows is the pickle's doing
    payload = Payload(tmp_path / "made")
    for name, data in weights_with(payload).items():
        for target in (pickled, file):  # under its own name, and under the name of what cannot hold code
            copy = shutil.copytree(models / folder, tmp_path / f"{name}-{Path(target).suffix[1:]}")
            (copy / file).unlink()
            (copy / target).write_bytes(data)
            with refused(ModelNotAvailable, copy):
                LOADERS[field](whole.override({f"models.{field}": str(copy)}))
            assert not payload.made.exists()


@pytest.mark.parametrize("component", ["scheduler", "tokenizer"])
def test_code_beside_the_weights_is_not_run(tiny_profile, models, tmp_path, component):
    """A folder can name classes of its own, in files of its own, for what the pipeline is made of."""
    copy = shutil.copytree(models / "stable-diffusion", tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    index[component] = ["payload_of_the_folder", "Payload"]
    (copy / "model_index.json").write_text(json.dumps(index))
    code = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\nclass Payload: pass\n"
    for place in (copy, copy / component):
        (place / "payload_of_the_folder.py").write_text(code)
    with refused(ModelNotAvailable):
        LOADERS["diffusion"](tiny_profile.override({"models.diffusion": str(copy)}))
    assert not (tmp_path / "made").exists()


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
