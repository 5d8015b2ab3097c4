"""Giving prototypes away: what is exported comes back whole, and an archive that is anything else is refused whole."""

import gzip
import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentences
from safetensors.numpy import save
from test_library import assert_equal, edited, masks, prototypes, support

from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import InputError
from ovdiff_lib.library.codec import ARRAYS, META, identify, write_meta
from ovdiff_lib.library.sharing import export_entries, import_archive
from ovdiff_lib.library.store import Library

MAKE = {"support": support, "masks": masks, "prototypes": prototypes}


def table(kind, words):
    return {"step": {"prototypes": "sd"}.get(kind, kind), "prompt": words, "settings": {}}


KEYS = {(kind, words): identify(table(kind, words)) for kind in MAKE for words in ("cat", "grey dog")}


@pytest.fixture
def library(tmp_path):
    made = Library(tmp_path / "lib")
    for (kind, words), key in KEYS.items():
        made.put(kind, key, MAKE[kind](len(words)), made_from=table(kind, words))
    return made


@pytest.fixture
def archive(library, tmp_path):
    export_entries(library.entries(), tmp_path / "all.tar")
    return tmp_path / "all.tar"


@pytest.fixture
def files(archive):
    """The files of an archive of six entries, by name."""
    with tarfile.open(archive) as file:
        return {m.name: file.extractfile(m).read() for m in file.getmembers()}


def pack(path, files):
    """A tar file of names and contents (bytes or a TarInfo), as a stranger would write it."""
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if isinstance(content, bytes) else 0
            file.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


@pytest.fixture
def refused(tmp_path):
    """refused(path, word, ...): the archive is, in one sentence of these words; returns nothing, and nothing was imported."""
    library = Library(tmp_path / "other")
    library.put("prototypes", "0" * 32, prototypes())
    before = library.entries()

    def check(path, *words):
        with sentences.refused(InputError, *words):
            import_archive(library, path)
        assert library.entries() == before and {p.name for p in library.root.iterdir()} == {"prototypes", "locks"}

    return check


def test_what_is_exported_comes_back(library, tmp_path):
    paths = [tmp_path / f"{name}.tar" for name in "ab"]
    for path in paths:
        export_entries(library.entries(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    other = Library(tmp_path / "other")
    assert import_archive(other, paths[0]) == Counter({True: 6})
    for (kind, words), key in KEYS.items():
        assert_equal(other.get(kind, key), MAKE[kind](len(words)))
    assert import_archive(other, paths[0]) == Counter({False: 6})
    assert other.verify() == [] and not list(other.root.glob(".*"))


# ---- what is refused, whole

OUTSIDE = ["../outside", "/tmp/outside", "support/../../outside", "prototypes/0123456789abcdef/../../../outside", "outside",
           "prototypes/0123456789abcdef/notes.txt", "prototypes/0123456789abcdef/sub/arrays.safetensors", "results/x.npz",
           "prototypes/ABCDEF0123456789/entry.json", "prototypes/0123456789abcdef/entry.json\n", "C:\\outside"]


def link(kind):
    evil = tarfile.TarInfo(f"prototypes/{KEYS['prototypes', 'cat']}/{ARRAYS}")
    evil.type, evil.linkname = kind, "/etc/passwd"
    return evil.name, evil


LINKS = map(link, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))


@pytest.mark.parametrize(("name", "content"), [*((name, b"x") for name in OUTSIDE), *LINKS])
def test_what_is_no_file_of_an_entry_is_refused(files, refused, tmp_path, name, content):
    refused(pack(tmp_path / "evil.tar", {**files, name: content}), "no file of a library entry", "nothing was imported")
    assert not (tmp_path / "outside").exists() and not Path("/tmp/outside").exists()


def test_a_header_larger_than_memory_is_refused(files, refused, tmp_path):
    """tarfile reads extended headers whole, whatever size they say they have; of this one nothing is there."""
    for size in (2**40, -1):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, size
        path = tmp_path / f"bomb{size}.tar"
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
        refused(path, "cannot be read as an archive")
    refused(pack(tmp_path / "deep.tar", {**files, f"{CAT}/{META}": b"[" * 200_000}), "does not verify")


def test_every_flipped_byte_is_found(files, refused, tmp_path):
    for name, content in files.items():
        for at in np.linspace(0, len(content) - 1, 5).astype(int):
            torn = bytearray(content)
            torn[at] ^= 4
            refused(pack(tmp_path / "flipped.tar", {**files, name: bytes(torn)}), "does not verify")


CAT, SUPPORT = f"prototypes/{KEYS['prototypes', 'cat']}", f"support/{KEYS['support', 'cat']}"
FORGERIES = {  # of what, and the edit of its description
    "another key": (CAT, lambda body: body["made_from"].update(prompt="dog")), "no origin": (CAT, lambda body: body.pop("made_from")),
    "a file outside": (CAT, lambda body: body["sha256"].update({"../../../x": "0" * 64})),
    "a file that is not there": (CAT, lambda body: body["sha256"].update({"images_099.png": "0" * 64})),
    "another format": (CAT, lambda body: body.update(format=99)), "sums that are no table": (CAT, lambda body: body.update(sha256=[])),
    "an origin that is no table": (CAT, lambda body: body.update(made_from=7)),
    # Refused before they take memory.
    **{f"images of {shape}": (SUPPORT, lambda body, shape=shape: body.update(images=shape)) for shape in (
        [3, 8, 13, 3], [2**30, 2**30, 2**30, 3], [-1, 8, 12, 3], [3, 8, 12], "abcd", [3.0, 8, 12, 3])}}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_descriptions_are_refused(files, refused, tmp_path, case):
    entry, change = FORGERIES[case]
    name = f"{entry}/{META}"
    refused(pack(tmp_path / "forged.tar", {**files, name: edited(files[name], change)}), "does not verify")


WORDS = {"step": "sd", "prompt": "cat", "seed": 1}
FORGED = {  # what an entry of prototypes says it was made from, and arrays of it; sums and key are right
    "words that steer a terminal": ({**WORDS, "prompt": "\x1b[31mred\x1b]0;title\x07"}, {}),
    "a number for words": ({**WORDS, "prompt": 5}, {}),
    "a step that is a list": ({**WORDS, "step": ["sd"]}, {}), "a list": (["sd", "cat"], {}), "text": ("sd cat", {}),
    "no words": ({"step": "sd"}, {}), "not a number": (WORDS, {"vectors": np.full((2, 3), np.nan, np.float32)}),
    "too large": (WORDS, {"vectors": np.full((2, 3), np.inf, np.float32)}), "one axis": (WORDS, {"vectors": np.ones(2, np.float32)}),
    "whole numbers": (WORDS, {"vectors": np.ones((2, 3), np.int64)}), "no grid": (WORDS, {"assignment": np.zeros(4, np.int16)}),
    "kinds that are none": (WORDS, {"kind": np.full(2, 200, np.uint8)}), "fewer kinds": (WORDS, {"kind": np.zeros(1, np.uint8)})}


def forged(path, made_from, changed):
    arrays = {"vectors": np.ones((2, 3), np.float32), "kind": np.zeros(2, np.uint8), "region": np.array([0, 1], np.uint8),
              "image": np.full(2, -1, np.int32), "cluster": np.full(2, -1, np.int32), "assignment": np.zeros((1, 2, 2), np.int16)}
    key, stored = identify(made_from), {ARRAYS: save(arrays | changed)}
    stored[META] = write_meta("prototypes", key, stored, {}, made_from)
    return pack(path, {f"prototypes/{key}/{name}": data for name, data in stored.items()})


@pytest.mark.parametrize("case", FORGED)
def test_entries_forged_with_right_sums_are_refused(refused, tmp_path, case):
    assert import_archive(Library(tmp_path / "good"), forged(tmp_path / "good.tar", WORDS, {})) == Counter({True: 1})
    refused(forged(tmp_path / "forged.tar", *FORGED[case]), "does not verify", "nothing was imported")


def test_an_archive_of_fewer_or_more_files_is_refused(files, refused, tmp_path):
    for missing in (META, ARRAYS, "images_000.png"):
        refused(pack(tmp_path / "less.tar", {name: data for name, data in files.items() if name != f"{SUPPORT}/{missing}"}), "not verify")
    refused(pack(tmp_path / "more.tar", {**files, f"{CAT}/images_000.png": b"x"}), "does not verify", "not among its files")
    refused(pack(tmp_path / "bare.tar", {}), "holds no entry")
    # Cut off between two entries it is whole for the library that reads tar files.
    whole = pack(tmp_path / "whole.tar", files)
    with tarfile.open(whole) as file:
        ends = [member.offset for member in file][1:]
    for end in ends:
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:end])
        refused(tmp_path / "cut.tar", "nothing was imported")


def test_what_is_no_archive_or_is_torn_is_one_sentence(archive, refused, tmp_path):
    for path in (tmp_path / "none.tar", tmp_path):
        refused(path, "nothing was imported")
    whole = archive.read_bytes()
    for content in (b"", b"PK\3\4 something", os.urandom(5000), whole[: len(whole) // 2], whole[:700], gzip.compress(whole)):
        (tmp_path / "torn.tar").write_bytes(content)
        refused(tmp_path / "torn.tar", "nothing was imported")


def test_a_file_that_says_it_is_mostly_empty_is_refused(files, refused, tmp_path):
    """However large it says it is: of an archive as it should be no file is larger than itself."""
    sparse = tarfile.TarInfo(f"{SUPPORT}/images_000.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}
    refused(pack(tmp_path / "sparse.tar", {**files, sparse.name: sparse}), "nothing was imported")
    sparse.pax_headers, sparse.type = {}, tarfile.GNUTYPE_SPARSE
    refused(pack(tmp_path / "sparse.tar", {**files, sparse.name: sparse}), "nothing was imported")


def test_what_cannot_be_exported_is_one_sentence_and_no_file(library, tmp_path):
    entries, path = library.entries(), library.root / "support" / KEYS["support", "cat"] / "images_000.png"
    (tmp_path / "file").touch()
    path.write_bytes(path.read_bytes()[:-1])
    for chosen, name, word in (([], "all.tar", "nothing"), (entries, "file/all.tar", "cannot be written"), (entries, "all.tar", "broken")):
        with sentences.refused(InputError, word):
            export_entries(chosen, tmp_path / name)
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("*.part"))


# ---- the command line

def test_the_commands(library, tmp_path, capsys):
    def command(*arguments, at=library.root, code=0):
        """What ``ovdiff library`` says; on stderr where it fails."""
        assert main(["library", *map(str, arguments), "--library", str(at)]) == code
        said = capsys.readouterr()
        return said.err if code == 2 else said.out

    said = command("list").splitlines()
    assert said[0].split() == ["support", "masks", "prototypes", "size"]
    assert [line.split()[:-1] for line in said[2:4]] == [["cat", "1", "1", "1"], ["grey", "dog", "1", "1", "1"]]
    assert said[-1].startswith("2 classes, 6 entries, ")
    assert command("list", "--classes", "cat").splitlines()[-1].startswith("1 class, 3 entries, ")

    cat, some = tmp_path / "cat.tar", ["--classes", "cat", "--prototypes-only"]
    assert command("export", cat, *some).startswith("1 entry, ")
    before = cat.read_bytes()
    assert "cannot be written" in command("export", tmp_path, code=2)
    command("export", cat, *some)
    assert cat.read_bytes() == before
    assert "1 new entry in " in command("import", cat, at=tmp_path / "other")
    assert [e.kind for e in Library(tmp_path / "other").entries()] == ["prototypes"]

    assert command("remove", "--classes", " , ").startswith("0 entries") and len(library.entries()) == 6
    library.remove("prototypes", KEYS["prototypes", "cat"])
    command("remove", "--classes", "grey dog")
    assert [(e.kind, e.key) for e in library.entries()] == [("support", KEYS["support", "cat"]), ("masks", KEYS["masks", "cat"])]
    (library.entries()[0].path / ARRAYS).write_bytes(b"")
    assert "1 of 2 entries" in command("verify", code=1)
    assert "1 leftover of " in command("list")
    command("remove", "--leftovers")
    command("verify")
    assert library.leftovers() == []
    command("remove", "--classes", "cat")
    assert library.entries() == [] and "0 classes, 0 entries, " in command("list")


@pytest.mark.parametrize("arguments, word", [
    (["list", "--classes", "horse"], "horse"), (["remove"], "Say what to remove"), (["import", "none.tar"], "none.tar"),
    (["export", "x.tar", "--library", "none"], "nothing to export")])
def test_mistakes_are_one_sentence(library, capsys, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["library", arguments[0], "--library", str(library.root), *arguments[1:]]) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and "\n" not in said and len(library.entries()) == 6
