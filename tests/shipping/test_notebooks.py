"""The notebooks: stripped, short, parametrised and named in the README; tests/slow runs every one."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import nbformat
import pytest

from ovdiff_lib.workbench.reproduce import check_parameters, parameters_of

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = ("profile", "seed", "overrides", "output")


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
