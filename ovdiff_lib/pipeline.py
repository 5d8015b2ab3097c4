"""OVDiff on one page: from class names to prototypes, from prototypes to a segmented image.

    names --support--> images + attribution --masks--> foreground / background --features, prototypes--> bank
    image --category filter, stuff filter--> kept prototypes --matching (Eq. 4)--> label map

Each step is one module; this page only connects them. A class is built from its own words and the profile alone, so adding a class
changes no other (Sec. 3.3), and a prediction depends on the image, the bank and the profile alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.images import read_image
from ovdiff_lib.library import Library
from ovdiff_lib.profiles import Profile, load_profile
from ovdiff_lib.types import Category, ForegroundBackground, PrototypeBank, Prototypes, Segmentation, SupportSet, Vocabulary

if TYPE_CHECKING:
    from ovdiff_lib.parts import Parts

# Fields that change how fast a result comes, not the result; they stay out of the library's keys.
SPEED_ONLY = {"batch_size"}


class OVDiff:
    """Training-free open-vocabulary segmentation.

    Args:
        profile: name of a profile ("mini", "paper"), path of a profile file, or a ``Profile``.
        overrides: profile fields to replace, for example ``{"support.size": 8}``; unknown ones raise ``ProfileError``.
        library: folder that keeps support sets and prototypes between runs (default: the user's cache folder).
        progress: show progress bars for long work.
        parts: networks shared with other objects (:class:`~ovdiff_lib.parts.Parts`), for measuring many settings; default: its own.

    Models are loaded when first needed. Raises ``ModelNotAvailable`` then when weights are not on this machine.
    """

    def __init__(self, profile: str | Path | Profile = "mini", overrides: dict[str, Any] | None = None, *,
                 library: str | Path | None = None, progress: bool = True, parts: Parts | None = None) -> None:
        self.profile = load_profile(profile, overrides)
        self.library = Library(library)
        self.progress = progress
        self._shared = parts
        self._parts: dict[str, Any] = {}

    def replaced(self, overrides: dict[str, Any]) -> OVDiff:
        """Another object with profile fields replaced and the same library, progress and shared networks."""
        return OVDiff(self.profile, overrides, library=self.library.root, progress=self.progress, parts=self._shared)

    # ------------------------------------------------------------------ the method

    def build(self, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] = ()) -> PrototypeBank:
        """Prototypes of every class (Sec. 3.1 to 3.3); classes built before come from the library.

        ``classes`` are names, categories, or one string "cat, sofa"; names also listed in ``stuff`` are treated as stuff regions.
        """
        vocabulary = Vocabulary.of(classes, stuff)
        self._check_parts()
        names = self.profile.features.extractors
        rows: dict[str, list[Prototypes]] = {name: [] for name in names}
        for category in tqdm(vocabulary, desc="building classes", unit="class", disable=not self.progress or len(vocabulary) == 1):
            for name, prototypes in self.build_class(category).items():
                rows[name].append(prototypes)
        return PrototypeBank(vocabulary, {name: tuple(built) for name, built in rows.items()})

    def segment(self, image: Any, classes: PrototypeBank | Vocabulary | Iterable[str | Category] | str) -> Segmentation:
        """Label every pixel of an image (a path, a PIL image or an array) with a class or background (Sec. 3.4, Eq. 4)."""
        from ovdiff_lib.filters.stuff import StuffFilter

        bank = classes if isinstance(classes, PrototypeBank) else self.build(classes)
        pixels = read_image(image)
        filters = self.profile.filters
        if filters.stuff:
            bank = self._part("stuff_filter", lambda: StuffFilter(filters))(bank)
        if filters.category:
            kept, probabilities = self.category_filter(pixels, bank.vocabulary)
        else:
            kept, probabilities = tuple(range(len(bank.vocabulary))), np.full(len(bank.vocabulary), np.nan, np.float32)
        matched = bank.restrict(kept)
        scores, winner = self.matcher.scores(pixels, matched)
        full = np.full((len(bank.vocabulary) + 1, *scores.shape[1:]), -np.inf, np.float32)
        full[[0, *(k + 1 for k in kept)]] = scores
        labels = full.argmax(0).astype(np.int32)
        return Segmentation(pixels, labels, full, winner, bank.vocabulary, tuple(kept), probabilities, matched)

    # ------------------------------------------------------------------ the steps of one class

    def support(self, category: Category | str) -> SupportSet:
        """Step 1: support images drawn for a category, with the attribution of its words (Sec. 3.1, 3.2)."""
        from ovdiff_lib.support.sampler import sample_support

        category = category if isinstance(category, Category) else Category(category)
        key, count = self._key("support", category), self.profile.support.size
        with self.library.lock(key):
            support = self.library.get_support(key)
            # Image i depends on its number, not on how many there are: a smaller set is the beginning of a larger one.
            have = 0 if support is None else len(support)
            if have < max(count, 1) or count < 1:
                missing = count - have if count > 0 else count  # a size below one is the sampler's to refuse
                drawn = sample_support(self.diffusion, category, self.profile, missing, progress=self.progress, start=have)
                support = drawn if support is None else support.joined(drawn)
                self.library.put_support(key, support, replace=True)
        # The library knows the words, not what this user calls them.
        return dataclasses.replace(support.take(range(count)), category=category)

    def masks(self, support: SupportSet) -> ForegroundBackground:
        """Step 2a: where the object is and is not in each support image (Sec. 3.2, Eq. 1)."""
        from ovdiff_lib.masks.select import make_masks

        make = functools.partial(make_masks, support, self.profile, self.segmenter)
        return self._shared.masks(support, self.profile, make) if self._shared else make()

    def prototypes(self, support: SupportSet, masks: ForegroundBackground) -> dict[str, Prototypes]:
        """Steps 2b, 2c: features of the support images and their prototypes (Eq. 2, 3), one entry an extractor."""
        return {name: self._prototypes(extractor, support, masks) for name, extractor in self.extractors.items()}

    def _prototypes(self, extractor, support: SupportSet, masks: ForegroundBackground) -> Prototypes:
        from ovdiff_lib.prototypes import build_prototypes

        features = extractor(support.images, support.seeds)
        return build_prototypes(features, masks, self.profile.prototypes, self.profile.masks.resize)

    def build_class(self, category: Category | str) -> dict[str, Prototypes]:
        """Steps 1 and 2 for one category; whatever the library holds already is taken from there."""
        category = category if isinstance(category, Category) else Category(category)
        names = self.profile.features.extractors
        self._check_parts()
        keys = {name: self._key(name, category) for name in names}
        found = {name: self.library.get_prototypes(key) for name, key in keys.items()}
        if any(prototypes is None for prototypes in found.values()):
            support = self.support(category)
            masks = self.masks(support)
            for name, extractor in self.extractors.items():
                with self.library.lock(keys[name]):
                    found[name] = self.library.get_prototypes(keys[name])  # another process may have built it meanwhile
                    if found[name] is None:
                        found[name] = self._prototypes(extractor, support, masks)
                        self.library.put_prototypes(keys[name], found[name])
        return found

    # ------------------------------------------------------------------ the parts, loaded when first used

    @property
    def diffusion(self):
        """The text-to-image pipeline."""
        return self._part("diffusion", lambda: _models().load_diffusion(self.profile))

    @property
    def extractors(self) -> dict[str, Any]:
        """The feature extractors of the profile, by name."""
        return self._part("extractors", self._load_extractors)

    @property
    def segmenter(self):
        """The segmenter Gamma of the profile."""
        from ovdiff_lib.masks import build_segmenter

        load = self._shared.segmenter if self._shared else build_segmenter
        return self._part("segmenter", lambda: load(self.profile))

    @property
    def category_filter(self):
        """The CLIP category pre-filter."""
        if self._shared:
            return self._part("category_filter", lambda: self._shared.category_filter(self.profile, self._load_filter))
        return self._part("category_filter", self._load_filter)

    @property
    def matcher(self):
        """Windows, cosine similarity and Eq. 4."""
        from ovdiff_lib.matching import Matcher

        return self._part("matcher", lambda: Matcher(self.extractors, self.profile))

    def _part(self, name: str, load):
        if name not in self._parts:
            self._parts[name] = load()
        return self._parts[name]

    def _load_extractors(self) -> dict[str, Any]:
        from ovdiff_lib.features import build_extractors

        return (self._shared.extractors if self._shared else build_extractors)(self.profile)

    def _check_parts(self) -> None:
        """``ProfileError`` or ``ModelNotAvailable`` for settings that a later step could not use, before any work is done."""
        from ovdiff_lib.checks import check_profile

        check_profile(self.profile)

    def _load_filter(self):
        from ovdiff_lib.filters.category import CategoryFilter

        return CategoryFilter(*_models().load_clip(self.profile), self.profile)

    def _key(self, step: str, category: Category) -> str:
        """Library key: hash of the category's words, the settings the step stands on, and the identity of the models and of the added
        parts (:attr:`~ovdiff_lib.registry.Part.code`) it runs.

        ``step`` is "support" or the name of an extractor. Fields of parts that are not used do not count.
        """
        from ovdiff_lib.features import EXTRACTORS
        from ovdiff_lib.masks import COMMON_SETTINGS, SEGMENTERS
        from ovdiff_lib.registry import Part

        profile = self.profile
        models, settings = {"diffusion": profile.models.diffusion}, {"support": dataclasses.asdict(profile.support)}
        code = {}
        if step == "support":
            settings["support"].pop("size")  # a support set grows; what it holds does not change
        else:
            settings["prototypes"] = dataclasses.asdict(profile.prototypes)
            settings["masks"] = Part(None, (), COMMON_SETTINGS).depends_on(profile, "masks")[1]
            for section, part in (("masks", SEGMENTERS[profile.masks.segmenter]), ("features", EXTRACTORS[step])):
                loaded, own = part.depends_on(profile, section)
                models |= loaded
                code |= {section: part.code} if part.code else {}
                settings[section] = {**settings.get(section, {}), **own}
            settings["features"].pop("extractors", None)  # an extractor's prototypes do not depend on which others run
        settings = {section: {k: v for k, v in table.items() if k not in SPEED_ONLY} for section, table in settings.items()}
        identities = {name: _models().model_identity(source) for name, source in models.items()} | {"dtype": profile.models.dtype}
        table = {"step": step, "prompt": category.prompt, "settings": settings, "models": identities}
        text = json.dumps(table | ({"code": code} if code else {}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _models():
    from ovdiff_lib import models  # torch and diffusers are imported only when a model is needed

    return models
