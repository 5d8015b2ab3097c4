"""What a result depends on: words, settings, models, code. Library, shared networks, stored measurements ask here.

Code counts by the statements (:mod:`~ovdiff_lib.code`) of the modules that a step begins in (:data:`STEPS`) and of all
that they import of the package. Of a registry's many parts only the chosen one counts, by the module that defines it.
"""

import dataclasses
from typing import Any

from ovdiff_lib.categories import Category
from ovdiff_lib.code import NAME, code_digest, parsed
from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.library.codec import identify
from ovdiff_lib.library.own import OwnPictures
from ovdiff_lib.masks import COMMON_SETTINGS, SEGMENTERS
from ovdiff_lib.networks.identity import model_identity, resolve_model
from ovdiff_lib.profiles.schema import UNUSED_BY_THE_METHOD, Profile, of_extractor
from ovdiff_lib.registry import NOT_MODELS, Part, chosen_fields, chosen_part

STEPS = {"support": (f"{NAME}.support.sampler", f"{NAME}.networks.loading"), "masks": (f"{NAME}.masks.select",),
         "prototypes": (f"{NAME}.prototypes.build",), "pictures": (f"{NAME}.library.own",)}
"""The modules that a step begins in."""


def check_profile(profile: Profile) -> None:
    """Before any work, loading no model: ``ProfileError`` for a part that no registry has, a threshold that lacks an
    extractor, a background that nothing scores, ``ModelNotAvailable`` for a missing folder of a model that is used."""
    parts = [(chosen_part("features.extractors", name, EXTRACTORS), "features") for name in profile.features.extractors]
    parts += [(chosen_part("masks.segmenter", profile.masks.segmenter, SEGMENTERS), "masks")]
    thresholds = {"filters.stuff_threshold": profile.filters.stuff_threshold,
                  "matching.background_threshold": profile.matching.background_threshold}
    for field, value in thresholds.items():
        for name in value if isinstance(value, dict) else ():
            chosen_part(field, name, EXTRACTORS)
        for name in profile.features.extractors:
            of_extractor(field, value, name)
    if not profile.prototypes.background and profile.matching.background_threshold is None:
        raise ProfileError("prototypes.background is false and nothing else scores the background; set it to true, or "
                           "matching.background_threshold (0.72 in the paper).")
    models = {"clip": profile.models.clip} if profile.filters.category else {}
    for part, section in parts:
        models |= part.depends_on(profile, section)[0] if part.models else {}
    for source in filter(None, models.values()):  # of an empty field the part itself says what it is for
        resolve_model(source)


def for_words(table: dict[str, Any], words: Category | str) -> tuple[str, dict[str, Any]]:
    """The library's key for one category, and what it is the hash of: ``table`` of :func:`made_from` with the
    category's words. The masks of one's own pictures have the key of these."""
    category = Category.of(words)
    table = {**table, "prompt": category.prompt, **({"pictures": category.pictures} if category.pictures else {})}
    return category.pictures if category.pictures and table["step"] == "masks" else identify(table), table


def for_pictures(profile: Profile, own: OwnPictures) -> tuple[str, dict[str, Any]]:
    """The library's key for own pictures and masks of a category, and what it hashes: how masks are chosen, too."""
    table = {"step": "pictures", "prompt": own.category.prompt, "digest": own.digest(),
             "image_size": profile.support.image_size, "code": code_digest(*STEPS["pictures"])}
    if own.masks is None:
        judge = [_identity(profile.models.clip), profile.filters.category_prompt, profile.filters.category_crop]
        table |= {"segmenter": of_part(profile, "masks", profile.masks.segmenter), "judge": judge,
                  "dtype": profile.models.dtype}
    return identify(table), table


def made_from(profile: Profile, step: str, own: bool = False) -> dict[str, Any]:
    """What the result of a step ("support", "masks" or the name of an extractor, for its prototypes) is made from, but
    for the words: the settings that the step and those before it stand on, and the identity of the models and of the
    code that they run. Fields of parts that are not used do not count. Of one's ``own`` pictures it is what prototypes
    are made from, but for the pictures, whose key tells the rest."""
    models, code, settings = {}, {}, {}
    if own:
        settings["masks"] = {"resize": profile.masks.resize}
    else:
        models["diffusion"] = model_identity(profile.models.diffusion)
        code["support"], settings["support"] = code_digest(*STEPS["support"]), dataclasses.asdict(profile.support)
    if step == "support":
        settings["support"].pop("size")  # a support set grows; what it holds does not change
    elif not own:
        part = of_part(profile, "masks", profile.masks.segmenter)
        settings["masks"] = chosen_fields(dataclasses.asdict(profile.masks), COMMON_SETTINGS) | part["settings"]
        models |= part["models"]
        code |= {"masks": code_digest(*STEPS["masks"]), "segmenter": part["code"]}
    if step == "masks":
        settings["masks"].pop("resize")  # how they meet a feature grid is the prototypes' matter
    if step not in ("support", "masks"):
        part = of_part(profile, "features", step)
        settings |= {"prototypes": dataclasses.asdict(profile.prototypes), "features": part["settings"]}
        models |= part["models"]
        code |= {"prototypes": code_digest(*STEPS["prototypes"]), "extractor": part["code"]}
    settings = {section: _without_speed(table) for section, table in settings.items()}
    return {"step": step, "settings": settings, "models": {**models, "dtype": profile.models.dtype}, "code": code}


def of_part(profile: Profile, section: str, name: str) -> dict[str, Any]:
    """Models, settings and code behind the results of an extractor (``section`` "features") or segmenter ("masks")."""
    part = {"features": EXTRACTORS, "masks": SEGMENTERS}[section][name]
    models, settings = part.depends_on(profile, section)
    settings.pop("extractors", None)  # results do not depend on which others run
    return {"models": {field: _identity(value) for field, value in models.items()}, "settings": settings,
            "code": _code_of(part)}


def of_labels(profile: Profile, all_models: bool = False) -> dict[str, Any]:
    """What label maps of a profile depend on, as plain data; ``all_models``: a baseline's, which may load any."""
    table = {section: _without_speed(fields) for section, fields in profile.to_dict().items()
             if section not in (*UNUSED_BY_THE_METHOD, "models")}
    used = {"diffusion": _identity(profile.models.diffusion)}
    if profile.filters.category:
        used["clip"] = _identity(profile.models.clip)
    code = {"pipeline": code_digest(f"{NAME}.pipeline")}
    parts = [("features", name) for name in profile.features.extractors]
    for section, name in [*parts, ("masks", profile.masks.segmenter)]:
        part = of_part(profile, section, name)
        used |= part["models"]
        code[f"{section} {name}"] = part["code"]
    if all_models:
        used = {k: _identity(v) for k, v in dataclasses.asdict(profile.models).items()
                if k not in NOT_MODELS and isinstance(v, str) and v}
    return {"profile": table, "dtype": profile.models.dtype, "models": used, "code": code}


def _without_speed(table: dict[str, Any]) -> dict[str, Any]:
    """The table but for what changes how fast a result comes, not the result."""
    return {name: value for name, value in table.items() if name != "batch_size"}


def _identity(source: str) -> str:
    try:
        return model_identity(source)
    except (ModelNotAvailable, ValueError):  # what needs it will say so; the name of an architecture is no hub id
        return f"not here: {source}"


def _code_of(part: Part) -> str:
    if part.version is not None:
        return f"version:{part.version}"
    own = repr((getattr(part.build, "args", ()), getattr(part.build, "keywords", {})))  # of a functools.partial
    module, source = part.defined
    if module.partition(".")[0] == NAME:
        return code_digest(module, texts=(own,))
    try:
        text, imported = parsed(source)
    except SyntaxError:  # the lines of a lambda are no statement of their own
        text, imported = source, ()
    return code_digest(*imported, texts=(own, text))
