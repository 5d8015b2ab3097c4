"""Charts and pictures: they show the numbers they are given, and nothing is cut off."""

import numpy as np
import pytest

from ovdiff_lib.categories import Category
from ovdiff_lib.masks.select import select
from ovdiff_lib.types import ForegroundBackground, SupportSet
from ovdiff_lib.workbench.figures.base import BACKGROUND, FOREGROUND
from ovdiff_lib.workbench.figures.charts import difference_chart, growth_chart
from ovdiff_lib.workbench.figures.steps import divided, divided_figure, feature_colours, selection_figure
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


def support(count=2):
    rng = np.random.default_rng(0)
    return SupportSet(Category("dog"), rng.integers(0, 255, (count, 8, 12, 3), np.uint8), rng.random((count, 4, 6), np.float32),
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
    for rows, colour in ((slice(2), FOREGROUND), (slice(-2, None), BACKGROUND)):
        assert np.abs(made[rows] - (drawn.images[0][rows] + np.array(colour)) / 2).max() <= 0.5
    assert (made[2:-2] == drawn.images[0][2:-2]).all()
    none, whole = slice(0), slice(None)
    figure = divided_figure([drawn], {"none": [halves(none, none)], "all": [halves(whole, none)]}, shown=4)
    shown = [(np.asarray(axis.images[0].get_array()) == drawn.images[n % 2]).all() for n, axis in enumerate(figure.axes)]
    assert shown == [True, True, False, False]


def test_alike_features_have_alike_colours():
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.normal(size=(32, 32)))[0][:3]
    which = rng.integers(0, 3, (2, 5, 7))
    features = directions[which] * rng.uniform(1, 9, (2, 5, 7, 1))  # lengths do not matter
    colours = feature_colours(features)
    assert colours.shape == (2, 5, 7, 3) and colours.dtype == np.uint8
    found = [np.unique(colours[which == k], axis=0) for k in range(3)]
    assert all(np.ptp(f, axis=0).max() <= 1 for f in found) and len({tuple(f[0]) for f in found}) == 3
    assert feature_colours(rng.normal(size=(1, 3, 4, 2))).shape == (1, 3, 4, 3)
