"""Profiles: values only, typed, validated, no line of code that asks which one it runs; the paper's and the released code's choices."""

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml
from sentences import refused

import ovdiff_lib
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.profiles.reading import FOLDER, available, load_profile
from ovdiff_lib.profiles.schema import Profile, field_names, from_dict
from ovdiff_lib.workbench.console import parse_assignments

PACKAGE = Path(ovdiff_lib.__file__).parent


def refuse(*told: str, make, error=ProfileError) -> None:
    with refused(error, *told):
        make()


def test_the_shipped_profiles_differ_in_values_not_in_fields():
    assert {"mini", "paper", "official"} <= set(available())
    tables = {}
    for name in available():
        profile = load_profile(name)
        assert isinstance(profile, Profile) and profile.name == name and profile.description
        written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        for table, all_of_them in ((profile.to_dict(), True), (written, False)):
            fields = {f"{s}.{f}" for s, fields in table.items() if isinstance(fields, dict) for f in fields}
            assert fields <= set(field_names()) and (fields == set(field_names()) or not all_of_them)
        assert profile == from_dict(written, "a table")  # read as YAML reads it
        tables[name] = profile.to_dict()
    assert tables["mini"]["support"] != tables["paper"]["support"]


def test_no_code_branches_on_a_profiles_name():
    """No comparison, ``in``, ``match`` or look-up table by the name of a profile anywhere in the package."""
    names, offences = set(available()), []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tested = []
            if isinstance(node, ast.Compare):
                tested = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                tested = [node.value]
            elif isinstance(node, ast.Dict):
                tested = [key for key in node.keys if key is not None]
            elif isinstance(node, ast.Subscript):
                tested = [node.slice]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith", "get"):
                tested = node.args
            for part in tested:
                constants = {n.value for n in ast.walk(part) if isinstance(n, ast.Constant)}
                named = any(isinstance(n, ast.Attribute) and n.attr == "name" and "profile" in ast.unparse(n.value) for n in ast.walk(part))
                if constants & names or named:
                    offences.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not offences


@pytest.mark.parametrize("source", ["min", "", "official2", "nowhere.yaml", "mini.yaml.bak", "../profiles/mini"])
def test_unknown_profiles_are_named(source):
    refuse(source, "mini", make=lambda: load_profile(source))


@pytest.mark.parametrize("key, word", [
    ("support.sise", "Did you mean 'support.size'?"), ("suport.size", "Did you mean 'support'?"), ("support.size.x", "support.size"),
    ("support", "support.size"), *((key, "models, support, masks") for key in (".size", "size", "name", "", 3))])
def test_unknown_fields_get_the_legal_ones(key, word):
    refuse(repr(str(key)), word, make=lambda: load_profile("mini", {key: 8}))


WORDS = {  # every field of a few words, as the steps' docstrings tell them
    "models.dtype": "float32 float16 bfloat16", "masks.threshold_scope": "image set", "masks.overlaps": "keep attribution",
    "masks.fallback": "otsu fixed", "masks.maskcut_facet": "keys queries values",
    "masks.resize": "area bilinear", "features.sd_latent": "mean sample", "features.sd_noise": "seeded fixed",
    "features.clip_normalisation": "clip imagenet", "filters.category_crop": "squash centre", "filters.stuff_against": "stuff all",
    "matching.resample": "bilinear lanczos", "matching.refine": "none pamr"}
NAN, INFINITY, SEED = float("nan"), float("inf"), 2**63
COUNTS = [1], [0, -1, True, 8.0, "8", None, [8]]
SEEDS = [0, SEED - 1], [-1, SEED, 2**70]
SHARES = [0, 1, 0.5], [-0.1, 1.5, "0.5", NAN]
FLAGS = [True, False], [1, "yes", None]
VALUES = {  # field: legal values, and others
    **{key: (words.split(), [words.split()[0].upper(), f"{words.split()[0]}x", "?", None]) for key, words in WORDS.items()},
    **dict.fromkeys(("support.size", "support.steps", "support.batch_size", "features.batch_size", "matching.batch_size",
                     "masks.sam_points", "masks.maskcut_rounds", "features.sd_noise_samples",
                     "features.dino_input_size", "matching.pamr_iterations", "baselines.reco_retrieved"), COUNTS),
    **dict.fromkeys(("prototypes.seed", "features.seed", "support.seed"), SEEDS),
    **dict.fromkeys((f"masks.{name}" for name in ("detector_score", "cutler_score", "sam_iou", "sam_stability", "grounding_box",
                                                  "grounding_text", "fallback_foreground")), SHARES),
    **dict.fromkeys(("filters.category", "support.mid_block", "models.download"), FLAGS),
    "prototypes.clusters": ([1, 16383], [0, -3, 16384, 40000]),  # 16 bits hold those of both regions
    "evaluation.seeds": ([[], [0, SEED - 1]], [[0, -1], [3, SEED]]),
    "masks.erosion": ([0], [-1]), "masks.background_below": ([0.001, 1, 2.5], [0, 0.0, -1.0]),
    "masks.threshold_classes": ([2, 5], [1, 6]), "masks.maskcut_tau": ([0, 0.5], [1, -1.0]),
    "support.guidance_scale": ([5, 0.5], [False, "5", None, NAN, INFINITY]), "support.prompt": (["{name}"], [3, None]),
    "features.sd_timestep": ([0], [-1]), "features.vit_scale": ([0.5, 16], [0, 17]),
    "features.extractors": ([["sd"]], [[], ["sd", "sd"], "sd", ["sd", 1], None]),
    "prototypes.kinds": ([["part"]], [["parts"], ["class", "class"], []]),
    "filters.category_logit_scale": ([None, 1e-6, 100], [0, -1.0, True]), "filters.category_top": ([1, 16], [0, 17]),
    "filters.category_prompt": (["{names}!"], ["a {name}", ""]),
    "filters.stuff_threshold": ([-1, 1, 0.5, {"sd": 0.5, "dino": 1}], [7, 1.01, None, "0.5", [0.5], {"sd": 2}, {"sd": None}, {3: 0.5}]),
    "matching.background_threshold": ([None, 2, {"sd": 0.5}], ["0.5", True, NAN, {"sd": None}]),
    "matching.long_side": ([None, 64], [0, -5, 63]), "matching.windows": ([[3], [64, 48]], [[0], [3, -1], [64, True], [64, 4.5], [65]]),
    "matching.pamr_dilations": ([[1]], [[], [1, 0]]), "baselines.clip_diy_seed_cosine": ([0.5], [0, 0.6]),
    "baselines.reco_templates": ([["{name}"], ["imagenet", "a {name}."]], [
        [], ["a photo of a {}"], ["a {name} in {place}"], ["{name} and {name}"], "a {name}", ["imagenets"], ["a {name}"] * 2]),
    "baselines.constants": ([{}, {"groupvit": {"voc": 0.95}}], [{"vit": {}}, {"groupvit": 3}, {"groupvit": {"voc": None}}]),
    "evaluation.images": ([None, 1], [0]), "evaluation.without_background": ([{}, {"VOC": "voc"}], [{"VOC": 3}, {3: "voc"}])}


@pytest.mark.parametrize("key", VALUES)
def test_other_values_are_refused_by_name(tmp_path, key):
    section, name = key.split(".")
    plain = load_profile("mini", {"matching.stride": 1, "masks.threshold_foreground": 1})
    legal, wrong = VALUES[key]
    for value in legal:
        assert getattr(getattr(plain.override({key: value}), section), name) == value
    for value in wrong:
        refuse(key, *map(repr, WORDS.get(key, "").split()), make=lambda value=value: plain.override({key: value}))
    table, path = plain.to_dict(), tmp_path / "own.yaml"
    table[section][name] = wrong[0]
    path.write_text(yaml.safe_dump(table))
    refuse(f"own.yaml, {key}", make=lambda: load_profile(path))


@pytest.mark.parametrize("overrides, word", [
    ({"matching.stride": 49}, "matching.stride"), ({"matching.windows": []}, "matching.windows"),
    ({"masks.threshold_foreground": 4}, "masks.threshold_foreground"),
    ({"masks.fallback": "fixed", "masks.fallback_background": 0.6}, "masks.fallback_background")])
def test_fields_that_do_not_go_together(overrides, word):
    refuse(f"{word} is {list(overrides.values())[-1]}", make=lambda: load_profile("mini", overrides))


def test_overrides_replace_and_leave_the_original_alone():
    mini = load_profile("mini")
    changed = load_profile(mini, {"support.size": 3, "support.guidance_scale": 7, "matching.background_threshold": 0.5,
                                  "matching.windows": (64, 32)})
    assert (changed.support.size, changed.support.guidance_scale) == (3, 7.0) and isinstance(changed.support.guidance_scale, float)
    assert changed.matching.background_threshold == 0.5 and changed.matching.windows == [64, 32]
    assert mini == load_profile("mini") and mini.support.size != 3
    assert changed.masks == mini.masks and changed.name == mini.name
    assert changed.override({"matching.background_threshold": None}).matching.background_threshold is None
    assert load_profile(mini) == mini and load_profile("mini", {}) == mini


def test_the_digest_knows_values_and_no_names():
    mini = load_profile("mini")
    assert mini.digest() == load_profile("mini").digest() != load_profile("paper").digest() and len(mini.digest()) == 16
    assert dataclasses.replace(mini, name="other", description="renamed").digest() == mini.digest()


def test_a_profile_survives_a_file_which_may_leave_out_what_has_a_default(tmp_path):
    profile = load_profile("paper", {"support.prompt": "ein Bild: „{name}“", "filters.category_logit_scale": None})
    path = tmp_path / "own.yml"
    path.write_text(yaml.safe_dump(profile.to_dict(), allow_unicode=True), encoding="utf-8")
    assert load_profile(path) == profile == load_profile(str(path)) == from_dict(profile.to_dict(), "a table")
    assert load_profile(path, {"support.size": 1}).support.size == 1
    path.write_text("name: short\ndescription: few words\nmodels: {diffusion: a, clip: b}\n")
    assert load_profile(path).support.size == 32


START = "name: x\ndescription: y\n"


@pytest.mark.parametrize("text, word", [
    ("", "dictionary"), ("- a\n", "dictionary"), ("just text", "dictionary"), ("a: [", "YAML"), ("a: b: c", "YAML"),
    (b"\xff\xfe\x00\x81", "YAML"), ("name: x\nmodels: {diffusion: a, clip: b}\n", "description"), (START, "models"),
    (START + "models: {diffusion: a}\n", "models.clip"), (START + "models: {diffusion: a, clip: b}\nsuport: {}\n", "mean 'support'"),
    (START + "models: {diffusion: a, clip: b}\nsupport: 3\n", "support is 3"), (START + "3: 4\n", "models"),
    (START + "models: {diffusion: a, clip: b}\nsupport: {sizes: 3}\n", "support.sizes"),
    (START + "models: {diffusion: a, clip: b}\nsupport: {size: true}\n", "support.size is True; it should be a valid integer")])
def test_broken_files_are_described(tmp_path, text, word):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse("broken.yaml", word, make=lambda: load_profile(path))
    path.unlink()
    path.mkdir()
    refuse("broken.yaml", make=lambda: load_profile(path))


@pytest.mark.parametrize("value", ["2024-13-45", "!!int y", "!!timestamp foo", "[" * 3000])
def test_values_that_yaml_cannot_make_are_one_sentence(tmp_path, value):
    refuse("support.prompt", make=lambda: parse_assignments([f"support.prompt={value}"]), error=InputError)
    (tmp_path / "own.yaml").write_text(f"name: {value}\n")
    refuse("own.yaml", make=lambda: load_profile(tmp_path / "own.yaml"))


# ---- what the released code does, and the paper

SD_LAYERS = ["down_blocks.0.attentions.0", "mid_block.attentions.0", *(f"up_blocks.{b}.attentions.{i}" for b in (1, 2) for i in range(3)),
             "up_blocks.3.attentions.2"]

ROWS = {  # what the released code does, topic by topic
    "sampling": {"models.dtype": "float16", "support.image_size": 512, "support.batch_size": 8, "support.seed": 42, "support.steps": 30,
                 "support.guidance_scale": 8.0, "support.size": 32, "support.prompt": "A good picture of a {name}"},
    "attribution map": {"support.mid_block": False}, "CutLER": {"masks.segmenter": "cutler", "masks.cutler_score": 0.35},
    "foreground mask": {"masks.overlaps": "attribution"}, "background mask": {"masks.background_below": 0.2, "masks.erosion": 1},
    "CutLER finds nothing": {"masks.fallback": "fixed", "masks.fallback_foreground": 0.5, "masks.fallback_background": 0.2},
    "without CutLER": {"masks.threshold_classes": 3, "masks.threshold_scope": "set"}, "mask resize": {"masks.resize": "bilinear"},
    "SD features": {"features.sd_layers": SD_LAYERS, "features.sd_timestep": 200, "features.sd_latent": "sample",
                    "features.sd_input_size": 512},
    "noise": {"features.sd_noise": "fixed", "features.sd_noise_samples": 1}, "k-means": {"prototypes.clusters": 32, "prototypes.seed": 0},
    "CLIP / DINO": {"features.clip_layer": -2, "features.clip_input_size": 512, "features.dino_input_size": 512,
                    "features.clip_normalisation": "imagenet", "models.clip": "openai/clip-vit-base-patch16",
                    "models.dino": "facebook/dino-vitb8"},
    "MAE": {"features.mae_input_size": 512, "models.mae": "facebook/vit-mae-base"},
    "prototypes": {"prototypes.kinds": ["class", "instance", "part"], "prototypes.background": True},
    "ensemble": {"features.extractors": ["sd", "dino", "clip-keys"]},
    "image size": {"matching.short_side": 448, "matching.resample": "lanczos", "matching.windows": [448, 336], "matching.stride": 224,
                   "matching.whole_image": True, "matching.refine": "none"},
    "category filter": {"filters.category": True, "filters.category_prompt": "a {names}", "filters.category_joiner": " and a ",
                        "filters.category_logit_scale": 1.0, "filters.category_crop": "squash", "filters.category_top": 10},
    "stuff in the filter": {"filters.category_keep_stuff": True}, "stuff filter": {"filters.stuff": True, "filters.stuff_threshold": 0.85},
    "final": {"matching.minimum_score": 0.0}, "PAMR": {"matching.pamr_iterations": 10, "matching.pamr_dilations": [1, 2, 4, 8, 12, 24]},
}

AS_PUBLISHED = {  # the paper's value, or the default where it is silent
    "models.dtype": "float32", "models.mae": "facebook/vit-mae-large",
    "support.batch_size": 4, "support.seed": 0, "masks.threshold_scope": "image",
    "masks.overlaps": "keep", "masks.background_below": 1.0, "masks.erosion": 0, "masks.fallback": "otsu", "masks.resize": "area",
    "features.sd_latent": "mean", "features.sd_noise": "seeded", "features.clip_normalisation": "clip", "features.clip_input_size": 448,
    "features.dino_input_size": 448, "features.mae_input_size": 448, "filters.category_prompt": "{names}",
    "filters.category_joiner": " and ", "filters.category_logit_scale": None, "filters.category_keep_stuff": False,
    "matching.resample": "bilinear", "matching.whole_image": False, "matching.minimum_score": None}


def values(name):
    table = load_profile(name).to_dict()
    return {key: table[key.split(".")[0]][key.split(".")[1]] for key in field_names()}


def test_every_choice_of_the_released_code_that_has_a_field_is_written_down():
    official = values("official")
    written = yaml.safe_load((FOLDER / "official.yaml").read_text(encoding="utf-8"))
    for topic, fields in ROWS.items():
        for key, value in fields.items():
            section, field = key.split(".")
            assert official[key] == value and type(official[key]) is type(value), (topic, key)
            assert field in written[section], f"{key} ({topic}) rests on a default that may change"


def test_official_and_paper_differ_where_the_code_differs_and_nowhere_else():
    official, paper = values("official"), values("paper")
    assert set(official) == set(paper) == set(field_names())
    different = {key: paper[key] for key in official if official[key] != paper[key]}
    assert different == AS_PUBLISHED
    assert set(different) <= {key for fields in ROWS.values() for key in fields}


def test_the_paper_profile_names_every_model_and_fetches_none():
    models = load_profile("paper").to_dict()["models"]
    named = {"diffusion", "clip", "dino", "mae", "open_clip", "cutler", "sam", "grounding", "groupvit"}
    assert {k for k, v in models.items() if v} == named | {"device", "dtype"} and models["download"] is False
