"""Step 3b, Sec. 3.4: windows of the image against the prototypes of the kept categories (Eq. 4).

Per extractor and window: cosine of every feature with every prototype, the maximum over each class's prototypes,
bilinear to the window. Then the mean over extractors, over the windows of a scale that cover a pixel, and over scales;
last, PAMR where the profile asks for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.images import resize_short_side
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.matching.windows import Box, check_image, crop, scales, window_seeds
from ovdiff_lib.networks.instruments import batches, undisturbed
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.profiles.schema import Matching, Profile
from ovdiff_lib.types import PrototypeBank

BLOCK = 4096
"""Prototypes compared at a time."""

BACKGROUND_REMEDY = "set matching.background_threshold (0.72 in the paper) or prototypes.background to true."


def check_matching(settings: Matching) -> None:
    """``ProfileError`` for values of ``profile.matching`` that do not go together."""
    sizes = _sizes(settings)
    if not sizes or max(sizes) > settings.short_side:
        raise ProfileError(f"matching.windows is {settings.windows}; give sizes up to matching.short_side ({settings.short_side}), "
                           "or none and matching.whole_image true.")
    if settings.stride > min(sizes):
        raise ProfileError(f"matching.stride is {settings.stride}; set it to at most the smallest window ({min(sizes)}).")
    if settings.long_side is not None and settings.long_side < settings.short_side:
        raise ProfileError(f"matching.long_side is {settings.long_side}; set it to at least matching.short_side ({settings.short_side}), "
                           "or to null for images of any length.")


def _sizes(settings: Matching) -> list[int]:
    """Sides of the windows; without windows that of the whole image, alone."""
    return settings.windows or [settings.short_side] * settings.whole_image


@dataclass(frozen=True)
class _ClassRows:
    """Prototypes of one bank in one extractor, L2-normalised, one entry a class, background first (None without
    any)."""

    vectors: list[torch.Tensor | None]  # f32 (p, D)
    index: list[np.ndarray]  # i64 (p, 2) the category of each vector and its row there


@dataclass(frozen=True, eq=False)
class _Opened:
    """An image on its way: what its windows are scored with, and what they add to."""

    shape: tuple[int, int]  # of the image as given
    resized: np.ndarray
    rows: dict[str, _ClassRows]
    fallback: float | None
    votes: torch.Tensor  # extractors that score each class, (C + 1, 1, 1)
    totals: list[torch.Tensor]  # a scale: f32 (C + 1, H, W)
    cover: list[torch.Tensor]  # a scale: windows over each pixel, (H, W)
    windows: list[_Window] = field(default_factory=list)
    seen: list[tuple[int, Box, np.ndarray, np.ndarray]] = field(default_factory=list)  # by the first extractor


@dataclass(frozen=True, eq=False)
class _Window:
    """One window of an image: where it lies, its pixels u8 (S, S, 3) and its noise seed."""

    image: _Opened
    number: int
    scale: int
    box: Box
    crop: np.ndarray
    seed: int


class Matcher:
    """Scores of every class at every pixel of an image, by cosine similarity to prototypes.

    ``extractors`` are :data:`~ovdiff_lib.features.EXTRACTORS` objects by name; more than one make an ensemble. Settings
    are ``profile.matching``. A score depends on the image, the bank and the profile alone.
    """

    def __init__(self, extractors: dict[str, Any], profile: Profile) -> None:
        settings = profile.matching
        if not extractors:
            raise ProfileError("features.extractors is empty; name at least one extractor.")
        check_matching(settings)
        self.extractors, self.profile, self.settings = extractors, profile, settings
        self.device = resolve_device(profile)

    @undisturbed()
    def scores(self, image: np.ndarray, bank: PrototypeBank) -> tuple[np.ndarray, np.ndarray]:
        """Scores f32 (C + 1, H, W) of an image u8 (H, W, 3) against C categories, and which prototype decided each
        pixel.

        Class 0 is background, by the background prototypes of all categories; without any it scores the constant
        ``matching.background_threshold``, -inf where the filters removed all of them, and ``InputError`` if neither was
        asked for. Where no score exceeds ``matching.minimum_score`` background gets the highest, and so the pixel.

        The prototype is a pair (category, row), i32 (2, H, W): ``bank.prototypes[first
        extractor][category].vectors[row]``, of the winning class the one with the highest cosine in any window over the
        pixel; -1 where a constant decided.
        """
        opened = self._open(image, bank)
        self._score_all(opened.windows)
        return self._close(opened)

    def scores_many(self, pairs: Sequence[tuple[np.ndarray, PrototypeBank]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """:meth:`scores` of each image against its own bank; windows of all of them share batches, and memory."""
        for opened in self._scored(pairs):
            yield self._close(opened)

    @undisturbed()
    def _scored(self, pairs: Sequence[tuple[np.ndarray, PrototypeBank]]) -> list[_Opened]:
        images = [self._open(image, bank) for image, bank in pairs]
        self._score_all([window for opened in images for window in opened.windows])
        return images

    def _score_all(self, windows: list[_Window]) -> None:
        # Extractors that take one size at a time get whole batches of it; the others do not mind.
        if not all(getattr(extractor, "any_size", False) for extractor in self.extractors.values()):
            windows = sorted(windows, key=lambda window: len(window.crop))
        for start, stop in batches(len(windows), self.settings.batch_size):
            self._score(windows[start:stop])

    def _open(self, image: np.ndarray, bank: PrototypeBank) -> _Opened:
        check_image(image)
        rows = {name: self._class_rows(name, bank) for name in self.extractors}
        fallback = self._fallback(rows)
        settings = self.settings
        resized = resize_short_side(image, settings.short_side, settings.resample, settings.long_side)
        placed = [(scale, side, box) for scale, (side, boxes) in enumerate(scales(resized.shape[:2], settings)) for box in boxes]
        seeds = window_seeds(self.profile.features.seed, image, len(placed))
        votes = torch.tensor([sum(r.vectors[c] is not None for r in rows.values()) for c in range(len(bank.vocabulary) + 1)],
                             dtype=torch.long, device=self.device).clamp(min=1)[:, None, None]
        zeros = [torch.zeros(len(votes) + 1, *resized.shape[:2], dtype=torch.float32, device=self.device)
                 for _ in range(placed[-1][0] + 1)]
        opened = _Opened(image.shape[:2], resized, rows, fallback, votes, [z[:-1] for z in zeros], [z[-1] for z in zeros])
        for number, ((scale, side, box), seed) in enumerate(zip(placed, seeds, strict=True)):
            opened.windows.append(_Window(opened, number, scale, box, crop(resized, box, side), seed))
        return opened

    @undisturbed()
    def _close(self, opened: _Opened) -> tuple[np.ndarray, np.ndarray]:
        """Scores and winner of an image all of whose windows have been scored."""
        total = torch.zeros_like(opened.totals[0])
        for one, cover in zip(opened.totals, opened.cover, strict=True):
            total += one / cover / len(opened.totals)
        if self.settings.refine == "pamr":
            total = pamr(opened.resized, total, self.settings.pamr_iterations, self.settings.pamr_dilations)
        # Bilinear weights times -inf are NaN, so a background without prototypes is filled in after the last resizing.
        scores = F.interpolate(total[None], size=opened.shape, mode="bilinear", align_corners=False)[0].cpu().numpy()
        if not np.isfinite(scores).all():
            raise InputError("The image features are not finite; check the extractor's weights, or use dtype float32.")
        if opened.fallback is not None:
            scores[0] = opened.fallback
        # In the windows' own order, whatever batches they came in: of equal cosines the first counts.
        seen = sorted(opened.seen, key=lambda noted: noted[0])
        winner = self._winner(scores.argmax(0), [noted[1:] for noted in seen], next(iter(opened.rows.values())), opened.resized.shape[:2])
        if self.settings.minimum_score is not None:
            best = scores.max(0)
            low = best <= self.settings.minimum_score
            scores[0][low], winner[:, low] = best[low], -1
        return scores, winner

    def _class_rows(self, name: str, bank: PrototypeBank) -> _ClassRows:
        if name not in bank.prototypes:
            raise InputError(f"The prototypes are for {', '.join(bank.extractors) or 'no extractor'} but the profile matches with "
                             f"{name!r}; build them again with this profile.")
        vectors, index, background, behind = [None], [], [], []
        for number, (category, prototypes) in enumerate(zip(bank.vocabulary, bank.prototypes[name], strict=True)):
            own = prototypes.region == "foreground"
            if not own.any():
                raise InputError(f"The class {category.name!r} has no foreground prototypes; build it again.")
            vectors.append(self._unit(prototypes.vectors[own]))
            background.append(prototypes.vectors[~own])
            for pairs, rows in ((index, np.flatnonzero(own)), (behind, np.flatnonzero(~own))):
                pairs.append(np.stack([np.full_like(rows, number), rows], 1))
        pooled = np.concatenate(background)
        if len(pooled):
            vectors[0] = self._unit(pooled)
        return _ClassRows(vectors, [np.concatenate(behind), *index])

    def _unit(self, vectors: np.ndarray) -> torch.Tensor:
        return F.normalize(torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)).to(self.device), dim=1)

    def _fallback(self, rows: dict[str, _ClassRows]) -> float | None:
        """Constant background score where no extractor has background prototypes, else None."""
        if any(r.vectors[0] is not None for r in rows.values()):
            return None
        if self.settings.background_threshold is not None:
            return self.settings.background_threshold
        if self.profile.prototypes.background:
            return -np.inf
        raise InputError(f"There are no background prototypes and no background score; {BACKGROUND_REMEDY}")

    def _score(self, part: Sequence[_Window]) -> None:
        """Add the scores of windows to their images; notes in ``seen`` what the first extractor saw in each."""
        found: list[torch.Tensor | int] = [0] * len(part)
        for name, extractor in self.extractors.items():
            features = _features(extractor, [window.crop for window in part], np.array([window.seed for window in part], np.int64))
            # Neighbours of one image and scale are matched in one product.
            for _, run in itertools.groupby(range(len(part)), lambda i: (id(part[i].image), part[i].scale)):
                run = list(run)
                image, (_, _, height, width) = part[run[0]].image, part[run[0]].box
                values, arguments = self._match(torch.stack(features[run[0] : run[-1] + 1]), image.rows[name])
                enlarged = F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)
                for i, window in zip(run, enlarged, strict=True):
                    found[i] = found[i] + window
                if name == next(iter(self.extractors)):
                    numbers, boxes = [part[i].number for i in run], [part[i].box for i in run]
                    image.seen.extend(zip(numbers, boxes, values.cpu().numpy(), arguments.int().cpu().numpy(), strict=True))
        for window, scores in zip(part, found, strict=True):
            image, (top, left, height, width) = window.image, window.box
            image.totals[window.scale][:, top : top + height, left : left + width] += scores / image.votes
            image.cover[window.scale][top : top + height, left : left + width] += 1

    def _match(self, features: torch.Tensor, rows: _ClassRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Highest cosine f32 (n, C + 1, h, w) of every feature (n, h, w, D) to each class and its row i64; 0 and -1
        without prototypes."""
        n, h, w, channels = features.shape
        if channels != rows.vectors[1].shape[1]:
            raise InputError(f"The prototypes have {rows.vectors[1].shape[1]} channels but the image features {channels}; "
                             "build the prototypes again with this profile.")
        unit = F.normalize(features.to(self.device, torch.float32).reshape(-1, channels), dim=1)
        values = unit.new_zeros(len(rows.vectors), len(unit))
        arguments = torch.full(values.shape, -1, dtype=torch.long, device=self.device)
        for c, vectors in enumerate(rows.vectors):
            if vectors is None:
                continue
            values[c] = -torch.inf
            for start in range(0, len(vectors), BLOCK):
                value, argument = (unit @ vectors[start : start + BLOCK].T).max(1)
                better = ~(value <= values[c])  # NaN counts as better, so that it surfaces
                values[c] = torch.where(better, value, values[c])
                arguments[c] = torch.where(better, argument + start, arguments[c])
        return tuple(t.reshape(-1, n, h, w).transpose(0, 1) for t in (values, arguments))

    @staticmethod
    def _winner(labels: np.ndarray, seen: list, rows: _ClassRows, resized: tuple[int, int]) -> np.ndarray:
        """Of all windows over a pixel, the prototype with the highest cosine within the class that won the pixel:
        (category, row), i32 (2, H, W)."""
        best, argument = np.full(labels.shape, -np.inf, np.float32), np.full(labels.shape, -1)
        centre = [((np.arange(n) + 0.5) * r / n).astype(int) for n, r in zip(labels.shape, resized, strict=True)]
        for (top, left, height, width), values, arguments in seen:
            y, x = (slice(*np.searchsorted(at, (first, first + length))) for at, first, length in zip(
                centre, (top, left), (height, width), strict=True))
            cell_y = (centre[0][y] - top) * values.shape[1] // height
            cell_x = (centre[1][x] - left) * values.shape[2] // width
            index = labels[y, x] * values[0].size + (cell_y[:, None] * values.shape[2] + cell_x)
            value = values.take(index)  # of the pixel's class in the pixel's cell
            better = value > best[y, x]
            np.copyto(best[y, x], value, where=better)
            np.copyto(argument[y, x], arguments.take(index), where=better)
        starts = np.cumsum([0, *map(len, rows.index[:-1])])
        pairs = np.concatenate([*rows.index, [(-1, -1)]]).astype(np.int32)  # the last: no prototype
        return np.ascontiguousarray(np.moveaxis(pairs[np.where(argument < 0, -1, starts[labels] + argument)], -1, 0))


def _features(extractor: Any, crops: list[np.ndarray], seeds: np.ndarray) -> list[torch.Tensor]:
    """Features f32 (h, w, D) of each square crop u8 (S, S, 3), in as few calls as the extractor allows."""
    if getattr(extractor, "any_size", False):
        return list(extractor(crops, seeds))
    found: list[torch.Tensor] = []
    for _, run in itertools.groupby(range(len(crops)), lambda i: crops[i].shape):
        run = list(run)
        found += list(extractor(np.stack([crops[i] for i in run]), seeds[run]))
    return found
