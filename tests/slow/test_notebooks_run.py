"""Every notebook runs headless, small, on the weights that ship, and what it writes is whole."""

import json
from pathlib import Path

import nbformat
import pandas
import pytest
from PIL import Image

from ovdiff_lib.workbench.reproduce import parameters_of, run_notebook
from ovdiff_lib.workbench.tables.tables import read_record, read_table

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

OVERRIDES = {"support.size": 2, "support.steps": 2, "prototypes.clusters": 3, "filters.category_top": 3, "evaluation.seeds": [0, 1],
             "evaluation.images": 2, "evaluation.object": "mini-voc20", "evaluation.without_background": {"VOC-20": "mini-voc20"}}
"""Profile fields of a run that is quick, whatever it measures."""

SMALL = {"images": 2, "classes": ["dog", "boat"], "seeds": 1, "sizes": [1, 2], "clusters": [1, 3], "repeats": 1, "count": 2}
"""Values for parameters of these names, where a notebook has them."""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A prototype library that the notebooks share."""
    return tmp_path_factory.mktemp("library")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path, monkeypatch, library):
    """Headless with papermill, on the weights that ship, small; its tables and figures are whole."""
    # Inherited by the kernel: with other work on the machine's cores, threads that wait for each other cost twenty times the work.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    known = parameters_of(path)
    values = {"overrides": OVERRIDES, "output": str(tmp_path / "mini")}
    values |= {name: value for name, value in SMALL.items() if name in known}
    target = tmp_path / "mini" / path.name
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "cache").symlink_to(library)  # what one notebook draws, the others find
    assert run_notebook(path, target, values, progress=False) is True

    executed = nbformat.read(target, 4)
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
