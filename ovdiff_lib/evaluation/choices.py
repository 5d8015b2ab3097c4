"""Choices that the paper leaves open or that the released code makes otherwise, each as a row that switches it alone.

Every one is a field of the profile; a row takes the alternative to what the profile has, so the same list serves profiles that follow the
paper and those that follow the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ovdiff_lib.evaluation.rows import Row
from ovdiff_lib.profiles import Profile

if TYPE_CHECKING:
    from ovdiff_lib.report.tables import Cell

FULL, CLIP = "full", "full, CLIP keys"
"""Labels of the rows that changes are measured against."""


@dataclass(frozen=True)
class Choice:
    """Two ways: ``paper`` (its text, or the default where it is silent) and ``code`` (the released code, or a documented alternative),
    each (label, settings). ``base`` is the row both are measured against."""

    paper: tuple[str, dict[str, Any]]
    code: tuple[str, dict[str, Any]]
    base: str = FULL

    def other(self, profile: Profile) -> tuple[str, dict[str, Any]]:
        """The way that ``profile`` does not go."""
        table = profile.to_dict()
        goes_with_code = all(table[field.split(".")[0]][field.split(".")[1]] == value for field, value in self.code[1].items())
        return self.paper if goes_with_code else self.code


def _field(name: str, paper: tuple[str, Any], code: tuple[str, Any], base: str = FULL) -> Choice:
    return Choice((paper[0], {name: paper[1]}), (code[0], {name: code[1]}), base)


CHOICES: tuple[Choice, ...] = (
    _field("support.mid_block", ("attribution: without the mid block", False), ("attribution: the mid block too", True)),
    _field("masks.overlaps", ("proposals may overlap", "keep"), ("proposals made disjoint by attribution", "attribution")),
    _field("masks.background_below", ("background: the lowest mask as it is", 1.0), ("background: only attribution < 0.2", 0.2)),
    _field("masks.erosion", ("background not eroded", 0), ("background eroded by 1 pixel", 1)),
    _field("masks.fallback", ("no proposals: multi-Otsu", "otsu"), ("no proposals: fixed thresholds", "fixed")),
    _field("masks.threshold_scope", ("thresholds of each image", "image"), ("thresholds of the whole support set", "set")),
    _field("masks.resize", ("mask cell: more than half inside", "area"), ("mask cell: any pixel inside", "any")),
    _field("features.sd_latent", ("VAE latent: mean", "mean"), ("VAE latent: sampled", "sample")),
    _field("features.sd_noise", ("noise by image and window", "seeded"), ("the same noise everywhere", "fixed")),
    _field("features.sd_noise_samples", ("one draw of noise", 1), ("mean over 3 draws of noise", 3)),
    _field("matching.whole_image", ("windows alone", False), ("whole image as a further window", True)),
    _field("matching.resample", ("image resized: bilinear", "bilinear"), ("image resized: Lanczos", "lanczos")),
    _field("matching.minimum_score", ("any best score counts", None), ("scores <= 0 are background", 0.0)),
    Choice(('filter prompt "x and y"', {"filters.category_prompt": "{names}", "filters.category_joiner": " and "}),
           ('filter prompt "a x and a y"', {"filters.category_prompt": "a {names}", "filters.category_joiner": " and a "})),
    _field("filters.category_logit_scale", ("filter: the model's logit scale", None), ("filter: no logit scale", 1.0)),
    _field("filters.category_crop", ("filter sees the squashed image", "squash"), ("filter sees the centre crop", "centre")),
    _field("filters.category_keep_stuff", ("filter judges stuff too", False), ("filter keeps all stuff", True)),
    _field("filters.category_top", ("filter: at most 10 classes", 10), ("filter: at most 5 classes", 5)),
    _field("features.clip_normalisation", ("CLIP keys: CLIP's pixel statistics", "clip"),
           ("CLIP keys: ImageNet's pixel statistics", "imagenet"), CLIP),
    _field("features.clip_layer", ("CLIP keys: second-to-last layer", -2), ("CLIP keys: last layer", -1), CLIP),
)

KEYS = {"features.extractors": ["clip-keys"]}


def rows_of_choices(profile: Profile) -> list[Row]:
    """The two base rows, and one row for each choice with the way that ``profile`` does not go."""
    rows = [Row(FULL), Row(CLIP, KEYS)]
    for choice in CHOICES:
        label, settings = choice.other(profile)
        rows.append(Row(label, {**settings, **(KEYS if choice.base == CLIP else {})}))
    return rows


def changes(cells: Sequence[Cell]) -> list[Cell]:
    """For each measured cell of :func:`rows_of_choices` but the bases, the difference to its base in the same column; n and values follow
    the pairs of seeds. Columns become "<column>, change"."""
    from ovdiff_lib.report.tables import Cell

    base = {label: choice.base for choice in CHOICES for label, _ in (choice.paper, choice.code)}
    found = {(cell.row, cell.column): cell for cell in cells}
    made = []
    for cell in cells:
        if cell.row in base:
            pairs = zip(cell.values, found[base[cell.row], cell.column].values, strict=True)
            made.append(Cell.of(cell.row, f"{cell.column}, change", [value - before for value, before in pairs]))
    return made
