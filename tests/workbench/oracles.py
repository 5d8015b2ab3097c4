"""What several test files of the workbench share: pictures, small data sets, windows averaged one at a time."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentences
import torch
import torch.nn.functional as F
from tiny import noise as picture

from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.matching.windows import windows
from ovdiff_lib.workbench.baselines.common import TextEmbeddings
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.tables.intervals import Runs

PETS = Vocabulary.of("cat, dog, chest of drawers")


def refused(words, act, *arguments, **options):
    """``act`` ends with an ``InputError`` of one sentence that holds all of ``words``."""
    with sentences.refused(InputError, *([words] if isinstance(words, str) else words)):
        act(*arguments, **options)


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def runs_of(values, noise, name, images=16):
    """Counts of one class in which the mIoU of the seeds is ``values``, in percent, with the standard deviation ``noise`` over
    images; cells of other names have other images that are hard."""
    rest = np.random.default_rng(list(name.encode())).standard_normal(images)
    rest = noise * np.sqrt(images) * (rest - rest.mean()) / (rest.std() or 1)
    both = np.round(1e4 * (np.array(values)[:, None] + rest))
    return Runs("made", np.stack([both, *2 * [np.full_like(both, 1e6)]], 2)[..., None].astype(np.int32))


def blocks(height, width, seed=0):
    """Coarse blocks of colour: noise of single pixels would be the same everywhere after resizing."""
    cells = picture(-(-height // 8), -(-width // 8), seed=seed)
    return np.kron(cells, np.ones((8, 8, 1), np.uint8))[:height, :width]


def texts_of(model, tokenizer):
    return TextEmbeddings(model, tokenizer, ["a good picture of a {name}"])


def averaged(image, sizes, stride, score):
    """Mean over ``sizes`` of the mean over windows of ``score(crop u8 (S, S, 3))`` (C, S, S), window by window."""
    scales = []
    for size in sizes:
        total, cover = 0, np.zeros(image.shape[:2])
        for top, left, height, width in windows(image.shape[:2], size, stride):
            place = slice(top, top + height), slice(left, left + width)
            found = np.asarray(score(image[place]))
            padded = np.zeros((len(found), *image.shape[:2]))
            padded[:, *place] = found
            total, cover[place] = total + padded, cover[place] + 1
        scales.append(total / cover)
    return np.mean(scales, axis=0)


def enlarged(grid, size):
    """(C, h, w) -> (C, *size), bilinear."""
    return F.interpolate(torch.as_tensor(grid)[None], size, mode="bilinear")[0].numpy()


def guess(image):
    """A segmenter of :class:`Toy` that is right about half of the time, with labels 1 and 2 only."""
    return 1 + (image.astype(int).sum(axis=-1) % 2)


@dataclass
class Toy:
    """Small non-square images; the red channel of each pixel is its true label."""

    count: int = 3
    name: str = "toy"
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary.of("cat, dog"))
    has_background: bool = True

    @property
    def ids(self):
        return tuple(str(i) for i in range(self.count))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        low = 0 if self.has_background else 1
        image = np.random.default_rng(index).integers(low, 3, (4 + index, 9, 3), dtype=np.uint8)
        labels = image[..., 0].copy()
        labels[0, index] = 255
        return Sample(str(index), image, labels)

    def __iter__(self):
        return (self[i] for i in range(self.count))
