"""Tables, figures and what ``ovdiff segment`` writes: colours that differ, shapes that hold, the paper's values in their own column."""

import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovdiff_lib.profiles import load_profile
from ovdiff_lib.report import figures
from ovdiff_lib.report.results import output_stems, write_segmentation
from ovdiff_lib.report.tables import COLUMNS, Cell, write_table
from ovdiff_lib.types import Category, ForegroundBackground, Prototypes, Segmentation, SupportSet, Vocabulary

HEIGHT, WIDTH = 20, 33


@pytest.fixture
def profile():
    return load_profile("mini")


def segmentation(names: str = "cat, dog, sofa", kept=(0, 2), shape=(HEIGHT, WIDTH)) -> Segmentation:
    """Left third cat (1), lower right sofa (3), the rest background; dog was dropped by the filter."""
    vocabulary = Vocabulary.of(names)
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.int32)
    labels[:, : shape[1] // 3] = 1
    labels[shape[0] // 2 :, shape[1] // 3 :] = 3
    scores = np.full((len(vocabulary) + 1, *shape), -np.inf, np.float32)
    scores[[0, 1, 3]] = 0.25
    scores[3][labels == 3] = 0.75
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Segmentation(image, labels, scores, np.zeros(shape, np.int32), vocabulary, kept, np.array([0.6, 0.1, 0.3], np.float32))


# ---------------------------------------------------------------------- colours and pictures

def test_the_first_thirty_labels_have_colours_one_can_tell_apart():
    colours = [np.array(figures.class_colour(i), int) for i in range(30)]
    assert all(c.shape == (3,) and c.min() >= 0 and c.max() <= 255 for c in colours)
    def nearest(count):  # smallest difference, summed over red, green and blue
        return min(np.abs(a - b).sum() for a, b in combinations(colours[:count], 2))

    assert nearest(21) >= 40 and nearest(30) >= 12
    assert np.array_equal(figures.palette(30), np.array(colours, np.uint8))
    # A class keeps its colour when the vocabulary grows.
    assert np.array_equal(figures.palette(5), figures.palette(30)[:5])


def test_paint_mixes_each_pixel_with_its_colour():
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    labels[5:, 10:] = 2
    painted = figures.paint(image, labels, alpha=0.5)
    assert painted.shape == image.shape and painted.dtype == np.uint8 and (image == 200).all()
    assert np.abs(painted[15, 25] - (100 + np.array(figures.class_colour(2)) / 2)).max() <= 0.5
    assert np.abs(painted[0, 0] - (0.55 * 200 + 0.45 * np.array(figures.class_colour(0)))).max() <= 0.5
    # A white line where the label changes, above and left of the region, and nowhere else.
    white = (painted == 255).all(-1)
    assert white[5, 10:].all() and white[5:, 10].all() and white.sum() == (WIDTH - 10) + (HEIGHT - 5) - 1
    assert not np.array_equal(figures.paint(image, labels, alpha=0.9), painted)


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
        shown = (legend == np.array(figures.class_colour(int(label)), np.uint8)).all(-1).any()
        assert shown == (label > 0), label
    assert not (legend == np.array(figures.class_colour(2), np.uint8)).all(-1).any()  # dog is nowhere, so not in the legend


def test_a_long_name_under_a_narrow_picture_is_not_cut():
    narrow = segmentation("cat" + " x" * 35 + ", dog, sofa", shape=(60, 8)).overlay()
    short = segmentation(shape=(60, 8)).overlay()
    assert narrow.width > short.width
    right = np.asarray(narrow)[:, -2:]
    assert (right[-20:] == 255).all()


def test_an_overlay_of_background_alone_says_so():
    result = segmentation()
    result.labels[:] = 0
    sheet = result.overlay()
    assert sheet.height > HEIGHT * round(512 / WIDTH)
    assert (np.asarray(sheet)[-20:] < 100).any()  # something is written there


def test_the_heat_map_is_as_large_as_its_image():
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    attribution = np.zeros((4, 6), np.float32)
    attribution[1, 4] = 1
    warm = figures.heat(image, attribution)
    assert warm.shape == image.shape and warm.dtype == np.uint8
    row, column = np.unravel_index(warm.sum(-1).argmax(), (HEIGHT, WIDTH))
    assert abs(row - 1.5 / 4 * HEIGHT) <= 2.5 and abs(column - 4.5 / 6 * WIDTH) <= 3


def masks() -> ForegroundBackground:
    foreground, background = np.zeros((2, HEIGHT, WIDTH), bool), np.zeros((2, HEIGHT, WIDTH), bool)
    foreground[1, :4, :7] = True
    background[1, 10:, 20:] = True
    return ForegroundBackground(foreground, background, ("threshold",) * 2)


def test_mask_pictures_colour_both_regions():
    picture = figures.mask_picture(masks(), 1)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert (picture == figures.FOREGROUND).all(-1).sum() == 28
    assert (picture == figures.BACKGROUND).all(-1).sum() == (HEIGHT - 10) * (WIDTH - 20)
    assert (figures.mask_picture(masks(), 0) == figures.UNUSED).all()


def test_part_pictures_give_each_part_its_colour():
    cluster = np.array([0, 1, 2, 3], np.int32)
    region = np.array(["foreground", "foreground", "background", "background"])
    assignment = np.array([[[0, 1, -1, 2, 3], [0, 1, -1, 2, 3]]], np.int16)
    parts = Prototypes(np.zeros((4, 2), np.float32), np.array(["part"] * 4), region, np.full(4, -1, np.int32), cluster, assignment)
    picture = figures.part_picture(parts)
    assert picture.shape == (2, 5, 3) and np.array_equal(picture[0], picture[1])
    assert (picture[:, 2] == figures.UNUSED).all()
    assert len({tuple(c) for c in picture[0].tolist()}) == 5
    red, _, blue = picture[0].astype(int).T
    assert (red[:2] > blue[:2]).all() and (blue[3:] > red[3:]).all()  # warm inside, cool outside


def test_grids_and_captions_are_written_whole(tmp_path):
    rng = np.random.default_rng(0)
    support = SupportSet(Category("Sofa"), rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8),
                         rng.random((2, 4, 6), dtype=np.float32), np.arange(2))
    figure = figures.support_grid(support, 8, masks())
    figures.class_legend(figure, ["sofa"], [1])
    assert len(figure.axes) == 6  # 2 images x (image, attribution, masks), though 8 were asked for
    path = figures.save_figure(figure, tmp_path / "figures" / "grid.png", "Caption with “quotes” and 🛋.")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 100
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == {"caption": "Caption with “quotes” and 🛋."}
    overlay = figures.save_figure(segmentation().overlay(), tmp_path / "figures" / "overlay.png", "Another.")
    with Image.open(overlay) as picture:
        assert picture.size == segmentation().overlay().size
        difference = np.asarray(picture.convert("RGB"), float) - np.asarray(segmentation().overlay().convert("RGB"), float)
        assert np.abs(difference).mean() < 8  # of 255, on noise, which no 256 colours fit well
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["grid.json", "grid.png", "overlay.json", "overlay.png"]


def test_figures_are_the_same_bytes_each_time(tmp_path):
    rows = [[np.full((HEIGHT, WIDTH, 3), 9, np.uint8)] * 2]
    first = figures.save_figure(figures.image_grid(rows, ["a"], ["b", "c"], title="t"), tmp_path / "1.png", "x").read_bytes()
    assert figures.save_figure(figures.image_grid(rows, ["a"], ["b", "c"], title="t"), tmp_path / "2.png", "x").read_bytes() == first


# ---------------------------------------------------------------------- tables

def test_a_table_is_csv_and_markdown_with_the_paper_apart(tmp_path, profile):
    cells = [Cell("OVDiff", "mIoU", 41.256, std=0.5, n=3, paper=64.4), Cell("OVDiff", "images", 310), Cell("a | b, c", "mIoU", 12.04)]
    text = write_table(tmp_path / "tables" / "t.csv", "t", cells, profile, "What was run.")
    with open(tmp_path / "tables" / "t.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3
    assert rows[0] == {"table": "t", "row": "OVDiff", "column": "mIoU", "measured": "41.256", "std": "0.5", "n": "3", "paper": "64.4",
                       "profile": "mini", "settings": profile.digest()}
    assert rows[1]["paper"] == rows[1]["std"] == "" and rows[2]["row"] == "a | b, c"
    assert (tmp_path / "tables" / "t.md").read_text(encoding="utf-8") == text
    lines = text.splitlines()
    assert "What was run." in lines[0] and "mini" in lines[0] and profile.digest() in lines[0]
    header, rule, first, second = lines[2:]
    assert [c.strip() for c in header.strip("|").split("|")] == ["", "mIoU", "mIoU (paper, its own data)", "images"]
    assert rule.count("|") == 5
    assert [c.strip() for c in first.strip("|").split("|")] == ["OVDiff", "41.3 ± 0.5", "64.4", "310.0"]
    assert second == "| a \\| b, c | 12.0 |  |  |"


def test_without_paper_values_there_is_no_paper_column(tmp_path, profile):
    text = write_table(tmp_path / "t.csv", "t", [Cell("r", "c", 1.23456)], profile, "x", digits=3)
    assert "paper" not in text and "1.235" in text


# ---------------------------------------------------------------------- results of ovdiff segment

@pytest.mark.parametrize("names, stems", [
    (["a.png", "b.jpg"], ["a", "b"]), (["a.jpg", "a.png"], ["a_jpg", "a_png"]), (["A.jpg", "a.png", "c.png"], ["A_jpg", "a_png", "c"]),
    (["a.b.png"], ["a.b"])])
def test_output_stems(names, stems):
    assert output_stems([Path(n) for n in names]) == stems


def test_no_two_images_share_an_output():
    names = ["a.png", "a.jpg", "a_png.webp", "A.PNG", "a_jpg.png", "a_jpg.webp"]
    stems = output_stems([Path(n) for n in names])
    assert len({s.casefold() for s in stems}) == len(names)
    assert stems[2] == "a_png"  # the one that really is called so


def test_a_written_segmentation_decodes_to_itself(tmp_path, profile):
    result = segmentation()
    labels, overlay, table = write_segmentation(result, tmp_path / "new" / "out", "room", profile)
    assert [p.name for p in (labels, overlay, table)] == ["room_labels.png", "room_overlay.png", "room.json"]
    with Image.open(labels) as picture:
        assert picture.mode == "P" and np.array_equal(np.asarray(picture), result.labels)
        painted = np.asarray(picture.convert("RGB"))
    assert np.array_equal(painted, figures.palette(4)[result.labels])
    with Image.open(overlay) as picture:
        assert picture.height > HEIGHT
    record = json.loads(table.read_text(encoding="utf-8"))
    assert record["size"] == [HEIGHT, WIDTH] and record["image"] == "room" and record["settings"] == profile.digest()
    rows = record["classes"]
    assert [r["name"] for r in rows] == ["background", "cat", "dog", "sofa"] and [r["label"] for r in rows] == [0, 1, 2, 3]
    assert [r["kept"] for r in rows] == [True, True, False, True]
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert rows[1]["share"] == pytest.approx(11 / 33) and rows[3]["share"] == pytest.approx(10 * 22 / (20 * 33))
    assert rows[2]["mean_score"] is None and rows[3]["mean_score"] == pytest.approx(0.75) and rows[0]["mean_score"] == pytest.approx(0.25)
    assert rows[0]["filter_probability"] is None and rows[1]["filter_probability"] == pytest.approx(0.6)
    assert [tuple(r["colour"]) for r in rows] == [figures.class_colour(i) for i in range(4)]


def test_the_record_is_strict_json_without_a_filter(tmp_path, profile):
    result = segmentation()
    result.filter_scores[:] = np.nan
    table = write_segmentation(result, tmp_path, "x", profile)[2]

    def refuse(constant):
        raise AssertionError(constant)

    rows = json.loads(table.read_text(), parse_constant=refuse)["classes"]
    assert all(r["filter_probability"] is None for r in rows)
