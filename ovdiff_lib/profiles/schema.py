"""Profiles: every value the method needs, typed and validated. Two profiles run the same code and differ in values only.

A profile is a YAML file with one section a step. Unknown sections, unknown fields and values of the wrong type raise
:class:`~ovdiff_lib.errors.ProfileError` with the legal names. ``overrides`` address fields as ``"section.field"``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ovdiff_lib.errors import ProfileError

MOST_CLUSTERS = 16_383
"""Part prototypes of a region at most: an assignment counts those of both regions in 16 bits."""

MOST_SEED = 2**63 - 1
"""torch's generators take no larger one."""


def ranged(default: Any, *, least: float | None = None, most: float | None = None, above: float | None = None) -> Any:
    """A dataclass field whose number is at least ``least``, at most ``most`` and more than ``above``; null is no number.

    The profile's reader goes by the field's metadata, which hold for each number of a list.
    """
    limits = {"least": least, "most": most, "above": above}
    return field(default=default, metadata={key: value for key, value in limits.items() if value is not None})


@dataclass(frozen=True)
class Models:
    """Where the frozen networks come from: a folder, a hub id, or ``package:NAME`` for weights shipped with ovdiff_lib."""

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
    dtype: str = "float32"  # float32 | float16 | bfloat16
    compile: bool = False  # torch.compile what is repeated in the networks: slower to start, then faster
    channels_last: bool = False  # lay the convolutions' images out pixel by pixel, which GPUs with tensor cores prefer
    download: bool = False  # may the hub be asked for a model that is not on disk


@dataclass(frozen=True)
class Support:
    """Step 1, Sec. 3.1 and App. C.5: how support images are drawn and attributed."""

    prompt: str = "A good picture of a {name}"
    negative_prompt: str = ""
    size: int = 32  # N, support images a category
    steps: int = 30  # DPM-Solver++ steps
    guidance_scale: float = 8.0
    image_size: int = 512  # side of the square support images, pixels
    batch_size: int | None = ranged(8, least=1)  # images drawn at a time; null: as many as the GPU's free memory holds
    seed: int = ranged(0, least=0, most=MOST_SEED)
    mid_block: bool = False  # count the mid block's cross-attention too (the released code's attribution tool leaves it out)


@dataclass(frozen=True)
class Masks:
    """Step 2a, Sec. 3.2: attribution to foreground and background."""

    segmenter: str = "threshold"  # name in masks.SEGMENTERS; "threshold" uses the attribution alone (the paper's -CutLER)
    threshold_classes: int = 3  # levels of multi-Otsu; the bottom one is background
    threshold_foreground: int = 1  # how many levels from the top are foreground; what lies between is not used
    threshold_scope: str = "image"  # image | set: thresholds from one map or from all maps of the support set
    background_below: float = ranged(1.0, above=0)  # background pixels must also have attribution below this (released code: 0.2)
    erosion: int = ranged(0, least=0)  # binary erosion of the background, pixels (released code: 1)
    overlaps: str = "keep"  # keep | attribution: a pixel of several proposals stays with the one of highest mean attribution
    fallback: str = "otsu"  # otsu | fixed: what divides an image without proposals
    fallback_foreground: float = 0.5  # fixed: foreground is attribution above this
    fallback_background: float = 0.2  # fixed: background is attribution below this
    maskcut_rounds: int = 3  # MaskCut: masks an image at most
    maskcut_tau: float = 0.15  # cosine from which two patches are joined
    maskcut_size: int = 480  # side of the square the image is resized to
    maskcut_facet: str = "keys"  # keys | queries | values of DINO's last layer
    maskcut_refine: str = "walker"  # walker | crf | none: what brings patch masks to pixels (crf needs pydensecrf2)
    detector_score: float = 0.5  # Mask R-CNN of torchvision: lowest score of a proposal
    cutler_score: float = 0.35  # CutLER: lowest score of a proposal
    sam_points: int = 32  # SAM: points along a side of the prompt grid
    sam_iou: float = 0.88  # lowest predicted IoU
    sam_stability: float = 0.95  # lowest stability score
    grounding_box: float = 0.25  # Grounded SAM: lowest box score
    grounding_text: float = 0.25  # lowest text score
    resize: str = "area"  # how masks meet the feature grid: area (inside if more than half) | any (inside if any pixel is)


@dataclass(frozen=True)
class Features:
    """Step 2b, Sec. 4.1 and App. C.2: the frozen extractors."""

    extractors: list[str] = field(default_factory=lambda: ["sd"])  # names in features.EXTRACTORS; several = ensemble
    sd_layers: list[str] = field(default_factory=list)  # modules whose attn2.to_q output is read, in order of concatenation
    sd_timestep: int = 200  # tau
    sd_input_size: int = 512  # every window is resized to this square before the VAE
    sd_latent: str = "mean"  # mean | sample of the VAE posterior
    sd_noise: str = "seeded"  # seeded (by image and window) | fixed (one noise for all)
    sd_noise_samples: int = 1  # noise draws averaged per image
    clip_input_size: int = 448  # support images are resized to this before CLIP; windows keep their size
    clip_layer: int = -2  # transformer layer the keys or tokens come from
    clip_normalisation: str = "clip"  # clip | imagenet: mean and standard deviation of the pixels (released code: imagenet)
    dino_input_size: int = 448  # as clip_input_size
    mae_input_size: int = 448  # as clip_input_size
    vit_scale: float = 1.0  # what DINO, MAE and CLIP see is enlarged so much, and so is their grid of patches
    batch_size: int | None = ranged(8, least=1)  # images at a time; null: as many as the GPU's free memory holds
    seed: int = ranged(0, least=0, most=MOST_SEED)


@dataclass(frozen=True)
class PrototypeSettings:
    """Step 2c, Eq. 2 and 3: which prototypes a category gets."""

    kinds: list[str] = field(default_factory=lambda: ["class", "instance", "part"])
    clusters: int = ranged(32, least=1, most=MOST_CLUSTERS)  # K part prototypes per region
    background: bool = True  # background prototypes; without them matching.background_threshold decides
    seed: int = ranged(0, least=0, most=MOST_SEED)


@dataclass(frozen=True)
class Filters:
    """Step 3a, Sec. 3.4: category pre-filter and "stuff" filter."""

    category: bool = True
    category_prompt: str = "{names}"  # template of the CLIP text; {names} = "a and b and c"
    category_joiner: str = " and "
    category_top: int = 10  # eta
    category_logit_scale: float | None = ranged(None, above=0)  # null = the model's own
    category_crop: str = "squash"  # squash | centre: how an image becomes CLIP's square input
    category_keep_stuff: bool = False  # stuff categories pass the pre-filter always (released code)
    stuff: bool = True
    stuff_threshold: float = ranged(0.85, least=-1, most=1)  # a cosine
    stuff_against: str = "stuff"  # stuff | all: whose foreground prototypes reject background prototypes (App. A.2)
    stuff_background: bool = False  # stuff classes keep their background prototypes (App. A.2)
    stuff_parts: bool = True  # stuff classes keep their part prototypes (App. A.2)


@dataclass(frozen=True)
class Matching:
    """Step 3b, Eq. 4: windows and cosine matching."""

    short_side: int = 448
    long_side: int | None = 2048  # a longer image is scaled down further, so that its short side falls below short_side; null: never
    windows: list[int] = field(default_factory=lambda: [448, 336])
    stride: int = 224
    whole_image: bool = False  # the squashed whole image as one more window (released code), or the only one if there are no windows
    background_threshold: float | None = None  # constant score of the background class when there are no background prototypes
    resample: str = "bilinear"  # bilinear | lanczos: how the image comes to short_side (released code: lanczos)
    minimum_score: float | None = None  # a pixel whose best score is not above this is background (released code: 0)
    refine: str = "none"  # none | pamr: post-processing of the scores
    pamr_iterations: int = 10
    pamr_dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12, 24])
    batch_size: int | None = ranged(8, least=1)  # windows at a time; null: as many as the GPU's free memory holds


UNUSED_BY_THE_METHOD = ("name", "description", "evaluation", "baselines")
"""Sections of a profile that change no segmentation of OVDiff: what it is called, what it is measured on and compared with."""


@dataclass(frozen=True)
class Evaluation:
    """Which data sets stand in the columns of the paper's tables, as "name", "name/split" or "name:folder"."""

    voc: str = "voc"  # Tables 1 to 3 and their kin
    context: str = "context"
    object: str = "coco-object"
    without_background: dict[str, str] = field(default_factory=dict)  # columns of Table A.7: the paper's name -> data set
    extractors: list[str] = field(default_factory=lambda: ["sd", "dino", "clip-keys"])  # the ensemble of the main tables
    images: int | None = None  # the first so many images of each data set; null = all
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"least": 0, "most": MOST_SEED})


@dataclass(frozen=True)
class Baselines:
    """What the methods of Table 1, A.1 and A.2 need beside the fields above; no field of it changes OVDiff."""

    archive: str = ""  # images that ReCo retrieves from: a folder, or package:NAME for one that ships; "" = not set
    reco_retrieved: int = 50  # k, images retrieved a class
    reco_size: int = 224  # side of the square that retrieved images are cropped to, pixels
    reco_contexts: list[str] = field(default_factory=lambda: ["tree", "sky", "building", "road", "person"])  # what seeds avoid
    clip_diy_size: int = 256  # CLIP-DIY: side of the square an image is squashed to, pixels
    clip_diy_scales: int = 3  # patches of the whole side, of half of it, of a quarter and so on
    clip_diy_background: list[str] = field(default_factory=lambda: ["background"])  # words whose best score is the background's
    clip_diy_seed_cosine: float = 0.3  # cosine to the background seed at which a patch is half salient (FOUND: background from there)


@dataclass(frozen=True)
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
        """A copy with ``{"section.field": value}`` replaced; an unknown field or a value that cannot be raises ``ProfileError``."""
        table = self.to_dict()
        for key, value in (overrides or {}).items():
            section, _, name = str(key).partition(".")
            if section not in table or not isinstance(table[section], dict) or name not in table[section]:
                raise ProfileError(_unknown("profile field", str(key), field_names()))
            table[section][name] = value
        return from_dict(table, f"overrides of profile {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self, *sections: str) -> str:
        """Hash (16 hex digits) of the named sections, or of all that change a segmentation: equal values, equal hash."""
        table = self.to_dict()
        chosen = {key: table[key] for key in (sections or [k for k in table if k not in UNUSED_BY_THE_METHOD])}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def field_names() -> list[str]:
    """Every field that ``overrides`` may address, as ``section.field``."""
    hints = typing.get_type_hints(Profile)
    return [f"{section}.{f.name}" for section, kind in hints.items() if dataclasses.is_dataclass(kind) for f in dataclasses.fields(kind)]


def from_dict(table: Any, origin: str) -> Profile:
    """A validated profile from nested dictionaries; ``origin`` is named in errors."""
    return _build(Profile, table, origin, "")


def _build(kind: type, table: Any, origin: str, prefix: str) -> Any:
    if not isinstance(table, dict):
        raise ProfileError(f"In the {origin}, {prefix.rstrip('.') or 'the whole'} must be a table of fields, not {table!r}.")
    hints = typing.get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise ProfileError(f"In the {origin}: " + _unknown("field", f"{prefix}{key}", [prefix + name for name in hints]))
    values = {}
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if f.name not in table:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and not dataclasses.is_dataclass(hint):
                raise ProfileError(f"In the {origin}, the field {prefix}{f.name} is missing; add it.")
            if dataclasses.is_dataclass(hint):
                values[f.name] = _build(hint, {}, origin, f"{prefix}{f.name}.")
        elif dataclasses.is_dataclass(hint):
            values[f.name] = _build(hint, table[f.name], origin, f"{prefix}{f.name}.")
        else:
            values[f.name] = _check(table[f.name], hint, f"{prefix}{f.name}", origin, f.metadata)
    return kind(**values)


def _check(value: Any, hint: Any, name: str, origin: str, limits: Mapping[str, Any]) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if kind is type(None) and value is None:
            return None
        if typing.get_origin(kind) is dict and isinstance(value, dict) and all(type(k) is str for k in value):
            return {k: _check(v, typing.get_args(kind)[1], f"{name}[{k!r}]", origin, limits) for k, v in value.items()}
        if typing.get_origin(kind) is list and isinstance(value, (list, tuple)):
            return [_check(v, typing.get_args(kind)[0], f"{name}[{i}]", origin, limits) for i, v in enumerate(value)]
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # not NaN
            return float(_in_range(value, name, origin, limits))
        if kind in (int, str, bool) and type(value) is kind:
            return _in_range(value, name, origin, limits)
    wanted = " or ".join("null" if k is type(None) else getattr(k, "__name__", str(k)) for k in allowed)
    raise ProfileError(f"In the {origin}, {name} must be {wanted}, not {value!r}.")


def _in_range(value: Any, name: str, origin: str, limits: Mapping[str, Any]) -> Any:
    """``value`` itself; ``ProfileError`` outside of ``limits``, as :func:`ranged` keeps them."""
    inside = limits.get("least", value) <= value <= limits.get("most", value) if limits else True
    if inside and not ("above" in limits and value <= limits["above"]):
        return value
    words = {"above": "above", "least": "at least", "most": "at most"}
    wanted = [f"{word} {limits[key]:,}" for key, word in words.items() if key in limits]
    raise ProfileError(f"In the {origin}, {name} is {value!r}; it must be {' and '.join(wanted)}.")


def _unknown(what: str, key: str, legal: list[str]) -> str:
    near = difflib.get_close_matches(key, legal, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the legal ones are {', '.join(legal)}."
    return f"Unknown {what} {key!r}; {hint}"
