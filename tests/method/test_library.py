"""The library: what was put comes back exactly; what is torn, edited or half written is never used; one builder at a time."""

import contextlib
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.library.codec import ARRAYS, META, identify
from ovdiff_lib.library.store import HOST, Library, beside, default_root
from ovdiff_lib.types import ForegroundBackground, Prototypes, SupportSet

KEY, OTHER = "0123456789abcdef", "f" * 32


def support(seed=0, name="cat"):
    rng = np.random.default_rng(seed)
    return SupportSet(Category(name, "a furry cat", "stuff"), rng.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8),
                      rng.random((3, 4, 6), dtype=np.float32), np.array([7, 2**62, -5]), {"steps": 30, "scale": 0.1, "note": "ünïcode\n"})


def prototypes(seed=0):
    rng = np.random.default_rng(seed)
    return Prototypes(
        rng.standard_normal((5, 7), dtype=np.float32), np.array(["class", "instance", "part", "class", "part"]),
        np.array(["foreground"] * 3 + ["background"] * 2), np.array([-1, 2, -1, -1, -1], np.int32),
        np.array([-1, -1, 0, -1, 3], np.int32), rng.integers(-1, 8, (3, 4, 6)).astype(np.int16))


def masks(seed=0):
    rng = np.random.default_rng(seed)
    foreground = rng.random((3, 9, 13)) > 0.5  # pixels that fill no whole number of bytes
    return ForegroundBackground(foreground, ~foreground & (rng.random((3, 9, 13)) > 0.5), ("threshold", "detector", "threshold"))


def assert_equal(left, right):
    for name in left.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, np.ndarray):
            assert a.dtype.kind == b.dtype.kind and a.shape == b.shape and (a == b).all(), name
        else:
            assert a == b, name


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "lib")


# ---- round trip

def test_what_was_put_comes_back(library):
    assert library.get("support", KEY) is None and library.get("masks", KEY) is None and library.get("prototypes", KEY) is None
    assert not library.root.exists()  # looking makes no folders
    library.put("support", KEY, support())
    library.put("masks", KEY, masks())
    library.put("prototypes", KEY, prototypes())
    again = Library(library.root)
    assert_equal(again.get("masks", KEY), masks())
    assert_equal(again.get("support", KEY), support())
    assert_equal(again.get("prototypes", KEY), prototypes())
    assert again.get("support", OTHER) is None
    again.get("support", KEY).images[:] = 0  # the caller's own memory
    assert_equal(again.get("support", KEY), support())


def test_no_prototypes_and_views_of_arrays(library):
    empty = prototypes().select(np.zeros(5, bool))
    library.put("prototypes", KEY, empty)
    assert_equal(library.get("prototypes", KEY), empty)
    turned = SupportSet(Category("x"), support().images.transpose(0, 2, 1, 3), support().attribution[::-1], support().seeds)
    library.put("support", KEY, turned)
    assert_equal(library.get("support", KEY), turned)


def test_a_whole_entry_stays_when_put_again(library):
    library.put("support", KEY, support(0))
    library.put("support", KEY, support(1))
    assert_equal(library.get("support", KEY), support(0))


@pytest.mark.parametrize("name", ["../../etc/passwd", "猫 🐈", "a/b\\c", "'; rm -rf \"", "con", "n" * 80])
def test_class_names_never_reach_the_file_system(library, name):
    library.put("support", KEY, support(name=name))
    assert library.get("support", KEY).category.name == name
    files = sorted(str(p.relative_to(library.root)) for p in library.root.rglob("*") if p.is_file())
    assert files == [f"locks/{KEY}.lock", f"support/{KEY}/{ARRAYS}", f"support/{KEY}/{META}", f"support/{KEY}/images_000.png"]
    assert all(p.is_relative_to(library.root) for p in library.root.parent.rglob("*") if p.is_file())


@pytest.mark.parametrize("key", ["", "../../../x", "ABCDEF01", "0123456", "0" * 65, "0123456789abcde\n", "01234567/9abcdef"])
def test_keys_that_are_none(library, key):
    for call in (lambda k: library.get("support", k), library.remove, lambda k: library.put("support", k, support())):
        with pytest.raises(InputError, match="hexadecimal"):
            call(key)
    assert not library.root.exists()


def test_no_pickle_is_read_or_written(library):
    library.put("support", KEY, support())
    library.put("prototypes", KEY, prototypes())
    for path in library.root.rglob("*.*"):
        assert path.suffix in (".safetensors", ".json", ".lock", ".png")


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("OVDIFF_LIBRARY", str(tmp_path / "there"))
    assert Library().root == default_root() == tmp_path / "there"
    monkeypatch.delenv("OVDIFF_LIBRARY")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert Library().root == tmp_path / ".cache" / "ovdiff"


def test_support_images_are_pictures_that_anything_opens(library, monkeypatch):
    monkeypatch.setattr("ovdiff_lib.library.codec.STRIP_PIXELS", 2 * 8 * 12)
    library.put("support", KEY, support())
    strips = [np.array(Image.open(path)) for path in sorted((library.root / "support" / KEY).glob("*.png"))]
    assert [strip.shape for strip in strips] == [(16, 12, 3), (8, 12, 3)]
    assert (np.concatenate(strips).reshape(3, 8, 12, 3) == support().images).all()
    assert_equal(library.get("support", KEY), support())


def test_what_an_entry_was_made_from_is_kept_and_is_its_key(library, caplog):
    table = {"step": "sd", "prompt": "a furry cat", "settings": {"prototypes": {"clusters": 2}}}
    key = identify(table)
    assert key == hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:32]
    library.put("prototypes", key, prototypes(), made_from=table)
    assert library.describe(library.entries()[0])["made_from"] == table and library.verify() == []
    # Another key with a correct sum: what is in it is not what its key stands for.
    library.put("prototypes", KEY, prototypes(), made_from=table)
    assert library.get("prototypes", KEY) is None and "not the hash of what" in caplog.text
    assert_equal(library.get("prototypes", key), prototypes())


# ---- damage

def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_prompt(path):
    path.write_text(path.read_text().replace("furry", "fluffy"))


def claim_another_key(path):
    table = json.loads(path.read_text())
    table["body"]["key"] = OTHER
    path.write_text(json.dumps(table))


IMAGES = "images_000.png"
DAMAGES = [(IMAGES, cut), (IMAGES, flip), (IMAGES, Path.unlink),
           (ARRAYS, cut), (ARRAYS, flip), (ARRAYS, Path.unlink), (ARRAYS, lambda p: p.write_bytes(b"")), (META, cut), (META, Path.unlink),
           (META, edit_prompt), (META, claim_another_key), (META, lambda p: p.write_text("[]")),
           (META, lambda p: p.write_text('{"body": 3}')), (META, lambda p: p.write_bytes(b"\xff\xfe"))]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_damaged_entries_are_set_aside_named_and_rebuilt(library, caplog, file, damage):
    library.put("support", KEY, support(0))
    library.put("support", OTHER, support(1))
    damage(library.root / "support" / KEY / file)
    with caplog.at_level(logging.WARNING):
        assert library.get("support", KEY) is None
    assert KEY in caplog.text and "broken" in caplog.text
    assert [p.suffix for p in (library.root / "support").glob(f"{KEY}*")] == [".broken"]  # kept for whoever wants to look
    caplog.clear()
    assert library.get("support", KEY) is None and not caplog.text  # reported once
    library.put("support", KEY, support(0))
    assert_equal(library.get("support", KEY), support(0))
    assert_equal(library.get("support", OTHER), support(1))


def test_put_replaces_a_damaged_entry(library):
    library.put("prototypes", KEY, prototypes())
    flip(library.root / "prototypes" / KEY / ARRAYS)
    library.put("prototypes", KEY, prototypes())
    assert_equal(library.get("prototypes", KEY), prototypes())


def test_entries_verify_and_remove(library):
    assert library.entries() == [] and library.verify() == [] and library.remove(KEY) == 0
    library.put("support", KEY, support())
    library.put("prototypes", KEY, prototypes())
    library.put("prototypes", OTHER, prototypes())
    assert [(e.kind, e.key) for e in library.entries()] == [("support", KEY), ("prototypes", KEY), ("prototypes", OTHER)]
    assert all(e.bytes == sum(f.stat().st_size for f in e.path.iterdir()) > 0 for e in library.entries())
    flip(library.root / "prototypes" / OTHER / ARRAYS)
    assert [(e.kind, e.key) for e in library.verify()] == [("prototypes", OTHER)]
    assert library.verify() == [] and len(library.entries()) == 2
    assert library.remove(KEY) == 2 and library.entries() == [] and library.get("support", KEY) is None


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_are_swept_but_nothing_that_is_in_use(library):
    for key in (KEY, OTHER):
        library.put("support", key, support())
    here = library.root / "support"
    flip(here / OTHER / ARRAYS)
    library.verify()
    swept = [here / f".{KEY}.{HOST}-{gone()}-01234567.part", library.root / f".import.{HOST}-{gone()}-01234567.part",
             here / f".{KEY}.elsewhere-1-01234567.part", here / f".{KEY}.1-2.part"]
    stays = [here / f".{KEY}.{HOST}-{os.getpid()}-01234567.part", beside(library.root / "import"),
             here / f".{KEY}.elsewhere-1-89abcdef.part"]
    for path in (*swept, *stays):
        shutil.copytree(here / KEY, path)
    for path in swept[2:]:  # of another machine nothing is known but that it has been silent for long
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    assert len(library.leftovers()) == 5 and library.entries()[0].key == KEY
    count, size = library.sweep()
    assert count == 5 and size > 0 and library.leftovers() == [] and all(path.exists() for path in stays)
    assert_equal(library.get("support", KEY), support())
    shutil.copytree(here / KEY, swept[0])  # the next writer of the key clears away what a killed one left, and nothing else
    library.put("support", KEY, support(), replace=True)
    assert not swept[0].exists() and all(path.exists() for path in stays)


def test_make_is_called_once_and_a_support_set_grows(library):
    asked = []

    def draw(start, count):
        asked.append((start, count))
        whole = support()
        return SupportSet(whole.category, whole.images[start : start + count], whole.attribution[start : start + count],
                          whole.seeds[start : start + count], whole.provenance)

    for count in (2, 3, 1, 3):
        got = library.get_or_grow(KEY, count, draw)
        assert len(got) == count and np.array_equal(got.images, support().images[:count])
    assert asked == [(0, 2), (2, 1)]
    made = [library.get_or_make("masks", OTHER, lambda n=n: masks(n)) for n in range(3)]
    for one in made:
        assert_equal(one, masks(0))


# ---- locks that do nothing

def test_a_lock_that_does_nothing_costs_a_build_and_never_an_entry(library, monkeypatch):
    """As on file systems where flock is a no-op: writers, readers, damage and sweepers at once; what is there is always whole."""
    monkeypatch.setattr(Library, "lock", lambda self, key: contextlib.nullcontext())
    library.put("support", OTHER, support())
    stop, failures, seen = threading.Event(), [], []

    def repeat(work):
        own = Library(library.root)
        try:
            while not stop.is_set():
                work(own)
        except BaseException as error:
            failures.append(error)
            raise

    def read(own):
        if (found := own.get("support", KEY)) is not None:
            seen.append(1)
            assert_equal(found, support())
        assert_equal(own.get("support", OTHER), support())

    def damage(own):
        with contextlib.suppress(FileNotFoundError):
            flip(library.root / "support" / KEY / IMAGES)
        time.sleep(0.005)

    works = [lambda own: own.put("support", KEY, support(), replace=True), lambda own: own.put("support", KEY, support(), replace=True),
             lambda own: own.get_or_make("support", KEY, support), read, read, damage, lambda own: own.sweep()]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == [] and seen
    library.put("support", KEY, support())
    assert_equal(library.get("support", KEY), support())
    assert_equal(library.get("support", OTHER), support())
    assert not list((library.root / "support").glob("*.part"))


# ---- folders that cannot be written

def test_a_full_disk_leaves_the_library_as_it_was(library, monkeypatch):
    library.put("support", OTHER, support())
    calls = []

    def full(_handle):
        calls.append(1)
        if len(calls) == 2:  # the first file fits, the second does not
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        library.put("support", KEY, support())
    assert "OVDIFF_LIBRARY" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert library.get("support", KEY) is None and os.listdir(library.root / "support") == [OTHER]
    assert_equal(library.get("support", OTHER), support())
    library.put("support", KEY, support())  # and the lock was let go
    assert_equal(library.get("support", KEY), support())


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    library = Library(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        library.put("support", KEY, support())


def test_whole_entries_of_a_read_only_library_are_used(library, monkeypatch):
    library.put("support", KEY, support())

    def refuse(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so the file mode alone would test nothing
    assert_equal(library.get("support", KEY), support())
    with pytest.raises(InputError, match="Permission denied"):
        library.put("support", OTHER, support())


def test_entries_that_may_not_be_read_are_not_called_broken(library, monkeypatch):
    library.put("support", KEY, support())

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match="may not be read"):
            library.get("support", KEY)
    assert_equal(library.get("support", KEY), support())


# ---- processes and threads

BUILDER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_library import KEY, Library, support
library = Library({root!r})
with library.lock(KEY):
    if library.get("support", KEY) is None:
        print("built", flush=True)
        time.sleep(0.5)
        library.put("support", KEY, support())
"""


def test_processes_that_want_one_class_build_it_once(library):
    script = BUILDER.format(tests=str(Path(__file__).parent), root=str(library.root))
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sorted(said) == ["", "", "built\n"]
    assert_equal(library.get("support", KEY), support())


def _die_while_writing(root, died_at):
    library, calls, fsync = Library(root), [], os.fsync

    def last_words(handle):
        calls.append(1)
        if len(calls) == died_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = last_words
    library.put("support", KEY, support())


@pytest.mark.parametrize("died_at", [1, 2, 3, 4, 5])
def test_a_killed_writer_leaves_all_or_nothing_and_no_lock(library, died_at):
    process = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(library.root, died_at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = library.get("support", KEY)
    if died_at == 5:  # after the rename
        assert_equal(found, support())
    else:
        assert found is None and library.entries() == []
    library.put("support", KEY, support())
    assert_equal(library.get("support", KEY), support())
    assert died_at == 5 or os.listdir(library.root / "support") == [KEY]  # what the dead writer left is swept up


def test_threads_exclude_each_other_and_locks_nest(library):
    inside, most = [], []

    def work():
        with library.lock(KEY), library.lock(KEY):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 5


def test_an_error_while_building_frees_the_lock(library):
    with pytest.raises(ZeroDivisionError), library.lock(KEY):
        raise ZeroDivisionError
    done = threading.Event()
    thread = threading.Thread(target=lambda: (library.put("support", KEY, support()), done.set()), daemon=True)
    thread.start()
    assert done.wait(30)


def test_an_os_error_of_the_builder_is_not_blamed_on_the_library(library):
    with pytest.raises(FileNotFoundError, match="weights"), library.lock(KEY):
        raise FileNotFoundError("weights")
