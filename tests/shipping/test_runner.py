"""Running notebooks: wrong parameters stop before anything runs, fresh results are kept, failures leave the last good result."""

import hashlib
import json
from pathlib import Path

import nbformat
import pytest

from ovdiff_lib import keys
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.workbench import reproduce as runner
from ovdiff_lib.workbench.reproduce import check_parameters, notebooks, run_all, run_notebook

COUNTING = """
from pathlib import Path
output = Path(output)
(output / "tables").mkdir(parents=True, exist_ok=True)
log = output / "log.txt"
log.write_text((log.read_text() if log.exists() else "") + f"{count},")
(output / "tables" / "00_counting.csv").write_text(f"count,{count}\\n")
assert count >= 0, "count is negative:\\nsecond line"
print("counted", count)
"""


@pytest.fixture
def notebook(tmp_path) -> Path:
    """A notebook that notes each of its runs and fails for a negative count."""
    made = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell('count: int | None = None  # how many\noutput = "."', id="parameters", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(COUNTING, id="count")])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "notebooks" / "00_counting.ipynb"
    path.parent.mkdir()
    nbformat.write(made, path)
    return path


@pytest.fixture(autouse=True)
def small_package(tmp_path, monkeypatch) -> Path:
    """A stand-in for the package's code and data, so that a test may change it."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(keys, "PACKAGE", folder)
    monkeypatch.setattr(runner, "_package", runner._package.__wrapped__)  # what a process asks once, a test asks again
    return folder


def test_notebooks_are_found_in_order(tmp_path):
    for name in ("02_b.ipynb", "00_a.ipynb", "notes.ipynb", "01_c.txt"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in notebooks(tmp_path)] == ["00_a.ipynb", "02_b.ipynb"]
    (tmp_path / "none").mkdir()
    for folder in ("none", "missing"):
        with pytest.raises(InputError, match="No notebook"):
            notebooks(tmp_path / folder)


def test_notebooks_are_chosen_by_number_or_name(tmp_path):
    names = ["00_a", "01_b", "02_c", "10_d"]
    for name in names:
        (tmp_path / f"{name}.ipynb").write_text("{}")

    def chosen(*only: str) -> list[str]:
        return [p.stem for p in notebooks(tmp_path, only)]

    assert chosen() == names
    assert chosen("02", "0") == ["00_a", "02_c"] and chosen("10_d.ipynb", " 10 ", "01_b") == ["01_b", "10_d"]
    for wrong in ("03", "1_b", "", "b", "²"):
        with pytest.raises(InputError, match=r"it has 00_a, 01_b, 02_c, 10_d\.") as caught:
            notebooks(tmp_path, [wrong])
        assert repr(wrong) in str(caught.value)


def test_the_kernel_is_quiet_unless_it_dies(notebook, tmp_path):
    made = nbformat.read(notebook, as_version=4)
    made.cells.append(nbformat.v4.new_code_cell("from ipykernel.kernelapp import IPKernelApp; print(IPKernelApp.instance().log_level)"))
    nbformat.write(made, notebook)
    target = tmp_path / "out" / "00_counting.ipynb"
    run_notebook(notebook, target, {"count": 1, "output": str(tmp_path)})
    assert nbformat.read(target, as_version=4).cells[-1].outputs[0].text.strip() == "50"


def test_unknown_parameters_are_refused_before_anything_runs(notebook, tmp_path):
    target = tmp_path / "out" / "00_counting.ipynb"
    with pytest.raises(InputError, match="did you mean 'count'") as caught:
        run_notebook(notebook, target, {"cuont": 3})
    assert "00_counting.ipynb" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="it has count, output"):
        run_notebook(notebook, target, {"profile": "mini"})
    with pytest.raises(InputError, match=r"'count' of 00_counting\.ipynb must be"):
        run_notebook(notebook, target, {"count": tmp_path})
    assert not target.parent.exists()


DEFAULTS = """seed = 0  # a number
scale = 8.0  # another
name = "mini"  # text
flag = True  # yes or no
classes = ["dog", "boat"]  # names
sizes = [1, 2]
mixed = [1, "a"]  # of any kind
empty = []  # of any kind
overrides = {}  # a table
images: int | None = 60  # the first so many
word: str | None = None
anything = None  # whatever
"""


@pytest.mark.parametrize("name, good, bad, words", [
    ("seed", [0, -3], ["many", 1.5, True, None, [1]], "int"), ("scale", [1, 2.5], ["x", True, None], "float"),
    ("name", ["", "paper"], [3, None, ["mini"]], "str"), ("flag", [False], [0, 1, "yes"], "bool"),
    ("classes", [["cat"], []], ["cat", [1], ["cat", None]], r"list\[str\]"), ("sizes", [[4]], [[4.5], ["4"], 4, [True]], r"list\[int\]"),
    ("mixed", [["x"], [None]], ["x"], "list"), ("empty", [[1, "x"]], [1], "list"), ("overrides", [{"a.b": 1}], [[], "a", None], "dict"),
    ("images", [3, None], ["all", 2.5], r"int \| None"), ("word", ["x", None], [1], r"str \| None"),
    ("anything", [1, "x", None, []], [Path("a")], "Any")])
def test_parameters_have_the_type_of_their_annotation_or_default(tmp_path, name, good, bad, words):
    path = tmp_path / "00_typed.ipynb"
    cell = nbformat.v4.new_code_cell(DEFAULTS, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    for value in good:
        check_parameters(path, {name: value})
    for value in bad:
        with pytest.raises(InputError, match=f"{name!r} of 00_typed.ipynb must be .*{words} like its default") as caught:
            check_parameters(path, {name: value})
        assert str(caught.value).endswith(f"not {value!r}.") and "\n" not in str(caught.value)


def test_the_defaults_of_the_shipped_notebooks_are_legal():
    paths = notebooks(Path(__file__).parents[2] / "notebooks")
    for path in paths:
        check_parameters(path, {name: default for name, (_, default) in runner.parameters_of(path).items()})
    assert len(paths) >= 2


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"{}", b"\xff\xfe", b'{"cells": [3]}',
                                     b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "%magic"}]}',
                                     b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "a = max(1, 2)"}]}',
                                     b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "a: open = 1"}]}'])
def test_files_that_are_no_notebook_are_described(tmp_path, content):
    path = tmp_path / "00_bad.ipynb"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a notebook") as caught:
        check_parameters(path, {"count": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read as a notebook"):
        check_parameters(tmp_path, {})


def test_a_notebook_without_parameters_has_none(tmp_path):
    path = tmp_path / "00_plain.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("count = 1")]), path)
    check_parameters(path, {})
    with pytest.raises(InputError, match="it has none"):
        check_parameters(path, {"count": 1})


def test_fresh_results_are_kept_and_failures_harm_nothing(notebook, tmp_path, small_package):
    folder = tmp_path / "out"
    target, log = folder / "00_counting.ipynb", folder / "log.txt"

    def run(count: int, **options) -> bool:
        return run_notebook(notebook, target, {"count": count, "output": str(folder)}, progress=False, **options)

    assert run(2) is True
    assert log.read_text() == "2,"
    executed = nbformat.read(target, 4)
    assert any("counted 2" in o.get("text", "") for c in executed.cells for o in c.get("outputs", []))
    assert not list(folder.glob("*.failed.ipynb")) and not list(folder.glob("*.partial.ipynb"))
    stamp = json.loads((folder / "00_counting.stamp.json").read_text())
    assert stamp["seconds"] >= 0 and stamp["code"] == sum_of_code(notebook)
    assert set(stamp["outputs"]) == {"00_counting.ipynb", "tables/00_counting.csv"}

    # The same again: nothing runs, nothing is touched.
    before = target.stat().st_mtime_ns
    assert run(2) is False and log.read_text() == "2," and target.stat().st_mtime_ns == before
    # Other parameters run again.
    assert run(3) is True and log.read_text() == "2,3,"

    # A failing cell: one sentence, and the last good result is what it was.
    good = target.read_bytes()
    with pytest.raises(OVDiffError, match="in its cell 'count': AssertionError: count is negative") as caught:
        run(-1)
    assert "\n" not in str(caught.value) and "second line" not in str(caught.value) and "00_counting.failed.ipynb" in str(caught.value)
    assert target.read_bytes() == good and (folder / "00_counting.failed.ipynb").exists()
    assert not list(folder.glob("*.partial.ipynb"))
    # Its table was overwritten by the failed run, so the good result is no longer whole: it runs again and cleans up.
    assert run(3) is True and log.read_text() == "2,3,-1,3,"
    assert not (folder / "00_counting.failed.ipynb").exists()


@pytest.mark.parametrize("change", ["source", "code", "data", "table of the package", "table", "panel",
                                    "no table", "torn stamp", "no stamp", "no copy", "force"])
def test_whatever_a_result_stands_on_makes_it_stale(notebook, tmp_path, small_package, monkeypatch, change):
    """Papermill is replaced by a copy, so that only the decision to run is tested."""
    import papermill

    folder = tmp_path / "out"
    target, runs = folder / "00_counting.ipynb", []

    def execute(source, output, **options):
        runs.append(options["parameters"])
        Path(output).write_bytes(Path(source).read_bytes())
        (folder / "tables").mkdir(exist_ok=True)
        (folder / "tables" / "00_counting.csv").write_text("count,1\n")
        (folder / "explain").mkdir(exist_ok=True)
        (folder / "explain" / "00_counting.json").write_text("{}")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    parameters = {"count": 1}
    run_notebook(notebook, target, parameters)
    (folder / "tables" / "01_other.csv").write_text("another notebook's\n")
    (small_package / "recipes").mkdir()
    (small_package / "recipes" / "train_unet.py").write_text("whatever = 1")  # no result stands on it
    (small_package / "code.py").write_text("x = 1  # a comment\n")
    target.with_suffix(".failed.ipynb").write_text("{}")  # of other settings
    outputs_added = nbformat.read(notebook, 4)
    outputs_added.cells[1].execution_count = 7  # running a notebook by hand changes no cell's source
    nbformat.write(outputs_added, notebook)
    assert run_notebook(notebook, target, parameters) is False
    assert not target.with_suffix(".failed.ipynb").exists()
    if change == "source":
        notebook.write_text(notebook.read_text().replace("counted", "recounted"))
    elif change == "code":
        (small_package / "code.py").write_text("x = 2\n")
    elif change == "data":
        (small_package / "weights.safetensors").write_bytes(b"1")
    elif change == "table of the package":
        (small_package / "things.csv").write_text("class,label\n")
    elif change == "panel":
        (folder / "explain" / "00_counting.json").unlink()
    elif change == "table":
        (folder / "tables" / "00_counting.csv").write_text("count,100\n")
    elif change == "no table":
        (folder / "tables" / "00_counting.csv").unlink()
    elif change == "torn stamp":
        (folder / "00_counting.stamp.json").write_text('{"source": ')
    elif change == "no stamp":
        (folder / "00_counting.stamp.json").unlink()
    elif change == "no copy":
        target.unlink()
    assert run_notebook(notebook, target, parameters, force=change == "force") is True
    assert len(runs) == 2
    assert run_notebook(notebook, target, parameters) is False


def sum_of_code(path: Path) -> str:
    """As an nbformat reader sees the cells."""
    return hashlib.sha256(json.dumps([c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]).encode()).hexdigest()


def test_while_a_notebook_runs_no_failed_copy_is_there(notebook, tmp_path, monkeypatch):
    """An earlier run's is gone, an interrupt leaves no copy, and nothing but a good run is noted."""
    import papermill

    folder, seen = tmp_path / "out", []
    (folder / "tables").mkdir(parents=True)
    (folder / "00_counting.failed.ipynb").write_text("{}")

    def execute(source, output, **options):
        Path(output).write_text("{}")
        seen.append(sorted(p.name for p in folder.glob("*.ipynb")))
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(KeyboardInterrupt):
        run_notebook(notebook, folder / "00_counting.ipynb", {}, progress=False)
    assert seen == [["00_counting.partial.ipynb"]] and not list(folder.glob("*.ipynb")) and not (folder / runner.EXECUTED).exists()


def test_what_ran_is_noted_with_its_time(notebook, tmp_path, monkeypatch):
    """Merged with what is there, in order, and again where a fresh result lacks its note; text and outputs do not count."""
    import papermill

    folder = tmp_path / "out"
    noted = folder / runner.EXECUTED
    monkeypatch.setattr(papermill, "execute_notebook", lambda source, output, **options: Path(output).write_text("{}"))
    noted.parent.mkdir(parents=True)
    noted.write_text('{"01_other": {"code": "a", "seconds": 61.0}, "00_counting": "b"}')
    assert run_all([notebook], folder, {"count": 1}) == []
    found = json.loads(noted.read_text())
    assert list(found) == ["00_counting", "01_other"] and found["01_other"] == {"code": "a", "seconds": 61.0}
    assert found["00_counting"]["code"] == sum_of_code(notebook) and found["00_counting"]["seconds"] >= 0
    noted.write_text("{torn")
    assert run_all([notebook], folder, {"count": 1}) == []
    assert json.loads(noted.read_text()) == {"00_counting": found["00_counting"]}
    before = sum_of_code(notebook)
    made = nbformat.read(notebook, 4)
    made.cells.append(nbformat.v4.new_markdown_cell("# Text"))
    nbformat.write(made, notebook)
    assert runner.code_sum(notebook) == sum_of_code(notebook) == before
    made.cells[1].source += "\nprint(1)"
    nbformat.write(made, notebook)
    assert runner.code_sum(notebook) == sum_of_code(notebook) != before


def test_the_time_to_expect_is_that_of_the_last_runs(tmp_path):
    """Two at a time, the longest first: 300 + 60 beside 240, then 120 alone, and before all the classes: 11 minutes."""
    paths = []
    for name, tags in (("00_a", []), ("01_b", []), ("02_c", []), ("03_d", ["alone"]), ("04_new", [])):
        cell = nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters", *tags]})
        paths.append(tmp_path / f"{name}.ipynb")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), paths[-1])
    assert runner.expected_time(paths, tmp_path, 2) == ""  # nothing is known
    for name, seconds in (("00_a", 60), ("01_b", 300), ("02_c", 240), ("03_d", 120), (runner.CLASSES, 240)):
        runner.note(tmp_path, name, {"code": "", "seconds": seconds})
    assert runner.expected_time(paths[:4], tmp_path, 2) == "4 to run, about 11 min as measured last."
    (tmp_path / "cache").mkdir()
    assert runner.expected_time(paths[:4], tmp_path, 2).startswith("4 to run, about 7 min")
    assert runner.expected_time(paths, tmp_path, 1).endswith("about 12 min as measured last, without 04_new, which did not run there yet.")


def test_a_folder_that_cannot_be_made_is_named(notebook, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run_notebook(notebook, tmp_path / "file" / "out" / "00_counting.ipynb", {})


def test_a_disk_that_fills_is_one_sentence(notebook, tmp_path, monkeypatch):
    import errno

    import papermill

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        run_notebook(notebook, tmp_path / "00_counting.ipynb", {})
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir() if p.suffix == ".ipynb" and p != notebook] == []


def test_a_kernel_that_dies_is_one_sentence(notebook, tmp_path):
    made = nbformat.read(notebook, 4)
    made.cells[1].source = "import os; os._exit(1)"
    nbformat.write(made, notebook)
    with pytest.raises(OVDiffError, match="lost its kernel") as caught:
        run_notebook(notebook, tmp_path / "out" / "00_counting.ipynb", {}, progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "00_counting.ipynb").exists()


def test_an_interrupt_in_the_kernel_is_an_interrupt(notebook, tmp_path):
    made = nbformat.read(notebook, 4)
    made.cells[1].source = "raise KeyboardInterrupt"
    nbformat.write(made, notebook)
    with pytest.raises(KeyboardInterrupt):
        run_notebook(notebook, tmp_path / "out" / "00_counting.ipynb", {}, progress=False)


def test_a_folder_with_braces_is_a_folder(notebook, tmp_path):
    folder = tmp_path / "{count}"
    assert run_notebook(notebook, folder / "00_counting.ipynb", {"count": 1, "output": str(folder)}, progress=False) is True
    assert (folder / "tables" / "00_counting.csv").exists()


def test_one_failure_stops_no_other(tmp_path, monkeypatch):
    """Whatever is raised becomes a sentence; an interrupt alone ends the run."""
    raised = {"01_b": OVDiffError("The notebook 01_b.ipynb failed in cell 'x'."), "02_c": MemoryError("no room\nhere"),
              "04_e": InputError("no."), "05_f": OSError(28, "No space left on device")}
    done, said = [], []

    def run(path, output, parameters, *, force, progress):
        assert progress is True and output == tmp_path / "out" / path.name and parameters == {"a": 1} and force is True
        if path.stem in raised:
            raise raised[path.stem]
        done.append(path.stem)
        return path.stem != "06_g"

    monkeypatch.setattr(runner, "run_notebook", run)
    chosen = [Path(f"{i:02d}_{letter}.ipynb") for i, letter in enumerate("abcdefg")]
    failures = run_all(chosen, tmp_path / "out", {"a": 1}, force=True, say=said.append)
    assert done == ["00_a", "03_d", "06_g"]
    assert failures == ["The notebook 01_b.ipynb failed in cell 'x'.", "The notebook 02_c.ipynb could not be run: MemoryError: no room",
                        "no.", "The notebook 05_f.ipynb could not be run: OSError: [Errno 28] No space left on device"]
    assert [line.split(":")[0] for line in said] == [p.stem for p in chosen]
    assert [("executed" in line, "FAILED" in line, "fresh" in line) for line in said] == [
        (True, False, False), (False, True, False), (False, True, False), (True, False, False), (False, True, False), (False, True, False),
        (False, False, True)]
    raised["02_c"] = KeyboardInterrupt()
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        run_all(chosen, tmp_path / "out", {"a": 1}, force=True, say=said.append)
    assert done == ["00_a"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_longest_begin_first_and_those_alone_come_last(tmp_path, workers):
    paths = []
    for number, (seconds, tags) in enumerate([(10, []), (30, []), (90, ["alone"]), (None, []), (20, [])]):
        cell = nbformat.v4.new_code_cell("x = 1  # number", metadata={"tags": ["parameters", *tags]})
        paths.append(tmp_path / f"0{number}_{'_'.join(tags) or 'plain'}.ipynb")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), paths[-1])
        runner.note(tmp_path, paths[-1].stem, seconds and {"seconds": seconds})
    turns = [([p.stem for p in turn], together) for turn, together in runner.in_turns(paths, tmp_path, workers)]
    together = [(["03_plain", "01_plain", "04_plain", "00_plain"], 2), (["02_alone"], 1)]  # one that never ran may be the longest
    assert turns == ([([p.stem for p in paths], 1)] if workers == 1 else together)


def test_two_notebooks_at_a_time_and_one_that_fails(notebook, tmp_path):
    """Each in a process and with a kernel of its own; the failure names its cell and stops no other."""
    made = nbformat.read(notebook, as_version=4)
    other = notebook.with_name("01_other.ipynb")
    for old, new in (("00_counting", "01_other"), ("log.txt", "other.txt"), ("count >= 0", "count > 9")):
        made.cells[1].source = made.cells[1].source.replace(old, new)
    nbformat.write(made, other)
    said = []
    parameters = {"count": 3, "output": str(tmp_path / "out")}
    failures = runner.run_all([notebook, other], tmp_path / "out", parameters, say=said.append, workers=2)
    assert len(failures) == 1 and "01_other.ipynb failed in its cell 'count'" in failures[0] and len(said) == 2
    assert (tmp_path / "out" / "00_counting.ipynb").exists() and not (tmp_path / "out" / "01_other.ipynb").exists()
    assert list(json.loads((tmp_path / "out" / runner.EXECUTED).read_text())) == ["00_counting"]  # the other failed
    assert not list(notebook.parent.glob("kernel*"))  # no sockets beside the notebooks
