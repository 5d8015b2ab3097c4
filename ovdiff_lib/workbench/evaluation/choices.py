"""Choices that the paper leaves open or that the released code makes otherwise, each a row that switches it alone.

Every one is a field of the profile; a row takes the alternative to what the profile has, so the same list serves
profiles that follow the paper and those that follow the code. A switch that nothing in a run depends on gives the same
label maps as its base: it was not exercised, and that is said instead of a difference of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.evaluation.rows import Row
from ovdiff_lib.workbench.tables.tables import IDLE, Cell

FULL, CLIP, THRESHOLDS = "full", "full, CLIP keys", "full, thresholds alone"
"""Labels of the rows that changes are measured against."""

BASES: dict[str, dict[str, Any]] = {
    FULL: {},
    CLIP: {"features.extractors": ["clip-keys"]},
    THRESHOLDS: {"masks.segmenter": "threshold", "masks.fallback": "otsu"},  # every image is one without proposals
}
"""Settings of those rows."""

NOT_SWITCHED = (
    "Not switched: MAE's variant (the released code's weights are another model; Table 2 has MAE as the profile has "
    "it), and the restarts of k-means (the code's n_init \"auto\" is one start with k-means++, as here where all "
    "points are clustered and not a sample).")
"""Choices of the released code without a row, and why."""


@dataclass(frozen=True)
class Choice:
    """Two ways: ``paper`` (its text, or the default where it is silent) and ``code`` (the released code, or a
    documented alternative), each (label, settings). ``base`` is the row both are measured against; ``idle`` says why
    the two may give the same label maps."""

    paper: tuple[str, dict[str, Any]]
    code: tuple[str, dict[str, Any]]
    base: str = FULL
    idle: str = ""

    def other(self, profile: Profile) -> tuple[str, dict[str, Any]]:
        """The way that ``profile``, with the settings of the base, does not go."""
        own = profile.override(BASES[self.base])
        return self.paper if own.override(self.code[1]) == own else self.code


def _field(name: str, paper: tuple[str, Any], code: tuple[str, Any], base: str = FULL, idle: str = "") -> Choice:
    return Choice((paper[0], {name: paper[1]}), (code[0], {name: code[1]}), base, idle)


CHOICES: tuple[Choice, ...] = (
    _field("support.mid_block", ("attribution: without the mid block", False), ("attribution: the mid block too", True),
           idle="the mid block adds too little attention to change a mask"),
    _field("masks.overlaps", ("proposals may overlap", "keep"),
           ("proposals made disjoint by attribution", "attribution")),
    _field("masks.background_below", ("background: the lowest mask as it is", 1.0),
           ("background: only attribution < 0.2", 0.2)),
    _field("masks.erosion", ("background not eroded", 0), ("background eroded by 1 pixel", 1)),
    Choice(("proposals: score of at least 0.35", {"masks.cutler_score": 0.35, "masks.detector_score": 0.35}),
           ("proposals: score of at least 0.5", {"masks.cutler_score": 0.5, "masks.detector_score": 0.5}),
           idle="this segmenter scores no proposals, or none between the two"),
    _field("masks.fallback", ("no proposals: multi-Otsu", "otsu"), ("no proposals: fixed thresholds", "fixed"),
           THRESHOLDS),
    _field("masks.threshold_scope", ("thresholds of each image", "image"),
           ("thresholds of the whole support set", "set"), THRESHOLDS),
    _field("masks.resize", ("mask cell: more than half inside", "area"), ("mask cell: any pixel inside", "any")),
    _field("features.sd_latent", ("VAE latent: mean", "mean"), ("VAE latent: sampled", "sample")),
    _field("features.sd_noise", ("noise by image and window", "seeded"), ("the same noise everywhere", "fixed")),
    _field("features.sd_noise_samples", ("one draw of noise", 1), ("mean over 3 draws of noise", 3)),
    _field("matching.whole_image", ("windows alone", False), ("whole image as a further window", True)),
    _field("matching.resample", ("image resized: bilinear", "bilinear"), ("image resized: Lanczos", "lanczos")),
    _field("matching.minimum_score", ("any best score counts", None), ("scores <= 0 are background", 0.0),
           idle="no pixel's best score is as low as 0"),
    Choice(('filter prompt "x and y"', {"filters.category_prompt": "{names}", "filters.category_joiner": " and "}),
           ('filter prompt "a x and a y"',
            {"filters.category_prompt": "a {names}", "filters.category_joiner": " and a "})),
    _field("filters.category_logit_scale", ("filter: the model's logit scale", None), ("filter: no logit scale", 1.0)),
    _field("filters.category_crop", ("filter sees the squashed image", "squash"),
           ("filter sees the centre crop", "centre")),
    _field("filters.category_keep_stuff", ("filter judges stuff too", False), ("filter keeps all stuff", True),
           idle="no class of this data set is stuff"),
    _field("filters.category_top", ("filter: at most 10 classes", 10), ("filter: at most 5 classes", 5),
           idle="never more than 5 classes passed 1/C"),
    _field("features.clip_normalisation", ("CLIP keys: CLIP's pixel statistics", "clip"),
           ("CLIP keys: ImageNet's pixel statistics", "imagenet"), CLIP),
    _field("features.clip_layer", ("CLIP keys: second-to-last layer", -2), ("CLIP keys: last layer", -1), CLIP),
)


def rows_of_choices(profile: Profile) -> list[Row]:
    """The base rows, and one row for each choice with the way that ``profile`` does not go."""
    ways = [(BASES[choice.base], *choice.other(profile)) for choice in CHOICES]
    return [*(Row(label, settings) for label, settings in BASES.items()),
            *(Row(label, {**base, **settings}) for base, label, settings in ways)]


def changes(cells: Sequence[Cell]) -> list[Cell]:
    """For each measured cell of :func:`rows_of_choices` but the bases, the difference to its base in the same column.

    n and values follow the pairs of seeds; columns become "<column>, change". Where every run has exactly the mIoU of
    its base the cell is idle, "not exercised", with the reason where one is known: a mean over classes that agrees to
    the last bit is one of the same counts.
    """
    of = {label: choice for choice in CHOICES for label, _ in (choice.paper, choice.code)}
    values = {(cell.row, cell.column): cell.values for cell in cells}
    made = []
    for cell in cells:
        if cell.row not in of:
            continue
        choice, column = of[cell.row], f"{cell.column}, change"
        differences = [a - b for a, b in zip(cell.values, values[choice.base, cell.column], strict=True)]
        if any(differences):
            made.append(Cell.of(cell.row, column, differences))
        else:
            why = f"not exercised: {choice.idle}" if choice.idle else "not exercised"
            made.append(Cell(cell.row, column, source=IDLE + why))
    return made
