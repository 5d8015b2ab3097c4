"""Extractors, segmenters and category filters that several OVDiff objects share, for measuring many settings on the same images.

Settings that differ in one field mostly run the same networks on the same pixels. :class:`SharedNetworks` builds each once for everything
it depends on, and they remember their latest results, so that a second setting pays for what differs alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache

from ovdiff_lib import keys
from ovdiff_lib.features import EXTRACTORS, check_extractors
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.masks import SEGMENTERS, check_segmenter
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import NOT_MODELS

MEMORY = 2**28
"""Bytes of results that are remembered in a process: what the methods of a table need of one class or one image, several times over."""

_numbers = itertools.count()


def _bytes(value: Any) -> int:
    return sum(map(_bytes, value)) if isinstance(value, tuple) else getattr(value, "nbytes", 64)


_remembered = LRUCache(MEMORY, getsizeof=_bytes)


def remember(key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` gives for ``key``, made now or remembered. A result larger than all the memory is not kept."""
    if key in _remembered:
        return _remembered[key]
    value = make()
    if _bytes(value) <= _remembered.maxsize:
        _remembered[key] = value
    return value


class Remembering:
    """A part that remembers the latest results of itself as a function and of ``methods``; all else is the part's own."""

    def __init__(self, part: Any, *methods: str) -> None:
        self._part, self._methods, self._number = part, methods, next(_numbers)

    def __call__(self, *arguments: Any) -> Any:
        return remember(self._key("", arguments), lambda: self._part(*arguments))

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._part, name)
        return functools.partial(self._asked, name, own) if name in self._methods else own

    def _asked(self, name: str, own: Callable, *arguments: Any) -> Any:
        return remember(self._key(name, arguments), lambda: own(*arguments))

    def _key(self, name: str, arguments: Sequence[Any]) -> tuple:
        return self._number, name, *(_digest(a) if isinstance(a, (np.ndarray, list)) else a for a in arguments)


class RememberingSegmenter(Remembering):
    """A segmenter that is asked for several images at a time for those alone that it does not remember."""

    def __init__(self, part: Any) -> None:
        super().__init__(part, "propose")

    def propose_many(self, images: np.ndarray, words: str) -> list[np.ndarray]:
        """Proposals bool (M, H, W) of each image u8 (H, W, 3)."""
        from ovdiff_lib.masks.select import proposals

        places = [self._key("propose", (image, words)) for image in images]
        found = {n: _remembered[key] for n, key in enumerate(places) if key in _remembered}
        new = [n for n in range(len(images)) if n not in found]
        for n, masks in zip(new, proposals(self._part, images[new], words) if new else [], strict=True):
            found[n] = remember(places[n], lambda masks=masks: np.asarray(masks))
        return [found[n] for n in range(len(images))]


class SharedNetworks:
    """Networks by what they depend on, to be given to :class:`~ovdiff_lib.pipeline.OVDiff` as ``networks``.

    A remembered result is the same object again: nobody may change it in place.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def extractors(self, profile: Profile) -> dict[str, Any]:
        """The extractors of ``features.extractors`` by name. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        check_extractors(profile)
        return {name: self._part("features", name, EXTRACTORS[name], profile, Remembering) for name in profile.features.extractors}

    def segmenter(self, profile: Profile) -> Any:
        """The segmenter of ``masks.segmenter``. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        check_segmenter(profile)
        name = profile.masks.segmenter
        return self._part("masks", name, SEGMENTERS[name], profile, RememberingSegmenter)

    def category_filter(self, profile: Profile) -> Any:
        """The category filter of the profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        key = ["filter", profile.models.clip, _machine(profile), profile.to_dict()["filters"]]
        return self._once(key, lambda: Remembering(CategoryFilter.build(profile)))

    def baseline(self, name: str, profile: Profile) -> Any:
        """The baseline called ``name`` with the profile's values. Raises as :func:`~ovdiff_lib.workbench.baselines.build_baseline`."""
        from ovdiff_lib.workbench.baselines import build_baseline

        values = {section: fields for section, fields in profile.to_dict().items() if section not in ("name", "description", "evaluation")}
        return self._once(["baseline", name, values], lambda: Remembering(build_baseline(name, profile), "scores"))

    def _part(self, section: str, name: str, part: Any, profile: Profile, wrap: type) -> Any:
        batch = getattr(getattr(profile, section), "batch_size", 0)
        return self._once([section, name, keys.of_part(profile, section, name), batch, _machine(profile)], lambda: wrap(part(profile)))

    def _once(self, key: list[Any], make: Callable[[], Any]) -> Any:
        text = json.dumps(key, sort_keys=True)
        if text not in self._made:
            self._made[text] = make()
        return self._made[text]


def _machine(profile: Profile) -> list[Any]:
    return [value for name, value in profile.to_dict()["models"].items() if name in NOT_MODELS]


def _digest(arrays: np.ndarray | list[np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays if isinstance(arrays, list) else [arrays]:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()
