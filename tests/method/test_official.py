"""The profiles ``official`` and ``paper``: the released code's choices, field by field, and nothing else between the two."""

import yaml

from ovdiff_lib.profiles.reading import FOLDER, load_profile
from ovdiff_lib.profiles.schema import field_names

SD_LAYERS = ["down_blocks.0.attentions.0", "mid_block.attentions.0", *(f"up_blocks.{b}.attentions.{i}" for b in (1, 2) for i in range(3)),
             "up_blocks.3.attentions.2"]

ROWS = {  # what the released code does, topic by topic
    "sampling": {"models.dtype": "float16", "support.image_size": 512, "support.batch_size": 8, "support.seed": 42, "support.steps": 30,
                 "support.guidance_scale": 8.0, "support.size": 32},
    "attribution map": {"support.mid_block": False},
    "CutLER": {"masks.segmenter": "cutler", "masks.cutler_score": 0.35},
    "foreground mask": {"masks.overlaps": "attribution"},
    "background mask": {"masks.background_below": 0.2, "masks.erosion": 1},
    "CutLER finds nothing": {"masks.fallback": "fixed", "masks.fallback_foreground": 0.5, "masks.fallback_background": 0.2},
    "without CutLER": {"masks.threshold_classes": 3, "masks.threshold_scope": "set"},
    "mask resize": {"masks.resize": "bilinear"},
    "SD features": {"features.sd_layers": SD_LAYERS, "features.sd_timestep": 200, "features.sd_latent": "sample",
                    "features.sd_input_size": 512},
    "noise": {"features.sd_noise": "fixed", "features.sd_noise_samples": 1},
    "CLIP / DINO": {"features.clip_layer": -2, "features.clip_input_size": 512, "features.dino_input_size": 512,
                    "features.clip_normalisation": "imagenet", "models.clip": "openai/clip-vit-base-patch16",
                    "models.dino": "facebook/dino-vitb8"},
    "MAE": {"features.mae_input_size": 512,
            "models.mae": "facebook/vit-mae-base"},
    "k-means": {"prototypes.clusters": 32, "prototypes.seed": 0},
    "prototypes": {"prototypes.kinds": ["class", "instance", "part"], "prototypes.background": True},
    "ensemble": {"features.extractors": ["sd", "dino", "clip-keys"]},
    "image size": {"matching.short_side": 448, "matching.resample": "lanczos", "matching.windows": [448, 336], "matching.stride": 224,
                   "matching.whole_image": True},
    "category filter": {"filters.category": True, "filters.category_prompt": "a {names}", "filters.category_joiner": " and a ",
                        "filters.category_logit_scale": 1.0, "filters.category_crop": "squash", "filters.category_top": 10},
    "stuff in the filter": {"filters.category_keep_stuff": True},
    "stuff filter": {"filters.stuff": True, "filters.stuff_threshold": 0.85},
    "final": {"matching.minimum_score": 0.0},
    "PAMR": {"matching.pamr_iterations": 10, "matching.pamr_dilations": [1, 2, 4, 8, 12, 24]},
}

AS_PUBLISHED = {  # the paper's value, or the default where it is silent
    "models.dtype": "float32", "models.mae": "facebook/vit-mae-large",
    "support.batch_size": 4, "support.seed": 0, "masks.threshold_scope": "image",
    "masks.overlaps": "keep", "masks.background_below": 1.0, "masks.erosion": 0, "masks.fallback": "otsu", "masks.resize": "area",
    "features.sd_latent": "mean", "features.sd_noise": "seeded", "features.clip_normalisation": "clip", "features.clip_input_size": 448,
    "features.dino_input_size": 448, "features.mae_input_size": 448, "filters.category_prompt": "{names}",
    "filters.category_joiner": " and ", "filters.category_logit_scale": None, "filters.category_keep_stuff": False,
    "matching.resample": "bilinear", "matching.whole_image": False, "matching.minimum_score": None,
}


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


def test_what_differs_is_marked_in_the_file():
    marked = set()
    section = ""
    for line in (FOLDER / "official.yaml").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            section = line.split(":")[0]
        elif line.startswith("  ") and "# differs" in line:
            marked.add(f"{section}.{line.split(':')[0].strip()}")
    assert marked == set(AS_PUBLISHED)


def test_the_paper_profile_names_every_model_and_the_main_tables_parts():
    paper = load_profile("paper")
    assert paper.features.extractors == ["sd", "dino", "clip-keys"] and paper.masks.segmenter == "cutler"
    assert paper.features.sd_layers == SD_LAYERS and paper.matching.refine == "none"
    models = paper.to_dict()["models"]
    named = {"diffusion", "clip", "dino", "mae", "open_clip", "cutler", "sam", "grounding", "groupvit"}
    assert {k for k, v in models.items() if v} == named | {"device", "dtype"} and models["download"] is False
