"""Profiles: every value the method needs, typed and validated. Two profiles run the same code, with other values.

A profile is a YAML file with one section a step. What a field may hold stands here and nowhere else, as its type:
``Literal`` lists the words, ``Field`` the range. Unknown sections, unknown fields and other values raise
:class:`~ovdiff_lib.errors.ProfileError` with the legal ones. What depends on several fields, on a network or on a
registry is judged by :func:`~ovdiff_lib.checks.check_profile`.
``overrides`` address fields as ``"section.field"``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ovdiff_lib.errors import ProfileError

MOST_SEED = 2**63 - 1
"""torch's generators take no larger one."""

EXACT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""A truth value or a text is no number, 8.0 no whole one; NaN and infinity are none at all."""


def _each_once(names: list) -> list:
    if len(set(names)) < len(names):
        raise ValueError("name each once")
    return names


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Names = Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)]


@dataclass(frozen=True, config=EXACT)
class Models:
    """Where the frozen networks come from: a folder, a hub id, or ``package:NAME`` for weights that ship."""

    diffusion: str  # StableDiffusionPipeline
    clip: str  # CLIPModel with its tokenizer
    dino: str = ""  # ViTModel trained with DINO; "" here and below: not set, so that what needs it says so
    mae: str = ""  # ViTMAEModel, or a .pth file of long_seq_mae
    open_clip: str = ""  # name of an open_clip architecture, or a folder of transformers' CLIPModel, which is converted
    open_clip_pretrained: str = ""  # open_clip's tag or a weights file; not used with a folder
    detector: str = ""  # folder of a class-agnostic torchvision Mask R-CNN
    cutler: str = ""  # checkpoint file of CutLER's Cascade Mask R-CNN, for detectron2
    cutler_sha256: str = ""  # its checksum; a pickled checkpoint is opened only if it matches
    sam: str = ""  # SamModel with its processor
    grounding: str = ""  # GroundingDinoForObjectDetection with its processor
    groupvit: str = ""  # GroupViTModel with its tokenizer (baseline of Table 1)
    device: str = "auto"  # "auto" = cuda if there is one, else cpu
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    download: bool = False  # may the hub be asked for a model that is not on disk


@dataclass(frozen=True, config=EXACT)
class Support:
    """Step 1, Sec. 3.1 and App. C.5: how support images are drawn and attributed."""

    prompt: str = "A good picture of a {name}"
    negative_prompt: str = ""
    size: Count = 32  # N, support images a category
    steps: Count = 30  # DPM-Solver++ steps
    guidance_scale: float = 8.0
    image_size: Count = 512  # side of the square support images, pixels
    batch_size: Count = 8  # images drawn at a time
    seed: Seed = 0
    mid_block: bool = False  # count the mid block's cross-attention too (the released code leaves it out)


@dataclass(frozen=True, config=EXACT)
class Masks:
    """Step 2a, Sec. 3.2: attribution to foreground and background."""

    segmenter: str = "threshold"  # name in masks.SEGMENTERS; "threshold": the attribution alone (the paper's -CutLER)
    threshold_classes: Annotated[int, Field(ge=2, le=5)] = 3  # levels of multi-Otsu; the bottom one is background
    threshold_foreground: Count = 1  # how many levels from the top are foreground; what lies between is not used
    threshold_scope: Literal["image", "set"] = "image"  # thresholds from one map or from all maps of the support set
    background_below: Annotated[float, Field(gt=0)] = 1.0  # of the attribution of background pixels (released: 0.2)
    erosion: Annotated[int, Field(ge=0)] = 0  # binary erosion of the background, pixels (released code: 1)
    overlaps: Literal["keep", "attribution"] = "keep"  # attribution: a pixel stays with one proposal, of highest mean
    fallback: Literal["otsu", "fixed"] = "otsu"  # what divides an image without proposals
    fallback_foreground: Share = 0.5  # fixed: foreground is attribution above this
    fallback_background: Share = 0.2  # fixed: background is attribution below this
    maskcut_rounds: Count = 3  # MaskCut: masks an image at most
    maskcut_tau: Annotated[float, Field(gt=-1, lt=1)] = 0.15  # cosine from which two patches are joined
    maskcut_size: Count = 480  # side of the square the image is resized to
    maskcut_facet: Literal["keys", "queries", "values"] = "keys"  # of DINO's last layer
    maskcut_refine: Literal["walker", "crf", "none"] = "walker"  # from patches to pixels; crf needs pydensecrf2
    detector_score: Share = 0.5  # Mask R-CNN of torchvision: lowest score of a proposal
    cutler_score: Share = 0.35  # CutLER: lowest score of a proposal
    sam_points: Count = 32  # SAM: points along a side of the prompt grid
    sam_iou: Share = 0.88  # lowest predicted IoU
    sam_stability: Share = 0.95  # lowest stability score
    grounding_box: Share = 0.25  # Grounded SAM: lowest box score
    grounding_text: Share = 0.25  # lowest text score
    resize: Literal["area", "any"] = "area"  # a cell is inside if half of it is, or any pixel


@dataclass(frozen=True, config=EXACT)
class Features:
    """Step 2b, Sec. 4.1 and App. C.2: the frozen extractors."""

    extractors: Names = Field(default_factory=lambda: ["sd"])  # names in features.EXTRACTORS; several = ensemble
    sd_layers: list[str] = Field(default_factory=list)  # modules whose attn2.to_q output is read, in this order
    sd_timestep: Annotated[int, Field(ge=0)] = 200  # tau
    sd_input_size: Count = 512  # every window is resized to this square before the VAE
    sd_latent: Literal["mean", "sample"] = "mean"  # of the VAE posterior
    sd_noise: Literal["seeded", "fixed"] = "seeded"  # by image and window, or one noise for all
    sd_noise_samples: Count = 1  # noise draws averaged per image
    clip_input_size: Count = 448  # support images are resized to this before CLIP; windows keep their size
    clip_layer: int = -2  # transformer layer the keys or tokens come from
    clip_normalisation: Literal["clip", "imagenet"] = "clip"  # pixels' mean and deviation (released: imagenet)
    dino_input_size: Count = 448  # as clip_input_size
    mae_input_size: Count = 448  # as clip_input_size
    vit_scale: Annotated[float, Field(gt=0, le=16)] = 1.0  # what DINO, MAE and CLIP see is enlarged so much
    batch_size: Count = 8  # images at a time
    seed: Seed = 0


@dataclass(frozen=True, config=EXACT)
class PrototypeSettings:
    """Step 2c, Eq. 2 and 3: which prototypes a category gets."""

    kinds: Annotated[list[Literal["class", "instance", "part"]], Field(min_length=1), AfterValidator(_each_once)] = (
        Field(default_factory=lambda: ["class", "instance", "part"]))
    clusters: Annotated[int, Field(ge=1, le=16_383)] = 32  # K part prototypes per region; both count in 16 bits
    background: bool = True  # background prototypes; without them matching.background_threshold decides
    seed: Seed = 0


@dataclass(frozen=True, config=EXACT)
class Filters:
    """Step 3a, Sec. 3.4: category pre-filter and "stuff" filter."""

    category: bool = True
    category_prompt: Annotated[str, Field(pattern=r"\{names\}")] = "{names}"  # CLIP text; {names} = "a and b and c"
    category_joiner: str = " and "
    category_top: Annotated[int, Field(ge=1, le=16)] = 10  # eta; 16 means 65,535 prompts an image
    category_logit_scale: Annotated[float, Field(gt=0)] | None = None  # null = the model's own
    category_crop: Literal["squash", "centre"] = "squash"  # how an image becomes CLIP's square input
    category_keep_stuff: bool = False  # stuff categories pass the pre-filter always (released code)
    stuff: bool = True
    stuff_threshold: Cosine = 0.85
    stuff_against: Literal["stuff", "all"] = "stuff"  # whose foreground rejects background prototypes (App. A.2)
    stuff_background: bool = False  # stuff classes keep their background prototypes (App. A.2)
    stuff_parts: bool = True  # stuff classes keep their part prototypes (App. A.2)


@dataclass(frozen=True, config=EXACT)
class Matching:
    """Step 3b, Eq. 4: windows and cosine matching."""

    short_side: Count = 448
    long_side: Count | None = 2048  # a longer image is scaled down below short_side; null: never
    windows: list[Count] = Field(default_factory=lambda: [448, 336])
    stride: Count = 224
    whole_image: bool = False  # the squashed whole image as one more window (released code), or the only one
    background_threshold: float | None = None  # constant score of a background without prototypes
    resample: Literal["bilinear", "lanczos"] = "bilinear"  # how the image comes to short_side (released code: lanczos)
    minimum_score: float | None = None  # a pixel whose best score is not above this is background (released code: 0)
    refine: Literal["none", "pamr"] = "none"  # post-processing of the scores
    pamr_iterations: Count = 10
    pamr_dilations: Annotated[list[Count], Field(min_length=1)] = Field(default_factory=lambda: [1, 2, 4, 8, 12, 24])
    batch_size: Count = 8  # windows at a time


UNUSED_BY_THE_METHOD = ("name", "description", "evaluation", "baselines")
"""Sections of a profile that change no segmentation of OVDiff: what it is called, measured on and compared with."""


@dataclass(frozen=True, config=EXACT)
class Evaluation:
    """Which data sets stand in the columns of the paper's tables, as "name", "name/split" or "name:folder"."""

    voc: str = "voc"  # Tables 1 to 3 and their kin
    context: str = "context"
    object: str = "coco-object"
    without_background: dict[str, str] = Field(default_factory=dict)  # columns of Table A.7: paper's name -> data set
    extractors: Names = Field(default_factory=lambda: ["sd", "dino", "clip-keys"])  # the ensemble of the main tables
    images: Count | None = None  # the first so many images of each data set; null = all
    seeds: list[Seed] = Field(default_factory=lambda: [0, 1, 2, 3, 4])


@dataclass(frozen=True, config=EXACT)
class Baselines:
    """What the methods of Table 1, A.1 and A.2 need beside the fields above; no field of it changes OVDiff."""

    archive: str = ""  # images that ReCo retrieves from: a folder, or package:NAME for one that ships; "" = not set
    reco_retrieved: Count = 50  # k, images retrieved a class
    reco_size: Count = 224  # side of the square that retrieved images are cropped to, pixels
    # What seeds avoid.
    reco_contexts: list[str] = Field(default_factory=lambda: ["tree", "sky", "building", "road", "person"])
    clip_diy_size: Count = 256  # CLIP-DIY: side of the square an image is squashed to, pixels
    clip_diy_scales: Count = 3  # patches of the whole side, of half of it, of a quarter and so on
    clip_diy_background: list[str] = Field(default_factory=lambda: ["background"])  # words of the background
    clip_diy_seed_cosine: Annotated[float, Field(gt=0, le=0.5)] = 0.3  # to the background seed, half salient (FOUND)


@dataclass(frozen=True, config=EXACT)
class Profile:
    """All values of one run. ``name`` only labels outputs; no code branches on it."""

    name: str
    description: str
    models: Models
    support: Support
    masks: Masks
    features: Features
    prototypes: PrototypeSettings
    filters: Filters
    matching: Matching
    evaluation: Evaluation
    baselines: Baselines

    def override(self, overrides: dict[str, Any] | None) -> Profile:
        """A copy with ``{"section.field": value}`` replaced. Raises ``ProfileError``."""
        table = self.to_dict()
        for key, value in (overrides or {}).items():
            section, _, name = str(key).partition(".")
            if section not in SECTIONS or name not in table[section]:
                raise ProfileError(_unknown("profile field", str(key), field_names()))
            table[section][name] = list(value) if isinstance(value, tuple) else value
        return from_dict(table, f"overrides of profile {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self, *sections: str) -> str:
        """Hash (16 hex digits) of the named sections, or of all that change a segmentation."""
        table = self.to_dict()
        chosen = {key: table[key] for key in (sections or [k for k in table if k not in UNUSED_BY_THE_METHOD])}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


SECTIONS: dict[str, type] = {"models": Models, "support": Support, "masks": Masks, "features": Features,
                             "prototypes": PrototypeSettings, "filters": Filters, "matching": Matching,
                             "evaluation": Evaluation, "baselines": Baselines}


def field_names() -> list[str]:
    """Every field that ``overrides`` may address, as ``section.field``."""
    return [f"{section}.{f.name}" for section, kind in SECTIONS.items() for f in dataclasses.fields(kind)]


def from_dict(table: Any, origin: str) -> Profile:
    """A validated profile from nested dictionaries; ``origin`` is named in errors."""
    _known(table, Profile, origin, "")
    sections = {name: _built(kind, table.get(name, {}), origin, f"{name}.") for name, kind in SECTIONS.items()}
    return _built(Profile, {**table, **sections}, origin, "")


def _built(kind: type, table: Any, origin: str, prefix: str) -> Any:
    _known(table, kind, origin, prefix)
    try:
        return kind(**table)
    except ValidationError as caught:
        wrong = caught.errors()[0]
    place = wrong["loc"]
    name = f"{prefix}{place[0]}" + "".join(f"[{step!r}]" for step in place[1:])
    if wrong["type"] == "missing":
        raise ProfileError(f"In the {origin}, the field {name} is missing; add it.")
    if wrong["type"] == "value_error":
        raise ProfileError(f"In the {origin}, {name} is {wrong['input']!r}; {wrong['ctx']['error']}.")
    schema = _schema(kind)["properties"][place[0]]
    for _ in place[1:]:
        schema = schema.get("items") or schema.get("additionalProperties") or schema
    near = difflib.get_close_matches(str(wrong["input"]).lower(), schema.get("enum", ()), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ProfileError(f"In the {origin}, {name} is {wrong['input']!r}; it must be {_legal(schema)}.{hint}")


def _known(table: Any, kind: type, origin: str, prefix: str) -> None:
    """``ProfileError`` unless ``table`` is one, with keys that ``kind`` has."""
    if not isinstance(table, dict):
        name = prefix.rstrip(".") or "the whole"
        raise ProfileError(f"In the {origin}, {name} must be a table of fields, not {table!r}.")
    legal = [f"{prefix}{f.name}" for f in dataclasses.fields(kind)]
    for key in table:
        if f"{prefix}{key}" not in legal:
            raise ProfileError(f"In the {origin}: " + _unknown("field", f"{prefix}{key}", legal))


def check_choice(field: str, value: str, legal: Iterable[str]) -> None:
    """``ProfileError`` unless ``value``, a profile's ``field``, is one of ``legal``: the names of a registry,
    which stands on a higher floor than this page."""
    if value not in legal:
        near = difflib.get_close_matches(value.lower(), legal, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ProfileError(f"{field} names {value!r}; the legal ones are {', '.join(legal)}.{hint}")


def _unknown(what: str, key: str, legal: list[str]) -> str:
    near = difflib.get_close_matches(key, legal, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the legal ones are {', '.join(legal)}."
    return f"Unknown {what} {key!r}; {hint}"


@functools.cache
def _schema(kind: type) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema()


def _legal(schema: dict[str, Any]) -> str:
    """What a JSON schema admits, in words."""
    if "anyOf" in schema:
        return " or ".join(_legal(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if schema["type"] == "array":
        return f"a list{' (not empty)' * ('minItems' in schema)}, each of it {_legal(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
             "null": "null", "object": "a table of text"}[schema["type"]]
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    wanted = [f"{word} {schema[key]:,}" for key, word in bounds.items() if key in schema]
    if "pattern" in schema:
        wanted.append(f"with {schema['pattern'].replace(chr(92), '')} in it")
    return f"{words} {' and '.join(wanted)}".strip()
