"""The notebooks: stripped, short, parametrised, named in the README, and every one runs."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import nbformat
import pandas
import pytest
from PIL import Image

from ovdiff_lib.workbench.reproduce import check_parameters, parameters_of, run_notebook
from ovdiff_lib.workbench.tables.tables import read_record, read_table

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = ("profile", "seed", "overrides", "output")

OVERRIDES = {"support.size": 2, "support.steps": 2, "prototypes.clusters": 3, "filters.category_top": 3, "evaluation.seeds": [0, 1],
             "evaluation.images": 2,
             "evaluation.object": "mini-voc20", "evaluation.without_background": {"VOC-20": "mini-voc20"}}
"""Profile fields of a run that is quick, whatever it measures."""

SMALL = {"images": 2, "classes": ["dog", "boat"], "seeds": 1, "sizes": [1, 2], "clusters": [1, 3], "repeats": 1, "count": 2}
"""Values for parameters of these names, where a notebook has them."""


def read(path: Path):
    return nbformat.read(path, 4)


def parameters_cells(notebook) -> list:
    return [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]


def parameters(path: Path) -> dict:
    """The defaults in the tagged cell, which must be legal themselves."""
    found = {name: default for name, (_, default) in parameters_of(path).items()}
    check_parameters(path, found)
    return found


def code_lines(source: str) -> int:
    """Lines with code: blank lines and comments do not count."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({line for t in tokens if t.type not in skipped for line in range(t.start[0], t.end[0] + 1)})


def test_there_are_notebooks_and_their_numbers_run_on():
    assert len(NOTEBOOKS) >= 2
    assert [p.name[:3] for p in NOTEBOOKS] == [f"{i:02d}_" for i in range(len(NOTEBOOKS))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestShape:
    def test_it_is_a_valid_notebook_for_python3(self, path):
        notebook = read(path)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3" and notebook.nbformat_minor >= 5

    def test_it_is_stripped(self, path):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
            assert set(cell["metadata"]) <= {"tags"}, cell["id"]
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text

    def test_its_cells_have_readable_names(self, path):
        ids = [cell.id for cell in read(path).cells]
        assert len(set(ids)) == len(ids)
        for name in ids:
            assert re.fullmatch(r"[a-z][a-z0-9-]{1,40}", name) and not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", name), name

    def test_it_has_one_parameters_cell_of_literals(self, path):
        notebook = read(path)
        cells = parameters_cells(notebook)
        assert len(cells) == 1 and cells[0].cell_type == "code"
        assert notebook.cells.index(cells[0]) <= 1  # the title, then the parameters
        found = parameters(path)
        assert set(COMMON) <= set(found) and len(found) <= 6
        assert (found["profile"], found["overrides"], found["output"]) == ("mini", {}, "../outputs/mini")
        lines = cells[0].source.splitlines()
        for statement in ast.parse(cells[0].source).body:
            assert "  # " in lines[statement.lineno - 1], f"say what it is: {lines[statement.lineno - 1]}"

    def test_it_shows_and_does_not_define(self, path):
        notebook = read(path)
        sources = [c.source for c in notebook.cells if c.cell_type == "code"]
        for source in sources:
            for statement in ast.parse(source).body:
                assert not isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)), statement.name
        assert sum(map(code_lines, sources)) <= 200
        assert [line for source in sources for line in source.splitlines() if len(line) > 100] == []
        assert all(source.strip() for source in sources)
        texts = [c.source for c in notebook.cells if c.cell_type == "markdown"]
        assert texts[0].startswith("# ") and len(texts) >= 3

    def test_its_outputs_bear_its_name(self, path):
        """Tables and figures start with the notebook's stem, so that each can be traced to the run that made it."""
        named = [node.value for cell in read(path).cells if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))
                 if isinstance(node, ast.Constant) and re.match(r"\d\d_\w", str(node.value))]
        assert named and all(name.startswith(path.stem) for name in named), named

    def test_the_readme_names_it(self, path):
        assert path.name in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A prototype library that the notebooks share."""
    return tmp_path_factory.mktemp("library")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path, monkeypatch, library):
    """Headless with papermill, on the weights that ship, small; its tables and figures are whole."""
    # Inherited by the kernel: with other work on the machine's cores, threads that wait for each other cost twenty times the work.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    known = parameters(path)
    values = {"overrides": OVERRIDES, "output": str(tmp_path / "mini")}
    values |= {name: value for name, value in SMALL.items() if name in known}
    target = tmp_path / "mini" / path.name
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "cache").symlink_to(library)  # what one notebook draws, the others find
    assert run_notebook(path, target, values, progress=False) is True

    executed = read(target)
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code" and c.source.strip())
    outputs = [o for c in executed.cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    assert {"image/png", "text/markdown"} <= {data for o in outputs for data in o.get("data", {})}
    tables, figures = sorted((tmp_path / "mini" / "tables").glob("*.csv")), sorted((tmp_path / "mini" / "figures").glob("*.png"))
    assert tables and figures and all(p.name.startswith(path.stem) for p in [*tables, *figures])
    for table in tables:
        rows = pandas.read_csv(table)
        assert set(rows.table) == {table.stem} and set(rows.profile) == {"mini"}
        # Reading refuses other columns, what is not finite and what contradicts itself.
        assert any(cell.source == "measured" for cell in read_table(table))
        assert read_record(table)["notebook"] == path.stem
        assert "|---" in table.with_suffix(".md").read_text(encoding="utf-8")
    for figure in figures:
        with Image.open(figure) as picture:
            picture.load()
            assert min(picture.size) >= 100
            assert len(picture.convert("RGB").getcolors(2**24)) > 20  # something is drawn
        caption = json.loads(figure.with_suffix(".json").read_text(encoding="utf-8"))["caption"]
        assert len(caption) > 20 and "mini" in caption and caption.endswith(".")
