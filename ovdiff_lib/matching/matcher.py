"""Step 3b, Sec. 3.4: windows of the image against the prototypes of the kept categories (Eq. 4).

Per extractor and window: cosine of every feature with every prototype, the maximum over each class's prototypes,
bilinear to the window. Then the mean over extractors, over the windows of a scale that cover a pixel, and over scales;
last, PAMR where the profile asks for it.

The mean is over the same extractors for every class and for the background, because their cosines differ in level. An
extractor whose background prototypes were all filtered away votes for the background with its constant
``matching.background_threshold``; without constants it has no vote in that image, for no class, unless all are so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.matching.windows import Box, check_image, crop, scales, window_seeds
from ovdiff_lib.networks.instruments import batches, undisturbed
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.profiles.schema import Profile, of_extractor
from ovdiff_lib.types import PrototypeBank, Prototypes

TOGETHER = 8  # regions of categories in one product: large ones are fast, and those of a large vocabulary too large


@dataclass(frozen=True, eq=False)
class _InProgress:
    """An image on its way: what its windows are scored with, and what they add to."""

    shape: tuple[int, int]  # of the image as given
    resized: np.ndarray
    bank: PrototypeBank
    voters: list[str]  # the extractors that the mean is over
    constant: float  # what extractors without background prototypes add to the mean of the background
    scored: bool  # whether any extractor has background prototypes
    total: torch.Tensor  # f32 (C + 1, H, W)
    windows: list[_Window] = field(default_factory=list)
    seen: list[tuple[int, Box, np.ndarray, np.ndarray]] = field(default_factory=list)  # by the first extractor


@dataclass(frozen=True, eq=False)
class _Window:
    """One window: where it lies, what it counts at each pixel there, its pixels u8 (S, S, 3) and its noise seed."""

    image: _InProgress
    number: int
    box: Box
    share: torch.Tensor  # f32 (height, width)
    crop: np.ndarray
    seed: int


class Matcher:
    """Scores of every class at every pixel of an image, by cosine similarity to prototypes.

    ``extractors`` are :data:`~ovdiff_lib.features.EXTRACTORS` objects by name; more than one make an ensemble. Settings
    are ``profile.matching``. A score depends on the image, the bank and the profile alone. An image is opened (which
    windows?), scored (features, nearest prototypes, maxima by class) and closed (mean, refinement, what decided).
    """

    def __init__(self, extractors: dict[str, Any], profile: Profile) -> None:
        self.extractors, self.profile, self.settings = extractors, profile, profile.matching
        self.device = resolve_device(profile)

    @undisturbed("matching.batch_size")
    def scores(self, pairs: Sequence[tuple[np.ndarray, PrototypeBank]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each image u8 (H, W, 3) with a bank of C categories the scores f32 (C + 1, H, W), and what decided each
        pixel; windows of all images share batches, and memory.

        Class 0 is background, by the background prototypes of all categories; without any it scores the mean of the
        extractors' constants ``matching.background_threshold``, or -inf. Where no score exceeds
        ``matching.minimum_score`` background gets the highest, and so the pixel.

        What decided is a (category, row) of the first extractor's prototypes in the bank, i32 (2, H, W): of the winning
        class the one with the highest cosine in any window over the pixel; -1 where a constant decided.
        """
        images = [self._open(image, bank) for image, bank in pairs]
        windows = [window for opened in images for window in opened.windows]
        windows.sort(key=lambda window: len(window.crop))  # for extractors that take one size at a time
        for start, stop in batches(len(windows), self.settings.batch_size):
            self._score(windows[start:stop])
        return map(self._close, images)

    def score(self, image: np.ndarray, bank: PrototypeBank) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`scores` of one image."""
        return next(self.scores([(image, bank)]))

    def _open(self, image: np.ndarray, bank: PrototypeBank) -> _InProgress:
        check_image(image)
        if missing := [name for name in self.extractors if name not in bank.prototypes]:
            raise InputError(f"The prototypes are for {', '.join(bank.extractors) or 'no extractor'} but the profile "
                             f"matches with {missing[0]!r}; build them again with this profile.")
        settings, given, left = self.settings, self.settings.background_threshold, bank.counts("background")
        without_background = [name for name in self.extractors if not any(left[name])]
        scored = len(without_background) < len(self.extractors)
        voters = [name for name in self.extractors if given is not None or name not in without_background]
        voters = voters or [*self.extractors]
        constants = [of_extractor("matching.background_threshold", given, name) for name in voters
                     if name in without_background]
        constant = -np.inf if None in constants else sum(constants) / len(voters)
        resized = resize_short_side(image, settings.short_side, settings.resample, settings.long_side)
        total = torch.zeros(len(bank.vocabulary) + 1, *resized.shape[:2], dtype=torch.float32, device=self.device)
        opened = _InProgress(image.shape[:2], resized, bank, voters, constant, scored, total)
        placed = scales(resized.shape[:2], settings)
        seeds = iter(window_seeds(self.profile.features.seed, image, sum(len(boxes) for _, boxes in placed)))
        for side, boxes in placed:
            cover = torch.zeros_like(total[0])  # how many windows of the scale lie over each pixel
            for box in boxes:
                cover[_slices(box)] += 1
            for box in boxes:
                share = 1 / (cover[_slices(box)] * len(placed))
                pixels = crop(resized, box, side)
                opened.windows.append(_Window(opened, len(opened.windows), box, share, pixels, next(seeds)))
        return opened

    def _score(self, part: Sequence[_Window]) -> None:
        """Add the scores of windows to their images; note in ``seen`` what the first extractor saw in each."""
        for name, extractor in self.extractors.items():
            found = zip(part, _features(extractor, part), strict=True)
            # Neighbours of one image and size are matched in one product.
            for _, run in itertools.groupby(found, lambda pair: (id(pair[0].image), pair[0].box[2:])):
                of_run, features = zip(*run, strict=True)
                image, (_, _, height, width) = of_run[0].image, of_run[0].box
                values, deciders = self._match(name, of_run, features)
                enlarged = F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)
                for window, scores in zip(of_run, enlarged, strict=True):
                    if name in image.voters:
                        image.total[:, *_slices(window.box)] += scores * window.share
                if name == next(iter(self.extractors)):
                    kept = values.cpu().numpy(), deciders.cpu().numpy()
                    image.seen.extend((w.number, w.box, *both) for w, *both in zip(of_run, *kept, strict=True))

    def _match(self, name: str, run: Sequence[_Window],
               features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Highest cosine f32 (n, C + 1, h, w) of features (h, w, D) of n windows of an image to each class, background
        first, and the (category, row) of that prototype, i32 (n, 2, C + 1, h, w); 0 and -1 for a class without any."""
        categories, shape = run[0].image.bank.prototypes[name], (len(run), *features[0].shape[:2])
        wanted, count = [(p, region) for region in ("background", "foreground") for p in categories], len(categories)
        values, rows = map(torch.stack, zip(*self._nearest(name, run, features, wanted), strict=True))  # (2 C, n h w)
        best, whose = values[:count].max(0, keepdim=True)
        values, rows = torch.cat([best, values[count:]]), torch.cat([rows[:count].gather(0, whose), rows[count:]])
        own = torch.arange(count, dtype=torch.int32, device=self.device)[:, None].expand_as(rows[1:])
        none, numbers = rows < 0, torch.cat([whose.int(), own])
        deciders = torch.stack([numbers.masked_fill(none, -1), rows])
        return (values.masked_fill(none, 0).unflatten(1, shape).transpose(0, 1),
                deciders.unflatten(2, shape).movedim(2, 0))

    def _nearest(self, name: str, run: Sequence[_Window], features: Sequence[torch.Tensor],
                 wanted: Sequence[tuple[Prototypes, str]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each feature of a run's windows the highest cosine to each (prototypes, region) that is ``wanted``, f32
        (n h w,), and the row of that prototype, i32; -1 and -1 where the region has none."""
        channels, cosines_to, found = features[0].shape[2], self._cosines(name, run, features), []
        for start, stop in batches(len(wanted), TOGETHER):
            rows = [np.flatnonzero(p.region == region) for p, region in wanted[start:stop]]
            vectors = np.concatenate([p.vectors[own] for (p, _), own in zip(wanted[start:stop], rows, strict=True)])
            if vectors.shape[1] != channels:
                raise InputError(f"The prototypes have {vectors.shape[1]} channels but the image features {channels}; "
                                 "build the prototypes again with this profile.")
            unit = F.normalize(torch.from_numpy(vectors).to(self.device, torch.float32), dim=1)
            for own, cosines in zip(rows, cosines_to(unit).split([*map(len, rows)], dim=1), strict=True):
                none = cosines.new_full((len(cosines),), -1.0)
                value, which = cosines.max(1) if len(own) else (none, none.long())
                numbers = np.append(own, -1).astype(np.int32)  # the last, which is also number -1, stands for none
                found.append((value, torch.from_numpy(numbers).to(self.device)[which]))
        return found

    def _cosines(self, name: str, run: Sequence[_Window],
                 features: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that gives the cosines f32 (n h w, p) of all features to unit vectors f32 (p, D)."""
        unit = F.normalize(torch.stack(list(features)).flatten(0, 2).to(self.device, torch.float32), dim=1)
        return lambda vectors: unit @ vectors.T

    @undisturbed()
    def _close(self, opened: _InProgress) -> tuple[np.ndarray, np.ndarray]:
        """Scores and winner of an image all of whose windows have been scored."""
        total, settings = opened.total / len(opened.voters), self.settings
        total[0] += opened.constant if opened.scored else 0
        if settings.refine == "pamr":
            total = pamr(opened.resized, total, settings.pamr_iterations, settings.pamr_dilations)
        # Bilinear weights times -inf are NaN, so a background without prototypes is filled in after the last resizing.
        scores = F.interpolate(total[None], size=opened.shape, mode="bilinear", align_corners=False)[0].cpu().numpy()
        if not np.isfinite(scores).all():
            raise InputError("The image features are not finite; check the extractor's weights, or use dtype float32.")
        if not opened.scored:
            scores[0] = opened.constant
        winner = _winner(scores.argmax(0), opened)
        if settings.minimum_score is not None:
            best = scores.max(0)
            low = best <= settings.minimum_score
            scores[0][low], winner[:, low] = best[low], -1
        return scores, winner


def _winner(labels: np.ndarray, opened: _InProgress) -> np.ndarray:
    """Of all windows over a pixel the prototype with the highest cosine within the class that won it, i32 (2, H, W)."""
    best, decider = np.full(labels.shape, -np.inf, np.float32), np.full((2, *labels.shape), -1, np.int32)
    sizes = zip(labels.shape, opened.resized.shape[:2], strict=True)
    centre = [((np.arange(n) + 0.5) * resized / n).astype(int) for n, resized in sizes]
    # In the windows' own order, whatever batches they came in: of equal cosines the first counts.
    for _, (top, left, height, width), values, deciders in sorted(opened.seen, key=lambda noted: noted[0]):
        y, x = (slice(*np.searchsorted(at, (first, first + length)))
                for at, first, length in zip(centre, (top, left), (height, width), strict=True))
        rows = (centre[0][y] - top) * values.shape[1] // height
        columns = (centre[1][x] - left) * values.shape[2] // width
        cell = (labels[y, x] * values.shape[1] + rows[:, None]) * values.shape[2] + columns  # of the pixel's class
        value = values.reshape(-1)[cell]
        better = value > best[y, x]
        best[y, x] = np.where(better, value, best[y, x])
        decider[:, y, x] = np.where(better, deciders.reshape(2, -1)[:, cell], decider[:, y, x])
    return decider


def _slices(box: Box) -> tuple[slice, slice]:
    top, left, height, width = box
    return slice(top, top + height), slice(left, left + width)


def _features(extractor: Any, part: Sequence[_Window]) -> list[torch.Tensor]:
    """Features f32 (h, w, D) of each window, in as few calls as the extractor allows."""
    any_size, found = getattr(extractor, "any_size", False), []
    for _, run in itertools.groupby(part, lambda window: any_size or window.crop.shape):
        crops, seeds = zip(*((window.crop, window.seed) for window in run), strict=True)
        found += list(extractor(list(crops) if any_size else np.stack(crops), np.array(seeds, np.int64)))
    return found
