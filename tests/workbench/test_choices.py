"""Undocumented choices: each row switches one thing alone, to what the profile does not do."""

import numpy as np
import pytest
from oracles import runs_of

from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.workbench.evaluation.choices import BASES, CHOICES, CLIP, FULL, THRESHOLDS, changes, rows_of_choices
from ovdiff_lib.workbench.tables.tables import Cell


def cell(row, column, values, noise=1.0):
    """Without noise over images two cells of the same values have the same counts."""
    return Cell.of(row, column, values, runs=runs_of(values, noise, row))


@pytest.mark.parametrize("name", ["mini", "paper", "official"])
def test_every_row_switches_one_choice(name):
    profile = load_profile(name)
    rows = rows_of_choices(profile)
    assert [row.label for row in rows[:3]] == [FULL, CLIP, THRESHOLDS] == list(BASES)
    assert len({row.label for row in rows}) == len(rows) == len(CHOICES) + 3
    for choice, row in zip(CHOICES, rows[3:], strict=True):
        base = profile.override({row.label: row.settings for row in rows[:3]}[choice.base])
        changed = base.override(row.settings)
        assert changed.digest() != base.digest(), row.label
        before, after = base.to_dict(), changed.to_dict()
        differing = {f"{s}.{f}" for s in before if isinstance(before[s], dict) for f in before[s] if before[s][f] != after[s][f]}
        assert differing <= set(choice.code[1]) and differing, row.label
        # With proposals in every image thresholds could not act.
        alone = {"masks.threshold_scope"} & differing
        assert (choice.base == THRESHOLDS) == bool(alone) and (not alone or base.masks.segmenter == "threshold"), row.label


def test_profiles_of_paper_and_code_take_opposite_ways():
    """Where the official profile follows the code, its row is the paper's way, and the other way round."""
    paper, official = ([row.label for row in rows_of_choices(load_profile(name))[3:]] for name in ("paper", "official"))
    opposite = [c.paper[0] for c, a, b in zip(CHOICES, paper, official, strict=True) if a == c.code[0] and b == c.paper[0]]
    assert len(opposite) >= 10


def test_changes_are_against_their_own_base():
    label = CHOICES[0].code[0]
    clip = next(c.code[0] for c in CHOICES if c.base == CLIP)
    full, changed, *others = [cell(FULL, "voc", [50.0, 52.0]), cell(label, "voc", [51.0, 51.0]), cell(CLIP, "voc", [40.0, 41.0]),
                              cell(clip, "voc", [43.0, 40.0])]
    first, second = changes([full, changed, *others])
    assert (first.row, first.column, first.values, first.measured) == (label, "voc, change", (1.0, -1.0), 0.0)
    assert second.values == (3.0, -1.0) and second.measured == 1.0 and second.n == 2
    assert [first.low, first.high] == pytest.approx(np.quantile(changed.runs.draws - full.runs.draws, [0.025, 0.975]))


def test_a_switch_that_changes_nothing_was_not_exercised():
    """In one of two columns, or in all; one run of two that differs is a difference."""
    stuff = next(c for c in CHOICES if "filters.category_keep_stuff" in c.code[1])
    label, latent = stuff.paper[0], next(c.code[0] for c in CHOICES if "features.sd_latent" in c.code[1])
    cells = [cell(FULL, "voc", [50.0, 52.0], 0), cell(FULL, "context", [30.0, 31.0], 0), cell(label, "voc", [50.0, 52.0], 0),
             cell(label, "context", [30.0, 20.0], 0), cell(latent, "voc", [50.0, 52.0], 0)]
    idle, acting, silent = changes(cells)
    assert (idle.row, idle.column, idle.measured) == (label, "voc, change", None)
    assert idle.idle == "not exercised: no class of this data set is stuff" and silent.idle == "not exercised"
    assert acting.values == (0.0, -11.0) and not acting.idle
