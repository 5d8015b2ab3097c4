"""Undocumented choices: each row switches one thing alone, to what the profile does not do."""

import pytest

from ovdiff_lib.evaluation.choices import CHOICES, CLIP, FULL, changes, rows_of_choices
from ovdiff_lib.profiles import load_profile
from ovdiff_lib.report.tables import Cell


@pytest.mark.parametrize("name", ["mini", "paper", "official"])
def test_every_row_switches_one_choice(name):
    profile = load_profile(name)
    rows = rows_of_choices(profile)
    assert [row.label for row in rows[:2]] == [FULL, CLIP] and len({row.label for row in rows}) == len(rows) == len(CHOICES) + 2
    for choice, row in zip(CHOICES, rows[2:], strict=True):
        base = profile.override({"features.extractors": ["clip-keys"]}) if choice.base == CLIP else profile
        changed = base.override(row.settings)
        assert changed.digest() != base.digest(), row.label
        before, after = base.to_dict(), changed.to_dict()
        differing = {f"{s}.{f}" for s in before if isinstance(before[s], dict) for f in before[s] if before[s][f] != after[s][f]}
        assert differing <= set(choice.code[1]) and differing, row.label


def test_profiles_of_paper_and_code_take_opposite_ways():
    """Where the official profile follows the code, its row is the paper's way, and the other way round."""
    paper, official = ([row.label for row in rows_of_choices(load_profile(name))[2:]] for name in ("paper", "official"))
    opposite = [c.paper[0] for c, a, b in zip(CHOICES, paper, official, strict=True) if a == c.code[0] and b == c.paper[0]]
    assert len(opposite) >= 10


def test_changes_are_against_their_own_base():
    label = CHOICES[0].code[0]
    clip = next(c.code[0] for c in CHOICES if c.base == CLIP)
    cells = [Cell.of(FULL, "voc", [50.0, 52.0]), Cell.of(CLIP, "voc", [40.0, 41.0]), Cell.of(label, "voc", [51.0, 51.0]),
             Cell.of(clip, "voc", [43.0, 40.0])]
    first, second = changes(cells)
    assert (first.row, first.column, first.values, first.measured) == (label, "voc, change", (1.0, -1.0), 0.0)
    assert second.values == (3.0, -1.0) and second.measured == 1.0 and second.n == 2
