"""Undocumented choices, each row of which switches one alone; thresholds: candidates as defined, and the best of them chosen."""

import numpy as np
import pytest
import yaml
from oracles import runs_of

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.evaluation import tuning
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.evaluation.choices import BASES, CHOICES, CLIP, FULL, PAMR, THRESHOLDS, changes, rows_of_choices
from ovdiff_lib.workbench.evaluation.rows import LEVELS, Row, Searched
from ovdiff_lib.workbench.evaluation.tuning import CONSTANT, KEPT, STUFF, Tried, cells_of, extractors_of, lines_of, tune
from ovdiff_lib.workbench.tables.tables import Cell


def cell(row, column, values, noise=1.0):
    """Without noise over images two cells of the same values have the same counts."""
    return Cell.of(row, column, values, runs=runs_of(values, noise, row))


@pytest.mark.parametrize("name", ["mini", "paper", "official"])
def test_every_row_switches_one_choice(name):
    profile = load_profile(name)
    rows = rows_of_choices(profile)
    assert [row.label for row in rows[:4]] == [FULL, CLIP, THRESHOLDS, PAMR] == list(BASES)
    assert len({row.label for row in rows}) == len(rows) == len(CHOICES) + 4
    for choice, row in zip(CHOICES, rows[4:], strict=True):
        base = profile.override({row.label: row.settings for row in rows[:4]}[choice.base])
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
    paper, official = ([row.label for row in rows_of_choices(load_profile(name))[4:]] for name in ("paper", "official"))
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


# ---------------------------------------------------------------------- thresholds

def made(rng, front, behind):
    n = front + behind
    region = rng.permutation(["foreground"] * front + ["background"] * behind)
    return Prototypes(rng.normal(size=(n, 3)).astype(np.float32), np.array(["part"] * n), region, np.full(n, -1, np.int32),
                      np.arange(n, dtype=np.int32), np.zeros((1, 2, 2), np.int16))


def test_likeness_is_each_things_background_against_all_stuff():
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(tuple(Category(f"c{i}", kind=kind) for i, kind in enumerate(("thing", "stuff", "thing", "stuff"))))
    bank = PrototypeBank(vocabulary, {"one": tuple(made(rng, 3, 4) for _ in range(4))})
    rows, expected = bank.prototypes["one"], []
    for thing in (rows[0], rows[2]):
        for vector in thing.vectors[thing.region == "background"]:
            others = [other for stuff in (rows[1], rows[3]) for other in stuff.vectors[stuff.region == "foreground"]]
            expected.append(max(vector @ o / np.linalg.norm(vector) / np.linalg.norm(o) for o in others))
    assert tuning.likeness(bank, "one") == pytest.approx(expected, abs=1e-6)
    for wrong in (bank.restrict([0, 2]), bank.restrict([1, 3]), bank.without_background()):
        with pytest.raises(InputError, match=r"filters\.stuff_threshold"):
            tuning.likeness(wrong, "one")


@pytest.fixture(scope="module")
def bench(tiny_profile, tmp_path_factory):
    """Two extractors; its data sets have two things, and one kind of stuff."""
    named = {"filters.stuff_threshold": {"clip-keys": 0.5, "sd": 0.5}, "filters.category": False}
    bench = Bench(tiny_profile, named, library=tmp_path_factory.mktemp("tuning"), seeds=[3], images=2, progress=False)
    for source in ("mini-voc/tune", "mini-context/tune"):
        data = bench.dataset(source)
        data.vocabulary = Vocabulary(data.vocabulary.categories[:2] + data.vocabulary.categories[20:21])
        table = np.where(data.table == 21, 3, np.where((data.table > 2) & (data.table < 255), 0, data.table))
        data.table[:] = table
    return bench


def test_the_best_candidate_of_each_space_is_chosen(bench):
    tried = tune(bench)
    assert [(one.field, one.extractor) for one in tried] == [(CONSTANT, "clip-keys"), (CONSTANT, "sd"), (STUFF, "clip-keys"), (STUFF, "sd")]
    for one in tried:
        assert list(one.values) == sorted(one.values) and one.miou[one.best] == max(one.miou)
        assert len(one.values) == len(one.labels) == len(one.miou) == (len(KEPT) if one.field == STUFF else LEVELS - 1)
    constant, stuff = tried[1], tried[3]
    row = Searched("search", {"features.extractors": ["sd"]})
    (best,) = bench.measure([row], "mini-voc/tune")["search"]
    assert best.miou * 100 == pytest.approx(max(constant.miou))
    own = {"features.extractors": ["sd"], CONSTANT: constant.values[constant.best]}
    for place in (0, -1):  # the shares that are kept, counted by hand, and the mIoU
        ovdiff = bench.ovdiff({**own, STUFF: stuff.values[place]})
        bank = ovdiff.build(bench.dataset("mini-context/tune").vocabulary)
        left = ovdiff.stuff_filter(bank).counts("background")["sd"]
        assert sum(left[:2]) == pytest.approx(KEPT[place] * sum(bank.counts("background")["sd"][:2]), abs=1)
        row = Row("kept", {**own, STUFF: stuff.values[place]})
        assert 100 * bench.measure([row], "mini-context/tune")["kept"][0].miou == pytest.approx(stuff.miou[place])


def test_other_prototypes_get_the_threshold_that_keeps_the_same_share(bench):
    own = Bench(bench.profile, {"evaluation.context": "mini-context/tune"}, library=bench.library, seeds=[3], progress=False)
    own._datasets, words, left = bench._datasets, bench.dataset("mini-context/tune").vocabulary, []
    rows = [Row("all"), Row("parts", {"prototypes.kinds": ["part"], STUFF: 1.0})]
    for row in tuning.same_share(own, rows):
        bank = own.ovdiff(row.settings).build(words)
        counts = [one.counts("background") for one in (own.ovdiff(row.settings).stuff_filter(bank), bank)]
        left += [sum(counts[0][name][:2]) / sum(counts[1][name][:2]) for name in bank.extractors]
    half = len(left) // 2
    assert left[half:] == pytest.approx(left[:half], abs=1 / 8) and min(left) < 1
    assert tuning.same_share(Bench(bench.profile, {"evaluation.context": "mini-voc"}, library=bench.library), rows) == rows


def test_a_table_and_the_lines_of_a_profile(tiny_profile):
    many = tuple(i / 100 for i in range(1, 31))
    tried = [Tried(CONSTANT, "sd", tuple(map(str, many)), many, tuple(-abs(v - 0.07) for v in many)),
             Tried(STUFF, "sd", ("a", "b"), (0.5, 0.75), (1.0, 1.0)), Tried(STUFF, "mae", ("a", "b"), (0.5, 0.75), (1.0, 2.0))]
    cells = {(cell.row, cell.column): cell.measured for cell in cells_of(tried)}
    assert cells[f"{CONSTANT}, chosen", "sd, value"] == 0.07 and cells[f"{STUFF}, chosen", "sd, value"] == 0.5
    assert [row for row, column in cells if column == "sd, mIoU" and row.startswith(CONSTANT)] == [
        f"{CONSTANT}, {label}" for label in ("0.1", "0.2", "0.3", "chosen")]
    assert cells[f"{STUFF}, b", "mae, mIoU"] == 2.0 and len(cells) == 8 + 12
    table = yaml.safe_load(lines_of(tried))
    assert table == {"matching": {"background_threshold": {"sd": 0.07}}, "filters": {"stuff_threshold": {"sd": 0.5, "mae": 0.75}}}
    overrides = {f"{step}.{name}": value for step, fields in table.items() for name, value in fields.items()}
    assert tiny_profile.override(overrides).filters.stuff_threshold == {"sd": 0.5, "mae": 0.75}
    assert cells_of([])[0].idle and extractors_of(tiny_profile) == ["sd", "dino", "clip-keys"]


def test_without_a_split_there_is_nothing_to_choose_by(tiny_profile, tmp_path):
    assert tune(Bench(tiny_profile, {"evaluation.tune": ""}, library=tmp_path, progress=False)) == []
