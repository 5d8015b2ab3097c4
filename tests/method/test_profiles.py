"""Profiles: values only, typed, validated, and no line of code that asks which profile it runs."""

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

import ovdiff_lib
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.profiles.reading import FOLDER, available, load_profile, parse_assignments
from ovdiff_lib.profiles.schema import UNUSED_BY_THE_METHOD, Profile, field_names, from_dict

PACKAGE = Path(ovdiff_lib.__file__).parent


def test_the_shipped_profiles():
    assert {"mini", "paper"} <= set(available())
    for name in available():
        profile = load_profile(name)
        assert isinstance(profile, Profile) and profile.name == name and profile.description


def test_the_paper_profile_holds_the_papers_values():
    paper = load_profile("paper")
    assert (paper.support.size, paper.support.steps, paper.support.guidance_scale, paper.support.image_size) == (32, 30, 8.0, 512)
    assert paper.support.prompt == "A good picture of a {name}"
    assert paper.prototypes.clusters == 32 and paper.prototypes.kinds == ["class", "instance", "part"] and paper.prototypes.background
    assert (paper.matching.short_side, paper.matching.windows, paper.matching.stride) == (448, [448, 336], 224)
    assert paper.filters.category and paper.filters.category_top == 10 and paper.filters.stuff_threshold == 0.85
    assert paper.features.sd_timestep == 200 and paper.models.download is False


def test_profiles_differ_in_values_not_in_fields():
    tables = {name: load_profile(name).to_dict() for name in available()}
    for table in tables.values():
        assert {f"{s}.{f}" for s, fields in table.items() if isinstance(fields, dict) for f in fields} == set(field_names())
    assert tables["mini"]["support"] != tables["paper"]["support"]
    # The files themselves name no section or field that the code does not know.
    for name in available():
        written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert {f"{s}.{f}" for s, fields in written.items() if isinstance(fields, dict) for f in fields} <= set(field_names())


def test_no_code_branches_on_a_profiles_name():
    """No comparison, ``in``, ``match`` or look-up table by the name of a profile anywhere in the package."""
    names = set(available())
    offences = []
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
    with pytest.raises(ProfileError) as caught:
        load_profile(source)
    assert repr(source) in str(caught.value) or "nowhere.yaml" in str(caught.value)
    assert "mini" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["support", "support.", ".size", "suport.size", "support.siz", "size", "name", "support.size.x", "", 3])
def test_unknown_fields_are_refused(key):
    with pytest.raises(ProfileError, match="Unknown profile field"):
        load_profile("mini", {key: 8})


def test_a_slip_of_the_pen_gets_the_right_name():
    with pytest.raises(ProfileError, match=r"did you mean .*support\.size"):
        load_profile("mini", {"support.sise": 8})


@pytest.mark.parametrize("key, value", [
    ("support.size", True), ("support.size", 8.0), ("support.size", "8"), ("support.size", None), ("support.size", [8]),
    ("support.guidance_scale", False), ("support.guidance_scale", "5"), ("support.guidance_scale", None),
    ("support.guidance_scale", float("nan")), ("support.guidance_scale", float("inf")), ("evaluation.without_background", {"VOC": 3}),
    ("evaluation.without_background", {3: "voc"}), ("filters.category", 1), ("filters.category", "yes"), ("filters.category", None),
    ("support.prompt", 3), ("support.prompt", None), ("features.extractors", "sd"), ("features.extractors", ["sd", 1]),
    ("features.extractors", None),
    ("matching.windows", [64, True]), ("matching.windows", [64, 4.5]), ("filters.category_logit_scale", True)])
def test_wrong_types_are_refused_by_name(key, value):
    with pytest.raises(ProfileError) as caught:
        load_profile("mini", {key: value})
    assert key in str(caught.value) and "must be" in str(caught.value) and "\n" not in str(caught.value)


SEED = 2**63


@pytest.mark.parametrize("key, legal, wrong, words", [
    ("prototypes.clusters", [1, 16383], [0, -3, 16384, 40000], "at least 1 and at most 16,383"),  # 16 bits hold those of both regions
    ("support.size", [1], [0, -1], "at least 1"), ("support.steps", [1], [0], "at least 1"),
    ("prototypes.seed", [0, SEED - 1], [-1, SEED], "at least 0 and at most 9,223,372,036,854,775,807"),
    ("features.seed", [0, SEED - 1], [-1, 2**70], "at least 0 and at most"), ("support.seed", [0, SEED - 1], [-1, SEED], "at least 0"),
    ("evaluation.seeds", [[], [0, SEED - 1]], [[0, -1], [3, SEED]], "at least 0 and at most"),
    ("support.batch_size", [1], [0, -1, None], "at least 1"), ("features.batch_size", [1], [0, None], "at least 1"),
    ("matching.batch_size", [1], [0, None], "at least 1"), ("masks.erosion", [0], [-1], "at least 0"),
    ("masks.background_below", [0.001, 1, 2.5], [0, 0.0, -1.0], "above 0"),
    ("masks.threshold_classes", [2, 5], [1, 6], "at least 2 and at most 5"), ("masks.maskcut_tau", [0, 0.5], [1, -1.0], "below 1"),
    *((f"masks.{name}", [0, 1, 0.5], [-0.1, 1.5], "at least 0 and at most 1") for name in (
        "detector_score", "cutler_score", "sam_iou", "sam_stability", "grounding_box", "grounding_text", "fallback_foreground")),
    ("masks.sam_points", [1], [0], "at least 1"), ("masks.maskcut_rounds", [1], [0], "at least 1"),
    ("features.sd_timestep", [0], [-1], "at least 0"), ("features.sd_noise_samples", [1], [0], "at least 1"),
    ("features.dino_input_size", [1], [0], "at least 1"), ("features.vit_scale", [0.5, 16], [0, 17], "above 0 and at most 16"),
    ("filters.category_logit_scale", [None, 1e-6, 100], [0, -1.0], "above 0"), ("filters.category_top", [1, 16], [0, 17], "at most 16"),
    ("filters.category_prompt", ["{names}!"], ["a {name}", ""], "{names}"),
    ("filters.stuff_threshold", [-1, 1, 0.5], [7, 1.01, -1.01], "at least -1 and at most 1"),
    ("matching.long_side", [None, 1], [0, -5], "at least 1 or null"), ("matching.windows", [[], [3]], [[0], [3, -1]], "at least 1"),
    ("matching.pamr_dilations", [[1]], [[], [1, 0]], "whole number at least 1"), ("matching.pamr_iterations", [1], [0], "at least 1"),
    ("baselines.reco_retrieved", [1], [0], "at least 1"), ("baselines.clip_diy_seed_cosine", [0.5], [0, 0.6], "above 0 and at most 0.5"),
    ("evaluation.images", [None, 1], [0], "at least 1"), ("features.extractors", [["sd"]], [[], ["sd", "sd"]], ""),
    ("prototypes.kinds", [["part"]], [["parts"], ["class", "class"], []], "")])
def test_values_out_of_range_are_refused_by_name(tmp_path, key, legal, wrong, words):
    section, name = key.split(".")
    for value in legal:
        assert getattr(getattr(load_profile("mini", {key: value}), section), name) == value
    for value in wrong:
        with pytest.raises(ProfileError) as caught:
            load_profile("mini", {key: value})
        assert key in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**load_profile("mini").to_dict(), section: {name: wrong[0]}}))
    with pytest.raises(ProfileError, match=rf"own\.yaml, {section}\.{name}"):
        load_profile(path)


WORDS = {  # every field of a few words, as the steps' docstrings tell them
    "models.dtype": "float32 float16 bfloat16", "masks.threshold_scope": "image set", "masks.overlaps": "keep attribution",
    "masks.fallback": "otsu fixed", "masks.maskcut_facet": "keys queries values", "masks.maskcut_refine": "walker crf none",
    "masks.resize": "area any", "features.sd_latent": "mean sample", "features.sd_noise": "seeded fixed",
    "features.clip_normalisation": "clip imagenet", "filters.category_crop": "squash centre", "filters.stuff_against": "stuff all",
    "matching.resample": "bilinear lanczos", "matching.refine": "none pamr"}


@pytest.mark.parametrize("key", WORDS)
def test_another_word_is_answered_with_the_legal_ones(key):
    section, name = key.split(".")
    words = WORDS[key].split()
    for word in words:
        assert getattr(getattr(load_profile("mini", {key: word}), section), name) == word
    with pytest.raises(ProfileError) as caught:
        load_profile("mini", {key: f"{words[0]}x".upper()})
    assert key in str(caught.value) and all(repr(word) in str(caught.value) for word in words)
    assert str(caught.value).endswith(f"Did you mean {words[0]!r}?")
    with pytest.raises(ProfileError) as caught:
        load_profile("mini", {key: "?"})
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("text, word, line", [
    ("name: x\ndescription: y\nname: z\nmodels: {diffusion: a, clip: b}\n", "'name'", 3),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b}\nsupport:\n  size: 3\n  seed: 1\n  size: 4\n", "'size'", 7),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b, 'clip': c}\n", "'clip'", 3),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b}\nsupport: {}\nmasks: {}\nsupport: {size: 3}\n", "'support'", 6)])
def test_a_field_named_twice_is_refused(tmp_path, text, word, line):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=rf"twice\.yaml, {word} is named twice in one table, again in line {line}; keep one") as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_anchors_and_merged_tables_are_no_repetition(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text("name: x\ndescription: y\nmodels: {diffusion: &a m, clip: *a}\nsupport: &s {batch_size: 3}\n"
                    "features: {<<: *s, seed: 4}\nmatching: {<<: *s, batch_size: 5}\n")
    profile = load_profile(path)
    assert (profile.models.clip, profile.features.batch_size, profile.features.seed, profile.matching.batch_size) == ("m", 3, 4, 5)
    # Read as YAML reads it.
    for name in available():
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        assert load_profile(name) == from_dict(yaml.safe_load(text), "a table")


def test_overrides_replace_and_leave_the_original_alone():
    mini = load_profile("mini")
    changed = load_profile(mini, {"support.size": 3, "support.guidance_scale": 7, "matching.background_threshold": 0.5,
                                  "matching.windows": (32, 16)})
    assert (changed.support.size, changed.support.guidance_scale) == (3, 7.0) and isinstance(changed.support.guidance_scale, float)
    assert changed.matching.background_threshold == 0.5 and changed.matching.windows == [32, 16]
    assert mini == load_profile("mini") and mini.support.size != 3
    assert changed.masks == mini.masks and changed.name == mini.name
    back = changed.override({"matching.background_threshold": None})
    assert back.matching.background_threshold is None
    assert load_profile(mini) == mini and load_profile("mini", {}) == mini


def test_digests_follow_the_values():
    mini = load_profile("mini")
    assert mini.digest() == load_profile("mini").digest() and len(mini.digest()) == 16
    assert mini.digest() != load_profile("paper").digest()
    assert dataclasses.replace(mini, name="other", description="renamed").digest() == mini.digest()
    other = mini.override({"support.seed": 1})
    assert other.digest() != mini.digest() and other.digest("support") != mini.digest("support")
    assert other.digest("masks", "features") == mini.digest("masks", "features")
    assert mini.override({"support.guidance_scale": 5}).digest() == mini.override({"support.guidance_scale": 5.0}).digest()


def test_every_field_counts_in_the_digest():
    mini = load_profile("mini")
    table = mini.to_dict()
    for key in field_names():
        section, field = key.split(".")
        value = table[section][field]
        if isinstance(value, bool):
            new = not value
        elif isinstance(value, (int, float)):
            new = value / 2 if isinstance(value, float) else value + 1  # a share has no room above
        elif value is None:
            new = 1  # legal for whole and for real numbers
        elif isinstance(value, dict):
            new = {**value, "x": "y"}
        else:
            other = value + "x" if isinstance(value, str) else value[:-1] or ["x"]
            new = next(word for word in WORDS[key].split() if word != value) if key in WORDS else other
        changed = mini.override({key: new})
        assert changed.digest(section) != mini.digest(section), key
        # What a run is measured on and compared with is not part of the method.
        assert (changed.digest() == mini.digest()) == (section in UNUSED_BY_THE_METHOD), key


def test_a_profile_survives_a_file(tmp_path):
    profile = load_profile("paper", {"support.prompt": "ein Bild: „{name}“", "filters.category_logit_scale": None})
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(profile.to_dict(), allow_unicode=True), encoding="utf-8")
    assert load_profile(path) == profile == load_profile(str(path)) == from_dict(profile.to_dict(), "a table")
    assert load_profile(path, {"support.size": 1}).support.size == 1


def test_a_file_may_leave_out_what_has_a_default(tmp_path):
    path = tmp_path / "short.yml"
    path.write_text("name: short\ndescription: few words\nmodels: {diffusion: a, clip: b}\n")
    assert load_profile(path).support.size == 32


@pytest.mark.parametrize("text, word", [
    ("", "must be a table"), ("- a\n", "must be a table"), ("just text", "must be a table"),
    ("a: [", "cannot be read as YAML"), ("a: b: c", "cannot be read as YAML"),
    ("name: x\nmodels: {diffusion: a, clip: b}\n", "description is missing"), ("name: x\ndescription: y\n", "models"),
    ("name: x\ndescription: y\nmodels: {diffusion: a}\n", r"models\.clip is missing"),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b}\nsuport: {}\n", "did you mean support"),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b}\nsupport: 3\n", "support must be a table"),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b}\nsupport: {sizes: 3}\n", r"support\.sizes"),
    ("name: x\ndescription: y\nmodels: {diffusion: a, clip: b}\nsupport: {size: true}\n",
     r"support\.size is True; it must be a whole number")])
def test_broken_files_are_described(tmp_path, text, word):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=word) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value) and "broken.yaml" in str(caught.value)


def test_files_that_are_no_text_are_described(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("bytes.yaml", "folder.yaml"):
        with pytest.raises(ProfileError, match=name):
            load_profile(tmp_path / name)


def test_field_names_are_the_dataclasses_fields():
    names = field_names()
    assert len(names) == len(set(names)) > 40
    for name in ("models.diffusion", "support.size", "masks.segmenter", "features.sd_timestep", "prototypes.clusters", "filters.stuff",
                 "matching.stride"):
        assert name in names
    assert "name" not in names and "support" not in names


@pytest.mark.parametrize("value", ["2024-13-45", "!!int y", "!!timestamp foo", "[" * 3000])
def test_values_that_yaml_cannot_make_are_one_sentence(tmp_path, value):
    with pytest.raises(InputError) as caught:
        parse_assignments([f"support.prompt={value}"])
    assert "\n" not in str(caught.value)
    path = tmp_path / "own.yaml"
    path.write_text(f"name: {value}\n")
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)
