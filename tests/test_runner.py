"""Running notebooks: wrong parameters stop before anything runs, fresh results are kept, failures leave the last good result."""

import json
from pathlib import Path

import nbformat
import pytest

from ovdiff_lib import runner
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.runner import check_parameters, notebooks, run_notebook

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
        nbformat.v4.new_code_cell('count = None  # how many; None = all\noutput = "."', id="parameters", metadata={"tags": ["parameters"]}),
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
    monkeypatch.setattr(runner, "PACKAGE", folder)
    return folder


def test_notebooks_are_found_in_order(tmp_path):
    for name in ("02_b.ipynb", "00_a.ipynb", "notes.ipynb", "01_c.txt"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in notebooks(tmp_path)] == ["00_a.ipynb", "02_b.ipynb"]
    (tmp_path / "none").mkdir()
    for folder in ("none", "missing"):
        with pytest.raises(InputError, match="No notebook"):
            notebooks(tmp_path / folder)


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
    with pytest.raises(InputError, match=r"'count' is a (Posix|Windows)Path"):
        run_notebook(notebook, target, {"count": tmp_path})
    assert not target.parent.exists()


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"{}", b"\xff\xfe", b'{"cells": [3]}',
                                     b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "%magic"}]}'])
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
    assert not list(folder.glob("*.failed.ipynb"))
    stamp = json.loads((folder / "00_counting.stamp.json").read_text())
    assert stamp["seconds"] >= 0 and set(stamp["outputs"]) == {"00_counting.ipynb", "tables/00_counting.csv"}

    # The same again: nothing runs, nothing is touched.
    before = target.stat().st_mtime_ns
    assert run(2) is False and log.read_text() == "2," and target.stat().st_mtime_ns == before
    # Other parameters run again.
    assert run(3) is True and log.read_text() == "2,3,"

    # A failing cell: one sentence, and the last good result is what it was.
    good = target.read_bytes()
    with pytest.raises(OVDiffError, match="AssertionError: count is negative") as caught:
        run(-1)
    assert "\n" not in str(caught.value) and "second line" not in str(caught.value) and "00_counting.failed.ipynb" in str(caught.value)
    assert target.read_bytes() == good and (folder / "00_counting.failed.ipynb").exists()
    # Its table was overwritten by the failed run, so the good result is no longer whole: it runs again and cleans up.
    assert run(3) is True and log.read_text() == "2,3,-1,3,"
    assert not (folder / "00_counting.failed.ipynb").exists()


@pytest.mark.parametrize("change", ["source", "code", "data", "table", "no table", "torn stamp", "no stamp", "no copy", "force"])
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

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    parameters = {"count": 1}
    run_notebook(notebook, target, parameters)
    (folder / "tables" / "01_other.csv").write_text("another notebook's\n")
    (small_package / "__pycache__").mkdir()
    (small_package / "__pycache__" / "code.py").write_text("not code")
    outputs_added = nbformat.read(notebook, 4)
    outputs_added.cells[1].execution_count = 7  # running a notebook by hand changes no cell's source
    nbformat.write(outputs_added, notebook)
    assert run_notebook(notebook, target, parameters) is False
    if change == "source":
        notebook.write_text(notebook.read_text().replace("counted", "recounted"))
    elif change == "code":
        (small_package / "code.py").write_text("x = 2\n")
    elif change == "data":
        (small_package / "new.png").write_bytes(b"1")
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


def test_a_folder_that_cannot_be_made_is_named(notebook, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run_notebook(notebook, tmp_path / "file" / "out" / "00_counting.ipynb", {})


def test_a_kernel_that_dies_is_one_sentence(notebook, tmp_path):
    made = nbformat.read(notebook, 4)
    made.cells[1].source = "import os; os._exit(1)"
    nbformat.write(made, notebook)
    with pytest.raises(OVDiffError, match="lost its kernel") as caught:
        run_notebook(notebook, tmp_path / "out" / "00_counting.ipynb", {}, progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "00_counting.ipynb").exists()
