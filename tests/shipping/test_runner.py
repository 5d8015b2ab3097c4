"""Running notebooks: wrong parameters stop before anything runs, fresh results are kept, failures leave the last good result."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.workbench import reproduce as runner
from ovdiff_lib.workbench.reproduce import check_parameters, notebooks, own_data, run_all, run_notebook

COUNTING = """
from pathlib import Path
output = Path(output)
(output / "tables").mkdir(parents=True, exist_ok=True)
log = output / "log.txt"
log.write_text((log.read_text() if log.exists() else "") + f"{count},")
(output / "tables" / "00_counting.csv").write_text(f"count,{count}\\n")
assert count >= 0, "count is negative:\\nsecond line"
from ipykernel.kernelapp import IPKernelApp
print("counted", count, IPKernelApp.instance().log_level)
"""


def written(folder: Path, stem: str, cells=(), source: str = "x = 1", tags=()) -> Path:
    """A notebook with a parameters cell of ``source`` and further cells."""
    made = new_notebook(cells=[new_code_cell(source, id="parameters", metadata={"tags": ["parameters", *tags]}), *cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(made, folder / f"{stem}.ipynb")
    return folder / f"{stem}.ipynb"


def counting(folder: Path, stem: str = "00_counting", source: str = COUNTING) -> Path:
    return written(folder, stem, [new_code_cell(source, id="count")], 'count: int | None = None  # how many\noutput = "."')


@pytest.fixture
def notebook(tmp_path) -> Path:
    """A notebook that notes each of its runs and fails for a negative count."""
    return counting(tmp_path / "notebooks")


@pytest.fixture(autouse=True)
def small_package(tmp_path, monkeypatch) -> Path:
    """A stand-in for the package's code and data, so that a test may change it."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(runner, "PACKAGE", folder)
    monkeypatch.setattr(runner, "_package", runner._package.__wrapped__)  # what a process asks once, a test asks again
    return folder


def sum_of_code(path: Path) -> str:
    """As an nbformat reader sees the cells."""
    return hashlib.sha256(json.dumps([c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]).encode()).hexdigest()


def refused(function, *arguments, error=InputError) -> str:
    """The one sentence of the error."""
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- which notebooks, and their parameters

def test_notebooks_are_found_in_order_and_chosen_by_number_or_name(tmp_path):
    names = ["00_a", "01_b", "02_c", "10_d"]
    for name in (*reversed(names), "notes"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    (tmp_path / "03_e.txt").write_text("")

    def chosen(*only: str) -> list[str]:
        return [p.stem for p in notebooks(tmp_path, only)]

    assert chosen() == names
    assert chosen("02", "00") == ["00_a", "02_c"] and chosen("10_d", " 01 ", "01_b") == ["01_b", "10_d"]
    for wrong in ("03", "1_b", "", "b", "²"):
        said = refused(chosen, wrong)
        assert all(name in said for name in names) and repr(wrong) in said
    refused(notebooks, tmp_path / "missing")


DEFAULTS = """seed = 0  # a number
scale = 8.0  # another
name = "mini"  # text
flag = True  # yes or no
classes = ["dog", "boat"]  # any list
sizes: list[int] = [1, 2]
overrides = {}  # a table
images: int | None = 60  # the first so many
"""


@pytest.mark.parametrize("name, good, bad, kind", [
    ("seed", [0, -3], ["many", 1.5, True, None, [1]], "int"), ("scale", [1, 2.5], ["x", True, None], "float"),
    ("name", ["", "paper"], [3, None, ["mini"]], "str"), ("flag", [False], [0, 1, "yes"], "bool"),
    ("classes", [["cat"], []], ["cat", [Path("a")]], "list"), ("sizes", [[4]], [[4.5], ["4"], 4, [True]], "list[int]"),
    ("overrides", [{"a.b": 1}], [[], "a", None], "dict"), ("images", [3, None], ["all", 2.5], "int | None")])
def test_parameters_have_the_type_of_their_annotation_or_default(tmp_path, name, good, bad, kind):
    path = written(tmp_path, "00_typed", source=DEFAULTS)
    for value in good:
        check_parameters(path, {name: value})
    for value in bad:
        said = refused(check_parameters, path, {name: value})
        assert f"{name!r} of 00_typed.ipynb" in said and kind in said and repr(value) in said


def test_a_profile_brings_its_own_images_to_a_notebook_that_takes_one_data_set(tmp_path):
    path, plain = written(tmp_path, "00_one", source='dataset = "mini-voc"'), written(tmp_path, "01_none")
    given = {"profile": "paper", "overrides": {"evaluation.voc": "voc:/data"}}
    assert own_data(path, given) == {"dataset": "voc:/data"} and own_data(path, {"profile": "mini"}) == {"dataset": "mini-voc"}
    assert own_data(path, {**given, "dataset": "context"}) == own_data(path, {}) == own_data(plain, given) == {}


def test_unknown_parameters_are_refused_before_anything_runs(notebook, tmp_path):
    target = tmp_path / "out" / "00_counting.ipynb"
    said = refused(run_notebook, notebook, target, {"cuont": 3})
    assert "'cuont'" in said and "'count'?" in said and "00_counting.ipynb" in said
    assert "count, output" in refused(run_notebook, notebook, target, {"profile": "mini"})
    refused(run_notebook, notebook, target, {"count": tmp_path})
    assert not target.parent.exists()
    plain = tmp_path / "00_plain.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("count = 1")]), plain)
    check_parameters(plain, {})
    assert "none" in refused(check_parameters, plain, {"count": 1})


def test_files_that_are_no_notebook_are_described(tmp_path):
    path, tagged = tmp_path / "00_bad.ipynb", '{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "%s"}]}'
    for content in (b"", b"not json", b"[]", b"{}", b"\xff\xfe", b'{"cells": [3]}', tagged % "%magic", tagged % "a = max(1, 2)",
                    tagged % "a: open = 1"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert str(path) in refused(check_parameters, path, {"count": 1})
    refused(check_parameters, tmp_path, {})


# ---- one notebook

def test_fresh_results_are_kept_and_failures_harm_nothing(notebook, tmp_path):
    folder = tmp_path / "out"
    target, log = folder / "00_counting.ipynb", folder / "log.txt"

    def run(count: int) -> bool:
        return run_notebook(notebook, target, {"count": count, "output": str(folder)}, progress=False)

    assert run(2) is True
    assert log.read_text() == "2,"
    (said,) = [o["text"] for c in nbformat.read(target, 4).cells for o in c.get("outputs", [])]
    assert said == "counted 2 50\n"  # a kernel is quiet unless it dies: log level CRITICAL
    assert not list(folder.glob("*.failed.ipynb")) and not list(folder.glob("*.partial.ipynb"))
    stamp = json.loads((folder / "00_counting.stamp.json").read_text())
    assert stamp["seconds"] >= 0 and stamp["code"] == sum_of_code(notebook)
    assert set(stamp["outputs"]) == {"00_counting.ipynb", "tables/00_counting.csv"}

    # The same again: nothing runs, nothing is touched. Other parameters run again.
    before = target.stat().st_mtime_ns
    assert run(2) is False and log.read_text() == "2," and target.stat().st_mtime_ns == before
    assert run(3) is True and log.read_text() == "2,3,"

    # A failing cell: one sentence, and the last good result is what it was.
    good, said = target.read_bytes(), refused(run, -1, error=OVDiffError)
    assert "'count': AssertionError: count is negative" in said and "second" not in said and "00_counting.failed.ipynb" in said
    assert target.read_bytes() == good and (folder / "00_counting.failed.ipynb").exists()
    assert not list(folder.glob("*.partial.ipynb"))
    # Its table was overwritten by the failed run, so the good result is no longer whole: it runs again and cleans up.
    assert run(3) is True and log.read_text() == "2,3,-1,3,"
    assert not (folder / "00_counting.failed.ipynb").exists()


CHANGES = {
    "source": lambda path, out, package: path.write_text(path.read_text().replace("counted", "recounted")),
    "code": lambda path, out, package: (package / "code.py").write_text("x = 2\n"),
    "data": lambda path, out, package: (package / "weights.safetensors").write_bytes(b"1"),
    "table of the package": lambda path, out, package: (package / "things.csv").write_text("class,label\n"),
    "panel": lambda path, out, package: (out / "explain" / "00_counting.json").unlink(),
    "table": lambda path, out, package: (out / "tables" / "00_counting.csv").write_text("count,100\n"),
    "no table": lambda path, out, package: (out / "tables" / "00_counting.csv").unlink(),
    "torn stamp": lambda path, out, package: (out / "00_counting.stamp.json").write_text('{"source": '),
    "no stamp": lambda path, out, package: (out / "00_counting.stamp.json").unlink(),
    "no copy": lambda path, out, package: (out / "00_counting.ipynb").unlink(), "force": lambda path, out, package: None}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_result_stands_on_makes_it_stale(notebook, tmp_path, small_package, monkeypatch, change):
    """Papermill is replaced by a copy, so that only the decision to run is tested."""
    folder = tmp_path / "out"
    target, runs = folder / "00_counting.ipynb", []

    def execute(source, output, **options):
        runs.append(options["parameters"])
        Path(output).write_bytes(Path(source).read_bytes())
        for kind, name in (("tables", "00_counting.csv"), ("explain", "00_counting.json")):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / name).write_text("{}")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    run_notebook(notebook, target, {"count": 1})
    (folder / "tables" / "01_other.csv").write_text("another notebook's\n")
    (small_package / "recipes").mkdir()
    (small_package / "recipes" / "train_unet.py").write_text("whatever = 1")  # no result stands on it
    (small_package / "code.py").write_text("x = 1  # a comment\n")
    target.with_suffix(".failed.ipynb").write_text("{}")  # of other settings
    by_hand = nbformat.read(notebook, 4)
    by_hand.cells[1].execution_count = 7  # running a notebook by hand changes no cell's source
    nbformat.write(by_hand, notebook)
    assert run_notebook(notebook, target, {"count": 1}) is False
    assert not target.with_suffix(".failed.ipynb").exists()
    CHANGES[change](notebook, folder, small_package)
    assert run_notebook(notebook, target, {"count": 1}, force=change == "force") is True
    assert len(runs) == 2
    assert run_notebook(notebook, target, {"count": 1}) is False


def test_folders_that_cannot_be_made_and_full_disks_are_one_sentence(notebook, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "out") in refused(run_notebook, notebook, tmp_path / "file" / "out" / "00_counting.ipynb", {})

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    assert "No space left" in refused(run_notebook, notebook, tmp_path / "00_counting.ipynb", {})
    assert not list(tmp_path.glob("*.ipynb"))


def test_a_kernel_that_dies_is_one_sentence_and_an_interrupt_in_it_an_interrupt(tmp_path):
    target = tmp_path / "out" / "00_counting.ipynb"
    assert "kernel" in refused(run_notebook, counting(tmp_path, source="import os; os._exit(1)"), target, {}, error=OVDiffError)
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt):
        run_notebook(counting(tmp_path, source="raise KeyboardInterrupt"), target, {}, progress=False)
    assert not list(target.parent.iterdir())  # neither a partial copy nor the failed one of the run before


# ---- all notebooks

def test_what_ran_is_noted(notebook, tmp_path, monkeypatch):
    """Merged with what is there, in order, and again where a fresh result lacks its note; text and outputs do not count."""
    noted = tmp_path / "out" / runner.EXECUTED
    monkeypatch.setattr(papermill, "execute_notebook", lambda source, output, **options: Path(output).write_text("{}"))
    noted.parent.mkdir(parents=True)
    noted.write_text('{"01_other": {"code": "a", "seconds": 61.0}, "00_counting": {"code": "b"}}')
    assert run_all([notebook], tmp_path / "out", {"count": 1}) == []
    found = json.loads(noted.read_text())
    assert list(found) == ["00_counting", "01_other"] and found["01_other"] == {"code": "a", "seconds": 61.0}
    assert found["00_counting"]["code"] == sum_of_code(notebook) and found["00_counting"]["seconds"] >= 0
    noted.write_text("{torn")
    assert run_all([notebook], tmp_path / "out", {"count": 1}) == []
    assert json.loads(noted.read_text()) == {"00_counting": found["00_counting"]}
    made = nbformat.read(notebook, 4)
    made.cells.append(new_markdown_cell("# Text"))
    nbformat.write(made, notebook)
    assert runner.code_sum(notebook) == sum_of_code(notebook) == found["00_counting"]["code"]


def test_the_longest_begin_first_and_those_that_measure_time_are_last_and_alone(tmp_path, monkeypatch):
    paths = [written(tmp_path, name, tags=["alone"] if "alone" in name else ())
             for name in ("00_short", "01_long", "02_alone", "03_new", "04_alone")]
    for name, seconds in (("00_short", 10), ("01_long", 90), ("02_alone", 900)):
        runner.note(tmp_path, name, {"code": "", "seconds": seconds})
    events = []

    def run(notebook, threads):
        events.append(notebook.stem)
        time.sleep(0.1)
        events.append("end")
        return notebook.stem, threads

    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, *_, **_options: ThreadPoolExecutor(workers))
    ended = dict(runner._side_by_side(run, paths, tmp_path, 2))
    assert [event for event in events if event != "end"] == ["03_new", "01_long", "00_short", "04_alone", "02_alone"]
    assert events[-4:] == ["04_alone", "end", "02_alone", "end"]  # what has not been measured may be the longest of all
    assert ended["02_alone"] == len(os.sched_getaffinity(0)) and ended["01_long"] == max(1, ended["02_alone"] // 2)


def test_the_time_to_expect_is_that_of_the_last_runs(tmp_path):
    """Two at a time, half of 60 + 300 + 240 s, and before them the classes: 9 minutes."""
    paths = [Path(f"{name}.ipynb") for name in ("00_a", "01_b", "02_c", "03_new")]
    assert runner.expected_time(paths, tmp_path, 2) == "4 to run."  # nothing is known
    for name, seconds in (("00_a", 60), ("01_b", 300), ("02_c", 240), (runner.CLASSES, 240)):
        runner.note(tmp_path, name, {"code": "", "seconds": seconds})
    assert runner.expected_time(paths, tmp_path, 2) == "4 to run, about 9 min as measured last."
    (tmp_path / "cache").mkdir()
    assert "about 10 min" in runner.expected_time(paths, tmp_path, 1)


def test_one_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    """Whatever is raised becomes a sentence; an interrupt alone ends the run."""
    raised = {"01_b": OVDiffError("The notebook 01_b.ipynb failed in cell 'x'."), "02_c": MemoryError("no room\nhere")}
    done = []

    def run(path, output, parameters, *, force, progress):
        assert progress is True and output == tmp_path / "out" / path.name and parameters == {"a": 1} and force is True
        if path.stem in raised:
            raise raised[path.stem]
        done.append(path.stem)
        return path.stem != "03_d"

    monkeypatch.setattr(runner, "run_notebook", run)
    chosen = [Path(f"{i:02d}_{letter}.ipynb") for i, letter in enumerate("abcd")]
    failures = run_all(chosen, tmp_path / "out", {"a": 1}, force=True)
    assert done == ["00_a", "03_d"] and failures[0] == "The notebook 01_b.ipynb failed in cell 'x'." and len(failures) == 2
    assert "02_c.ipynb" in failures[1] and failures[1].endswith("MemoryError: no room")
    assert [line[:8] for line in capsys.readouterr().out.splitlines()] == ["00_a: ex", "01_b: FA", "02_c: FA", "03_d: fr"]
    raised["01_b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_all(chosen, tmp_path / "out", {"a": 1}, force=True)
    assert done == ["00_a", "03_d", "00_a"]


def test_two_notebooks_at_a_time_and_one_that_fails(notebook, tmp_path, capsys):
    """Each in a process and with a kernel of its own; the failure names its cell and stops no other."""
    source = COUNTING.replace("00_counting", "01_other").replace("log.txt", "other.txt").replace("count >= 0", "count > 9")
    other = counting(notebook.parent, "01_other", source)
    failures = run_all([notebook, other], tmp_path / "out", {"count": 3, "output": str(tmp_path / "out")}, workers=2)
    assert len(failures) == 1 and "01_other.ipynb" in failures[0] and "'count'" in failures[0] and capsys.readouterr().out.count("\n") == 2
    assert (tmp_path / "out" / "00_counting.ipynb").exists() and not (tmp_path / "out" / "01_other.ipynb").exists()
    assert list(json.loads((tmp_path / "out" / runner.EXECUTED).read_text())) == ["00_counting"]  # the other failed
    assert not list(notebook.parent.glob("kernel*"))  # no sockets beside the notebooks
