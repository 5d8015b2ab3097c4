"""Tables, figures and what ``ovdiff segment`` writes: colours that differ, shapes that hold, the paper's values in their own column."""

import dataclasses
import io
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from oracles import csv_rows, runs_of
from PIL import Image
from skimage.color import rgb2lab

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.cli.segment import output_stems, write_segmentation
from ovdiff_lib.errors import InputError
from ovdiff_lib.overlay import colours_of, paint
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import ForegroundBackground, Prototypes
from ovdiff_lib.workbench.data.classes import vocabulary_of
from ovdiff_lib.workbench.data.datasets import load_dataset
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.figures import base as figures
from ovdiff_lib.workbench.tables.intervals import Runs, read_runs
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell, paper_table
from ovdiff_lib.workbench.tables.tables import BRACKETS, COLUMNS, STAMP, Cell, read_record, read_table, write_table

HEIGHT, WIDTH = 20, 33


@pytest.fixture
def profile():
    return load_profile("mini")


def segmentation(names: str = "cat, dog, sofa", shape=(HEIGHT, WIDTH)) -> Segmentation:
    """Left third cat (1), lower right sofa (3), the rest background; dog was dropped by the filter."""
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.int32)
    labels[:, : shape[1] // 3] = 1
    labels[shape[0] // 2 :, shape[1] // 3 :] = 3
    scores = np.full((3, *shape), 0.25, np.float32)
    scores[2][labels == 3] = 0.75
    return Segmentation(rng.integers(0, 256, (*shape, 3), dtype=np.uint8), labels, scores, np.zeros((2, *shape), np.int32),
                        Vocabulary.of(names), (0, 2), np.array([0.6, 0.1, 0.3], np.float32), None)


# ---------------------------------------------------------------------- colours and pictures

def lab_distance(colours):
    """Smallest distance of any two colours u8 (n, 3) in CIELAB, where 2.3 is just noticed."""
    lab = rgb2lab(np.array(colours, np.uint8)[None] / 255)[0]
    return min(np.linalg.norm(a - b) for a, b in combinations(lab, 2))


def test_classes_of_the_data_sets_have_colours_one_can_tell_apart():
    for name, least in (("mini-voc", 25), ("mini-context", 20), ("mini-object", 15)):
        colours = colours_of(["background", *load_dataset(name).vocabulary.names])
        assert lab_distance(colours) > least and colours.dtype == np.uint8
    assert lab_distance(colours_of(["background", *vocabulary_of("voc").names])) > 15
    assert lab_distance(colours_of(["background", *vocabulary_of("ade20k").names])) > 3


def test_a_class_has_one_colour_in_every_vocabulary():
    whole = dict(zip(NAMES := ["background", *load_dataset("mini-object").vocabulary.names], colours_of(NAMES).tolist(), strict=True))
    some = ["background", "sheep", "a zebra crossing", "car", "cow"]
    assert [colours_of(some)[i].tolist() for i in (0, 1, 3, 4)] == [whole[some[i]] for i in (0, 1, 3, 4)]
    unknown = [f"word {i}" for i in range(100)]
    colours = colours_of(["background", *unknown])
    assert len({tuple(c) for c in colours}) == 101  # words that hash to one colour are moved apart
    assert colours_of(["background", "word 7", "cow"])[1].tolist() == colours_of(["background", "dog", "word 7"])[2].tolist()
    assert colours_of(["background", *map(str, range(2000))]).shape == (2001, 3)


def test_paint_mixes_each_pixel_with_its_colour():
    image = np.full((HEIGHT, WIDTH, 3), (250, 200, 150), np.uint8)
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    labels[5:, 10:] = 2
    names = ["background", "cat", "dog"]
    painted = paint(image, labels, names)
    assert painted.shape == image.shape and painted.dtype == np.uint8 and (image == (250, 200, 150)).all()
    below = 0.35 * np.array([250, 200, 150]) + 0.65 * 200  # faded to its grey
    assert np.abs(painted[15, 25] - (0.4 * below + 0.6 * colours_of(names)[2])).max() <= 0.5
    assert np.abs(painted[0, 0] - (0.55 * image[0, 0] + 0.45 * colours_of(names)[0])).max() <= 0.5
    # A white line where the label changes, above and left of the region, and nowhere else.
    white = (painted == 255).all(-1)
    assert white[5, 10:].all() and white[5:, 10].all() and white.sum() == (WIDTH - 10) + (HEIGHT - 5) - 1


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (700, 30), (1, 7), (9, 1200)])
def test_an_overlay_has_a_legend_below_the_picture(shape):
    result = segmentation(shape=shape)
    sheet = result.overlay()
    factor = max(1, round(512 / max(shape)))
    assert isinstance(sheet, Image.Image) and sheet.mode == "RGB"
    assert sheet.height > shape[0] * factor and sheet.width >= shape[1] * factor
    pixels = np.asarray(sheet)
    legend = pixels[shape[0] * factor :].reshape(-1, 3)
    for label in np.unique(result.labels):
        shown = (legend == colours_of(result.class_names)[label]).all(-1).any()
        assert shown == (label > 0), label
    assert not (legend == colours_of(result.class_names)[2]).all(-1).any()  # dog is nowhere, so not in the legend


def test_an_overlay_cuts_no_long_name_and_says_that_all_is_background():
    narrow = segmentation("cat" + " x" * 35 + ", dog, sofa", shape=(60, 8)).overlay()
    assert narrow.width > segmentation(shape=(60, 8)).overlay().width and (np.asarray(narrow)[-20:, -2:] == 255).all()
    result = segmentation()
    result.labels[:] = 0
    assert (np.asarray(result.overlay())[-20:] < 100).any()  # something is written there


def test_mask_and_part_pictures_colour_both_regions():
    foreground, background = np.zeros((2, 2, HEIGHT, WIDTH), bool)
    foreground[1, :4, :7], background[1, 10:, 20:] = True, True
    masks = ForegroundBackground(foreground, background, ("threshold",) * 2)
    picture = figures.mask_picture(masks, 1)
    assert ((picture == figures.ORANGE).all(-1) == foreground[1]).all()
    assert ((picture == figures.BLUE).all(-1) == background[1]).all()
    assert (figures.mask_picture(masks, 0) == figures.LIGHT_GREY).all()
    assignment = np.array([[[1, 2, 0, -1, -2], [1, 2, 0, -1, -2]]], np.int16)
    parts = Prototypes(np.zeros((4, 2), np.float32), np.array(["part"] * 4), np.repeat(["foreground", "background"], 2),
                       np.full(4, -1, np.int32), np.array([1, 2, -1, -2], np.int32), assignment)
    picture = figures.part_picture(parts)
    assert picture.shape == (2, 5, 3) and np.array_equal(picture[0], picture[1])
    assert (picture[:, 2] == figures.LIGHT_GREY).all() and len({tuple(c) for c in picture[0].tolist()}) == 5
    red, _, blue = picture[0].astype(int).T
    assert (red[:2] > blue[:2]).all() and (blue[3:] > red[3:]).all()  # warm inside, cool outside


def test_a_saved_figure_keeps_the_colours_of_its_legend_and_is_the_same_each_time(tmp_path):
    """As near as they must be told apart: 256 colours serve 18 pictures and 42 classes."""
    data = load_dataset("mini-object")
    names = ["background", *data.vocabulary.names]
    figure = figures.image_grid([[data[i].image for i in range(first, first + 6)] for first in (0, 6, 12)], ["a", "b", "c"])
    figures.class_legend(figure, names, range(1, len(names)))
    drawn = np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")).reshape(-1, 3)
    path, again, caption = tmp_path / "new" / "x.png", tmp_path / "again.png", "Caption with “quotes” and 🛋."
    figures.save_figure(figure, path, caption)
    figures.save_figure(figure, again, caption)
    assert path.read_bytes() == again.read_bytes() and path.stat().st_size < 120_000
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == {"caption": caption}
    saved = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in colours_of(names)[1:]:
        there = (drawn == colour).all(1)
        assert there.sum() > 50 and np.abs(saved[there] - colour).max() <= 30
    assert np.abs(saved - drawn).mean() < 8  # of 255


# ---------------------------------------------------------------------- tables

def test_a_table_is_csv_and_markdown_with_the_paper_apart(tmp_path, profile):
    cells = [Cell("OVDiff", "mIoU", 41.256, std=0.5, n=3, paper=paper_cell("1", "OVDiff", "VOC")), Cell("OVDiff", "images", 310),
             Cell("a | b, c", "mIoU", 12.04, paper=PaperCell("1", "abc", "VOC")), Cell("a | b, c", "images", 7)]
    text = write_table(tmp_path / "tables" / "t.csv", "t", cells, profile, "What was run.", {"images": 0})
    rows = csv_rows(tmp_path / "tables" / "t.csv")
    assert tuple(rows[0]) == COLUMNS and len(rows) == 4
    assert rows[0] == {"table": "t", "row": "OVDiff", "column": "mIoU", "measured": "41.256", "std": "0.5", "low": "", "high": "",
                       "n": "3", "values": "", "source": "measured", "paper": "66.3", "paper_std": "0.2", "paper_table": "1",
                       "paper_row": "OVDiff", "paper_column": "VOC", "profile": "mini", "settings": profile.digest(), "note": ""}
    assert rows[1]["paper"] == rows[1]["std"] == rows[1]["paper_table"] == "" and rows[2]["row"] == "a | b, c"
    assert (rows[2]["paper"], rows[2]["paper_table"], rows[2]["paper_row"]) == ("", "1", "abc")
    assert (tmp_path / "tables" / "t.md").read_text(encoding="utf-8") == text
    head, _, *lines = text.splitlines()
    assert "What was run." in head and "mini" in head and profile.digest() in head and head.endswith(STAMP)
    assert lines == ["| | mIoU | mIoU (paper, its own data) | images |", "|---|---:|---:|---:|",
                     "| OVDiff | 41.3 ± 0.5 | 66.3 ± 0.2 | 310 |", "| a \\| b, c | 12.0 |  | 7 |"]
    alone = write_table(tmp_path / "t.csv", "t", [Cell("r", "c", 1.23456, paper=PaperCell("1", "r", "c"))], profile, "x", digits=3)
    assert "paper" not in alone and "1.235" in alone


def test_where_a_number_is_from_is_shown(tmp_path, profile):
    cells = [Cell("TCL", "VOC", paper=paper_cell("1", "TCL", "VOC"), source="published"),
             Cell("ViL-Seg", "VOC", paper=paper_cell("1", "ViL-Seg", "Object"), source="published"),
             Cell("corrected", "VOC", source="idle: no name needs it | here", paper=PaperCell("9", "x", "z", 7.0))]
    assert write_table(tmp_path / "t.csv", "t", cells, profile, "x").splitlines()[4:] == [
        "| TCL | published | 51.2 |", "| ViL-Seg | published | not reported |", "| corrected | no name needs it \\| here | 7.0 |"]
    read = read_table(tmp_path / "t.csv")
    assert (read[2].measured, read[2].idle, read[1].idle) == (None, "no name needs it | here", "")


def test_a_table_reads_back_as_it_was_written(tmp_path, profile):
    """Mean and sample standard deviation of the runs, six significant digits."""
    cells = [Cell.of("a", "c,\n1", [1.5, 2.25], PaperCell("9", "x | y", "z", 3.5, 0.25)), Cell("b", "c", 2.0, 0.5, 3),
             Cell("c", "c", source="published", paper=PaperCell("9", "x", "z", 7.0)), Cell("d", "c", 1e-7, note="a | b"),
             Cell("🐈", "c", -4.0, paper=PaperCell("9", "own", "z")), Cell.of("e", "c", (v for v in (50.0, 53.0, 49.0)))]
    write_table(tmp_path / "t.csv", "t", cells, profile, "x")
    read = read_table(tmp_path / "t.csv")
    rounded = [dataclasses.replace(c, std=None, measured=c.measured and float(f"{c.measured:.6g}")) for c in cells]
    assert [dataclasses.replace(c, std=None) for c in read] == rounded
    assert read[0].std == pytest.approx(cells[0].std, rel=1e-5) and read[1].std == 0.5
    row = csv_rows(tmp_path / "t.csv")[-1]
    assert (row["measured"], row["std"], row["n"], row["values"]) == ("50.6667", "2.08167", "3", "50 53 49")
    assert cells[-1].std == pytest.approx(np.std([50, 53, 49], ddof=1)) and cells[-1].measured == pytest.approx(152 / 3)
    assert (Cell.of("r", "c", [7]).std, Cell.of("r", "c", [7]).n) == (None, 1)


def test_an_miou_has_its_interval_and_its_counts_beside_the_table(tmp_path, profile):
    """Cells of one run and of two, of two data sets, under names that no file could have; and none is left of an older table."""
    runs = {"w/o \"x\" | \n": runs_of([50.0], 2.0, "a"), "b": Runs("other", runs_of([40.0, 44.0], 1.0, "b").counts)}
    cells = [Cell.of(row, "c", [40.0, 44.0], runs=one) for row, one in runs.items()] + [Cell("d", "c", 1.0)]
    text = write_table(tmp_path / "t.csv", "t", cells, profile, "x")
    low, high = np.quantile(runs["b"].draws, [0.025, 0.975])
    assert f"| b | 42.0 [{low:.1f}, {high:.1f}] |" in text and text.splitlines()[0].endswith(BRACKETS) and "| d | 1.0 |" in text
    assert read_table(tmp_path / "t.csv")[1].low == pytest.approx(low, rel=1e-5)
    read = read_runs(tmp_path / "t.csv")
    assert list(read) == [(row, "c") for row in runs] and [one.dataset for one in read.values()] == ["made", "other"]
    assert all(np.array_equal(a.counts, b.counts) for a, b in zip(read.values(), runs.values(), strict=True))
    assert BRACKETS not in write_table(tmp_path / "t.csv", "t", cells[2:], profile, "x")
    assert read_runs(tmp_path / "t.csv") == {} and not (tmp_path / "t.npz").exists()


def test_rows_with_the_same_counts_are_a_footnote(tmp_path, profile):
    """Of one data set; the earlier row is named, with its column where that is another."""
    runs, less = runs_of([50.0], 2.0, "a"), runs_of([50.0], 2.0, "a", 15)
    other = Runs("other", runs.counts)
    cells = [Cell.miou(row, column, one) for row, column, one in
             (("a", "c", runs), ("b", "c", Runs("made", runs.counts.copy())), ("b", "d", runs), ("x", "c", other), ("y", "c", less))]
    cells[1] = dataclasses.replace(cells[1], note="Once more.")
    text = write_table(tmp_path / "t.csv", "t", cells, profile, "x")
    said = ["Once more. Same counts in every image as a: not exercised.", "Same counts in every image as a, c: not exercised."]
    assert text.splitlines()[-3:] == [f"c, b: {said[0]}", "", f"d, b: {said[1]}"]
    assert [c.note for c in read_table(tmp_path / "t.csv")] == ["", *said, "", ""]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", ",".join(COLUMNS) + "\nt,r,c,x" + "," * 14 + "\n", ",".join(COLUMNS) + "\nt,r\n",
                                     None])
def test_a_file_that_is_no_table_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=r"t\.csv") as caught:
        read_table(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


def test_what_was_run_stands_beside_the_table(tmp_path, profile, monkeypatch):
    for name in ("05_main.ipynb", "05_main_results.ipynb", "06_other.ipynb"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    name = "05_main_results_rivals"
    write_table(tmp_path / "t" / f"{name}.csv", name, [Cell("r", "c", 1)], profile, "x", {"c": 2}, title="Table 1", details={"seeds": [0]})
    assert read_record(tmp_path / "t" / f"{name}.csv") == {
        "name": name, "title": "Table 1", "caption": "x", "digits": {"c": 2}, "notebook": "05_main_results", "profile": "mini",
        "segmenter": "detector", "settings": profile.digest(), "details": {"seeds": [0]}}
    assert read_record(tmp_path / "t" / "none.csv") == {}
    (tmp_path / "t" / "torn.json").write_text("{")
    with pytest.raises(InputError, match=r"torn\.json"):
        read_record(tmp_path / "t" / "torn.csv")


@pytest.mark.parametrize("details, said", [
    ({"images": {"mini-voc": 80, "mini-context": 80}, "seeds": [0, 1, 2, 3]}, "80 images of each data set, seeds 0 to 3. "),
    ({"images": {"voc:/data/VOC": 100, "mini-voc": 80}}, "Images: 100 of voc, 80 of mini-voc. "),
    ({"images": 1, "seeds": [3, 5]}, "1 image, seeds 3, 5. "), ({"volatile": True}, "")])
def test_a_table_says_of_how_many_images_and_seeds_it_is(tmp_path, profile, details, said):
    head = write_table(tmp_path / "t.csv", "t", [Cell("r", "c", 1)], profile, "What was run.", details=details).splitlines()[0]
    assert head.startswith(f"**What was run.** {said}Profile `mini`")


@pytest.mark.parametrize("arguments", [
    {"measured": 1, "source": "guessed"}, {}, {"source": "idle: "}, {"measured": 1, "source": "idle: as it is"},
    {"measured": 1, "source": "published"}, {"measured": float("nan")}, {"measured": 1, "std": float("inf")}])
def test_a_cell_that_contradicts_itself_is_refused(arguments):
    with pytest.raises(InputError, match="The cell 'r', 'c'"):
        Cell("r", "c", **arguments)


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path, profile):
    with pytest.raises(InputError, match="'r', 'c'"):
        write_table(tmp_path / "t.csv", "t", [Cell("r", "c", 1), Cell("r", "d", 1), Cell("r", "c", 2)], profile, "x")
    with pytest.raises(TypeError):
        write_table(tmp_path / "t.csv", "t", [Cell("r", "c", 1)], profile, "x", details={"path": tmp_path})
    assert not list(tmp_path.iterdir())


def test_the_papers_numbers():
    """A few by hand from the paper's text; the rest of the file by its shape."""
    cell = paper_cell("1", "OVDiff", "VOC")
    assert (cell.key, cell.value, cell.std) == (("1", "OVDiff", "VOC"), 66.3, 0.2)
    assert paper_cell("3", "w/o bg prototypes", "VOC delta").value == -11.2
    assert paper_cell("A.5", "without up-1 block", "Context").value == 27.3
    assert paper_cell("3", 'w/o "stuff" filter', "VOC").value is paper_cell("1", "ViL-Seg", "Object").value is None
    assert [c.value for c in paper_table("2")] == [54.9, 59.1, 51.4, 61.8, 64.4, 66.4]
    assert {c.column for c in paper_table("1")} == {"VOC", "Context", "Object"} and len(paper_table("1")) == 42
    assert PaperCell("fig5", "n", "N=4").value is None
    for function, arguments, words in ((paper_cell, ("1", "OVDif", "VOC"), "are ..1., .OVDiff., .VOC"),
                                       (paper_cell, ("11", "OVDiff", "Voc"), "are ..1., .OVDiff., .VOC"), (paper_table, ("X",), "'X'")):
        with pytest.raises(InputError, match=words):
            function(*arguments)


# ---------------------------------------------------------------------- results of ovdiff segment

@pytest.mark.parametrize("names, stems", [
    (["a.png", "b.jpg"], ["a", "b"]), (["a.b.png"], ["a.b"]), (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
    (["A.jpg", "a.png", "a.png.webp"], ["A.jpg", "a.png", "a.png.webp"])])
def test_no_two_images_share_an_output(names, stems):
    assert output_stems([Path(n) for n in names]) == stems


def test_a_written_segmentation_decodes_to_itself(tmp_path, profile):
    result = segmentation()
    labels, overlay, table = write_segmentation(result, tmp_path / "new" / "out", "room", profile)
    assert [p.name for p in (labels, overlay, table)] == ["room_labels.png", "room_overlay.png", "room.json"]
    with Image.open(labels) as picture:
        assert picture.mode == "P" and np.array_equal(np.asarray(picture), result.labels)
        painted = np.asarray(picture.convert("RGB"))
    assert np.array_equal(painted, colours_of(result.class_names)[result.labels])
    with Image.open(overlay) as picture:
        assert picture.height > HEIGHT
    record = json.loads(table.read_text(encoding="utf-8"))
    assert record["size"] == [HEIGHT, WIDTH] and record["image"] == "room" and record["settings"] == profile.digest()
    rows = {name: [row[name] for row in record["classes"]] for name in record["classes"][0]}
    assert rows["name"] == ["background", "cat", "dog", "sofa"] and rows["label"] == [0, 1, 2, 3]
    assert rows["kept"] == [True, True, False, True]
    assert rows["share"] == pytest.approx([10 * 22 / 660, 11 / 33, 0, 10 * 22 / 660])
    assert rows["mean_score"] == [pytest.approx(0.25), pytest.approx(0.25), None, pytest.approx(0.75)]
    assert rows["filter_probability"] == [None, *map(pytest.approx, (0.6, 0.1, 0.3))]
    assert rows["colour"] == colours_of(result.class_names).tolist()
    result.filter_scores[:] = np.nan  # without a filter the record is strict JSON, too
    text = write_segmentation(result, tmp_path, "x", profile)[2].read_text()
    assert "NaN" not in text and all(row["filter_probability"] is None for row in json.loads(text)["classes"])


def test_what_the_paper_has_beside_what_was_measured_stands_as_published():
    own = [Cell.of("ours", "mini-voc20", [70.0], paper_cell("A.7", "OVDiff", "VOC-20"))]
    added = {(cell.row, cell.column): cell for cell in Bench.published(own, "A.7")[1:]}
    assert all(cell.source == "published" and cell.measured is None for cell in added.values())
    assert ("ours", "mini-voc20") not in added and added["ours", "City"].paper.value == 23.4
    assert added["TCL", "mini-voc20"].paper.value == 77.5 and ("CLIPpy", "City") not in added  # which reported none
    assert len(added) == sum(cell.value is not None for cell in paper_table("A.7")) - 1


def test_a_change_stands_beside_the_papers_own():
    full, less = (Cell.miou(row, "x", runs_of([value], 2.0, "a"), paper_cell("3", name, "VOC"))
                  for row, value, name in (("full", 50.0, "Full"), ("less", 45.0, "w/o CutLER")))
    assert less.against(full).paper.value == -4.0 and less.against(full).measured == pytest.approx(-5)
    assert Cell.miou("y", "x", less.runs).against(full).paper is None
