"""What can be known to be wrong with a profile before any work is done, and is no single field's affair.

Classes take long to build, so a mistake in a later step must not wait for its turn. The values of single fields were
judged when the profile was read (:mod:`~ovdiff_lib.profiles.schema`).
"""

from __future__ import annotations

from collections.abc import Callable

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.features import EXTRACTORS, check_extractors
from ovdiff_lib.masks import SEGMENTERS, check_segmenter
from ovdiff_lib.masks.select import check_masks
from ovdiff_lib.matching.matcher import BACKGROUND_REMEDY, check_matching
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.profiles.schema import Profile


def check_profile(profile: Profile) -> None:
    """``ProfileError`` for the first thing, in the order of the steps, that cannot work: a part that no registry has,
    settings that do not go together. ``ModelNotAvailable`` for a missing folder of a model that a later step loads.
    Loads no model."""
    for check in _checks(profile):
        check()
    parts = [("features", EXTRACTORS[name]) for name in profile.features.extractors]
    for section, part in [*parts, ("masks", SEGMENTERS[profile.masks.segmenter])]:
        for source in part.depends_on(profile, section)[0].values() if part.models else ():
            if source:  # an empty field has a sentence of its own
                resolve_model(source)
    if profile.filters.category:
        resolve_model(profile.models.clip)


def setting_problems(profile: Profile) -> list[str]:
    """The sentences of every ``ProfileError`` of :func:`check_profile` for this profile; models are not looked at."""
    problems = []
    for check in _checks(profile):
        try:
            check()
        except ProfileError as error:
            problems.append(str(error))
    return problems


def _checks(profile: Profile) -> list[Callable[[], None]]:
    return [lambda: check_extractors(profile), lambda: check_segmenter(profile), lambda: check_masks(profile.masks),
            lambda: check_matching(profile.matching), lambda: _check_background(profile)]


def _check_background(profile: Profile) -> None:
    if not profile.prototypes.background and profile.matching.background_threshold is None:
        raise ProfileError("prototypes.background is false and nothing else scores the background; "
                           f"{BACKGROUND_REMEDY}")
