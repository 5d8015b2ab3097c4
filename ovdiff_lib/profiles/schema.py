"""Profiles: every value the method needs, typed and validated. Two profiles run the same code, with other values.

A profile is a YAML file with one section a step. What a field may hold stands here and nowhere else: ``Literal`` lists
the words, ``Field`` the range, a validator what the fields of a section need of each other. Anything else raises
``ProfileError`` with what is legal; what a registry or a network knows, :func:`~ovdiff_lib.keys.check_profile` judges.
"""

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ovdiff_lib.errors import ProfileError, legal

section = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
"""Makes a class a frozen dataclass whose values are judged when one is made."""


def _each_once(names: list) -> list:
    if len(set(names)) < len(names):
        raise ValueError("Input should name each once")
    return names


def _template(text: str, *others: str) -> str:
    if text not in others and (text.count("{name}") != 1 or set("{}") & set(text.replace("{name}", ""))):
        right = "Input should hold {name} once, as 'a photo of a {name}.'"
        raise ValueError(" or be ".join([right, *map(repr, others)]))
    return text


def _crossed(step: str, values: Any, field: str, relation: str, other: str) -> ValueError:
    """The error of a field that does not go together with another."""
    return ValueError(f"{step}.{field} is {getattr(values, field)}; it must be {relation} {step}.{other} "
                      f"({getattr(values, other)}).")


# Strict: a truth value or a text is no number, 8.0 no whole one.
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Whole = Annotated[int, Strict()]
Seed = Annotated[int, Strict(), Field(ge=0, le=2**63 - 1)]  # torch's generators take no larger one
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Cosine = Annotated[float, Strict(), Field(ge=-1, le=1)]
Names = Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)]
IMAGENET = "imagenet"  # among templates it stands for the 80 of CLIP's authors
Template = Annotated[str, AfterValidator(_template)]
Templates = Annotated[list[Annotated[str, AfterValidator(lambda text: _template(text, IMAGENET))]], Field(min_length=1),
                      AfterValidator(_each_once)]
# One value for all feature spaces, or a mapping by extractor: see of_extractor. A tag is pydantic's name of a form.
ONE, EACH = pydantic.Tag("<number>"), pydantic.Tag("<mapping>")
FORM = pydantic.Discriminator(lambda value: (EACH if isinstance(value, dict) else ONE).tag)
Cosines = Annotated[Annotated[Cosine, ONE] | Annotated[dict[str, Cosine], EACH], FORM]
Numbers = Annotated[Annotated[Number | None, ONE] | Annotated[dict[str, Number], EACH], FORM]
Kinds = Annotated[list[Literal["class", "instance", "part"]], Field(min_length=1), AfterValidator(_each_once)]


@section
class Models:
    """Where the frozen networks come from: a folder, a hub id, or ``package:NAME`` for weights that ship."""

    diffusion: str  # StableDiffusionPipeline
    clip: str  # CLIPModel with its tokenizer
    dino: str = ""  # ViTModel trained with DINO; "" here and below: not set, so that what needs it says so
    mae: str = ""  # ViTMAEModel
    open_clip: str = ""  # CLIP in the format of the open_clip library, its image tower a plain ViT
    detector: str = ""  # folder of a class-agnostic torchvision Mask R-CNN
    cutler: str = ""  # checkpoint file of CutLER's Cascade Mask R-CNN, for detectron2
    sam: str = ""  # SamModel with its processor
    grounding: str = ""  # GroundingDinoForObjectDetection with its processor
    groupvit: str = ""  # GroupViTModel with its tokenizer (baseline of Table 1)
    device: str = "auto"  # "auto" = cuda if there is one, else mps, else cpu
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    download: Flag = False  # may the hub be asked for a model that is not on disk


@section
class Support:
    """Step 1, Sec. 3.1 and App. C.5: how support images are drawn and attributed."""

    prompt: Template = "A good picture of a {name}"
    negative_prompt: str = ""
    size: Count = 32  # N, support images a category
    steps: Count = 30  # DPM-Solver++ steps
    guidance_scale: Number = 8.0
    image_size: Count = 512  # side of the square support images, pixels
    batch_size: Count = 8  # images drawn at a time
    seed: Seed = 0
    mid_block: Flag = False  # count the mid block's cross-attention too (the released code leaves it out)


@section
class Masks:
    """Step 2a, Sec. 3.2: attribution to foreground and background."""

    segmenter: str = "threshold"  # name in masks.SEGMENTERS; "threshold": the attribution alone (the paper's -CutLER)
    threshold_classes: Annotated[Whole, Field(ge=2, le=5)] = 3  # levels of multi-Otsu; the bottom one is background
    threshold_foreground: Count = 1  # how many levels from the top are foreground; what lies between is not used
    threshold_scope: Literal["image", "set"] = "image"  # thresholds from one map or from all maps of the support set
    background_below: Positive = 1.0  # of the attribution of background pixels (released: 0.2)
    erosion: Annotated[Whole, Field(ge=0)] = 0  # binary erosion of the background, pixels (released code: 1)
    overlaps: Literal["keep", "attribution"] = "keep"  # attribution: a pixel stays with one proposal, of highest mean
    fallback: Literal["otsu", "fixed"] = "otsu"  # what divides an image in which the segmenter finds nothing
    fallback_foreground: Share = 0.5  # fixed: foreground is attribution above this
    fallback_background: Share = 0.2  # fixed: background is attribution below this
    maskcut_rounds: Count = 3  # MaskCut: masks an image at most
    maskcut_tau: Annotated[Number, Field(gt=-1, lt=1)] = 0.15  # cosine from which two patches are joined
    maskcut_size: Count = 480  # side of the square the image is resized to
    maskcut_facet: Literal["keys", "queries", "values"] = "keys"  # of DINO's last layer
    detector_score: Share = 0.5  # Mask R-CNN of torchvision: lowest score of a proposal
    cutler_score: Share = 0.35  # CutLER: lowest score of a proposal
    sam_points: Count = 32  # SAM: points along a side of the prompt grid
    sam_iou: Share = 0.88  # lowest predicted IoU
    sam_stability: Share = 0.95  # lowest stability score
    grounding_box: Share = 0.25  # Grounded SAM: lowest box score
    grounding_text: Share = 0.25  # lowest text score
    resize: Literal["area", "bilinear"] = "area"  # a cell is inside if half of it is, or what is interpolated is not 0

    @model_validator(mode="after")
    def _fallback_divides(self):
        divided = self.fallback == "otsu" or self.segmenter == "threshold"
        if divided and self.threshold_foreground >= self.threshold_classes:
            raise _crossed("masks", self, "threshold_foreground", "below", "threshold_classes")
        if self.fallback == "fixed" and self.fallback_background > self.fallback_foreground:
            raise _crossed("masks", self, "fallback_background", "at most", "fallback_foreground")
        return self


@section
class Features:
    """Step 2b, Sec. 4.1 and App. C.2: the frozen extractors."""

    extractors: Names = Field(["sd"])  # names in features.EXTRACTORS; several = ensemble
    sd_layers: list[str] = Field([])  # modules whose attn2.to_q output is read, in this order
    sd_timestep: Annotated[Whole, Field(ge=0)] = 200  # tau
    sd_input_size: Count = 512  # every window is resized to this square before the VAE
    sd_latent: Literal["mean", "sample"] = "mean"  # of the VAE posterior
    sd_noise: Literal["seeded", "fixed"] = "seeded"  # by image and window, or one noise for all
    sd_noise_samples: Count = 1  # noise draws averaged per image
    clip_input_size: Count = 448  # support images are resized to this before CLIP; windows keep their size
    clip_layer: Whole = -2  # transformer layer the keys or tokens come from
    clip_normalisation: Literal["clip", "imagenet"] = "clip"  # pixels' mean and deviation (released: imagenet)
    dino_input_size: Count = 448  # as clip_input_size
    mae_input_size: Count = 448  # as clip_input_size
    vit_scale: Annotated[Number, Field(gt=0, le=16)] = 1.0  # what DINO, MAE and CLIP see is enlarged so much
    batch_size: Count = 8  # images at a time
    seed: Seed = 0


@section
class PrototypeSettings:
    """Step 2c, Eq. 2 and 3: which prototypes a category gets."""

    kinds: Kinds = Field(["class", "instance", "part"])
    clusters: Annotated[Whole, Field(ge=1, le=16_383)] = 32  # K part prototypes per region; both count in 16 bits
    background: Flag = True  # background prototypes; without them matching.background_threshold decides
    seed: Seed = 0


@section
class Filters:
    """Step 3a, Sec. 3.4: category pre-filter and "stuff" filter."""

    category: Flag = True
    category_prompt: Annotated[str, Field(pattern=r"\{names\}")] = "{names}"  # CLIP text; {names} = "a and b and c"
    category_joiner: str = " and "
    category_top: Annotated[Whole, Field(ge=1, le=16)] = 10  # eta; 16 means 65,535 prompts an image
    category_logit_scale: Positive | None = None  # null = the model's own
    category_crop: Literal["squash", "centre"] = "squash"  # how an image becomes CLIP's square input
    category_keep_stuff: Flag = False  # stuff categories pass the pre-filter always (released code)
    stuff: Flag = True
    stuff_threshold: Cosines = 0.85  # of all extractors, or a mapping: a cosine means something else in each space
    stuff_against: Literal["stuff", "all"] = "stuff"  # whose foreground rejects background prototypes (App. A.2)
    stuff_background: Flag = False  # stuff classes keep their background prototypes (App. A.2)
    stuff_parts: Flag = True  # stuff classes keep their part prototypes (App. A.2)


@section
class Matching:
    """Step 3b, Eq. 4: windows and cosine matching."""

    short_side: Count = 448
    long_side: Count | None = 2048  # a longer image is scaled down below short_side; null: never
    windows: list[Count] = Field([448, 336])
    stride: Count = 224
    whole_image: Flag = False  # the squashed whole image as one more window (released code), or the only one
    background_threshold: Numbers = None  # score of a background without prototypes, as stuff_threshold; null: no score
    resample: Literal["bilinear", "lanczos"] = "bilinear"  # how the image comes to short_side (released code: lanczos)
    minimum_score: Number | None = None  # a pixel whose best score is not above this is background (released code: 0)
    refine: Literal["none", "pamr"] = "none"  # post-processing of the scores
    pamr_iterations: Count = 10
    pamr_dilations: Annotated[list[Count], Field(min_length=1)] = Field([1, 2, 4, 8, 12, 24])
    batch_size: Count = 8  # windows at a time

    @model_validator(mode="after")
    def _windows_cover_the_image(self):
        sizes = self.windows or [self.short_side] * self.whole_image
        if not sizes or max(sizes) > self.short_side:
            raise _crossed("matching", self, "windows", "at least one size, each at most", "short_side")
        if self.stride > min(sizes):
            raise _crossed("matching", self, "stride", "at most the smallest of", "windows")
        if self.long_side is not None and self.long_side < self.short_side:
            raise _crossed("matching", self, "long_side", "null or at least", "short_side")
        return self


@section
class Evaluation:
    """Which data sets stand in the columns of the paper's tables, as "name", "name/split" or "name:folder"."""

    voc: str = "voc"  # Tables 1 to 3 and their kin
    context: str = "context"
    object: str = "coco-object"
    without_background: dict[str, str] = Field({})  # columns of Table A.7: paper's name -> data set
    tune: str = ""  # split of the same data sets on which constants are chosen; "" = they have none
    extractors: Names = Field(["sd", "dino", "clip-keys"])  # the ensemble of the main tables
    images: Count | None = None  # the first so many images of each data set; null = all
    seeds: list[Seed] = Field([0, 1, 2, 3, 4])


@section
class Baselines:
    """What the methods of Table 1, A.1 and A.2 need beside the fields above; no field of it changes OVDiff."""

    maskclip_templates: Templates = Field(["a photo of a {name}."])  # a class's embedding is the mean over templates
    clip_diy_templates: Templates = Field(["a photo of a {name}"])
    reco_templates: Templates = Field(["a photo of a {name}."])
    groupvit_templates: Templates = Field(["a photo of a {name}."])
    clip_segmenter_templates: Templates = Field(["a photo of a {name}."])
    # Published scores of the background, by baseline and data set; the best constant is searched where there is none.
    constants: dict[Literal["maskclip", "clip-diy", "reco", "groupvit"], dict[str, Number]] = Field({})
    archive: str = ""  # images that ReCo retrieves from: a folder, or package:NAME for one that ships; "" = not set
    reco_retrieved: Count = 50  # k, images retrieved a class
    reco_size: Count = 224  # side of the square that retrieved images are cropped to, pixels
    reco_contexts: list[str] = Field(["tree", "sky", "building", "road", "person"])  # what seeds avoid
    clip_diy_size: Count = 256  # CLIP-DIY: side of the square an image is squashed to, pixels
    clip_diy_scales: Count = 3  # patches of the whole side, of half of it, of a quarter and so on
    clip_diy_background: list[str] = Field(["background"])  # words of the background
    clip_diy_seed_cosine: Annotated[Number, Field(gt=0, le=0.5)] = 0.3  # to the background seed, half salient (FOUND)


UNUSED_BY_THE_METHOD = ("name", "description", "evaluation", "baselines")
"""What changes no segmentation of OVDiff: what a profile is called, measured on and compared with."""


@section
class Profile:
    """All values of one run. ``name`` only labels outputs; no code branches on it."""

    name: str
    description: str
    models: Models
    support: Support = Support()
    masks: Masks = Masks()
    features: Features = Features()
    prototypes: PrototypeSettings = PrototypeSettings()
    filters: Filters = Filters()
    matching: Matching = Matching()
    evaluation: Evaluation = Evaluation()
    baselines: Baselines = Baselines()

    def override(self, overrides: dict[str, Any] | None) -> "Profile":
        """A copy with ``{"section.field": value}`` replaced. Raises ``ProfileError``."""
        table = self.to_dict()
        for key, value in (overrides or {}).items():
            if key not in field_names():
                raise ProfileError(f"There is no profile field {str(key)!r}; {legal(str(key), _beside(str(key)))}")
            step, _, name = key.partition(".")
            table[step][name] = value
        return from_dict(table, f"overrides of profile {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Hash (16 hex digits) of all that changes a segmentation."""
        chosen = {key: value for key, value in self.to_dict().items() if key not in UNUSED_BY_THE_METHOD}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


SECTIONS = {f.name: f.type for f in dataclasses.fields(Profile) if dataclasses.is_dataclass(f.type)}


def field_names() -> list[str]:
    """Every field that ``overrides`` may address, as ``section.field``."""
    return [f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in dataclasses.fields(kind)]


def of_extractor(field: str, value: Any, extractor: str) -> Any:
    """The ``value`` of ``field`` for one extractor: itself, or a mapping's entry. ``ProfileError`` if that has none."""
    if not isinstance(value, dict):
        return value
    if extractor not in value:
        named = ", ".join(value) or "no extractor"
        raise ProfileError(f"{field} names {named} but not {extractor!r}, which the profile matches with; add it, or "
                           "give one number for all.")
    return value[extractor]


def _beside(field: str) -> list[str]:
    """The fields of the section of ``field``; where there is no such section, the sections."""
    return [name for name in field_names() if name.startswith(f"{field.partition('.')[0]}.")] or [*SECTIONS]


def from_dict(table: Any, origin: str) -> Profile:
    """A validated profile from nested dictionaries. ``ProfileError`` says where (``origin``), what, and what to do."""
    try:
        return TypeAdapter(Profile).validate_python(table)
    except ValidationError as caught:
        raise ProfileError(f"In the {origin}, {_sentence(caught.errors()[0])}") from None


def _sentence(wrong: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in wrong["loc"] if part not in (ONE.tag, EACH.tag, "[key]"))
    said = wrong["msg"].removeprefix("Value error, ")
    if wrong["type"] in ("unexpected_keyword_argument", "invalid_key"):
        return f"there is no field {name!r}; {legal(name, _beside(name))}"
    if wrong["type"] == "missing":
        return f"the field {name} is missing; add it."
    _, should, what = said.replace("\\", "").partition(" should ")
    return f"{name or 'the whole'} is {wrong['input']!r}; it should {what}." if should else said
