"""OVDiff on one page: from class names to prototypes, from prototypes to a segmented image.

    names --support--> images + attribution --masks--> foreground / background --features, prototypes--> bank
    image --category filter, stuff filter--> kept prototypes --matching (Eq. 4)--> label map

Each step is one module; this page only connects them. A class is built from its own words and the profile alone, so adding a class
changes no other (Sec. 3.3), and a prediction depends on the image, the bank and the profile alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.images import read_image
from ovdiff_lib.library.codec import identify
from ovdiff_lib.library.store import Library
from ovdiff_lib.networks.identity import model_identity
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import ForegroundBackground, PrototypeBank, Prototypes, SupportSet

if TYPE_CHECKING:
    from ovdiff_lib.workbench.evaluation.shared import Parts

# Fields that change how fast a result comes, not the result; they stay out of the library's keys.
SPEED_ONLY = {"batch_size"}


class OVDiff:
    """Training-free open-vocabulary segmentation.

    Args:
        profile: name of a profile ("mini", "paper"), path of a profile file, or a ``Profile``.
        overrides: profile fields to replace, for example ``{"support.size": 8}``; unknown ones raise ``ProfileError``.
        library: folder that keeps support sets and prototypes between runs (default: the user's cache folder).
        progress: show progress bars for long work.
        parts: networks shared with other objects (:class:`~ovdiff_lib.workbench.evaluation.shared.Parts`), for measuring many settings; default: its own.

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
        made_from = self._made_from_all()
        rows: dict[str, list[Prototypes]] = {name: [] for name in self.profile.features.extractors}
        for category in tqdm(vocabulary, desc="building classes", unit="class", disable=not self.progress or len(vocabulary) == 1):
            for name, prototypes in self._build_class(category, made_from).items():
                rows[name].append(prototypes)
        return PrototypeBank(vocabulary, {name: tuple(built) for name, built in rows.items()})

    def segment(self, image: Any, classes: PrototypeBank | Vocabulary | Iterable[str | Category] | str) -> Segmentation:
        """Label every pixel of an image (a path, a PIL image or an array) with a class or background (Sec. 3.4, Eq. 4)."""
        return next(self.segment_many([image], classes))

    def segment_many(self, images: Iterable[Any], classes: PrototypeBank | Vocabulary | Iterable[str | Category] | str,
                     together: int = 8) -> Iterator[Segmentation]:
        """:meth:`segment` of each image, in order, ``together`` of them at a time: their windows share the networks' batches.

        Images are read as they are needed. The results are those of one image after the other, up to rounding.
        """
        from ovdiff_lib.filters.stuff import StuffFilter

        bank = classes if isinstance(classes, PrototypeBank) else self.build(classes)
        filters = self.profile.filters
        if filters.stuff:
            bank = self._part("stuff_filter", lambda: StuffFilter(filters))(bank)
        everything = tuple(range(len(bank.vocabulary)))
        waiting = iter(images)
        while chosen := [read_image(image) for image in itertools.islice(waiting, max(1, together))]:
            if filters.category:
                found = [self.category_filter(pixels, bank.vocabulary) for pixels in chosen]
            else:
                found = [(everything, np.full(len(everything), np.nan, np.float32)) for _ in chosen]
            matched = [bank if kept == everything else bank.restrict(kept) for kept, _ in found]
            scored = self.matcher.scores_many(list(zip(chosen, matched, strict=True)))
            for pixels, (kept, probabilities), own, (scores, winner) in zip(chosen, found, matched, scored, strict=True):
                labels = np.array([0, *(k + 1 for k in kept)], np.int32)[scores.argmax(0)]
                yield Segmentation(pixels, labels, scores, winner, bank.vocabulary, tuple(kept), probabilities, own)

    # ------------------------------------------------------------------ the steps of one class

    def support(self, category: Category | str) -> SupportSet:
        """Step 1: support images drawn for a category, with the attribution of its words (Sec. 3.1, 3.2)."""
        from ovdiff_lib.support.sampler import sample_support

        category = category if isinstance(category, Category) else Category(category)
        made_from, count = self._made_from("support", category), self.profile.support.size
        key = identify(made_from)
        with self.library.lock(key):
            support = self.library.get_support(key)
            # Image i depends on its number, not on how many there are: a smaller set is the beginning of a larger one.
            have = 0 if support is None else len(support)
            if have < count:
                drawn = sample_support(self.diffusion, category, self.profile, count - have, progress=self.progress, start=have)
                support = drawn if support is None else support.joined(drawn)
                self.library.put_support(key, support, made_from=made_from, replace=True)
        # The library knows the words, not what this user calls them.
        return dataclasses.replace(support.take(range(count)), category=category)

    def masks(self, support: SupportSet) -> ForegroundBackground:
        """Step 2a: where the object is and is not in each support image (Sec. 3.2, Eq. 1)."""
        from ovdiff_lib.masks.select import make_masks

        make = functools.partial(make_masks, support, self.profile, self.segmenter)
        return self._shared.masks(support, self.profile, make) if self._shared else make()

    def masks_of(self, category: Category | str) -> ForegroundBackground:
        """:meth:`masks` of a category's support set, from the library if they are there."""
        category = category if isinstance(category, Category) else Category(category)
        return self._masks_of(self._made_from("masks", category), lambda: self.support(category))

    def _masks_of(self, made_from: dict[str, Any], support: Callable[[], SupportSet]) -> ForegroundBackground:
        key = identify(made_from)
        if (found := self.library.get_masks(key)) is None:
            with self.library.lock(key):
                found = self.library.get_masks(key)  # another process may have made them meanwhile
                if found is None:
                    found = self.masks(support())
                    self.library.put_masks(key, found, made_from=made_from)
        return found

    def prototypes(self, support: SupportSet, masks: ForegroundBackground) -> dict[str, Prototypes]:
        """Steps 2b, 2c: features of the support images and their prototypes (Eq. 2, 3), one entry an extractor."""
        return {name: self._prototypes(extractor, support, masks) for name, extractor in self.extractors.items()}

    def _prototypes(self, extractor, support: SupportSet, masks: ForegroundBackground) -> Prototypes:
        from ovdiff_lib.networks.instruments import undisturbed
        from ovdiff_lib.prototypes.build import build_prototypes

        with undisturbed():  # an extractor of the user's own may not see to it
            features = extractor(support.images, support.seeds)
        return build_prototypes(features, masks, self.profile.prototypes, self.profile.masks.resize)

    def build_class(self, category: Category | str) -> dict[str, Prototypes]:
        """Steps 1 and 2 for one category; whatever the library holds already is taken from there."""
        category = category if isinstance(category, Category) else Category(category)
        self._check_parts()
        return self._build_class(category, self._made_from_all())

    def _build_class(self, category: Category, tables: dict[str, dict[str, Any]]) -> dict[str, Prototypes]:
        tables = {step: {**table, "prompt": category.prompt} for step, table in tables.items()}
        keys = {name: identify(tables[name]) for name in self.profile.features.extractors}
        found = {name: self.library.get_prototypes(key) for name, key in keys.items()}
        if any(prototypes is None for prototypes in found.values()):
            support = self.support(category)
            masks = self._masks_of(tables["masks"], lambda: support)
            for name, extractor in self.extractors.items():
                with self.library.lock(keys[name]):
                    found[name] = self.library.get_prototypes(keys[name])  # another process may have built it meanwhile
                    if found[name] is None:
                        found[name] = self._prototypes(extractor, support, masks)
                        self.library.put_prototypes(keys[name], found[name], made_from=tables[name])
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
        from ovdiff_lib.matching.matcher import Matcher

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
        """Library key of a step for one category."""
        return identify(self._made_from(step, category))

    def _made_from_all(self) -> dict[str, dict[str, Any]]:
        """:meth:`_made_from` of the masks and of every extractor, words left out: what all classes of a build have in common."""
        return {step: self._made_from(step) for step in ("masks", *self.profile.features.extractors)}

    def _made_from(self, step: str, category: Category | None = None) -> dict[str, Any]:
        """What a step's result is made from: the category's words, the settings the step stands on, and the identity of the models and of
        the added parts (:attr:`~ovdiff_lib.registry.Part.code`) it runs. Its hash is the library's key.

        ``step`` is "support", "masks" or the name of an extractor. Fields of parts that are not used do not count.
        """
        from ovdiff_lib.features import EXTRACTORS
        from ovdiff_lib.masks import COMMON_SETTINGS, SEGMENTERS
        from ovdiff_lib.registry import Part

        profile = self.profile
        models, settings = {"diffusion": profile.models.diffusion}, {"support": dataclasses.asdict(profile.support)}
        code, parts = {}, []
        if step == "support":
            settings["support"].pop("size")  # a support set grows; what it holds does not change
        else:
            settings["masks"] = Part(None, (), COMMON_SETTINGS).depends_on(profile, "masks")[1]
            parts.append(("masks", SEGMENTERS[profile.masks.segmenter]))
        if step == "masks":
            settings["masks"].pop("resize")  # how they meet a feature grid is the prototypes' matter
        if step not in ("support", "masks"):
            settings["prototypes"] = dataclasses.asdict(profile.prototypes)
            parts.append(("features", EXTRACTORS[step]))
        for section, part in parts:
            loaded, own = part.depends_on(profile, section)
            models |= loaded
            code |= {section: part.code} if part.code else {}
            settings[section] = {**settings.get(section, {}), **own}
        settings.get("features", {}).pop("extractors", None)  # an extractor's prototypes do not depend on which others run
        settings = {section: {k: v for k, v in table.items() if k not in SPEED_ONLY} for section, table in settings.items()}
        identities = {name: model_identity(source) for name, source in models.items()} | {"dtype": profile.models.dtype}
        table = {"step": step, "prompt": category.prompt if category else "", "settings": settings, "models": identities}
        return table | ({"code": code} if code else {})


def _models():
    from ovdiff_lib.networks import loading as models  # torch and diffusers are imported only when a model is needed

    return models
