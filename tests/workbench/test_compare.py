"""Comparing regenerated tables with those that were there: every kind of difference is named, and nothing else is."""

import dataclasses
import json

import pytest

from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.workbench.tables.claims import write_claims
from ovdiff_lib.workbench.tables.compare import compare_tables
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell
from ovdiff_lib.workbench.tables.tables import Cell, write_table

PROFILE = load_profile("mini")
CELLS = {
    "mIoU": Cell.of("OVDiff", "VOC", [49.0, 51.0], paper_cell("1", "OVDiff", "VOC")),
    "images": Cell("OVDiff", "images", 211),
    "published": Cell("TCL", "VOC", paper=paper_cell("1", "TCL", "VOC"), source="published"),
    "other": Cell("MaskCLIP", "VOC", 6.0, low=5.0, high=7.0),
}


def write(folder, cells=None, name="05_t", profile=PROFILE, **details):
    write_table(folder / "tables" / f"{name}.csv", name, list((cells or CELLS).values()), profile, "x", details=details)


CHANGES = [  # name, changed cells (None = removed), what is said
    ("nothing", {}, []),
    ("within the tolerance", {"mIoU": Cell.of("OVDiff", "VOC", [49.5, 51.5], paper_cell("1", "OVDiff", "VOC"))}, []),
    ("measured", {"other": dataclasses.replace(CELLS["other"], measured=6.6)}, ["MaskCLIP / VOC: measured: 6.0 against 6.6"]),
    ("a count", {"images": Cell("OVDiff", "images", 210)}, ["OVDiff / images: measured: 211.0 against 210.0"]),
    ("the spread", {"mIoU": Cell.of("OVDiff", "VOC", [48.0, 52.0], paper_cell("1", "OVDiff", "VOC"))},
     ["OVDiff / VOC: std: 1.41421 against 2.82843"]),
    ("an end of the interval", {"other": dataclasses.replace(CELLS["other"], low=5.6)}, ["MaskCLIP / VOC: low: 5.0 against 5.6"]),
    ("one run", {"mIoU": Cell("OVDiff", "VOC", 50.0, paper=paper_cell("1", "OVDiff", "VOC"))},
     ["OVDiff / VOC: n: 2 against 1", "OVDiff / VOC: std: 1.41421 against None"]),
    ("where it is from", {"other": Cell("MaskCLIP", "VOC", source="idle: so")},
     ["MaskCLIP / VOC: source: measured against idle: so", "MaskCLIP / VOC: measured: 6.0 against None",
      "MaskCLIP / VOC: low: 5.0 against None", "MaskCLIP / VOC: high: 7.0 against None"]),
    ("the paper's key", {"images": dataclasses.replace(CELLS["images"], paper=PaperCell.own("1", "a", "b"))},
     [f"OVDiff / images: paper: None against {PaperCell('1', 'a', 'b')}"]),
    ("a name", {"other": Cell("MaskClip", "VOC", 6.0)},
     ["MaskCLIP / VOC: is only in the first", "MaskClip / VOC: is only in the second"]),
    ("a cell less", {"other": None}, ["MaskCLIP / VOC: is only in the first"]),
]


@pytest.mark.parametrize("change, said", [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_differences(tmp_path, change, said):
    write(tmp_path / "a")
    write(tmp_path / "b", {name: cell for name, cell in (CELLS | change).items() if cell is not None})
    assert compare_tables(tmp_path / "a", tmp_path / "b", 0.5) == [f"05_t: {text}" for text in said]


def test_tables_profile_and_settings(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "a", name="06_only")
    write(tmp_path / "b", profile=dataclasses.replace(PROFILE.override({"support.size": 8}), name="other"))
    write(tmp_path / "b", name="07_only")
    found = compare_tables(tmp_path / "a", tmp_path / "b" / "tables", 0)
    assert found[:2] == [f"06_only: is only in {tmp_path / 'a'}", f"07_only: is only in {tmp_path / 'b' / 'tables'}"]
    assert found[2:] == ["05_t: profile: 'mini' against 'other'",
                         f"05_t: settings: {PROFILE.digest()!r} against {PROFILE.override({'support.size': 8}).digest()!r}"]


@pytest.mark.parametrize("volatile, said", [(True, 0), (False, 3)])
def test_times_are_passed_over(tmp_path, volatile, said):
    changed = CELLS | {"mIoU": Cell("OVDiff", "VOC", 90.0, n=2, paper=CELLS["mIoU"].paper), "images": Cell("OVDiff", "images", 1)}
    write(tmp_path / "a", volatile=volatile)
    write(tmp_path / "b", changed, volatile=volatile)
    assert len(compare_tables(tmp_path / "a", tmp_path / "b", 0.5)) == said  # the mean, its deviation, a count
    # Their names count all the same.
    del changed["published"]
    write(tmp_path / "b", changed)
    assert len(compare_tables(tmp_path / "a", tmp_path / "b", 0.5)) == said + 1


def test_what_cannot_be_compared_is_one_sentence_and_claims_are_no_tables(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a)
    write(b)
    write_claims(b)
    assert compare_tables(a, b, 0) == []
    (tmp_path / "empty").mkdir()
    for other, tolerance, word in ((a, -1, "tolerance"), (a, float("nan"), "tolerance"), (a, float("inf"), "tolerance"),
                                   (tmp_path / "empty", 0.5, "empty"), (tmp_path / "none", 0.5, "none")):
        with pytest.raises(InputError, match=word):
            compare_tables(a, other, tolerance)
    (b / "tables" / "05_t.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"05_t\.json"):
        compare_tables(a, b, 0.5)
