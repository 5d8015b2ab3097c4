"""What several OVDiff objects share: settings that differ in one field mostly run the same networks on the same pixels
and match with the same prototypes. Networks are built once and remember their latest results, so that a second setting
pays for what differs alone; prototypes are in memory once. While all notebooks run, features of windows are kept on
disk, where each that looks at an image finds them."""

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from cachetools import LRUCache, TTLCache, cached

from ovdiff_lib import keys
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import written_whole
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.library.store import Library
from ovdiff_lib.masks import SEGMENTERS
from ovdiff_lib.masks.select import proposals
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import NOT_MODELS, chosen_part
from ovdiff_lib.types import Prototypes
from ovdiff_lib.workbench.baselines import build_baseline
from ovdiff_lib.workbench.console import FEATURES
from ovdiff_lib.workbench.evaluation.layered import Layered, factors_of

MEMORY = 2**26
"""Bytes of results remembered in a process: what the methods of a table need of one class or image several times."""

DISK, LARGEST = 2**32, 2**23
"""Bytes of features that are kept on disk, in files of at most so many: larger ones a network has made as soon."""

_numbers = itertools.count()


def _bytes(value: Any) -> int:
    return sum(map(_bytes, value)) if isinstance(value, tuple) else getattr(value, "nbytes", 64)


def _digest(*arguments: Any) -> bytes:
    return hashlib.blake2b(pickle.dumps(arguments), digest_size=16).digest()


@cached(LRUCache(MEMORY, getsizeof=_bytes), key=lambda key, make: key, lock=RLock())
def remember(key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` gives for ``key``, made now or remembered. A result larger than all the memory is not kept."""
    return make()


def remember_many(places: Sequence[Any], make: Callable[[list[int]], Iterable[Any]]) -> list[Any]:
    """What is remembered at each place; ``make`` gives what is not, for the numbers of the places in order."""
    with remember.cache_lock:
        found = [remember.cache.get(key) for key in places]
    new = [n for n, known in enumerate(found) if known is None]
    for n, made in zip(new, make(new) if new else [], strict=True):
        found[n] = remember(places[n], lambda made=made: made)
    return found


class Remembering:
    """A part whose method ``name``, or which itself as a function, remembers its latest results."""

    def __init__(self, part: Any, name: str = "__call__") -> None:
        self._part, self._name, self.number = part, name, next(_numbers)

    def __call__(self, *arguments: Any) -> Any:
        return remember(self._key(*arguments), lambda: getattr(self._part, self._name)(*arguments))

    def __getattr__(self, name: str) -> Any:
        return self if name == self._name else getattr(self._part, name)

    def _key(self, *arguments: Any) -> tuple:
        return self.number, _digest(*arguments)


class RememberingAll(Remembering):
    """A part whose results are few numbers each: it remembers them all."""

    def __init__(self, part: Any) -> None:
        super().__init__(part)
        self._all: dict[tuple, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        key = self._key(*arguments)
        if key not in self._all:
            self._all[key] = self._part(*arguments)
        return self._all[key]


class RememberingSegmenter(Remembering):
    """A segmenter that is asked for several images at a time for those alone that it does not remember."""

    def __init__(self, part: Any) -> None:
        super().__init__(part, "propose")

    def propose_many(self, images: np.ndarray, words: str) -> list[np.ndarray]:
        """Proposals bool (M, H, W) of each image u8 (H, W, 3)."""
        return remember_many([self._key(image, words) for image in images],
                             lambda new: map(np.asarray, proposals(self._part, images[new], words)))


class SharedMatcher(Matcher):
    """A matcher that compares an image with the prototypes of a category once, whatever other settings ask it again,
    and layers of the diffusion model on their own grids."""

    _digests: Any = cached_property(lambda self: WeakKeyDictionary())  # of prototypes, by region

    def _nearest(self, name: str, run: Sequence[Any], features: Sequence[torch.Tensor],
                 wanted: Sequence[tuple[Prototypes, str]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        make, seen = partial(super()._nearest, name, run, features), self._seen(name, run)
        return remember_many([(*seen, self._digest_of(*one)) for one in wanted],
                             lambda new: make([wanted[n] for n in new]))

    def _cosines(self, name: str, run: Sequence[Any], features: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor]:
        widths = getattr(self.extractors[name], "widths", None)  # of layers
        if widths is None:
            return super()._cosines(name, run, features)

        def layered() -> Layered:
            stacked = torch.stack(list(features)).to(self.device, torch.float32)
            return Layered(stacked, factors_of(stacked, widths))

        return remember((*self._seen(name, run), "layers"), layered).cosines

    def _seen(self, name: str, run: Sequence[Any]) -> tuple:
        return self.extractors[name].number, _digest([(window.crop, window.seed) for window in run])

    def _digest_of(self, prototypes: Prototypes, region: str) -> bytes:
        known = self._digests.setdefault(prototypes, {})
        if region not in known:
            chosen = prototypes.region == region
            known[region] = _digest(np.flatnonzero(chosen), prototypes.vectors[chosen])
        return known[region]


@cached(TTLCache(1, 5.0))
def _room(folder: Path) -> int:
    """Bytes that the folder may still take, looked up every five seconds: that takes as long as a small network."""
    return DISK - sum(one.stat().st_size for one in folder.glob("*.pt"))


class KeptOnDisk(Remembering):
    """A network that looks at images: what ``shared`` remembers of it, and beyond that what a folder keeps. ``key``, as
    plain data, is all that its tensors depend on beside the arguments."""

    def __init__(self, shared: Remembering, key: Any, folder: Path) -> None:
        self.__dict__.update(shared.__dict__, _of=json.dumps(key, sort_keys=True), _folder=folder)

    def __call__(self, *arguments: Any) -> Any:
        return remember(self._key(*arguments), lambda: self._kept(*arguments))

    def _kept(self, *arguments: Any) -> Any:
        path = self._folder / f"{_digest(self._of, arguments).hex()}.pt"
        with suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return torch.load(path, weights_only=True)
        made = getattr(self._part, self._name)(*arguments)
        with suppress(OSError, InputError):  # a full disk keeps nothing
            if _bytes(made) <= min(LARGEST, _room(self._folder)):
                with written_whole(path) as file:
                    torch.save(made, file)
        return made


class FewerLayers:
    """The diffusion extractor with some ``layers`` of another's, ``whole``: its features without the other channels."""

    name, any_size = "sd", True

    def __init__(self, whole: Any, layers: list[str]) -> None:
        channels = np.split(np.arange(whole.channels), np.cumsum(whole.widths)[:-1])
        own = dict(zip(whole.settings.sd_layers, channels, strict=True))
        self.whole, self.columns = whole, np.concatenate([own[layer] for layer in layers])
        self.number = whole.number, *layers
        self.widths = [len(own[layer]) for layer in layers]
        self.channels = len(self.columns)

    def __call__(self, images: Any, seeds: np.ndarray) -> torch.Tensor:
        return self.whole(images, seeds)[..., self.columns]


class SharedLibrary(Library):
    """A library that gives prototypes which somebody holds as the same object again: nobody may change it in place."""

    _held: Any = cached_property(lambda self: WeakValueDictionary())

    def get(self, kind: str, key: str) -> Any:
        if kind != "prototypes":
            return super().get(kind, key)
        found = self._held.get(key)
        if found is None and (found := super().get(kind, key)) is not None:
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

    def extractors(self, profile: Profile, kept: bool = False) -> dict[str, Any]:
        """The extractors of ``features.extractors`` by name; features of windows are ``kept`` on disk."""
        return {name: self._extractor(name, profile, kept) for name in profile.features.extractors}

    def segmenter(self, profile: Profile) -> Any:
        """The segmenter of ``masks.segmenter``."""
        name = profile.masks.segmenter
        part = chosen_part("masks.segmenter", name, SEGMENTERS)
        return self._part("masks", name, part, profile, RememberingSegmenter)

    def category_filter(self, profile: Profile) -> Any:
        """The category filter of the profile."""
        own = {name: value for name, value in profile.to_dict()["filters"].items() if name.startswith("category")}
        key = ["filter", profile.models.clip, _machine(profile), own]
        return self._once(key, lambda: RememberingAll(CategoryFilter.build(profile)))

    def matcher(self, extractors: dict[str, Any], profile: Profile) -> Matcher:
        """The matcher of the profile's extractors, whose features of windows are kept on disk."""
        return SharedMatcher(self.extractors(profile, True), profile)

    def baseline(self, name: str, profile: Profile) -> Any:
        """The baseline called ``name`` with the profile's values."""
        def make() -> Remembering:
            made = build_baseline(name, profile)
            if name == "reco":  # its dense CLIP looks at the windows that MaskCLIP looks at
                made.maskclip = self.baseline("maskclip", profile)
            elif name == "clip-segmenter":
                made.segmenter = self.segmenter(profile)
            for network in getattr(made, "networks", ()):
                setattr(made, network, self._disk(Remembering(getattr(made, network)), [name, network, sees]))
            return Remembering(made, "scores")

        key = {section: fields for section, fields in profile.to_dict().items() if section != "evaluation"}
        sees = {section: key[section] for section in ("models", "features", "matching", "baselines")}
        sees["features"] = {**sees["features"], "extractors": []}
        return self._once(["baseline", name, key], make)

    def _extractor(self, name: str, profile: Profile, kept: bool) -> Any:
        layers = profile.features.sd_layers
        if name == "sd" and set() < set(layers) < set(self._layers):
            whole = self._extractor(name, profile.override({"features.sd_layers": self._layers}), kept)
            return FewerLayers(whole, layers)
        part = chosen_part("features.extractors", name, EXTRACTORS)
        shared = self._part("features", name, part, profile, Remembering)
        if kept:
            return self._disk(shared, [name, keys.of_part(profile, "features", name), _machine(profile)])
        return shared

    def _disk(self, shared: Remembering, key: Any) -> Remembering:
        return KeptOnDisk(shared, key, self._folder) if self._folder else shared

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
