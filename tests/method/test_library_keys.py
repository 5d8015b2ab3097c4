"""Every profile field against every key of the prototype library: what matters to a result changes its key, nothing else does.

What matters stands here field by field, written from the paper and the fields' comments, not from the code: a new field fails the test
until somebody has decided.
"""

import dataclasses
import shutil

import pytest

from ovdiff_lib.keys import for_words, made_from
from ovdiff_lib.library.codec import identify
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import field_names

VITS = {"dino", "mae", "clip-keys", "clip-tokens"}
EXTRACTORS = {"sd", *VITS}
BUILT = {"masks", *EXTRACTORS}  # what is made from a support set
ALL = {"support", *BUILT}
NOTHING: set = set()
SD, CLIP = {"sd"}, {"clip-keys", "clip-tokens"}

# With MaskCut as segmenter, whose network is DINO.
MATTERS = {
    "models.diffusion": ALL, "models.dino": BUILT, "models.clip": CLIP, "models.mae": {"mae"},
    **dict.fromkeys(("models.open_clip", "models.detector", "models.cutler", "models.sam", "models.grounding", "models.groupvit"), NOTHING),
    "models.dtype": ALL, **dict.fromkeys(("models.device", "models.download"), NOTHING),
    **dict.fromkeys(("support.prompt", "support.negative_prompt", "support.steps", "support.guidance_scale", "support.image_size",
                     "support.seed", "support.mid_block"), ALL),
    "support.size": BUILT, "support.batch_size": NOTHING,
    **dict.fromkeys(("masks.segmenter", "masks.threshold_classes", "masks.threshold_foreground", "masks.threshold_scope",
                     "masks.background_below", "masks.erosion", "masks.overlaps", "masks.fallback", "masks.fallback_foreground",
                     "masks.fallback_background", "masks.maskcut_rounds", "masks.maskcut_tau", "masks.maskcut_size",
                     "masks.maskcut_facet"), BUILT),
    "masks.resize": EXTRACTORS,
    **dict.fromkeys(("masks.detector_score", "masks.cutler_score", "masks.sam_points", "masks.sam_iou", "masks.sam_stability",
                     "masks.grounding_box", "masks.grounding_text"), NOTHING),
    "features.extractors": NOTHING, "features.batch_size": NOTHING,
    **dict.fromkeys(("features.sd_layers", "features.sd_timestep", "features.sd_input_size", "features.sd_latent", "features.sd_noise",
                     "features.sd_noise_samples", "features.seed"), SD),
    **dict.fromkeys(("features.clip_input_size", "features.clip_layer", "features.clip_normalisation"), CLIP),
    "features.dino_input_size": {"dino"}, "features.mae_input_size": {"mae"}, "features.vit_scale": VITS,
    **dict.fromkeys(("prototypes.kinds", "prototypes.clusters", "prototypes.background", "prototypes.seed"), EXTRACTORS),
}
SECTIONS_THAT_DO_NOT = ("filters", "matching", "evaluation", "baselines")  # they act on prototypes that are there

OTHER = {"masks.segmenter": "detector", "masks.threshold_scope": "set", "masks.overlaps": "attribution", "masks.fallback": "fixed",
         "masks.maskcut_facet": "queries", "masks.resize": "bilinear", "features.sd_latent": "sample",
         "features.sd_noise": "fixed", "features.clip_normalisation": "imagenet", "models.dtype": "bfloat16", "models.device": "auto",
         "features.extractors": ["dino"], "prototypes.kinds": ["class"], "matching.resample": "lanczos",
         "matching.refine": "pamr", "filters.category_crop": "centre", "filters.stuff_against": "all", "filters.category_logit_scale": 50.0,
         "matching.background_threshold": 0.5, "matching.minimum_score": 0.0, "evaluation.images": 3, "evaluation.extractors": ["mae"],
         "features.vit_scale": 1.5,
         "masks.background_below": 0.2, "filters.stuff_threshold": 0.5, "features.sd_layers": ["mid_block.attentions.0"]}
MODELS = ("diffusion", "clip", "dino", "mae", "open_clip", "detector", "cutler", "sam", "grounding", "groupvit")


@pytest.fixture(scope="module")
def profile():
    return load_profile("mini", {"masks.segmenter": "maskcut"})


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """A copy of a model's folder with one byte more in its configuration."""
    folder = tmp_path_factory.mktemp("weights")

    def copy(identifier):
        target = folder / identifier.replace(":", "_")
        if not target.exists():
            shutil.copytree(resolve_model(identifier), target)
            config = next(target.rglob("*.json"))
            config.write_text(config.read_text() + "\n")
        return str(target)

    return copy


def keys(profile):
    return {step: for_words(made_from(profile, step), "cat")[0] for step in ALL}


def changed(profile, field, other_weights):
    """The value of a field, replaced by another that it may have."""
    section, name = field.split(".")
    old = getattr(getattr(profile, section), name)
    if section == "models" and name in MODELS:
        return other_weights(old if old.startswith("package:") else profile.models.dino)
    by_kind = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old / 2, str: lambda: f"another {old}",
               list: lambda: [*old, old[-1]], type(None): lambda: 700,
               dict: lambda: {"sd": 0.125} if field.endswith("threshold") else {**old, "x": "mini-voc"}}
    new = OTHER[field] if field in OTHER else by_kind[type(old)]()
    assert new != old
    return new


@pytest.mark.parametrize("field", field_names())
def test_a_key_changes_with_what_matters_and_with_nothing_else(profile, field, other_weights):
    expected = NOTHING if field.split(".")[0] in SECTIONS_THAT_DO_NOT else MATTERS[field]
    before, after = keys(profile), keys(profile.override({field: changed(profile, field, other_weights)}))
    assert {step for step in ALL if before[step] != after[step]} == expected


def test_words_and_steps_matter_and_names_and_where_weights_lie_do_not(profile, tmp_path):
    assert set(MATTERS) <= set(field_names())
    assert len({for_words(made_from(profile, step), word)[0] for step in ALL for word in ("cat", "dog")}) == 2 * len(ALL)
    moved = shutil.copytree(resolve_model(profile.models.dino), tmp_path / "elsewhere")
    mine = dataclasses.replace(profile, name="mine", description="what I like").override({"models.dino": str(moved)})
    assert keys(mine) == keys(profile)


def test_a_key_is_the_hash_of_what_is_written_beside_the_entry(tiny_profile, tmp_path):
    ovdiff = OVDiff(tiny_profile, library=tmp_path, progress=False)
    ovdiff.build_class("cat")
    found = ovdiff.library.described()
    assert [entry.kind for entry, _ in found] == ["support", "masks", "prototypes"]
    for entry, described in found:
        assert identify(described["made_from"]) == entry.key and described["made_from"]["prompt"] == "cat"
    assert ovdiff.library.verify() == []
