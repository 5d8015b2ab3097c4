"""The ladder: true cells and true image labels against loops over hand-made label maps, true support, the whole."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import PETS, averaged, blocks, enlarged, refused

from ovdiff_lib import OVDiff
from ovdiff_lib.categories import Category
from ovdiff_lib.filters.stuff import filter_stuff
from ovdiff_lib.library.own import own_support, square_around
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.evaluation.ladder import RUNGS, Ladder, ladder, lost
from ovdiff_lib.workbench.evaluation.measure import evaluate, label_predictor
from ovdiff_lib.workbench.evaluation.shared import SharedNetworks
from ovdiff_lib.workbench.evaluation.truth import among_shown, scenes_of, true_bank, true_cells


@dataclass
class Scenes:
    """Non-square scenes of coarse blocks, some of which show cat (1), dog (2) or chest of drawers (3)."""

    shown: tuple = ((1, 2), (2,), (3,), (1, 3), (2, 1))
    split: str = "val"
    name: str = "scenes"
    folder: Path = Path("scenes")
    has_background: bool = True
    vocabulary: object = PETS

    ids = property(lambda self: tuple(f"{self.split}{i}" for i in range(len(self.shown))))

    def __len__(self):
        return len(self.shown)

    def labels(self, index):
        labels = np.full((64, 84) if index % 2 else (88, 64), 0 if self.has_background else 255, np.uint8)
        for number, label in enumerate(self.shown[index]):
            labels[7 + index : 37 + index, 3 + 30 * number : 30 + 30 * number] = label
        labels[50:54] = 255
        return labels

    def __getitem__(self, index):
        labels = self.labels(index)
        return Sample(self.ids[index], blocks(*labels.shape, seed=index + 10 * (self.split == "val")), labels)


@pytest.fixture
def tiny(tiny_profile, tmp_path):
    return OVDiff(tiny_profile, {"support.size": 2}, library=tmp_path, progress=False, networks=SharedNetworks())


def cells_by_counting(labels, grid, classes):
    """Scores (len(classes), *labels.shape) of a window: 1 for the class with the most pixels of a cell, then enlarged."""
    rows, columns = (np.arange(n) * g // n for n, g in zip(labels.shape, grid, strict=True))
    scores = np.zeros((len(classes), *grid))
    for y in range(grid[0]):
        for x in range(grid[1]):
            inside = labels[rows == y][:, columns == x]
            counts = [(inside == label).sum() for label in classes]
            if max(counts):
                scores[int(np.argmax(counts)), y, x] = 1
    return enlarged(scores, labels.shape)


@pytest.mark.parametrize("background", [True, False])
def test_true_cells_against_counting_pixels(tiny, background):
    """Windows of 64 and 48 pixels on a grid of 16 x 16: cells of 4 x 4 and of 3 x 3 pixels."""
    dataset = Scenes(has_background=background)
    label = true_cells(tiny, dataset)
    for sample in (dataset[0], dataset[3]):
        classes = [0] * background + sorted(set(np.unique(sample.labels)) - {0, 255})
        scores = averaged(sample.labels, (64, 48), 32, partial(cells_by_counting, grid=(16, 16), classes=classes))
        expected = np.array(classes)[scores.argmax(0)]
        counted = sample.labels != 255
        top, second = np.sort(scores, 0)[[-1, -2]]
        clear, found = top - second > 1e-5, label(sample)
        assert found.shape == sample.labels.shape and (found == expected)[clear].all() and clear[counted].mean() > 0.8
        # Objects do not end where cells do; without background nothing lies between them here.
        assert 0.8 < (found == sample.labels)[counted].mean() < (1 if background else 1.01)
    nothing = Sample("none", sample.image, np.full_like(sample.labels, 255))
    assert not label(nothing).any()


def test_the_grid_is_the_extractors_own(tiny):
    """A grid of 8 x 8 cells of 8 pixels: what is smaller than half of a cell is lost, and whole cells come back."""
    coarse = tiny.replaced({"features.extractors": ["dino"], "matching.windows": [64], "matching.refine": "none"})
    labels = np.zeros((64, 80), np.uint8)
    labels[8:40, 16:48], labels[48:53, 64:68] = 1, 2
    found = true_cells(coarse, Scenes())(Sample("", blocks(64, 80), labels))
    assert (found[12:36, 20:44] == 1).all() and (found != 2).all() and (found[:, 56:] == 0).all()
    assert (found == 1)[8:40, 16:48].mean() > 0.95


def test_true_labels_leave_the_classes_that_are_shown(tiny):
    """The "stuff" filter still judges by the whole vocabulary, whatever an image shows."""
    dataset, open_filter = Scenes(), tiny.replaced({"filters.category": False, "filters.stuff": False})
    whole = tiny.build(PETS.names, stuff=["chest of drawers"])
    bank = filter_stuff(whole, tiny.profile.filters)
    assert len(bank.prototypes["sd"][0]) < len(whole.prototypes["sd"][0])
    label = among_shown(tiny, whole, dataset)
    for sample in dataset:
        shown = sorted(set(np.unique(sample.labels)) - {0, 255})
        restricted = open_filter.segment(sample.image, bank.restrict(c - 1 for c in shown)).labels
        assert (label(sample) == np.array([0, *shown])[restricted]).all()
    bare = Scenes(has_background=False)
    for sample in bare:
        assert set(np.unique(among_shown(tiny, whole, bare)(sample))) <= set(np.unique(sample.labels)) - {255}


def test_scenes_are_the_first_that_show_a_class_well_enough():
    assert scenes_of(Scenes(), 2) == [[0, 3], [0, 1], [2, 3]]
    assert scenes_of(Scenes(), 9) == [[0, 3, 4], [0, 1, 4], [2, 3]]
    refused(["cat, chest of drawers", "tune", "--support-split"], scenes_of, Scenes(((2,), (2,)), "tune"), 2)


def test_own_pictures_become_a_support_set(tiny):
    """The square around the object, of pictures of any sizes; what is neither stays neither."""
    images, objects = [blocks(40, 90), blocks(70, 32, 1)], [np.zeros((40, 90), bool), np.zeros((70, 32), bool)]
    objects[0][10:20, 60:84], objects[1][30:60, 4:20] = True, True
    around = [~mask for mask in objects]
    around[0][:, 70:] = False
    assert square_around(objects[0]) == (2, 51, 36, 36) and square_around(objects[1]) == (29, 0, 32, 32)
    apart = np.zeros((20, 60), bool)
    apart[2:4, :3] = apart[15:18, 50:] = True  # no square holds both: the one that holds the larger
    assert square_around(apart)[:1] + square_around(apart)[2:] == (0, 20, 20) and square_around(apart)[1] == 40
    support, masks = own_support(Category("cat"), zip(images, objects, around, strict=True), tiny)
    assert support.images.shape == (2, 64, 64, 3) and support.attribution is None and masks.foreground.shape == (2, 64, 64)
    for n, (top, left, side) in enumerate(((2, 51, 36), (29, 0, 32))):
        places = (np.arange(64) + 0.5) * side / 64
        rows, columns = top + places[:, None].astype(int), left + places[None].astype(int)
        assert (masks.foreground[n] == objects[n][rows, columns]).mean() > 0.95
        assert (masks.background[n] == around[n][rows, columns]).mean() > 0.95
    assert not (masks.foreground & masks.background).any()


def test_prototypes_of_own_pictures_are_means_under_the_true_masks(tiny):
    training = Scenes(split="tune")
    bank = true_bank(tiny, PETS, training, scenes_of(training, 2))
    assert bank.vocabulary == PETS and all(set(p.region) == {"foreground", "background"} for p in bank.prototypes["sd"])
    sample = training[2]  # the first that shows the third class
    masks = sample.labels == 3, np.isin(sample.labels, (0, 1, 2))
    support, _ = given = own_support(PETS.categories[2], [(sample.image, *masks)], tiny)
    features = tiny.extractors["sd"](support.images, np.zeros(1, np.int64))[0].double()
    drawers = bank.prototypes["sd"][2]
    for region in ("foreground", "background"):
        inside = getattr(given[1], region)[0].reshape(16, 4, 16, 4).mean((1, 3)) > 0.5
        row = np.flatnonzero((drawers.kind == "instance") & (drawers.region == region) & (drawers.image == 0))
        mean = features[torch.from_numpy(inside)].mean(0)
        np.testing.assert_allclose(drawers.vectors[row[0]], mean, rtol=1e-4, atol=1e-5)


def test_the_whole_ladder(tiny, tmp_path, monkeypatch):
    dataset, training = Scenes(), Scenes(((1, 2), (3,)), "tune")
    found = ladder(tiny, dataset, training, folder=tmp_path / "counts", limit=2, progress=False)
    assert found.images == 2 and found.scenes == (1, 1, 1) and found.amount == "1"
    table, cells = found.table(), {(c.column, c.row): c for c in found.cells()}
    assert table.shape == (11, 2) and {place: c.measured for place, c in cells.items()} == table.unstack().to_dict()
    for column in ("mIoU", "mIoU, PAMR"):
        rungs = table[column][list(RUNGS)]
        assert rungs.between(0, 100).all() and rungs.idxmax() == "true cells" and rungs.nunique() > 3
        assert table[column].iloc[len(RUNGS):].sum() == pytest.approx(100 - rungs["as shipped"])
    assert str(found).splitlines()[1].split() == ["as", "shipped", *(f"{x:.1f}" for x in table.loc["as shipped"])]
    whole, grid = cells["mIoU", "true cells"], cells["mIoU", "lost by feature grid"]
    assert whole.low < whole.high and (grid.low, grid.high) == pytest.approx((100 - whole.high, 100 - whole.low))
    plain = tiny.replaced({"filters.category": False})
    again = evaluate(label_predictor(plain, plain.build(PETS), dataset), dataset, 2, progress=False)
    assert 100 * again.miou == pytest.approx(table["mIoU"]["no category filter"])
    monkeypatch.setattr(OVDiff, "segment", None)  # all is counted already
    assert ladder(tiny, dataset, training, folder=tmp_path / "counts", limit=2, progress=False).table().equals(table)
    refused("'val' is measured", ladder, tiny, dataset, Scenes())


def test_what_each_part_costs_by_hand():
    rungs = dict(zip(RUNGS, (50.0, 56.0, 60.0, 70.0, 30.0, 40.0, 88.0), strict=True))
    assert lost(rungs) == {"drawings and masks": (10 + 14) / 2, "category filter": (6 + 10) / 2,
                           "features and matching": 18, "feature grid": 12}
    assert Ladder({}, 7, (4, 2)).amount == "2 to 4"
