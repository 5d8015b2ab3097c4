"""What the scenarios share: a profile, a library of its own that is deleted, real prototypes, images, and as many made-up classes as
wanted."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.loading import load_diffusion, resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.types import PrototypeBank

CLASSES = ("dog", "boat")
"""Real classes that are drawn for the measurements; made-up ones are copies of theirs."""

NOISE = 0.1
"""Noise on the copies, in standard deviations of a channel: enough that no two prototypes are equal."""


def check_repeats(repeats: int) -> None:
    """``InputError`` for fewer than one round."""
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}; give at least 1.")


class Scene:
    """One session of the benchmark: ``profile`` with the extractor sd alone, ``repeats`` rounds a scenario.

    A context manager: its prototype library and files live in a temporary folder, so that nothing is read that an earlier run left;
    ``library`` names another scene's instead. Raises ``InputError`` for ``repeats`` below 1.
    """

    def __init__(self, profile: Profile, repeats: int = 3, library: str | Path | None = None) -> None:
        check_repeats(repeats)
        self.profile = profile.override({"features.extractors": ["sd"]})
        self.repeats = repeats
        self.device = resolve_device(self.profile)
        self.category = Category(CLASSES[0])
        self._folder = tempfile.TemporaryDirectory(prefix="ovdiff-benchmark-")
        self.folder = Path(self._folder.name)
        self.library = Path(library or self.folder / "library")

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @functools.cached_property
    def profile_file(self) -> Path:
        """The profile as a file, for other processes."""
        path = self.folder / "profile.yaml"
        path.write_text(yaml.safe_dump(self.profile.to_dict(), allow_unicode=True), encoding="utf-8")
        return path

    @property
    def pipe(self):
        """The text-to-image pipeline."""
        return load_diffusion(self.profile)

    @functools.cached_property
    def ovdiff(self) -> OVDiff:
        return self.method({})

    def method(self, overrides: dict[str, Any]) -> OVDiff:
        """An ``OVDiff`` of the profile with fields replaced, over the scene's library."""
        return OVDiff(self.profile, overrides, library=self.library, progress=False)

    @functools.cached_property
    def bank(self) -> PrototypeBank:
        """Real prototypes of :data:`CLASSES`, drawn on first use."""
        return self.ovdiff.build(CLASSES)

    @functools.cached_property
    def images(self) -> list[np.ndarray]:
        """Validation images u8 (H, W, 3) of the mini world, which ship with the package and are at hand for every profile."""
        return [self.data[i].image for i in range(min(64, len(self.data)))]

    @functools.cached_property
    def data(self):
        """The data set of :attr:`images`."""
        from ovdiff_lib.workbench.data.datasets import load_dataset

        return load_dataset("mini-voc")

    def image(self, number: int) -> np.ndarray:
        """Image ``number``, from the first again after the last."""
        return self.images[number % len(self.images)]

    def made_up(self, count: int) -> PrototypeBank:
        """:func:`made_up` classes from :attr:`bank`."""
        return made_up(self.bank, count)


def made_up_vocabulary(count: int) -> Vocabulary:
    """``count`` classes "w0001", "w0002", ... whose prompts are two words of the mini world, or three once all pairs are used, no two
    alike: as long as names of large vocabularies are."""
    from ovdiff_lib.mini.world import load_world

    words, categories = load_world().names, []
    for i in range(count):
        digits = [i % len(words), i // len(words) % len(words), *([i // len(words) ** 2 - 1] if i >= len(words) ** 2 else ())]
        categories.append(Category(f"w{i + 1:04}", " ".join(words[digit] for digit in digits)))
    return Vocabulary(tuple(categories))


def made_up(bank: PrototypeBank, count: int, seed: int = 0) -> PrototypeBank:
    """A bank of :func:`made_up_vocabulary`: in turns copies of the classes of ``bank``, with noise of :data:`NOISE`.

    Class i is the same for every ``count`` of at least i.
    """
    vocabulary = made_up_vocabulary(count)
    prototypes = {}
    for name, rows in bank.prototypes.items():
        scales = [NOISE * rows[i].vectors.std(0) for i in range(len(rows))]
        made = []
        for i in range(count):
            source, generator = rows[i % len(rows)], np.random.default_rng([seed, i])
            noise = generator.standard_normal(source.vectors.shape, dtype=np.float32)
            made.append(replace(source, vectors=source.vectors + noise * scales[i % len(rows)].astype(np.float32)))
        prototypes[name] = tuple(made)
    return PrototypeBank(vocabulary, prototypes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """That the category filter leaves out joined prompts beyond CLIP's length is told in the rows, not warned of at every image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The category filter left out")
        yield


def difference(left: np.ndarray | torch.Tensor, right: np.ndarray | torch.Tensor) -> float:
    """Largest absolute difference of two arrays of one shape; infinite values at the same places are equal."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape != right.shape:
        raise InputError(f"Results of the shapes {left.shape} and {right.shape} cannot be compared; this is a defect of a scenario.")
    same = left == right
    return float(np.abs(np.where(same, 0.0, left) - np.where(same, 0.0, right)).max(initial=0.0))
