"""Profiles: values only, typed, validated, and no line of code that asks which profile it runs."""

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml
from sentences import refused

import ovdiff_lib
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.profiles.reading import FOLDER, available, load_profile
from ovdiff_lib.profiles.schema import UNUSED_BY_THE_METHOD, Profile, field_names, from_dict
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


def test_the_paper_profile_holds_the_papers_values():
    paper = load_profile("paper")
    assert (paper.support.size, paper.support.steps, paper.support.guidance_scale, paper.support.image_size) == (32, 30, 8.0, 512)
    assert paper.support.prompt == "A good picture of a {name}"
    assert paper.prototypes.clusters == 32 and paper.prototypes.kinds == ["class", "instance", "part"] and paper.prototypes.background
    assert (paper.matching.short_side, paper.matching.windows, paper.matching.stride) == (448, [448, 336], 224)
    assert paper.filters.category and paper.filters.category_top == 10 and paper.filters.stuff_threshold == 0.85
    assert paper.features.sd_timestep == 200 and paper.models.download is False


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
                     "features.dino_input_size", "matching.pamr_iterations",
                     "baselines.reco_retrieved"), COUNTS),
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


def test_every_field_counts_in_the_digest():
    mini, table = load_profile("mini"), load_profile("mini").to_dict()
    assert mini.digest() == load_profile("mini").digest() != load_profile("paper").digest() and len(mini.digest()) == 16
    assert dataclasses.replace(mini, name="other", description="renamed").digest() == mini.digest()
    for key in field_names():
        section, field = key.split(".")
        value = table[section][field]
        if isinstance(value, bool):
            new = not value
        elif isinstance(value, (int, float)):
            new = value / 2 if isinstance(value, float) else value - 1 if value > 1 else value + 1
        elif value is None:
            new = 64  # legal for whole and for real numbers
        elif isinstance(value, dict):
            new = {"voc": "voc"} if section == "evaluation" else 0.125
        else:
            other = value + "x" if isinstance(value, str) else value[:-1] or ["x"]
            new = next(word for word in WORDS[key].split() if word != value) if key in WORDS else other
        changed = mini.override({key: new, **({"matching.windows": [48]} if key == "matching.short_side" else {})})
        # What a run is measured on and compared with is not part of the method.
        assert (changed.digest() == mini.digest()) == (section in UNUSED_BY_THE_METHOD), key


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
