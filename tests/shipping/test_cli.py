"""The command line: what it writes, and that every mistake is one sentence on stderr, exit code 2 and nothing half-written."""

import json
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentences import assigned
from test_engines import small_dataset
from tiny import tiny_overrides

from ovdiff_lib import pipeline
from ovdiff_lib.cli import main as cli
from ovdiff_lib.cli.main import COMMANDS, main
from ovdiff_lib.cli.segment import label_image
from ovdiff_lib.errors import OVDiffError
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.workbench import reproduce as runner
from ovdiff_lib.workbench.data import datasets
from ovdiff_lib.workbench.evaluation import ladder
from ovdiff_lib.workbench.tables.intervals import Runs
from ovdiff_lib.workbench.tables.paper import paper_cell
from ovdiff_lib.workbench.tables.tables import Cell, write_table

SHAPE = (40, 72)
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture
def tiny(tiny_models, library) -> list[str]:
    """Options that select the tiny models and this file's library."""
    settings = {**tiny_overrides(tiny_models), "support.size": 2, "prototypes.clusters": 3, "filters.category": False}
    return [*assigned(settings), "--library", str(library)]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with a.png, a.jpg and b.webp of different shapes, and a file that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, (name, shape) in enumerate((("a.png", SHAPE), ("a.jpg", (72, 40)), ("b.webp", (33, 61)))):
        small = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize(shape[::-1], Image.NEAREST).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def outputs(*stems: str) -> list[str]:
    return sorted(f"{stem}{end}" for stem in stems for end in (".json", "_labels.png", "_overlay.png"))


@pytest.mark.parametrize(("n", "mode"), [(1, "P"), (21, "P"), (256, "P"), (257, "I;16"), (2001, "I;16")])
def test_label_png_holds_the_labels(tmp_path, n, mode):
    labels = np.random.default_rng(0).integers(0, n, (9, 13))
    labels[0, 0] = n - 1
    colours = np.random.default_rng(1).integers(0, 256, (n, 3), dtype=np.uint8)
    label_image(labels, colours).save(tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as image:
        assert image.mode == mode and (np.asarray(image) == labels).all()
        if mode == "P":
            assert (np.asarray(image.convert("RGB")) == colours[labels]).all()


def test_one_image(images, tiny, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["segment", str(images / "a.png"), "--classes", "cat, dog", "--out", str(out), *tiny]) == 0
    assert files(out) == outputs("a")
    assert "1 image segmented" in capsys.readouterr().out
    labels = np.asarray(Image.open(out / "a_labels.png"))
    assert labels.shape == SHAPE and labels.max() <= 2
    record = json.loads((out / "a.json").read_text(encoding="utf-8"))
    assert {c["name"]: c["share"] for c in record["classes"]} == pytest.approx(
        {name: (labels == i).mean() for i, name in enumerate(("background", "cat", "dog"))})
    # The same again replaces the files by equal ones.
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["segment", str(images / "a.png"), "--classes", "cat, dog", "--out", str(out), *tiny]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_folder_with_names_that_collide(images, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["segment", str(images), "--classes", "cat", "--out", str(out), *tiny]) == 0
    assert files(out) == outputs("a.png", "a.jpg", "b.webp")
    shapes = {path.name: Image.open(path).size[::-1] for path in out.glob("*_labels.png")}
    assert shapes == {"a.png_labels.png": SHAPE, "a.jpg_labels.png": (72, 40), "b.webp_labels.png": (33, 61)}
    assert "3 images segmented" in capsys.readouterr().out


def test_one_broken_image_of_a_folder_is_named_and_the_others_are_done(images, tiny, tmp_path, capsys):
    (images / "a.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    out = tmp_path / "out"
    assert main(["segment", str(images), "--classes", "cat", "--out", str(out), *tiny]) == 2
    assert files(out) == outputs("a.png", "b.webp")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ovdiff: ")]
    assert len(errors) == 2 and "a.jpg" in errors[0] and "1 of 3" in errors[1]


IMAGE = "segment {images}/a.png --classes "
MISTAKES = [  # arguments ({images} is the folder), words of the sentence
    ("segment {images}/none.png --classes cat", "none.png"), ("segment {images}/broken.png --classes cat", "broken.png"),
    ("segment {images}/sub --classes cat", "holds no image"), (IMAGE + "'cat, Cat'", "twice"), (IMAGE + "cat --stuff gras", "'gras'"),
    (IMAGE + "cat --profile big", "'big'"), (IMAGE + "cat --set support.sise=3", "support.size"), (IMAGE + "cat --set =3", "NAME=VALUE"),
    (IMAGE + "cat --set support.size", "NAME=VALUE"), (IMAGE + "cat --set matching.windows=[64", "cannot be read"),
    (IMAGE + "cat --library {images}/a.png/library", "cannot be written"), ("build --classes ' , '", "empty"),
    ("build --classes cat --stuff sky", "'sky'"), ("evaluate vox", "mini-voc"), ("evaluate voc", "--data"),
    ("evaluate mini-voc --predictions none", "does not exist"),
    ("vocabulary 'cat, Cat'", "twice"), ("build --classes cat --workers 0", "workers"), ("evaluate mini-voc --limit 0", "limit"),
    ("evaluate mini-voc --workers 2 --limit 0", "limit"), ("evaluate mini-voc --split train", "tune, val, wild"),
    ("tune --set evaluation.tune=", "set evaluation.tune"),
    ("run {images}/none.ipynb", "none.ipynb"), ("reproduce --notebooks {images}", "No notebook"),
    (f"reproduce --notebooks {NOTEBOOKS} --only 00,77", "'77'"), (f"run {NOTEBOOKS / '00_quickstart.ipynb'} -p seed=many", "'seed'")]


@pytest.mark.parametrize("arguments, words", MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes(images, tiny_models, tmp_path, capsys, monkeypatch, arguments, words):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    (images / "sub").mkdir()
    out, library = tmp_path / "out", tmp_path / "library"
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(arguments.replace("{images}", str(images)))
    if arguments[0] in ("segment", "run", "reproduce"):
        arguments += ["--out", str(out)]
    if "--library" not in arguments:
        arguments += ["--library", str(library)]
    models = [f"models.diffusion={tiny_models / 'stable-diffusion'}", f"models.clip={tiny_models / 'clip'}"]
    # First, so that an argument of the test's own comes after and wins.
    arguments[1:1] = [o for m in models for o in ("--set", m)]
    before = files(images)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("ovdiff: ") and said.err.count("\n") == 1, said.err
    assert words in said.err and "Traceback" not in said.err
    assert not out.exists() or files(out) == []
    assert files(images) == before
    assert not [p for p in tmp_path.rglob("*.part")]


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_where_results_go_is_tried_before_anything_is_built(images, tiny, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(pipeline.OVDiff, "build", lambda *a, **o: pytest.fail("classes were built"))
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    for place in (tmp_path / "file" / "out", tmp_path / "file", Path("/proc/none/out")):
        arguments = {"segment": ["segment", str(images / "a.png"), "--classes", "cat", "--out", str(place)],
                     "evaluate": ["evaluate", "mini-voc", "--json", str(place / "result.json")]}[command]
        assert main([*arguments, *tiny]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"ovdiff: {place} cannot be written (") and said.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["segment"], ["segment", "a.png"], ["nothing"], ["evaluate", "mini-voc", "--limit", "x"],
                                       ["build"], ["build", "--classes", "a", "--class", "b"]])
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: ovdiff" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, *(f"library {name}" for name in COMMANDS["library"])])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0 and f"usage: ovdiff {command} " in capsys.readouterr().out


def test_own_pictures_are_a_class_by_their_folder_and_then_by_their_key(images, tiny, tmp_path, library, capsys):
    cats = tmp_path / "cats"
    cats.mkdir()
    shutil.copy(images / "a.jpg", cats)
    Image.fromarray(np.arange(72)[:, None].repeat(40, 1) < 20).save(cats / "a_mask.png")
    assert main(["build", "--class", f"my cat={cats}", "--class", "dog", *tiny]) == 0
    assert capsys.readouterr().out.startswith("2 classes, ")
    assert main(["library", "list", "--library", str(library), "--classes", "my cat"]) == 0
    (key,) = re.findall(r"my cat=([0-9a-f]{32}) +1 +1 +1 ", capsys.readouterr().out)
    shutil.rmtree(cats)
    for source, code in ((key, 0), (cats, 2)):
        assert main(["segment", str(images / "a.png"), "--class", f"my cat={source}", "--out", str(tmp_path / "out"), *tiny]) == code
    assert "does not exist" in capsys.readouterr().err
    assert [one["name"] for one in json.loads((tmp_path / "out" / "a.json").read_text())["classes"]] == ["background", "my cat"]


def test_evaluate_prints_and_writes_the_same_numbers(tiny, tmp_path, capsys, monkeypatch):
    """Two classes of the data set's twenty, by a stand-in for its vocabulary, to save the time of drawing all."""
    small_dataset(monkeypatch)
    path = tmp_path / "deep" / "result.json"
    assert main(["evaluate", "mini-voc", "--split", "wild", "--limit", "2", "--json", str(path), *tiny]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = json.loads(path.read_text())
    miou = table.pop("mIoU")
    assert next(iter(table)) == "background" and "mini-voc wild, 2 images" in lines[-1]
    assert lines[-1].startswith("mIoU") and f"{100 * miou:.1f}" in lines[-1]
    shown = {line.rsplit(maxsplit=1)[0].strip(): line.rsplit(maxsplit=1)[1] for line in lines[:-1]}
    assert shown == {name: "-" if v is None else f"{100 * v:.1f}" for name, v in table.items()}


def test_ladder_prints_its_rungs(tiny, capsys, monkeypatch):
    small_dataset(monkeypatch)
    monkeypatch.setattr(ladder, "load_dataset", datasets.load_dataset)
    assert main(["ladder", "mini-voc", "--split", "tune", "--images", "2", *tiny]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["mIoU", "mIoU,", "PAMR"] and lines[0].startswith("as shipped")
    assert "2 images, true support: 2 scenes of val a class" in lines[-1] and len(lines) == 12
    assert main(["ladder", "mini-voc", "--support-split", "val", *tiny]) == 2 and "'val' is measured" in capsys.readouterr().err


def test_a_notebook_runs_with_parameters(tmp_path, capsys, monkeypatch):
    """What ``ovdiff run`` hands to the runner: profile, overrides and output, and the user's own parameters over them."""
    calls = []
    monkeypatch.setattr(runner, "run_notebook", lambda *a, **o: calls.append((a, o)) or True)
    monkeypatch.chdir(tmp_path)
    for name in ("00_a.ipynb", "01_b.ipynb"):
        (tmp_path / name).write_text("{}")
    own = ["-p", "seed=4", "-p", "classes=[cat, dog]", "-p", "word=yes please"]
    assert main(["run", "00_a.ipynb", "--set", "support.size=3", *own]) == 0
    (notebook, target, parameters), options = calls.pop()
    assert notebook == Path("00_a.ipynb") and target == tmp_path / "outputs" / "mini" / "00_a.ipynb" and options["force"]
    assert parameters == {"profile": "mini", "overrides": {"support.size": 3}, "output": str(tmp_path / "outputs" / "mini"), "seed": 4,
                          "classes": ["cat", "dog"], "word": "yes please"}
    # A folder is meant from here, although the notebook runs in its own folder.
    assert main(["run", "00_a.ipynb", "-p", "output=there"]) == 0
    (_, target, parameters), _ = calls.pop()
    assert parameters["output"] == str(tmp_path / "there") and target == tmp_path / "there" / "00_a.ipynb"
    assert main(["reproduce", "--workers", "1", "--notebooks", ".", "--out", "o", "--force"]) == 0
    assert [c[0][1] for c in calls] == [tmp_path / "o" / "mini" / n for n in ("00_a.ipynb", "01_b.ipynb")]
    assert all(c[1]["force"] for c in calls)
    assert "Done." in capsys.readouterr().out
    calls.clear()
    assert main(["reproduce", "--workers", "1", "--notebooks", ".", "--out", "o", "--only", "01"]) == 0
    assert [c[0][1].name for c in calls] == ["01_b.ipynb"] and not calls[0][1]["force"]


def test_reproduce_ends_with_claims_and_report_whatever_fails(tmp_path, capsys, monkeypatch):
    """The second of three notebooks fails, the others run, claims and page are written; what cannot be written is said."""
    def run(notebook, output, parameters, **options):
        if notebook.stem == "01_broken":
            raise OVDiffError("01_broken.ipynb failed.")
        if notebook.stem == "02_table":
            cells = []
            for row, values in {"OVDiff": [49.0, 51.0], "OVDiff (-CutLER)": [40.0, 41.0]}.items():
                runs = Runs("VOC", np.array([[[[v], [100], [100]]] * 9 for v in values]))
                cells.append(Cell.of(row, "VOC", values, paper_cell("1", row, "VOC"), runs))
            write_table(output.parent / "tables" / "02_table.csv", "02_table", cells, load_profile("mini"), "What was run.")
        return True

    monkeypatch.setattr(runner, "run_notebook", run)
    monkeypatch.chdir(tmp_path)
    for name in ("00_plain", "01_broken", "02_table"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    reproduce = ["reproduce", "--workers", "1", "--notebooks", "."]
    assert main(reproduce) == 1
    said, page = capsys.readouterr(), Path("outputs/mini/report/index.html")
    first, *lines = said.out.splitlines()
    assert "3" in first and [line.split(":")[0] for line in lines[:5]] == ["00_plain", "01_broken", "02_table", "claims", "report"]
    assert "executed" in lines[0] and "FAILED" in lines[1] and "executed" in lines[2]
    assert f"{Path('outputs/mini/tables/claims.md')} (holds 1, fails 0" in lines[3]
    assert str(page) in lines[4] and page.is_file() and lines[-1].startswith("1 failed")
    assert said.err == "ovdiff: 01_broken.ipynb failed.\n"

    monkeypatch.setattr("ovdiff_lib.workbench.page.page.build_report", lambda *arguments: 1 / 0)
    (tmp_path / "outputs" / "mini" / "tables" / "09_old.csv").write_text("a,b\n1,2\n")
    (tmp_path / "01_broken.ipynb").unlink()
    assert main(reproduce) == 1
    claims, report = capsys.readouterr().err.splitlines()
    assert "claims could not be written" in claims and "09_old.csv" in claims
    assert report == "ovdiff: The report could not be written: ZeroDivisionError: division by zero"


def test_a_killed_process_is_one_sentence(tmp_path, capsys, monkeypatch):
    def killed(*_arguments):
        raise BrokenProcessPool

    monkeypatch.setattr(runner, "expected_time", killed)
    (tmp_path / "00_a.ipynb").write_text("{}")
    assert main(["reproduce", "--workers", "1", "--notebooks", str(tmp_path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ovdiff: a process was killed") and said.count("\n") == 1


def test_an_interrupt_that_python_drops_comes_again(monkeypatch, capsys):
    class Freed:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work(_options):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Freed()  # and at once no more
        time.sleep(30)

    work.arguments = ()
    monkeypatch.setattr(cli, "COMMANDS", {"work": work})
    hook = sys.unraisablehook
    assert main(["work"]) == 130 and sys.unraisablehook is hook
    assert capsys.readouterr().err == "ovdiff: interrupted; what is finished is kept, run the same command again to go on.\n"


def test_compare_tables(tmp_path, capsys):
    for name, value in (("a", 50.0), ("b", 50.4), ("c", 51.0)):
        write_table(tmp_path / name / "tables" / "05_t.csv", "05_t", [Cell("OVDiff", "VOC", value)], load_profile("mini"), "x")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["compare-tables", a, b]) == 0 and "same (tolerance 0.5)" in capsys.readouterr().out
    assert main(["compare-tables", a, f"{c}/tables"]) == 1
    assert capsys.readouterr().out.splitlines() == ["05_t: OVDiff / VOC: measured: 50.0 against 51.0", "1 differences"]
    assert main(["compare-tables", a, b, "--tolerance", "0.1"]) == 1 and main(["compare-tables", a, c, "--tolerance", "1"]) == 0
    assert main(["compare-tables", a, str(tmp_path / "none")]) == 2 and "holds no tables" in capsys.readouterr().err
