"""OVDiff on one page: from class names to prototypes, from prototypes to a segmented image.

    names --support--> images + attribution --masks--> foreground / background --features, prototypes--> bank
    image --category filter, stuff filter--> kept prototypes --matching (Eq. 4)--> label map

Each step is one module; this page only connects them. A class is built from its own words and the profile alone, so
adding a class changes no other (Sec. 3.3), and a prediction depends on the image, the bank and the profile alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib import keys
from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.features import build_extractors
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.filters.stuff import filter_stuff
from ovdiff_lib.images import read_image
from ovdiff_lib.library.own import with_pictures
from ovdiff_lib.library.store import Library
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.matching.matcher import Matcher
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import load_diffusion
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.segmentation import Segmentation, label_ids
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import ForegroundBackground, PrototypeBank, Prototypes, SupportSet

Classes = PrototypeBank | Vocabulary | Iterable[str | Category] | str

NETWORKS = SimpleNamespace(extractors=build_extractors, segmenter=build_segmenter,
                           category_filter=CategoryFilter.build, matcher=Matcher)
"""How an object makes its networks; :class:`~ovdiff_lib.workbench.evaluation.shared.SharedNetworks` serves many."""


class OVDiff:
    """Training-free open-vocabulary segmentation.

    Args:
        profile: name of a profile ("mini", "paper"), path of a profile file, or a ``Profile``.
        overrides: profile fields to replace, for example ``{"support.size": 8}``; unknown ones raise ``ProfileError``.
        library: folder that keeps support sets and prototypes between runs (default: the user's cache folder).
        progress: show progress bars for long work.
        networks: where networks come from, for measuring many settings with the same ones; default: its own.

    Models are loaded when first needed. Raises ``ModelNotAvailable`` then when weights are not on this machine.
    """

    def __init__(self, profile: str | Path | Profile = "mini", overrides: dict[str, Any] | None = None, *,
                 library: str | Path | None = None, progress: bool = True, networks: Any = NETWORKS):
        self.profile, self.library = load_profile(profile, overrides), Library(library)
        self.progress, self.networks = progress, networks

    def replaced(self, overrides: dict[str, Any]) -> OVDiff:
        """Another object with profile fields replaced and the same library, progress and networks."""
        return OVDiff(self.profile, overrides, library=self.library.root, progress=self.progress,
                      networks=self.networks)

    # ------------------------------------------------------------------ steps 1 and 2: words to prototypes
    def build(self, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] = ()) -> PrototypeBank:
        """Prototypes of every class (Sec. 3.1 to 3.3); ``classes`` as for :meth:`Vocabulary.of`, with those in
        ``stuff`` as regions. Classes built before come from the library."""
        vocabulary = Vocabulary.of(classes, stuff)
        hidden = not self.progress or len(vocabulary) == 1
        built = [self.build_class(one) for one in tqdm(vocabulary, "building classes", unit="class", disable=hidden)]
        return PrototypeBank(vocabulary, {name: tuple(p[name] for p in built) for name in built[0]})

    def build_from(self, classes: dict[str, Any], masks: dict[str, Any] | None = None,
                   stuff: Iterable[str] = ()) -> PrototypeBank:
        """:meth:`build` of classes by name, of which each is words, to be drawn, or a list or folder of one's own
        pictures, with their ``masks``, if any, by name (:class:`~ovdiff_lib.library.own.OwnPictures`)."""
        return self.build(with_pictures(self, classes, masks or {}, stuff, keys.for_pictures))

    def build_class(self, category: Category | str) -> dict[str, Prototypes]:
        """Steps 1 and 2 for one category: its prototypes by extractor; what the library holds is taken from there."""
        keys.check_profile(self.profile)
        support = cache(lambda: self.support(category))
        masks = cache(lambda: self._from_library("masks", category, lambda: self.masks(support())))
        return {name: self._from_library(name, category, lambda name=name: self._prototypes(name, support(), masks()))
                for name in self.profile.features.extractors}

    def support(self, category: Category | str) -> SupportSet:
        """Step 1: support images drawn for a category, with the attribution of its words (Sec. 3.1, 3.2)."""
        category = Category.of(category)
        if category.pictures:
            return self.library.given(category)
        key, made_from = keys.for_words(self._made_from("support"), category)
        found = self.library.get_or_grow(key, self.profile.support.size, lambda start, count: sample_support(
            self.diffusion, category, self.profile, count, self.progress, start), made_from)
        return dataclasses.replace(found, category=category)  # the library knows the words, not the name they have here

    def masks(self, support: SupportSet) -> ForegroundBackground:
        """Step 2a: where the object is and is not in each support image (Sec. 3.2, Eq. 1)."""
        return make_masks(support, self.profile, self.segmenter)

    def masks_of(self, category: Category | str) -> ForegroundBackground:
        """:meth:`masks` of a category's support set, from the library if they are there."""
        return self._from_library("masks", category, lambda: self.masks(self.support(category)))

    def prototypes(self, support: SupportSet, masks: ForegroundBackground) -> dict[str, Prototypes]:
        """Steps 2b, 2c: features of the support images and their prototypes (Eq. 2, 3), one entry an extractor."""
        return {name: self._prototypes(name, support, masks) for name in self.profile.features.extractors}

    def _prototypes(self, extractor: str, support: SupportSet, masks: ForegroundBackground) -> Prototypes:
        with undisturbed("features.batch_size"):  # an extractor of the user's own may not see to it
            features = self.extractors[extractor](support.images, support.seeds)  # (N, h, w, D)
        return build_prototypes(features, masks, self.profile.prototypes, self.profile.masks.resize)

    def _from_library(self, step: str, category: Category | str, make: Callable[[], Any]) -> Any:
        """A category's masks, or its prototypes of the extractor ``step``: from the library, or made and kept there."""
        category = Category.of(category)
        key, made_from = keys.for_words(self._made_from(step, bool(category.pictures)), category)
        return self.library.get_or_make("masks" if step == "masks" else "prototypes", key, make, made_from)

    # ------------------------------------------------------------------ step 3: image and prototypes to labels
    def segment(self, image: Any, classes: Classes) -> Segmentation:
        """Label every pixel of an image (a path, PIL image or array) with a class or background (Sec. 3.4, Eq. 4)."""
        image, bank = read_image(image), self._bank(classes)  # a broken image is told of before classes are built
        kept, probabilities = self._possible(image, bank.vocabulary)
        matched = bank.restrict(kept)
        scores, winner = self.matcher.score(image, matched)  # (1 + kept, H, W): background first
        labels = label_ids(kept)[scores.argmax(0)]  # Eq. 4: a pixel is of the class with its highest score
        return Segmentation(image, labels, scores, winner, bank.vocabulary, kept, probabilities, matched)

    def segment_many(self, images: Iterable[Any], classes: Classes, together: int = 8) -> Iterator[Segmentation]:
        """:meth:`segment` of each image, read when needed, in order, up to rounding, ``together`` at a time."""
        bank, waiting = self._bank(classes), iter(images)
        while chosen := [read_image(image) for image in itertools.islice(waiting, max(1, together))]:
            found = [self._possible(image, bank.vocabulary) for image in chosen]
            matched = [bank.restrict(kept) for kept, _ in found]
            scored = self.matcher.scores(list(zip(chosen, matched, strict=True)))
            for image, (kept, probabilities), own, (scores, winner) in zip(chosen, found, matched, scored, strict=True):
                labels = label_ids(kept)[scores.argmax(0)]
                yield Segmentation(image, labels, scores, winner, bank.vocabulary, kept, probabilities, own)

    def _bank(self, classes: Classes) -> PrototypeBank:
        """The prototypes to match with: built if they are words, then through the "stuff" filter."""
        bank = classes if isinstance(classes, PrototypeBank) else self.build(classes)
        return self.stuff_filter(bank) if self.profile.filters.stuff else bank

    def _possible(self, image: np.ndarray, vocabulary: Vocabulary) -> tuple[tuple[int, ...], np.ndarray]:
        """The categories that may be in the image, and their probabilities; without the filter all of them, and NaN."""
        if self.profile.filters.category:
            return self.category_filter(image, vocabulary)
        return tuple(range(len(vocabulary))), np.full(len(vocabulary), np.nan, np.float32)

    # ------------------------------------ what is made when first used; a bank that is filtered segments many images
    _made_from = cached_property(lambda self: cache(partial(keys.made_from, self.profile)))
    diffusion = cached_property(lambda self: load_diffusion(self.profile))
    extractors = cached_property(lambda self: self.networks.extractors(self.profile))
    segmenter = cached_property(lambda self: self.networks.segmenter(self.profile))
    category_filter = cached_property(lambda self: self.networks.category_filter(self.profile))
    stuff_filter = cached_property(lambda self: lru_cache(1)(lambda bank: filter_stuff(bank, self.profile.filters)))
    matcher = cached_property(lambda self: self.networks.matcher(self.extractors, self.profile))
