"""Every profile field, and the code, against every key of the library: what matters to a result changes its key, nothing else does.

What matters stands here field by field, written from the paper and the fields' comments, not from the code: a new field fails the test
until somebody has decided. An edited step makes its results anew, and those below it, and no others.
"""

import dataclasses
import importlib
import shutil
import sys
from pathlib import Path

import pytest

from ovdiff_lib import OVDiff, code, keys
from ovdiff_lib.library.codec import identify
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.profiles.schema import UNUSED_BY_THE_METHOD, field_names
from ovdiff_lib.workbench.evaluation.results import code_digest

NOTHING, SD, CLIP = set(), {"sd"}, {"clip-keys", "clip-tokens"}
OPEN_CLIP = {"open-clip-keys"}
CLIPS = {*CLIP, *OPEN_CLIP}
VITS = {*CLIPS, "dino", "mae"}
EXTRACTORS = {*SD, *VITS}
BUILT = {"masks", *EXTRACTORS}  # what is made from a support set
ALL = {"support", *BUILT}

# With MaskCut as segmenter, whose network is DINO.
MATTERS = {
    "models.diffusion": ALL, "models.dino": BUILT, "models.clip": CLIP, "models.mae": {"mae"}, "models.open_clip": OPEN_CLIP,
    **dict.fromkeys(("models.detector", "models.cutler", "models.sam", "models.grounding", "models.groupvit"), NOTHING),
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
    **dict.fromkeys(("features.clip_input_size", "features.clip_layer", "features.clip_normalisation"), CLIPS),
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
         "features.vit_scale": 1.5, "masks.background_below": 0.2, "filters.stuff_threshold": 0.5,
         "features.sd_layers": ["mid_block.attentions.0"], "baselines.constants": {"reco": {"voc": 0.5}},
         **{field: ["imagenet"] for field in field_names() if field.endswith("_templates")}}
FOR_LABELS = {"diffusion", "dino", "clip", "dtype"}  # of the models, with the extractors of the mini profile and MaskCut
MODELS = ("diffusion", "clip", "dino", "mae", "open_clip", "detector", "cutler", "sam", "grounding", "groupvit")


@pytest.fixture(scope="module")
def profile():
    """With MaskCut as segmenter, whose network is DINO."""
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


def keys_of(profile):
    return {step: keys.for_words(keys.made_from(profile, step), "cat")[0] for step in ALL}


def another(profile, field, other_weights):
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
    other = profile.override({field: another(profile, field, other_weights)})
    before, after = keys_of(profile), keys_of(other)
    assert {step for step in ALL if before[step] != after[step]} == expected
    # What a run is measured on and compared with is not part of the method; label maps depend on all but that and speed.
    section, name = field.split(".")
    assert (other.digest() == profile.digest()) == (section in UNUSED_BY_THE_METHOD)
    same = section in UNUSED_BY_THE_METHOD or name == "batch_size" or (section == "models" and name not in FOR_LABELS)
    assert (keys.of_labels(other) == keys.of_labels(profile)) == same


def test_words_and_steps_matter_and_names_and_where_weights_lie_do_not(profile, tmp_path):
    assert set(MATTERS) <= set(field_names())
    assert len({keys.for_words(keys.made_from(profile, step), word)[0] for step in ALL for word in ("cat", "dog")}) == 2 * len(ALL)
    moved = shutil.copytree(resolve_model(profile.models.dino), tmp_path / "elsewhere")
    mine = dataclasses.replace(profile, name="mine", description="what I like").override({"models.dino": str(moved)})
    assert keys_of(mine) == keys_of(profile) and mine.digest() != profile.digest()  # which names the folder


def test_a_key_is_the_hash_of_what_is_written_beside_the_entry(tiny_profile, tmp_path):
    ovdiff = OVDiff(tiny_profile, library=tmp_path, progress=False)
    ovdiff.build_class("cat")
    found = ovdiff.library.described()
    assert [entry.kind for entry, _ in found] == ["support", "masks", "prototypes"]
    for entry, described in found:
        assert identify(described["made_from"]) == entry.key and described["made_from"]["prompt"] == "cat"
    assert ovdiff.library.verify() == []


# ---- the code

@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the package whose code the keys are of, to be edited."""
    folder = tmp_path / "ovdiff_lib"
    shutil.copytree(code.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "weights", "*.webp", "*.png", "*.npz"))
    monkeypatch.setattr(code, "PACKAGE", folder)
    return folder


def edit(path: Path, text: str = "\nEDITED = 1\n") -> None:
    path.write_text(path.read_text() + text)


def changed(profile, do) -> set[str]:
    """The steps whose keys ``do`` changes."""
    before = {step: keys.made_from(profile, step) for step in ALL}
    do()
    return {step for step in ALL if keys.made_from(profile, step) != before[step]}


CHANGES = {  # written from what each module does, not from what it imports
    "support/sampler.py": ALL, "support/attribution.py": ALL, "networks/instruments.py": ALL, "networks/loading.py": ALL,
    "masks/select.py": BUILT, "masks/threshold.py": BUILT, "masks/segmenters/maskcut.py": BUILT, "masks/segmenters/refine.py": BUILT,
    "prototypes/build.py": EXTRACTORS, "prototypes/kmeans.py": EXTRACTORS,
    "features/diffusion.py": SD, "features/vit.py": VITS, "features/open_clip.py": {"open-clip-keys"},
    **dict.fromkeys(("masks/segmenters/detector.py", "masks/segmenters/sam.py", "features/__init__.py", "pipeline.py",
                     "filters/category.py", "matching/matcher.py", "explain.py", "errors.py", "profiles/schema.py",
                     "library/store.py", "cli/main.py"), NOTHING)}


def test_an_edited_module_changes_the_keys_of_its_step_and_of_those_below(copy, profile):
    found = {}
    for name in CHANGES:
        text = (copy / name).read_text()
        found[name] = changed(profile, lambda name=name: edit(copy / name))
        (copy / name).write_text(text)
    assert found == CHANGES


def test_statements_count_and_comments_docstrings_and_layout_do_not(copy, profile):
    path = copy / "masks" / "select.py"
    text = path.read_text()

    def becomes(edited: str) -> set[str]:
        path.write_text(text)
        assert edited != text
        return changed(profile, lambda: path.write_text(edited))

    assert becomes("# why\n" + text.replace('"""Eq. 1', '"""Says more. Eq. 1').replace("    if bare:", "    if (\n\n    bare):")) == NOTHING
    assert becomes(text.replace("mean.argmax()", "mean.argmin()")) == BUILT
    assert becomes(text.replace("\nimport numpy as np\n", "\nimport cupy as np\n")) == BUILT


def test_what_a_line_of_the_registry_says_counts_for_its_entry(profile):
    """Two parts of one class are told apart by what the registry builds them with."""
    code = {name: keys.of_part(profile, "features", name)["code"] for name in CLIP}
    assert len(set(code.values())) == 2


def test_masks_are_made_anew_after_an_edit_and_drawings_are_not(copy, tiny_profile, tmp_path):
    def build() -> list[str]:
        ovdiff = OVDiff(tiny_profile, library=tmp_path / "library", progress=False)
        ovdiff.build_class("cat")
        return [entry.kind for entry in ovdiff.library.entries()]

    assert build() == ["support", "masks", "prototypes"]
    edit(copy / "masks" / "select.py")
    assert build() == ["support", "masks", "masks", "prototypes", "prototypes"]
    edit(copy / "prototypes" / "kmeans.py")
    assert build() == ["support", "masks", "masks", "prototypes", "prototypes", "prototypes"]


def test_a_count_depends_on_all_that_can_change_a_label_and_on_nothing_else(copy, profile):
    def state():
        return code_digest(), keys.of_labels(profile)

    expected = {
        **dict.fromkeys(("matching/pamr.py", "filters/stuff.py", "masks/segmenters/maskcut.py", "features/diffusion.py",
                         "workbench/baselines/reco.py", "workbench/evaluation/measure.py", "workbench/data/metrics.py",
                         "workbench/data/things_c8.csv"), True),
        **dict.fromkeys(("masks/segmenters/sam.py", "features/open_clip.py", "features/__init__.py", "workbench/figures/charts.py",
                         "workbench/tables/claims.py", "cli/main.py", "recipes/art.py"), False)}
    found = {}
    for name in expected:
        before = state()
        edit(copy / name)
        found[name] = state() != before
    assert found == expected


def test_what_runs_is_what_was_loaded(tmp_path, monkeypatch):
    """A file that is written while the process runs is not its code, until it is loaded again."""
    path = tmp_path / "loaded_once.py"
    path.write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("loaded_once")
    assert code._text("loaded_once", path) == "X = 1\n"
    path.write_text("X = 22\n")
    assert code._text("loaded_once", path) == "X = 1\n"
    importlib.reload(module)
    assert code._text("loaded_once", path) == "X = 22\n" and module.X == 22
    sys.modules.pop("loaded_once")
