"""The committed tables of the mini profile are what the commands produce: whole, of today's settings, and some measured again here."""

import hashlib
import json
from pathlib import Path

import nbformat
import pytest
from oracles import csv_rows

from ovdiff_lib import OVDiff
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.rows import Rival
from ovdiff_lib.workbench.tables import claims
from ovdiff_lib.workbench.tables.claims import judge
from ovdiff_lib.workbench.tables.intervals import interval, read_runs
from ovdiff_lib.workbench.tables.tables import read_table

OUTPUTS = Path(__file__).parents[2] / "outputs" / "mini"
TABLES = sorted(p for p in (OUTPUTS / "tables").glob("*.csv") if p.stem != "claims")
RECORDS = {p.stem: json.loads(p.with_suffix(".json").read_text(encoding="utf-8")) for p in TABLES}
TOLERANCE = 0.5
"""Percentage points: another processor rounds otherwise, and a few pixels change sides."""


def cell(table: str, row: str, column: str):
    (found,) = [c for c in read_table(OUTPUTS / "tables" / f"{table}.csv") if (c.row, c.column) == (row, column)]
    return found


def test_every_table_is_whole_and_of_one_notebook():
    stems = {p.stem for p in (OUTPUTS.parent.parent / "notebooks").glob("*.ipynb")}
    assert len(TABLES) >= 25
    for path in TABLES:
        record = RECORDS[path.stem]
        assert record["name"] == path.stem and any(path.stem.startswith(stem) for stem in stems)
        assert record["profile"] == "mini" and record["caption"] and read_table(path)
        assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("**")
    assert {stem for stem in stems if any(p.stem.startswith(stem) for p in TABLES)} == stems
    for figure in (OUTPUTS / "figures").glob("*.png"):
        assert len(json.loads(figure.with_suffix(".json").read_text(encoding="utf-8"))["caption"]) > 20
    # History is not to grow by pictures and counts.
    assert sum(p.stat().st_size for p in (OUTPUTS / "figures").iterdir()) < 2_500_000
    assert sum(p.stat().st_size for p in (OUTPUTS / "tables").glob("*.npz")) < 4_000_000


def test_every_miou_has_its_interval_and_the_counts_that_it_is_from():
    """Drawn again from the counts beside the tables."""
    found = 0
    for path in TABLES:
        runs = read_runs(path)
        for one in read_table(path):
            if one.low is not None and (one.row, one.column) in runs:
                assert (one.low, one.high) == pytest.approx(interval(runs[one.row, one.column].draws), abs=1e-3)
                found += 1
            elif one.paper and one.paper.column.endswith("delta"):
                column = one.column.removesuffix(", change")
                draws = runs[one.row, column].draws - runs["full", column].draws
                assert (one.low, one.high) == pytest.approx(interval(draws), abs=1e-3)
            elif one.paper and one.paper.table not in ("timing", "storage", "hyperparameters") and one.paper.column != "percent":
                assert one.source != "measured", (path.stem, one)
    assert found > 150


def test_the_tables_are_of_todays_notebooks():
    """``notebooks.json`` holds what ran; the code cells are summed anew as nbformat reads them."""
    path = OUTPUTS / "tables" / "notebooks.json"
    assert path.exists(), "outputs/mini/tables/notebooks.json is missing: run `make reproduce` and commit what it writes."
    today = {}
    for notebook in sorted((OUTPUTS.parent.parent / "notebooks").glob("[0-9]*.ipynb")):
        cells = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
        today[notebook.stem] = hashlib.sha256(json.dumps(cells).encode()).hexdigest()
    noted = {stem: record["code"] for stem, record in json.loads(path.read_text(encoding="utf-8")).items() if "code" in record}
    stale = sorted(stem for stem in {*noted, *today} if noted.get(stem) != today.get(stem))
    assert not stale, f"{', '.join(stale)} changed since the committed tables were made: run `make reproduce` and commit what it writes."


OWN_SETTINGS = {"03_prototype_ablations": {"features.extractors": ["sd"]}}
"""Fields that a notebook sets whatever the profile says."""


@pytest.mark.parametrize("stem", sorted({record["notebook"] for record in RECORDS.values()}))
def test_every_table_is_of_todays_settings(stem):
    """A change of the profile needs `make reproduce`."""
    today = load_profile("mini", OWN_SETTINGS.get(stem, {})).digest()
    own = [path for path in TABLES if path.stem.startswith(stem)]
    assert {row["settings"] for path in own for row in csv_rows(path)} == {today}
    assert {RECORDS[path.stem]["settings"] for path in own} == {today}


@pytest.mark.parametrize(("row", "name"), [("MaskCLIP", "maskclip"), ("CLIP-DIY", "clip-diy")])
def test_a_rivals_row_is_measured_again(row, name, tmp_path):
    bench = Bench("mini", library=tmp_path, progress=False)
    (again,) = bench.cells([Rival(row, baseline=name)], {"VOC": bench.profile.evaluation.voc}, "1")
    assert again.measured == pytest.approx(cell("05_main_results_table1", row, "mini-voc").measured, abs=TOLERANCE)


def test_masks_of_a_class_are_made_again(tmp_path):
    ovdiff = OVDiff("mini", library=tmp_path, progress=False)
    masks = ovdiff.masks(ovdiff.support("sheep"))
    for column, mask in (("foreground, % of pixels", masks.foreground), ("background, % of pixels", masks.background)):
        assert 100 * mask.mean() == pytest.approx(cell("01_support_sampling", "sheep", column).measured, abs=TOLERANCE)


def test_the_claims_are_judged_as_committed():
    committed = {row["id"]: row for row in csv_rows(OUTPUTS / "tables" / "claims.csv")}
    results = judge(OUTPUTS)
    assert len(results) == len(committed) == 33 and len({r.verdict for r in results}) >= 3
    for result in results:
        assert (committed[str(result.id)]["verdict"], committed[str(result.id)]["measured"]) == (result.verdict, result.measured)


def test_every_failed_claim_is_explained_and_no_explanation_is_of_another_verdict():
    """The texts of ``explanations.csv`` on this profile against the committed claims: with new tables both change."""
    verdicts = {int(row["id"]): row["verdict"] for row in csv_rows(OUTPUTS / "tables" / "claims.csv")}
    explained = {number: verdict for profile, number, verdict in claims._explanations() if profile == "mini"}
    missing = sorted(number for number, verdict in verdicts.items() if verdict == "fails" and explained.get(number) != "fails")
    assert not missing, f"explanations.csv says nothing of why the claims {missing} fail"
    dead = sorted(number for number, verdict in explained.items() if verdicts[number] != verdict)
    assert not dead, f"explanations.csv explains verdicts that the claims {dead} no longer have; take the texts out or rewrite them"
