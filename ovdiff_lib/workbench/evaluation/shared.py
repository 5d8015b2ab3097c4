"""Extractors, segmenters and category filters that several OVDiff objects share, for measuring many settings on the
same images.

Settings that differ in one field mostly run the same networks on the same pixels. :class:`SharedNetworks` builds each
once for everything it depends on, and they remember their latest results, so that a second setting pays for what
differs alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ovdiff_lib import keys
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.features import EXTRACTORS, check_extractors
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.masks import SEGMENTERS, check_segmenter
from ovdiff_lib.profiles.schema import Profile

MEMORY = 2**31
"""Bytes of results that are remembered, of all networks together."""


class SharedNetworks:
    """Networks by what they depend on, to be given to :class:`~ovdiff_lib.pipeline.OVDiff` as ``networks``.

    A remembered result is the same object again: nobody may change it in place.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._memory = _Memory()

    def extractors(self, profile: Profile) -> dict[str, Any]:
        """The extractors of ``features.extractors`` by name. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        check_extractors(profile)
        return {name: self._make("features", name, EXTRACTORS[name], profile, _RememberingExtractor)
                for name in profile.features.extractors}

    def segmenter(self, profile: Profile) -> Any:
        """The segmenter of ``masks.segmenter``. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        check_segmenter(profile)
        name = profile.masks.segmenter
        return self._make("masks", name, SEGMENTERS[name], profile, _RememberingSegmenter)

    def category_filter(self, profile: Profile) -> Any:
        """The category filter of the profile. Raises ``ProfileError`` and ``ModelNotAvailable``."""
        table = ["filter", profile.models.clip, _machine(profile), dataclasses.asdict(profile.filters)]
        key = json.dumps(table, sort_keys=True)
        if key not in self._made:
            self._made[key] = _RememberingFilter(CategoryFilter.build(profile), self._memory)
        return self._made[key]

    def baseline(self, name: str, profile: Profile) -> Any:
        """The baseline called ``name`` with the profile's values. Raises as
        :func:`~ovdiff_lib.workbench.baselines.build_baseline`."""
        from ovdiff_lib.workbench.baselines import build_baseline

        unused = ("name", "description", "evaluation")
        values = {section: fields for section, fields in profile.to_dict().items() if section not in unused}
        key = json.dumps(["baseline", name, values], sort_keys=True)
        if key not in self._made:
            self._made[key] = _RememberingBaseline(build_baseline(name, profile), self._memory)
        return self._made[key]

    def _make(self, section: str, name: str, part: Any, profile: Profile, remember: type) -> Any:
        batch = getattr(getattr(profile, section), "batch_size", 0)
        table = [section, name, keys.of_part(profile, section, name), batch, _machine(profile)]
        key = json.dumps(table, sort_keys=True)
        if key not in self._made:
            self._made[key] = remember(part(profile), self._memory)
        return self._made[key]


def _machine(profile: Profile) -> list[Any]:
    models = profile.models
    return [models.device, models.dtype, models.download]


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


class _Memory:
    """The latest results by key, as many as fit in :data:`MEMORY` bytes and at least one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._kept

    def __call__(self, key: Any, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """What ``make`` gives for ``key``, made now or remembered; ``size`` tells a result's bytes."""
        if key not in self._kept:
            value = make()
            self._kept[key] = value, size(value)
            self._bytes += size(value)
            while self._bytes > MEMORY and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        self._kept.move_to_end(key)
        return self._kept[key][0]


class _RememberingExtractor:
    def __init__(self, extractor: Any, memory: _Memory) -> None:
        self.extractor, self.name, self.channels, self._memory = extractor, extractor.name, extractor.channels, memory
        self.any_size = getattr(extractor, "any_size", False)

    def __call__(self, images: np.ndarray | Sequence[np.ndarray], seeds: np.ndarray) -> Any:
        key = id(self), _digest(*images, np.asarray(seeds))
        return self._memory(key, lambda: self.extractor(images, seeds), lambda features: features.nbytes)


class _RememberingSegmenter:
    def __init__(self, segmenter: Any, memory: _Memory) -> None:
        self.segmenter, self.name, self._memory = segmenter, segmenter.name, memory

    def propose(self, image: np.ndarray, words: str) -> np.ndarray:
        key = id(self), _digest(image), words
        return self._memory(key, lambda: np.asarray(self.segmenter.propose(image, words)), lambda masks: masks.nbytes)


    def propose_many(self, images: np.ndarray, words: str) -> list[np.ndarray]:
        from ovdiff_lib.masks.select import proposals

        keys = [(id(self), _digest(image), words) for image in images]
        new = [n for n, key in enumerate(keys) if key not in self._memory]
        made = dict(zip(new, proposals(self.segmenter, images[new], words), strict=True))

        def make(n: int) -> np.ndarray:  # what was remembered may have made room for what is new
            return np.asarray(made[n] if n in made else self.segmenter.propose(images[n], words))

        return [self._memory(key, lambda n=n: make(n), lambda masks: masks.nbytes) for n, key in enumerate(keys)]


class _RememberingBaseline:
    def __init__(self, baseline: Any, memory: _Memory) -> None:
        self.baseline, self._memory = baseline, memory

    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        key = id(self), _digest(image), vocabulary
        return self._memory(key, lambda: self.baseline.scores(image, vocabulary), lambda scores: scores.nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.baseline, name)


class _RememberingFilter:
    def __init__(self, category_filter: Any, memory: _Memory) -> None:
        self.filter, self._memory = category_filter, memory

    def __call__(self, image: np.ndarray, vocabulary: Vocabulary) -> Any:
        key = id(self), _digest(image), vocabulary
        return self._memory(key, lambda: self.filter(image, vocabulary),
                            lambda found: 64 * len(found[0]) + found[1].nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.filter, name)
