"""Charts and figures show the numbers they are given: bars, masks, regions in their colours, margins, absent classes, galleries."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_explain import asked, many

from ovdiff_lib.categories import Category
from ovdiff_lib.explain import Activated, activated
from ovdiff_lib.masks.select import select
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.profiles.schema import Filters
from ovdiff_lib.types import ForegroundBackground, SupportSet
from ovdiff_lib.workbench.analysis.margins import MarginStatistics
from ovdiff_lib.workbench.figures import explanations
from ovdiff_lib.workbench.figures.base import BLUE, ORANGE
from ovdiff_lib.workbench.figures.charts import difference_chart, growth_chart
from ovdiff_lib.workbench.figures.explanations import COLOURS, REASON_COLOURS, Trace, highlight, prototype_figure, source_images
from ovdiff_lib.workbench.figures.steps import Column, divided, divided_figure, gallery, selection_figure
from ovdiff_lib.workbench.tables.tables import Cell


def pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def test_growth_has_means_and_intervals():
    cells = [Cell("N=1", "mIoU", 12.0, n=2, low=9.0, high=14.0), Cell("N=2", "mIoU", 20.0),
             Cell("N=4", "mIoU", 31.0, n=3, low=30.0, high=33.0)]
    axis = growth_chart([1, 2, 4], cells, "N", "mIoU", mark=2).axes[0]
    line = axis.containers[0].lines[0]
    assert line.get_ydata().tolist() == [12, 20, 31] and line.get_xdata().tolist() == [1, 2, 4]
    bars = axis.containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[9, 14], [20, 20], [30, 33]]
    assert [t.get_text() for t in axis.texts] == ["n = 2", "n = 1", "n = 3"]
    assert [t.xy for t in axis.texts] == [(1, 9), (2, 20), (4, 30)]  # below their bars
    assert pixels(axis.figure).std() > 5


def test_differences_point_both_ways_and_a_switch_that_was_not_exercised_has_no_bar():
    cells = [Cell("a", "mIoU, change", -3.25, low=-5.0, high=0.5), Cell("b", "mIoU, change", source="idle: not exercised"),
             Cell("c", "mIoU, change", 1.5, low=1.0, high=2.5)]
    figure = difference_chart(["with a very long name indeed", "idle", "b"], cells, "mIoU")
    axis = figure.axes[0]
    assert [bar.get_width() for bar in axis.patches if bar.get_height() == pytest.approx(0.62)] == [-3.25, 1.5]
    assert [bar.get_segments()[0][:, 0].tolist() for bar in axis.collections] == [[-5, 0.5], [1, 2.5]]
    assert [(t.get_text(), t.xy[0]) for t in axis.texts] == [("-3.2", -5), ("not exercised here", 0), ("+1.5", 2.5)]
    (marker,) = [line for line in axis.lines if line.get_marker() == "o"]
    assert (marker.get_xdata(), marker.get_ydata(), marker.get_markerfacecolor()) == ([0], [1], "white")
    edge = pixels(figure)  # labels lie within the picture: its margin is white
    assert (edge[[0, -1]] == 255).all() and (edge[:, [0, -1]] == 255).all()


class Halves:
    name = "halves"

    def propose(self, image, words):
        masks = np.zeros((2, *image.shape[:2]), bool)
        masks[0, :, :4], masks[1, :3] = True, True
        return masks


def support(name="dog", count=2):
    rng = np.random.default_rng(0)
    return SupportSet(Category(name), rng.integers(0, 255, (count, 8, 12, 3), np.uint8), rng.random((count, 4, 6), np.float32),
                      np.arange(count))


def halves(foreground, background, count=2):
    """Masks of ``count`` images with these rows as foreground and as background."""
    masks = np.zeros((2, count, 8, 12), bool)
    masks[0, :, foreground], masks[1, :, background] = True, True
    return ForegroundBackground(*masks, ("a",) * count)


def test_the_selection_names_the_masks_of_eq_1():
    drawn = support()
    foreground, background = select(Halves().propose(drawn.images[0], ""), np.kron(drawn.attribution[0], np.ones((2, 2), np.float32)))
    masks = ForegroundBackground(np.stack([foreground] * 2), np.stack([background] * 2), ("halves",) * 2)
    figure = selection_figure([drawn], [masks], Halves(), proposals=3)
    said = [t.get_text() for axis in figure.axes for t in axis.texts if t.get_text()]
    assert len(said) == 3 and sum("foreground" in t for t in said) == sum("background" in t for t in said) == 1
    numbers = [float(t.split(" ")[0]) for t in said]
    assert max(numbers) == numbers[0] and min(numbers) == numbers[1]
    nothing = Halves()
    nothing.propose = lambda image, words: np.zeros((0, *image.shape[:2]), bool)
    assert selection_figure([drawn], [masks], nothing).axes


def test_divided_tints_only_its_masks():
    drawn = support()
    made = divided(drawn, halves(slice(0, 2), slice(-2, None)), 0).astype(int)
    for rows, colour in ((slice(2), ORANGE), (slice(-2, None), BLUE)):
        assert np.abs(made[rows] - (drawn.images[0][rows] + np.array(colour)) / 2).max() <= 0.5
    assert (made[2:-2] == drawn.images[0][2:-2]).all()
    none, whole = slice(0), slice(None)
    figure = divided_figure([drawn], {"none": [halves(none, none)], "all": [halves(whole, none)]})
    shown = [(np.asarray(axis.images[0].get_array()) == drawn.images[n % 2]).all() for n, axis in enumerate(figure.axes)]
    assert shown == [True, True, False, False]


# ---------------------------------------------------------------------- figures that explain

RED, GREEN = (250, 20, 20), (20, 250, 20)


def test_regions_are_tinted_and_outlined_in_their_colours():
    image = np.full((300, 480, 3), 100, np.uint8)
    left, whole = np.zeros((5, 8), bool), np.ones((1, 1), bool)
    left[1:4, 1:4] = True
    drawn = highlight(image, [left], [RED])
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert np.abs(drawn[150, 150] - (100 + np.array(RED)) / 2).max() <= 1  # inside: half the picture, half the colour
    assert (drawn[60, 60:240] == RED).all() and (drawn[60:240, 60] == RED).all()  # the outline of rows and columns 60 to 239
    assert (drawn[59, 50:250] == drawn[0, 0]).all() and (drawn[0, 0] < 100).all()  # outside: darker, nothing else
    later = highlight(image, [left, whole], [RED, GREEN])
    assert np.abs(later[150, 150] - (100 + np.array(GREEN)) / 2).max() <= 1  # later regions cover earlier ones
    assert not (later == RED).all(-1).any() and not (later[0] == GREEN).all(-1).any()  # no outline along the image's border
    small = highlight(np.zeros((16, 64, 3), np.uint8), [np.ones((4, 4), bool)], [RED])
    assert small.shape == (64, 256, 3)  # small images are enlarged


def prototype(category, images, sizes):
    masks = np.zeros((len(images), 3, 4), bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask.flat[:size] = True
    return Activated(category, "part", "foreground", 3, np.zeros((4, 7), bool), images, masks)


def test_support_images_show_every_prototype_first_and_then_what_is_left():
    first, second, third = prototype("cat", (4, 2, 0), (5, 4, 1)), prototype("cat", (4, 1), (6, 5)), prototype("sofa", (1, 0), (3, 2))
    assert source_images([first, second, third], 9) == [("cat", 4), ("sofa", 1), ("cat", 1), ("cat", 2), ("sofa", 0), ("cat", 0)]
    assert source_images([first, second, third], 2) == [("cat", 4), ("sofa", 1)]
    assert source_images([first], 2) == [("cat", 4), ("cat", 2)] and source_images([], 3) == []


def test_the_prototype_figure_has_a_row_a_trace_and_the_colours_of_its_prototypes():
    segmentation, _ = many()
    segmentation = replace(segmentation, image=np.full((4, 7, 3), 128, np.uint8))
    supports = {name: support(name) for name in ("cat", "sofa")}
    traces = [Trace(name, segmentation, activated(segmentation, name, 3), supports, pixel) for name, pixel in
              (("sofa", None), ("background", (1, 2)))]
    figure = prototype_figure(traces, shown=3)
    shown = [2 + len(source_images(t.prototypes, 3)) for t in traces]
    assert len(figure.axes) == sum(shown)
    texts, share = [t.get_text() for t in figure.texts], 100 * traces[0].prototypes[0].pixels.sum() / (segmentation.labels == 3).sum()
    assert any(text.endswith(f": {share:.0f} %") for text in texts)
    # The middle picture of each row has the outline of every prototype; the support images have some of their colours and no others.
    for trace, axes in zip(traces, (figure.axes[: shown[0]], figure.axes[shown[0]:]), strict=True):
        own = {tuple(c) for c in COLOURS[: len(trace.prototypes)]}
        seen = [{tuple(c) for c in np.asarray(axis.images[0].get_array()).reshape(-1, 3).tolist()} & set(COLOURS) for axis in axes]
        assert seen[1] == own and all(colours <= own and colours for colours in seen[2:])


def test_the_support_image_shows_the_prototypes_own_region_and_the_image_its_pixel():
    segmentation, _ = many()
    masks = np.zeros((1, 2, 3), bool)
    masks[0, 1, 2] = True
    one = Activated("cat", "part", "foreground", 4, segmentation.labels == 1, (1,), masks)
    segmentation = replace(segmentation, image=np.full((4, 7, 3), 128, np.uint8))
    plain, marked = ([np.asarray(axis.images[0].get_array()).astype(int) for axis in prototype_figure([
        Trace("cat", segmentation, (one,), {"cat": support("cat")}, pixel)], shown=2).axes] for pixel in (None, (1, 5)))
    assert len(plain) == 3
    rows_of, columns_of = np.nonzero((plain[2] == COLOURS[0]).all(-1))
    height, width = plain[2].shape[:2]
    assert rows_of.min() == height // 2 and columns_of.min() == width * 2 // 3  # the lower right cell, and nothing beyond it
    changed, factor = np.argwhere((plain[0] != marked[0]).any(-1)), plain[0].shape[0] // 4
    assert np.abs((changed.min(0) + changed.max(0)) / 2 - [1.5 * factor, 5.5 * factor]).max() < 2


def test_the_margin_figure_shows_both_distributions_and_the_error():
    statistics = MarginStatistics()
    statistics.right[:60:2], statistics.wrong[:20] = 5, 2
    left, right = explanations.margin_figure(statistics).axes
    assert [round(patch.get_data().values.sum()) for patch in left.patches] == [100, 100]
    assert right.lines[0].get_ydata() == pytest.approx([100 * rate for _, rate in statistics.error_rates()])


def test_bars_of_the_absent_figure_tell_probability_reason_and_what_is_shown():
    """A shown class that was dropped takes the place of the least probable of the others, however improbable it is itself."""
    results = [replace(asked(probabilities, kept), image=np.full((2, 3, 3), 128, np.uint8), labels=np.full((2, 3), 2, np.int32))
               for probabilities, kept in (([0.30, 0.28, 0.25, 0.15, 0.02], (1,)), ([0.55, 0.28, 0.15, 0.02, 1e-9], (0,)))]
    there = [["class 0"], ["class 4", "class 0"]]
    figure = explanations.absent_figure(results, Filters(category_top=2), ["first", "second"], there, bars=4)
    bars, others = figure.axes[2:]
    assert [p.get_width() for p in bars.patches] == pytest.approx([0.30, 0.28, 0.25, 0.15])
    wanted = [REASON_COLOURS[r] for r in ("not in the best combined prompt", "kept", "not among the top eta", "below 1/C")]
    assert [to_hex(p.get_facecolor()) for p in bars.patches] == wanted
    assert [t.get_text() for t in bars.get_yticklabels()] == ["● class 0", "class 1", "class 2", "class 3"]
    assert bars.lines[0].get_xdata()[0] == pytest.approx(0.2) and [bool(p.get_hatch()) for p in bars.patches] == [True, *[False] * 3]
    assert [t.get_text() for t in others.get_yticklabels()] == ["● class 0", "class 1", "class 2", "● class 4"]
    assert [p.get_width() for p in others.patches] == pytest.approx([0.55, 0.28, 0.15, 1e-4]) and others.get_xlim()[0] < 1e-4
    assert [bool(p.get_hatch()) for p in others.patches] == [*[False] * 3, True]


def test_a_gallery_keeps_shapes_and_names_words_in_their_colours():
    images = [np.full((20, 50, 3), 90, np.uint8), np.full((30, 15, 3), 200, np.uint8)]
    maps = [[np.full(i.shape[:2], k, np.int32) for k in (1, 2)] for i in images]
    columns = [Column("wide", images[0], maps[0], [1]), Column("tall", images[1], maps[1])]
    names = ["background", "cat", "dog"]
    figure = gallery(columns, names, ["image", "one", "two\nlines"], height=0.8)
    assert len(figure.axes) == 6
    for axis, image in zip(figure.axes[:6:3], images, strict=True):
        width, height = axis.get_position().size * figure.get_size_inches()
        assert height == pytest.approx(0.8) and width == pytest.approx(0.8 * image.shape[1] / image.shape[0])
    word = next(t for t in figure.texts if t.get_text() == "cat")
    assert tuple(word.get_color()) == pytest.approx(tuple(colours_of(names)[1] / 255 * 0.85))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["dog"]  # cat is named above


def test_the_innermost_pixel_is_the_farthest_from_the_border():
    region = np.zeros((7, 11), bool)
    region[1:6, 2:9] = True
    region[3, 0] = True
    outside = np.argwhere(~np.pad(region, 1)) - 1
    depth = {(r, c): min(np.hypot(*(outside - (r, c)).T)) for r, c in np.argwhere(region).tolist()}
    assert depth[explanations.innermost(region)] == max(depth.values())
    assert explanations.innermost(np.ones((3, 5), bool))[0] == 1  # the image's border counts
