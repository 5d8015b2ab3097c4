"""Giving prototypes away: what is exported comes back whole, and an archive that is anything else is refused whole."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_library import assert_equal, masks, prototypes

from ovdiff_lib.categories import Category
from ovdiff_lib.cli.main import main
from ovdiff_lib.errors import InputError
from ovdiff_lib.library.codec import ARRAYS, META, identify
from ovdiff_lib.library.sharing import Imported, export_entries, import_archive
from ovdiff_lib.library.store import Library
from ovdiff_lib.types import SupportSet


def table(step, words):
    return {"step": step, "prompt": words, "settings": {}}


KEYS = {(step, words): identify(table(step, words)) for step in ("support", "masks", "sd") for words in ("cat", "grey dog")}


def support(words, n=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (9, 8, 12, 3), dtype=np.uint8)
    return SupportSet(Category(words), images[:n], rng.random((9, 4, 6), dtype=np.float32)[:n], np.arange(9)[:n], {"steps": 3})


@pytest.fixture
def library(tmp_path):
    made = Library(tmp_path / "lib")
    for seed, words in enumerate(("cat", "grey dog")):
        made.put("support", KEYS["support", words], support(words, seed=seed), made_from=table("support", words))
        made.put("masks", KEYS["masks", words], masks(seed), made_from=table("masks", words))
        made.put("prototypes", KEYS["sd", words], prototypes(seed), made_from=table("sd", words))
    return made


@pytest.fixture
def archive(library, tmp_path):
    export_entries(library, library.entries(), tmp_path / "all.tar")
    return tmp_path / "all.tar"


def members(path):
    with tarfile.open(path) as file:
        return {m.name: file.extractfile(m).read() for m in file.getmembers()}


def pack(path, files):
    """A tar file of {name: bytes or TarInfo}, as a stranger would write it."""
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def listing(root):
    return sorted((str(p.relative_to(root)), p.read_bytes() if p.is_file() else None) for p in root.rglob("*"))


# ---- there and back

@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz"])
def test_what_is_exported_comes_back(library, tmp_path, suffix):
    path = tmp_path / f"prototypes{suffix}"
    assert export_entries(library, library.entries(), path) == 6
    other = Library(tmp_path / "other")
    assert import_archive(other, path) == Imported(new=6)
    assert other.verify() == [] and [(e.kind, e.key) for e in other.entries()] == [(e.kind, e.key) for e in library.entries()]
    assert_equal(other.get("support", KEYS["support", "grey dog"]), library.get("support", KEYS["support", "grey dog"]))
    assert_equal(other.get("masks", KEYS["masks", "cat"]), masks(0))
    assert_equal(other.get("prototypes", KEYS["sd", "cat"]), prototypes(0))
    assert import_archive(other, path) == Imported(kept=6)
    assert not list(other.root.glob(".*"))


def test_the_same_entries_make_the_same_archive(library, tmp_path):
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        export_entries(library, library.entries(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_support_set_grows_by_import_and_never_shrinks(library, archive, tmp_path):
    key = KEYS["support", "cat"]
    longer = Library(tmp_path / "longer")
    longer.put("support", key, support("cat", 7), made_from=table("support", "cat"))
    export_entries(longer, longer.entries(), tmp_path / "longer.tar")
    assert import_archive(library, tmp_path / "longer.tar") == Imported(grown=1)
    assert_equal(library.get("support", key), support("cat", 7))
    assert import_archive(library, archive) == Imported(kept=6)
    assert len(library.get("support", key)) == 7
    # More images, but not the same first ones: drawn elsewhere, of which prototypes here know nothing.
    foreign = Library(tmp_path / "foreign")
    foreign.put("support", key, support("cat", 9, seed=5), made_from=table("support", "cat"))
    export_entries(foreign, foreign.entries(), tmp_path / "foreign.tar")
    assert import_archive(library, tmp_path / "foreign.tar") == Imported(kept=1)
    assert_equal(library.get("support", key), support("cat", 7))


# ---- what is refused, whole

def refused(library, path, *words):
    before = listing(library.root) if library.root.exists() else []
    with pytest.raises(InputError) as caught:
        import_archive(library, path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    after = listing(library.root) if library.root.exists() else []
    assert [entry for entry in after if "locks" not in entry[0]] == [entry for entry in before if "locks" not in entry[0]]


def evil(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


OUTSIDE = ["../outside", "/tmp/outside", "support/../../outside", "prototypes/0123456789abcdef/../../../outside", "outside",
           "prototypes/0123456789abcdef/notes.txt", "prototypes/0123456789abcdef/sub/arrays.safetensors", "results/x.npz",
           "prototypes/ABCDEF0123456789/entry.json", "prototypes/0123456789abcdef/entry.json\n", "C:\\outside"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_are_no_entry_are_refused(library, archive, tmp_path, name):
    path = pack(tmp_path / "evil.tar", {**members(archive), name: b"x"})
    refused(Library(tmp_path / "other"), path, "no file of a library entry", "nothing was imported")
    assert not (tmp_path / "outside").exists() and not Path("/tmp/outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(archive, tmp_path, kind):
    name = f"prototypes/{KEYS['sd', 'cat']}/{ARRAYS}"
    path = pack(tmp_path / "evil.tar", {**members(archive), name: evil(name, kind, "/etc/passwd")})
    refused(Library(tmp_path / "other"), path, "no file of a library entry")


def test_a_header_larger_than_memory_is_refused_before_it_is_read(archive, tmp_path, library):
    """tarfile reads extended headers whole, whatever size they say they have; of this one nothing is there."""
    other = Library(tmp_path / "other")
    for size in (2**40, -1):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, size
        path = tmp_path / f"bomb{size}.tar"
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
        refused(other, path, "cannot be read as an archive")
    refused(other, pack(tmp_path / "deep.tar", {**members(archive), "index.json": b"[" * 200_000}), "index.json")


def test_names_that_come_twice_are_refused(archive, tmp_path):
    files = members(archive)
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        for name in (*files, next(iter(files))):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            file.addfile(info, io.BytesIO(files[name]))
    refused(Library(tmp_path / "other"), tmp_path / "twice.tar", "twice")


def test_every_flipped_byte_is_found(archive, tmp_path):
    files = members(archive)
    other = Library(tmp_path / "other")
    for name, content in files.items():
        for at in np.linspace(0, len(content) - 1, 5).astype(int):
            torn = bytearray(content)
            torn[at] ^= 4
            said = "just the entries of its index" if name == "index.json" else "does not verify"
            refused(other, pack(tmp_path / "flipped.tar", {**files, name: bytes(torn)}), said)


def edited(content, change):
    """entry.json changed by someone who also corrects its sum."""
    import hashlib

    body = json.loads(content)["body"]
    change(body)
    return json.dumps({"body": body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}).encode()


FORGERIES = {
    "another key": lambda body: body["made_from"].update(prompt="dog"),
    "no origin": lambda body: body.pop("made_from"),
    "a file outside": lambda body: body["sha256"].update({"../../../x": "0" * 64}),
    "a file that is not there": lambda body: body["sha256"].update({"images_099.png": "0" * 64}),
    "another format": lambda body: body.update(format=99),
    "sums that are no table": lambda body: body.update(sha256=[]),
    "an origin that is no table": lambda body: body.update(made_from=7),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_descriptions_are_refused(archive, tmp_path, change):
    files = members(archive)
    name = f"prototypes/{KEYS['sd', 'cat']}/{META}"
    refused(Library(tmp_path / "other"), pack(tmp_path / "forged.tar", {**files, name: edited(files[name], change)}), "does not verify")


@pytest.mark.parametrize("shape", [[3, 8, 13, 3], [2**30, 2**30, 2**30, 3], [-1, 8, 12, 3], [3, 8, 12], "abcd", [3.0, 8, 12, 3]])
def test_images_of_another_size_than_they_say_are_refused_before_they_take_memory(archive, tmp_path, shape):
    files = members(archive)
    name = f"support/{KEYS['support', 'cat']}/{META}"
    forged = edited(files[name], lambda body: body.update(images=shape))
    refused(Library(tmp_path / "other"), pack(tmp_path / "forged.tar", {**files, name: forged}), "does not verify")


@pytest.mark.parametrize("missing", [META, ARRAYS, "images_000.png"])
def test_entries_that_lack_a_file_are_refused(archive, tmp_path, missing):
    files = members(archive)
    left = {name: data for name, data in files.items() if name != f"support/{KEYS['support', 'cat']}/{missing}"}
    refused(Library(tmp_path / "other"), pack(tmp_path / "less.tar", left), "does not verify")


def test_files_that_no_description_vouches_for_are_refused(archive, tmp_path):
    files = {**members(archive), f"prototypes/{KEYS['sd', 'cat']}/images_000.png": b"x"}
    refused(Library(tmp_path / "other"), pack(tmp_path / "more.tar", files), "does not verify", "not among its files")


def test_what_is_no_archive_or_is_torn_is_one_sentence(archive, library, tmp_path):
    other = Library(tmp_path / "other")
    refused(other, tmp_path / "none.tar", "There is no archive")
    refused(other, tmp_path, "There is no archive")
    whole = archive.read_bytes()
    export_entries(library, library.entries(), tmp_path / "all.tar.gz")
    zipped = (tmp_path / "all.tar.gz").read_bytes()
    torn = tmp_path / "torn.tar"
    for content in (b"", b"PK\3\4 something", os.urandom(5000), whole[: len(whole) // 2], whole[:700], zipped[: len(zipped) // 2],
                    zipped[:50]):
        torn.write_bytes(content)
        refused(other, torn, "nothing was imported")


def test_an_archive_larger_than_the_disk_is_refused_before_it_is_unpacked(archive, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=500))
    refused(Library(tmp_path / "other"), archive, "free")


def test_broken_entries_are_not_exported(library, tmp_path):
    path = library.root / "support" / KEYS["support", "cat"] / "images_000.png"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="broken"):
        export_entries(library, library.entries(), tmp_path / "all.tar")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lib"]  # and no half archive


def test_exporting_nothing_or_to_nowhere_is_one_sentence(library, tmp_path):
    with pytest.raises(InputError, match="nothing to export"):
        export_entries(library, [], tmp_path / "all.tar")
    with pytest.raises(InputError, match="cannot be written"):
        export_entries(library, library.entries(), tmp_path / "no" / "all.tar")


def test_an_archive_cut_off_between_two_files_is_refused(archive, tmp_path):
    """For the library that reads tar files it is whole; its index says otherwise."""
    files = list(members(archive).items())
    for n in range(len(files)):
        refused(Library(tmp_path / "other"), pack(tmp_path / "cut.tar", dict(files[:n])), "nothing was imported")
    refused(Library(tmp_path / "other"), pack(tmp_path / "bare.tar", dict(files[1:])), "index.json")


# ---- the command line

def test_the_commands(library, tmp_path, capsys):
    at = ["--library", str(library.root)]
    assert main(["library", "list", *at]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert lines[0][:4] == ["words", "images", "prototypes", "of"]
    assert lines[1][:4] == ["cat", "3", "sd", "3"] and lines[2][:5] == ["grey", "dog", "3", "sd", "3"]
    assert said.splitlines()[-1].startswith("2 classes, 6 entries, ")
    assert main(["library", "list", *at, "--classes", "cat", "--json", str(tmp_path / "list.json")]) == 0
    listed = json.loads((tmp_path / "list.json").read_text())
    assert [(e["kind"], e["made_from"]["prompt"]) for e in listed] == [("support", "cat"), ("masks", "cat"), ("prototypes", "cat")]

    assert main(["library", "export", *at, str(tmp_path / "cat.tar"), "--classes", "cat", "--prototypes-only"]) == 0
    said, before = capsys.readouterr().out, (tmp_path / "cat.tar").read_bytes()
    assert said.splitlines()[-1].startswith("1 entry, ")
    for arguments, wrong in (([], "is there already; give another name, or --overwrite"), (["--keys", "zz"], "is there already")):
        assert main(["library", "export", *at, str(tmp_path / "cat.tar"), *arguments]) == 2
        assert wrong in capsys.readouterr().err and (tmp_path / "cat.tar").read_bytes() == before
    for name in ("cat.zip", "cat", "cat.gz"):
        assert main(["library", "export", *at, str(tmp_path / name)]) == 2 and "does not end in .tar, .tar.gz" in capsys.readouterr().err
    assert main(["library", "export", *at, str(tmp_path), "--overwrite"]) == 2 and "is a folder" in capsys.readouterr().err
    assert main(["library", "export", *at, str(tmp_path / "ALL.TAR.GZ")]) == 0 and (tmp_path / "ALL.TAR.GZ").read_bytes()[:2] == b"\x1f\x8b"
    capsys.readouterr()
    assert main(["library", "export", *at, str(tmp_path / "nowhere" / "cat.tar")]) == 2 and "There is no folder" in capsys.readouterr().err
    assert main(["library", "export", *at, str(tmp_path / "cat.tar"), "--classes", "cat", "--prototypes-only", "--overwrite"]) == 0
    assert (tmp_path / "cat.tar").read_bytes() == before
    other = ["--library", str(tmp_path / "other")]
    assert main(["library", "import", *other, str(tmp_path / "cat.tar")]) == 0
    assert "1 new entry in " in capsys.readouterr().out
    assert [e.kind for e in Library(tmp_path / "other").entries()] == ["prototypes"]

    assert main(["library", "remove", *at, "--classes", "grey dog", "--dry-run"]) == 0
    assert "would go" in capsys.readouterr().out and len(library.entries()) == 6
    assert main(["library", "remove", *at, "--keys", KEYS["sd", "cat"][:9]]) == 0
    assert main(["library", "remove", *at, "--classes", "grey dog"]) == 0
    assert [(e.kind, e.key) for e in library.entries()] == [("support", KEYS["support", "cat"]), ("masks", KEYS["masks", "cat"])]

    path = library.root / "support" / KEYS["support", "cat"] / ARRAYS
    path.write_bytes(b"")
    assert main(["library", "verify", *at]) == 1
    assert "1 of 2 entries" in capsys.readouterr().out
    assert main(["library", "list", *at]) == 0 and "1 leftover of " in capsys.readouterr().out
    assert main(["library", "remove", *at, "--leftovers"]) == 0
    assert main(["library", "verify", *at]) == 0 and library.leftovers() == []
    for file in library.entries()[0].path.iterdir():
        os.utime(file, (1, 1))
    assert main(["library", "remove", *at, "--unused-for", "30"]) == 0 and library.entries() == []
    assert main(["library", "list", *at]) == 0 and "0 classes, 0 entries, 0 B" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, word", [
    (["list", "--classes", "horse"], "horse"), (["export", "x.tar", "--keys", "ffff"], "ffff"), (["remove"], "Say what to remove"),
    (["import", "none.tar"], "none.tar"), (["remove", "--unused-for", "-3"], "days above 0"),
    (["remove", "--unused-for", "nan"], "days above 0"), (["remove", "--unused-for", "0"], "days above 0"),
    (["remove", "--all", "--classes", "cat"], "every entry")])
def test_mistakes_are_one_sentence(library, capsys, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["library", *arguments, "--library", str(library.root)]) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and "\n" not in said and len(library.entries()) == 6


@pytest.mark.parametrize("arguments", [["list"], ["verify"], ["export", "x.tar"], ["remove", "--all"]])
@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_library_that_is_not_there_is_a_mistake(tmp_path, monkeypatch, capsys, arguments, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        (tmp_path / "lib").write_text("")
    assert main(["library", *arguments, "--library", str(tmp_path / "lib")]) == 2
    assert "There is no library folder" in capsys.readouterr().err


def test_reading_an_entry_counts_as_use(library):
    entry = library.entries()[-1]
    for file in entry.path.iterdir():
        os.utime(file, (1, 1))
    assert library.entries()[-1].used == 1
    library.verify()
    assert library.entries()[-1].used == 1  # looking whether it is whole is no use
    library.get("prototypes", entry.key)
    assert library.entries()[-1].used > 1e9
