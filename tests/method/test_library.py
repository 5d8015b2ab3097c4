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
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovdiff_lib.categories import Category
from ovdiff_lib.errors import InputError
from ovdiff_lib.library.codec import ARRAYS, META, identify
from ovdiff_lib.library.store import HOST, Library, beside
from ovdiff_lib.types import ForegroundBackground, Prototypes, SupportSet

KEY, OTHER = "0123456789abcdef", "f" * 32
IMAGES = "images_000.png"


def support(seed=0, name="cat"):
    rng = np.random.default_rng(seed)
    return SupportSet(Category(name, "a furry cat", "stuff"), rng.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8),
                      rng.random((3, 4, 6), dtype=np.float32), np.array([7, 2**62, -5]))


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


def edited(content, change):
    """entry.json changed by someone who also corrects its sum."""
    body = json.loads(content)["body"]
    change(body)
    return json.dumps({"body": body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}).encode()


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "lib")


# ---- round trip

@pytest.mark.parametrize(("kind", "value"), [
    ("support", support()), ("masks", masks()), ("prototypes", prototypes()), ("prototypes", prototypes().select(np.zeros(5, bool))),
    ("support", SupportSet(Category("x"), support().images.transpose(0, 2, 1, 3), support().attribution[::-1], support().seeds))])
def test_what_was_put_comes_back(library, kind, value):
    assert library.get(kind, KEY) is None and not library.root.exists()  # looking makes no folders
    library.put(kind, KEY, value)
    again = Library(library.root)
    assert_equal(again.get(kind, KEY), value)
    assert again.get(kind, OTHER) is None
    assert {path.suffix for path in library.root.rglob("*.*")} <= {".safetensors", ".json", ".lock", ".png"}  # no pickle
    library.put(kind, KEY, {"support": support, "masks": masks, "prototypes": prototypes}[kind](1))
    assert_equal(library.get(kind, KEY), value)  # a whole entry stays
    if kind == "support":
        again.get(kind, KEY).images[:] = 0  # the caller's own memory
        assert_equal(again.get(kind, KEY), value)


@pytest.mark.parametrize("key", ["", "../../../x", "ABCDEF01", "0123456", "0" * 65, "0123456789abcde\n", "01234567/9abcdef"])
def test_keys_that_are_none(library, key):
    for call, *given in ((library.get,), (library.remove,), (library.put, support())):
        with pytest.raises(InputError):
            call("support", key, *given)
    assert not library.root.exists()


def test_where_the_library_is(monkeypatch, tmp_path):
    monkeypatch.setenv("OVDIFF_LIBRARY", str(tmp_path / "there"))
    assert Library().root == tmp_path / "there"
    monkeypatch.delenv("OVDIFF_LIBRARY")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert Library().root == tmp_path / ".cache" / "ovdiff"


def test_images_and_masks_are_pictures_that_anything_opens(library, monkeypatch):
    monkeypatch.setattr("ovdiff_lib.library.codec.STRIP_PIXELS", 2 * 9 * 13)
    for kind, value, name, pictures in (("support", support(), "images", support().images), ("masks", masks(), "foreground",
                                                                                           masks().foreground)):
        library.put(kind, KEY, value)
        strips = [np.array(Image.open(path)) for path in sorted((library.root / kind / KEY).glob(f"{name}*.png"))]
        assert [len(strip) for strip in strips] == [2 * pictures.shape[1], pictures.shape[1]]
        assert (np.concatenate(strips).reshape(pictures.shape) == pictures).all()
        assert_equal(library.get(kind, KEY), value)


def test_what_an_entry_was_made_from_is_kept_and_is_its_key(library, caplog):
    table = {"step": "sd", "prompt": "a furry cat", "settings": {"prototypes": {"clusters": 2}}}
    key = identify(table)
    assert key == hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:32]
    library.put("prototypes", key, prototypes(), made_from=table)
    assert library.described()[0][1]["made_from"] == table and library.verify() == []
    # Another key with a correct sum: what is in it is not what its key stands for.
    library.put("prototypes", KEY, prototypes(), made_from=table)
    assert library.get("prototypes", KEY) is None and KEY in caplog.text
    assert_equal(library.get("prototypes", key), prototypes())


# ---- damage

def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write(content):
    return lambda path: path.write_bytes(content)


def forge(**change):
    return lambda path: path.write_bytes(edited(path.read_bytes(), lambda body: body.update(change)))


DAMAGES = [(IMAGES, cut), (IMAGES, flip), (IMAGES, Path.unlink),
           (ARRAYS, cut), (ARRAYS, flip), (ARRAYS, Path.unlink), (ARRAYS, write(b"")), (META, cut), (META, Path.unlink),
           (META, lambda path: path.write_text(path.read_text().replace("furry", "fluffy"))), (META, write(b"[]")),
           (META, write(b'{"body": 3}')), (META, write(b"\xff\xfe")), (META, forge(key=OTHER)), (META, forge(kind="masks")),
           (META, forge(format=2))]  # as it was written before masks were pictures


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
    damage(library.root / "support" / KEY / file)
    library.put("support", KEY, support(0))  # without a look before
    assert_equal(library.get("support", KEY), support(0))
    assert_equal(library.get("support", OTHER), support(1))


def test_entries_verify_and_remove(library):
    assert library.entries() == [] and library.verify() == [] and library.remove("support", KEY) is None
    library.put("support", KEY, support())
    library.put("prototypes", KEY, prototypes())
    library.put("prototypes", OTHER, prototypes())
    assert [(e.kind, e.key) for e in library.entries()] == [("support", KEY), ("prototypes", KEY), ("prototypes", OTHER)]
    assert all(e.bytes == sum(f.stat().st_size for f in e.path.iterdir()) > 0 for e in library.entries())
    flip(library.root / "prototypes" / OTHER / ARRAYS)
    assert [(e.kind, e.key) for e in library.verify()] == [("prototypes", OTHER)]
    assert library.verify() == [] and len(library.entries()) == 2
    library.remove("support", KEY)
    assert [(e.kind, e.key) for e in library.entries()] == [("prototypes", KEY)] and library.get("support", KEY) is None


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
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
    assert library.sweep() == 5 and library.leftovers() == [] and all(path.exists() for path in stays)
    assert_equal(library.get("support", KEY), support())
    shutil.copytree(here / KEY, swept[0])  # the next writer of the key clears away what a killed one left, and nothing else
    library.put("support", KEY, support(), replace=True)
    assert not swept[0].exists() and all(path.exists() for path in stays)


def test_make_is_called_once_and_a_support_set_grows(library):
    asked = []

    def draw(start, count):
        asked.append((start, count))
        return support().take(range(start, start + count))

    for count in (2, 3, 1, 3):
        assert_equal(library.get_or_grow(KEY, count, draw), support().take(range(count)))
    assert asked == [(0, 2), (2, 1)]
    for number in range(3):
        assert_equal(library.get_or_make("masks", OTHER, lambda number=number: masks(number)), masks(0))


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

    def write(own):
        own.put("support", KEY, support(), replace=True)

    def read(own):
        if (found := own.get("support", KEY)) is not None:
            seen.append(1)
            assert_equal(found, support())
        assert_equal(own.get("support", OTHER), support())

    def damage(own):
        with contextlib.suppress(FileNotFoundError):
            flip(library.root / "support" / KEY / IMAGES)
        time.sleep(0.005)

    works = [write, write, lambda own: own.get_or_make("support", KEY, support), read, read, damage, Library.sweep]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == [] and seen
    library.put("support", KEY, support())
    for key in (KEY, OTHER):
        assert_equal(library.get("support", key), support())
    assert not list((library.root / "support").glob("*.part"))


# ---- folders that cannot be written or read

def test_a_full_disk_leaves_the_library_as_it_was(library, monkeypatch):
    library.put("support", OTHER, support())
    calls = []

    def full(_handle):
        calls.append(1)
        if len(calls) == 2:  # the first file fits, the second does not
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="No space left on device") as caught:
        patched.setattr(os, "fsync", full)
        library.put("support", KEY, support())
    assert "OVDIFF_LIBRARY" in str(caught.value) and "\n" not in str(caught.value)
    assert library.get("support", KEY) is None and os.listdir(library.root / "support") == [OTHER]
    assert_equal(library.get("support", OTHER), support())
    library.put("support", KEY, support())  # and the lock was let go
    assert_equal(library.get("support", KEY), support())


def test_folders_that_may_not_be_written_or_read(library, monkeypatch, tmp_path):
    """Whole entries of a read-only library are used, and entries that may not be read are not called broken."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        Library(tmp_path / "file").put("support", KEY, support())
    library.put("support", KEY, support())

    def refuse(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)  # root may write anywhere, so the file mode alone would test nothing
        assert_equal(library.get("support", KEY), support())
        with pytest.raises(InputError, match="Permission denied"):
            library.put("support", OTHER, support())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match="Permission denied"):
            library.get("support", KEY)
    assert_equal(library.get("support", KEY), support())


# ---- processes and threads

@pytest.mark.parametrize("kind", [threading.Thread, multiprocessing.get_context("fork").Process])
def test_threads_and_processes_that_want_one_class_build_it_once(library, tmp_path, kind):
    def build():
        def make():
            with (tmp_path / "made").open("a") as file:
                file.write("x")
            time.sleep(0.3)
            return support()  # put under the lock that this one's builder holds: locks nest

        Library(library.root).get_or_make("support", KEY, make)

    running = [kind(target=build, daemon=True) for _ in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
    assert (tmp_path / "made").read_text() == "x"
    assert_equal(library.get("support", KEY), support())


def test_an_error_while_building_is_the_builders_own_and_frees_the_lock(library):
    with pytest.raises(FileNotFoundError, match="weights"), library.lock(KEY):
        raise FileNotFoundError("weights")
    thread = threading.Thread(target=library.put, args=("support", KEY, support()), daemon=True)
    thread.start()
    thread.join(30)
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
