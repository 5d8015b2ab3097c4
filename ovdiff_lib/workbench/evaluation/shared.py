"""What several OVDiff objects share: settings that differ in one field mostly run the same networks on the same pixels
and match with the same prototypes. Networks are built once and remember their latest results, so that a second setting
pays for what differs alone; prototypes are in memory once. While all notebooks run, features of windows are kept on
disk, where each that looks at an image finds them."""

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from cachetools import LRUCache, cached

from ovdiff_lib import keys
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.files import written_whole
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.library.store import Library
from ovdiff_lib.masks import SEGMENTERS
from ovdiff_lib.masks.select import proposals
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import NOT_MODELS, chosen_part
from ovdiff_lib.workbench.baselines import build_baseline
from ovdiff_lib.workbench.console import FEATURES

MEMORY = 2**26
"""Bytes of results remembered in a process: what the methods of a table need of one class or image several times."""

DISK, LARGEST = 2**32, 2**23
"""Bytes of features that are kept on disk, in files of at most so many: larger ones a network has made as soon."""

_numbers = itertools.count()


def _bytes(value: Any) -> int:
    return sum(map(_bytes, value)) if isinstance(value, tuple) else getattr(value, "nbytes", 64)


@cached(LRUCache(MEMORY, getsizeof=_bytes), key=lambda key, make: key)
def remember(key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` gives for ``key``, made now or remembered. A result larger than all the memory is not kept."""
    return make()


class Remembering:
    """A part whose method ``name``, or which itself as a function, remembers its latest results."""

    def __init__(self, part: Any, name: str = "__call__") -> None:
        self._part, self._name, self._number = part, name, next(_numbers)

    def __call__(self, *arguments: Any) -> Any:
        return remember(self._key(*arguments), lambda: getattr(self._part, self._name)(*arguments))

    def __getattr__(self, name: str) -> Any:
        return self if name == self._name else getattr(self._part, name)

    def _key(self, *arguments: Any) -> tuple:
        return self._number, hashlib.blake2b(pickle.dumps(arguments), digest_size=16).digest()


class RememberingSegmenter(Remembering):
    """A segmenter that is asked for several images at a time for those alone that it does not remember."""

    def __init__(self, part: Any) -> None:
        super().__init__(part, "propose")

    def propose_many(self, images: np.ndarray, words: str) -> list[np.ndarray]:
        """Proposals bool (M, H, W) of each image u8 (H, W, 3)."""
        places = [self._key(image, words) for image in images]
        found = {n: remember.cache[key] for n, key in enumerate(places) if key in remember.cache}
        new = [n for n in range(len(images)) if n not in found]
        for n, masks in zip(new, proposals(self._part, images[new], words) if new else [], strict=True):
            found[n] = remember(places[n], lambda masks=masks: np.asarray(masks))
        return [found[n] for n in range(len(images))]


class KeptOnDisk(Remembering):
    """An extractor of windows: what ``shared`` remembers of it, and beyond that what a folder keeps. ``key``, as text,
    is all that features depend on beside the arguments."""

    def __init__(self, shared: Remembering, key: str, folder: Path) -> None:
        self.__dict__.update(shared.__dict__, _of=key, _folder=folder)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return remember(self._key(*arguments), lambda: self._kept(*arguments))

    def _kept(self, *arguments: Any) -> torch.Tensor:
        path = self._folder / f"{hashlib.sha256(pickle.dumps((self._of, arguments))).hexdigest()[:32]}.npy"
        with suppress(OSError, ValueError):
            return torch.from_numpy(np.load(path))
        made = self._part(*arguments)
        if made.nbytes <= min(LARGEST, DISK - sum(one.stat().st_size for one in self._folder.glob("*.npy"))):
            with written_whole(path) as file:
                np.save(file, made.numpy(force=True))
        return made


class FewerLayers:
    """The diffusion extractor with some ``layers`` of another's, ``whole``: its features without the other channels."""

    name, any_size = "sd", True

    def __init__(self, whole: Any, layers: list[str]) -> None:
        channels = np.split(np.arange(whole.channels), np.cumsum(whole.widths)[:-1])
        own = dict(zip(whole.settings.sd_layers, channels, strict=True))
        self.whole, self.columns = whole, np.concatenate([own[layer] for layer in layers])
        self.channels = len(self.columns)

    def __call__(self, images: Any, seeds: np.ndarray) -> torch.Tensor:
        return self.whole(images, seeds)[..., self.columns]


class SharedLibrary(Library):
    """A library that gives prototypes which somebody holds as the same object again: nobody may change it in place."""

    _held: Any = cached_property(lambda self: WeakValueDictionary())

    def get(self, kind: str, key: str) -> Any:
        if kind != "prototypes":
            return super().get(kind, key)
        if found := self._held.get(key) or super().get(kind, key):
            self._held[key] = found
        return found


class SharedNetworks:
    """Networks by what they depend on, to be given to :class:`~ovdiff_lib.pipeline.OVDiff` as ``networks``.

    Who needs but some of the diffusion model's ``layers`` takes them from the features of all. A remembered result is
    the same object again: nobody may change it in place. Methods raise ``ProfileError`` and ``ModelNotAvailable``.
    """

    def __init__(self, layers: list[str] | None = None) -> None:
        folder = os.environ.get(FEATURES)
        self._made, self._folder, self._layers = {}, Path(folder) if folder else None, layers or []

    def extractors(self, profile: Profile, folder: Path | None = None) -> dict[str, Any]:
        """The extractors of ``features.extractors`` by name; for windows with a ``folder``."""
        return {name: self._extractor(name, profile, folder) for name in profile.features.extractors}

    def segmenter(self, profile: Profile) -> Any:
        """The segmenter of ``masks.segmenter``."""
        name = profile.masks.segmenter
        part = chosen_part("masks.segmenter", name, SEGMENTERS)
        return self._part("masks", name, part, profile, RememberingSegmenter)

    def category_filter(self, profile: Profile) -> Any:
        """The category filter of the profile."""
        key = ["filter", profile.models.clip, _machine(profile), profile.to_dict()["filters"]]
        return self._once(key, lambda: Remembering(CategoryFilter.build(profile)))

    def matcher(self, extractors: dict[str, Any], profile: Profile) -> Matcher:
        """The matcher of these extractors."""
        return Matcher(self.extractors(profile, self._folder) if self._folder else extractors, profile)

    def baseline(self, name: str, profile: Profile) -> Any:
        """The baseline called ``name`` with the profile's values."""
        def make() -> Remembering:
            made = build_baseline(name, profile)
            if name == "reco":  # its dense CLIP looks at the windows that MaskCLIP looks at
                made.maskclip = self.baseline("maskclip", profile)
            for network in getattr(made, "networks", ()):
                setattr(made, network, Remembering(getattr(made, network)))
            return Remembering(made, "scores")

        key = {section: fields for section, fields in profile.to_dict().items() if section != "evaluation"}
        return self._once(["baseline", name, key], make)

    def _extractor(self, name: str, profile: Profile, folder: Path | None) -> Any:
        layers = profile.features.sd_layers
        if name == "sd" and set() < set(layers) < set(self._layers):
            whole = self._extractor(name, profile.override({"features.sd_layers": self._layers}), folder)
            return FewerLayers(whole, layers)
        part = chosen_part("features.extractors", name, EXTRACTORS)
        shared = self._part("features", name, part, profile, Remembering)
        key = json.dumps([name, keys.of_part(profile, "features", name), _machine(profile)], sort_keys=True)
        return KeptOnDisk(shared, key, folder) if folder else shared

    def _part(self, section: str, name: str, part: Any, profile: Profile, wrap: type) -> Any:
        batch = getattr(getattr(profile, section), "batch_size", 0)
        key = [section, name, keys.of_part(profile, section, name), batch, _machine(profile)]
        return self._once(key, lambda: wrap(part(profile)))

    def _once(self, key: list[Any], make: Callable[[], Any]) -> Any:
        text = json.dumps(key, sort_keys=True)
        if text not in self._made:
            self._made[text] = make()
        return self._made[text]


def _machine(profile: Profile) -> list[Any]:
    return [value for name, value in profile.to_dict()["models"].items() if name in NOT_MODELS]
