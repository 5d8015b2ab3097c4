"""What can be known to be wrong before any work is done: values of a profile that cannot be, results that could not be written.

Classes take long to build, so a mistake in a later step must not wait for its turn. Each module judges its own settings; here is the
list of them.
"""

from __future__ import annotations

from collections.abc import Callable

from ovdiff_lib.errors import ProfileError
from ovdiff_lib.profiles.schema import Profile


def check_profile(profile: Profile) -> None:
    """``ProfileError`` for the first value, in the order of the method's steps, that no step could use; ``ModelNotAvailable`` for a
    missing folder of the category filter's CLIP, which is loaded last. No model is loaded."""
    for check in _checks(profile):
        check()


def setting_problems(profile: Profile) -> list[str]:
    """The sentences of every ``ProfileError`` that :func:`check_profile` has for this profile; models are not looked at."""
    problems = []
    for check in _checks(profile, models=False):
        try:
            check()
        except ProfileError as error:
            problems.append(str(error))
    return problems


def _checks(profile: Profile, models: bool = True) -> list[Callable[[], None]]:
    """One call for each step; steps that the profile leaves out are not judged."""
    from ovdiff_lib.features import check_extractors
    from ovdiff_lib.filters.category import check_category
    from ovdiff_lib.filters.stuff import check_stuff
    from ovdiff_lib.masks import check_segmenter
    from ovdiff_lib.masks.select import check_masks
    from ovdiff_lib.matching.matcher import check_background, check_matching
    from ovdiff_lib.networks.identity import resolve_model
    from ovdiff_lib.prototypes.build import check_prototypes, check_resize

    checks = [lambda: check_extractors(profile), lambda: check_segmenter(profile), lambda: check_masks(profile.masks),
              lambda: check_resize(profile.masks.resize), lambda: check_prototypes(profile.prototypes)]
    if profile.filters.stuff:
        checks.append(lambda: check_stuff(profile.filters))
    if profile.filters.category:
        checks.append(lambda: check_category(profile.filters))
    checks += [lambda: check_matching(profile.matching), lambda: check_background(profile)]
    if profile.filters.category and models:
        checks.append(lambda: resolve_model(profile.models.clip))
    return checks
