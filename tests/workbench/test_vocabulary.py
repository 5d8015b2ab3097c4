"""The vocabulary doctor: collisions against brute force and against rebuilt prototypes, words, masks, readings, and the command."""

import itertools
import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from sentences import assigned
from tiny import tiny_overrides

from ovdiff_lib import InputError, OVDiff, OVDiffError, ProfileError
from ovdiff_lib.cli.main import main
from ovdiff_lib.filters.stuff import bare, filter_stuff
from ovdiff_lib.library.store import Library
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.networks import instruments
from ovdiff_lib.profiles.schema import PrototypeSettings
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.types import ForegroundBackground
from ovdiff_lib.workbench.analysis.margins import confusions
from ovdiff_lib.workbench.data.classes import class_table, vocabulary_of
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.figures.charts import share_tables
from ovdiff_lib.workbench.vocabulary.examine import AMBIGUOUS, Collisions, Limits, collide, examine, own_similarity

GRID = (5, 7)
TABLES = [field.name for field in fields(Collisions)]
NAMES = "cat, dog, mouse, water"
LOOSE = Limits(collide_look=2, collide_bad=2, recognised_look=0, recognised_bad=0, foreground_bad=0, masks_look=2, pieces=99)
"""Limits that nothing exceeds."""


def support_features(rng, centre, around=0.0, images=4, channels=12, empty=()):
    """Features f32 (N, *GRID, D) around ``centre`` on the foreground of random masks and ``around`` beside it, and the masks."""
    foreground = rng.random((images, *GRID)) < 0.4
    foreground[:, 2, 3] = True
    foreground[list(empty)] = False
    background = ~foreground & (rng.random(foreground.shape) < 0.7)
    features = np.where(foreground[..., None], centre, around) + rng.normal(size=(*foreground.shape, channels))
    return features.astype(np.float32), ForegroundBackground(foreground, background, ("threshold",) * images)


def some_classes(count=5, seed=0, kinds=("class", "instance", "part"), channels=12):
    rng = np.random.default_rng(seed)
    settings = PrototypeSettings(clusters=3, kinds=list(kinds))
    made = []
    for k in range(count):
        features, masks = support_features(rng, 0.15 * rng.normal(size=channels), empty=(1,) if k == 2 else ())
        made.append((features, masks, build_prototypes(features, masks, settings)))
    return made


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_hand(classes) -> Collisions:
    """The definitions, one pair of vectors at a time; an image is left out by building its class again without it."""
    settings = PrototypeSettings(clusters=3, kinds=list(dict.fromkeys(classes[0][2].kind.tolist())))
    tables = {name: np.full((len(classes), len(classes)), np.nan) for name in TABLES}
    own = []
    for features, masks, p in classes:
        similarity = []
        for n in p.image[(p.kind == "instance") & (p.region == "foreground")]:
            left = masks.foreground.copy()
            left[n] = False
            without = build_prototypes(features, ForegroundBackground(left, masks.background, masks.source), settings)
            mine = features[n][masks.foreground[n]].mean(0)
            similarity.append(max(cosine(mine, v) for v in chosen(without, "foreground", parts=False)))
        own.append(similarity)
    for (a, (_, _, p)), (b, (_, _, q)) in itertools.permutations(enumerate(classes), 2):
        images = p.vectors[(p.kind == "instance") & (p.region == "foreground")]
        near, sinks = ([max(cosine(v, w) for w in vectors) for v in images]
                       for vectors in (chosen(q, "foreground", parts=False), chosen(q, "background")))
        tables["highest"][a, b] = max(cosine(v, w) for v in chosen(p, "foreground") for w in chosen(q, "foreground"))
        tables["lost"][a, b], tables["sunk"][a, b] = (np.mean([x > s for x, s in zip(found, own[a], strict=True)])
                                                      for found in (near, sinks))
        tables["passes"][a, b] = np.mean([x >= np.median(own[b]) for x in near])
    return Collisions(**tables)


def chosen(p, region, parts=True):
    return [v for v, kind, r in zip(p.vectors, p.kind, p.region, strict=True) if r == region and (parts or kind != "part")]


def same(found: Collisions, expected: Collisions):
    for name in TABLES:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name)


# ---------------------------------------------------------------------- collisions

@pytest.mark.parametrize("kinds", [("class", "instance", "part"), ("class", "instance")])
def test_the_tables_are_those_of_the_definitions(kinds):
    classes = some_classes(5, 4, kinds)
    found = collide([p for _, _, p in classes])
    same(found, by_hand(classes))
    assert all(0 < np.nanmean(table) < 1 for table in (found.lost, found.passes, found.sunk))  # they can be wrong


def test_collisions_need_instance_prototypes_and_no_others():
    assert np.isfinite(collide([p for _, _, p in some_classes(2, 5, ("instance",))]).lost[0, 1])
    with pytest.raises(InputError, match="instance"):
        collide([p for _, _, p in some_classes(2, 5, ("class", "part"))])


def test_what_cannot_be_compared_is_nan():
    full, lonely, bare = (p for _, _, p in some_classes(3, 6))
    lonely = lonely.select((lonely.kind != "instance") | (lonely.image == 0))
    bare = bare.select(bare.region == "foreground")
    found = collide([full, lonely, bare])
    assert np.isnan(found.lost[1]).all() and np.isnan(found.sunk[1]).all() and np.isnan(found.sunk[:, 2]).all()
    assert np.isfinite(found.lost[[0, 0, 2, 2], [1, 2, 0, 1]]).all() and np.isfinite(found.sunk[[0, 2, 2], [1, 0, 1]]).all()
    assert np.isnan(found.passes[:, 1]).all() and np.isfinite(found.passes[[0, 1, 1, 2], [2, 0, 2, 0]]).all()
    assert np.isnan(np.diag(found.highest)).all() and np.isnan(own_similarity(lonely)).all()
    assert np.isnan(collide([full]).lost).all()


# ---------------------------------------------------------------------- words

def test_the_list_of_ambiguous_nouns_is_whole_and_content_with_its_own_advice():
    table = pd.read_csv(AMBIGUOUS)
    assert list(table) == ["noun", "senses", "rewordings"] and len(table) > 100 and table.noun.is_unique
    assert not table.isna().any(axis=None) and table.senses.str.contains("; ").all()
    rewordings = set(table.rewordings.str.split("; ").explode())
    assert not rewordings & set(table.noun)
    assert all(words == words.strip().casefold() and words for words in [*table.noun, *rewordings])
    data_sets = {name for key in class_table()["data_sets"] for name in vocabulary_of(key).names}
    assert len(data_sets & set(table.noun)) > 20
    assert not set(load_world().names) & set(table.noun)  # nothing is ambiguous in the mini world


# ---------------------------------------------------------------------- the examination

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def ovdiff(tiny_profile, folder) -> OVDiff:
    return OVDiff(tiny_profile, library=folder, progress=False)


def check_readings(ovdiff, report, judged, words):
    """Against CLIP itself: what it reads in the drawings of a class among ``judged``, and the nearest of ``words``."""
    asked = ovdiff.category_filter
    with torch.no_grad():
        texts = asked.clip.get_text_features(**asked.text.tokenizer(words, padding=True, return_tensors="pt")).pooler_output
    texts = dict(zip(words, torch.nn.functional.normalize(texts, dim=-1), strict=True))
    if report.name in judged:
        images = [asked.embed_image(image) for image in ovdiff.support(report.name).images]
        read = [max(judged, key=lambda word: float(texts[word] @ image)) for image in images]
        assert report.values["recognised"] == pytest.approx(read.count(report.name) / len(read))
        assert read.count(report.values["read_as"]) == max(map(read.count, read))
    near = {word: float(texts[word] @ texts[report.name]) for word in words if word != report.name}
    assert report.values["nearest_word"] == max(near, key=near.get)
    assert report.values["text_cosine"] == pytest.approx(max(near.values()), abs=1e-5)


def reasons(report) -> str:
    return "\n".join(f"{verdict}: {sentence}" for verdict, sentence in report.found)


@pytest.fixture(scope="module")
def report(ovdiff):
    return examine(ovdiff, NAMES, ["water"])


def test_every_value_is_that_of_its_own_step(ovdiff, report):
    assert [c.name for c in report.classes] == NAMES.split(", ") and report.classes[3].kind == "stuff"
    assert report.built == tuple(NAMES.split(", ")) and set(report.tables) == {"sd"}
    bank = ovdiff.build(NAMES, ["water"])
    left = filter_stuff(bank, ovdiff.profile.filters)
    assert report.notes == tuple(bare(bank, left, ovdiff.profile.filters))
    had, has = bank.counts("background")["sd"], left.counts("background")["sd"]
    for c, before, after in zip(report.classes, had, has, strict=True):
        assert c.values["background_left"] == after / before
        masks = ovdiff.masks(ovdiff.support(c.name))
        assert c.values["with_foreground"] == pytest.approx(np.mean([m.any() for m in masks.foreground]))
        assert c.values["foreground_area"] == pytest.approx(np.mean([m.mean() for m in masks.foreground if m.any()]))
        assert c.values["pieces"] == len(ovdiff.category_filter.text.tokenizer.tokenize(c.name))
        check_readings(ovdiff, c, ["cat", "dog", "mouse"], NAMES.split(", "))  # stuff stays always, so things compete
    assert "recognised" not in report.classes[3].values
    mouse = reasons(report.classes[2])
    assert "can mean" in mouse and "computer mouse" in mouse and "into 5 pieces" in mouse


def test_a_word_is_read_among_others_that_are_not_drawn(ovdiff, monkeypatch):
    built, build = [], OVDiff.build_class
    monkeypatch.setattr(OVDiff, "build_class", lambda self, category: built.append(category.name) or build(self, category))
    words = ["cat", "dog", "sofa", "boat", "water"]
    check_readings(ovdiff, examine(ovdiff, "cat", among=["dog", "sofa", "Cat", "boat", "water"]).classes[0], words, words)
    assert built == ["cat"]


def test_rivals_come_from_the_tables(ovdiff, report):
    bank = filter_stuff(ovdiff.build(NAMES, ["water"]), ovdiff.profile.filters)
    table, names = collide(bank.prototypes["sd"]), bank.vocabulary.names
    same(report.tables["sd"], table)
    taken = np.maximum(table.lost, table.passes)
    assert (taken >= 0.2).any()
    for a, c in enumerate(report.classes):
        b = names.index(c.values["rival"])
        assert taken[a, b] == np.nanmax(taken[a]) == pytest.approx(max(c.values["lost"], c.values["passes"]))
        assert c.values["lost"] == pytest.approx(table.lost[a, b]) and c.values["highest"] == pytest.approx(table.highest[a, b])
        for said, share in (("taken for", taken[a]), ("lost in the background of", table.sunk[a])):
            found = [sentence for _, sentence in c.found if f"can be {said} " in sentence]
            assert len(found) == (np.nan_to_num(share) >= 0.2).any()
            for b, name in enumerate(names):
                assert (f"{name!r} ({share[b]:.0%})" in "".join(found)) == (share[b] >= 0.2)
            assert all(verdict == ("bad" if np.nanmax(share) >= 0.5 else "look") for verdict, text in c.found if text in found)


def test_the_verdict_is_that_of_the_worst_reason(report):
    text = str(report)
    for c in report.classes:
        levels = [verdict for verdict, _ in c.found]
        assert c.verdict == ("bad" if "bad" in levels else "look" if "look" in levels else "fine")
        assert all(f"  {reason}" in text for reason in reasons(c).splitlines())
    assert text.splitlines()[0].split()[0] == "verdict" and text.splitlines()[4].startswith("water (stuff)")
    assert text.splitlines()[-1].startswith("Of 4 classes: ")


def test_limits_decide_and_nothing_else(ovdiff):
    fine = examine(ovdiff, "cat, dog", limits=LOOSE)
    assert [c.verdict for c in fine.classes] == ["fine", "fine"] and str(fine).endswith("Of 2 classes: 2 fine.")
    strict = examine(ovdiff, "cat, dog", limits=Limits(recognised_look=2, recognised_bad=2, full=0, masks_look=0))
    for c in strict.classes:
        assert c.verdict == "bad" and all(words in reasons(c) for words in ("CLIP reads", "the foreground fills"))


def test_doubles_of_meaning(ovdiff):
    found = examine(ovdiff, "cat, Sofa, couch, child, person", limits=LOOSE)
    said = {c.name: re.findall(r"it and '(\w+)' are synonyms", reasons(c)) for c in found.classes}
    assert said == {"cat": [], "Sofa": ["couch"], "couch": ["Sofa"], "child": ["person"], "person": ["child"]}


def test_a_class_that_cannot_be_built_is_bad_and_the_others_are_examined(ovdiff, monkeypatch):
    build = OVDiff.build_class

    def refuse(self, category):
        if category.name != "cat" and category.name != "sofa":
            raise OVDiffError("None of the 3 support images has any foreground.")
        return build(self, category)

    monkeypatch.setattr(OVDiff, "build_class", refuse)
    long = "z" * 40  # the tiny tokenizer knows no such word: 40 tokens, where its text encoder reads 32
    found = examine(ovdiff, ["cat", long, "dog", "sofa"], limits=LOOSE)
    assert [c.verdict for c in found.classes] == ["fine", "bad", "bad", "fine"] and found.built == ("cat", "sofa")
    assert "shorten the class name" in reasons(found.classes[1]) and "any foreground" in reasons(found.classes[2])
    assert found.tables["sd"].lost.shape == (2, 2) and long in str(found)
    nothing = examine(ovdiff, ["boat", "dog"])
    assert {c.verdict for c in nothing.classes} == {"bad"} and nothing.tables == {} and str(nothing)


def test_what_is_not_the_words_fault_is_an_error(ovdiff, monkeypatch):
    with pytest.raises(ProfileError):
        examine(ovdiff.replaced({"matching.stride": 999}), ["cat", "dog"])
    monkeypatch.setattr(OVDiff, "build_class", lambda self, category: (_ for _ in ()).throw(InputError("the disk is full")))
    with pytest.raises(InputError, match="disk"):
        examine(ovdiff, ["cat", "dog"])


@pytest.mark.parametrize(("areas", "source", "said"), [
    ([0, 0, 0.5], ["detector"] * 3, "bad: 67% of its drawings have no foreground"),
    ([1, 1, 0.5], ["detector"] * 3, "look: the foreground fills 67% of its drawings"),
    ([0.25, 0.5], ["threshold"] * 2, "look: the segmenter 'detector' found nothing in 100% of its drawings"),
    ([0.25, 0, 0.75], ["detector", "detector", "threshold"], "")])
def test_masks(ovdiff, monkeypatch, areas, source, said):
    foreground = np.arange(12)[None, None] < 12 * np.array(areas)[:, None, None]  # from the left
    foreground = np.broadcast_to(foreground, (len(areas), 8, 12))
    masks = ForegroundBackground(foreground, ~foreground, tuple(source))
    monkeypatch.setattr(OVDiff, "masks_of", lambda self, category: masks)
    found = examine(ovdiff, ["cat", "dog"], limits=replace(LOOSE, foreground_bad=0.5, masks_look=0.5)).classes[0]
    assert reasons(found) == said
    assert found.values["foreground_area"] == pytest.approx(np.mean([a for a in areas if a]))


def test_without_category_filter_clip_is_not_asked(ovdiff):
    found = examine(ovdiff.replaced({"filters.category": False, "models.clip": "nobody/nowhere"}), ["cat", "dog"])
    assert "Without category filter" in str(found)
    assert all("recognised" not in c.values and "nearest_word" not in c.values for c in found.classes)


def test_regions_that_are_not_marked_as_stuff(ovdiff):
    found = examine(ovdiff, "cat, water, Grass", ["Grass"], LOOSE)
    assert ["usually a region" in reasons(c) for c in found.classes] == [False, True, False]
    without = examine(ovdiff.replaced({"filters.stuff": False}), "cat, water")
    assert not any("usually a region" in reasons(c) for c in without.classes)


def test_a_vocabulary_that_leaves_no_background_says_so(ovdiff):
    """A threshold that every cosine exceeds, and one that none does."""
    everything, nothing = (examine(ovdiff.replaced({"filters.stuff_threshold": t, "filters.stuff_background": False}),
                                   "cat, dog, water", ["water"], LOOSE) for t in (-1.0, 1.0))
    said = 'the "stuff" filter left it no background prototypes of sd'
    assert [(c.verdict, c.values["background_left"], said in reasons(c)) for c in everything.classes] == [
        ("look", 0, True), ("look", 0, True), ("fine", 0, False)] and "background left" in str(everything)  # stuff is meant to lose them
    assert [(c.verdict, c.values["background_left"]) for c in nothing.classes] == [("fine", 1), ("fine", 1), ("fine", 0)]
    note, = everything.notes
    assert "left none of the" in note and note in str(everything) and nothing.notes == ()


# ---------------------------------------------------------------------- evidence and figures

def test_confusions_are_counted_pixel_by_pixel(ovdiff):
    """Labels of the data set in another order than the bank, one that the bank lacks, one that the data set lacks, ignored pixels."""
    bank = ovdiff.build(["dog", "cat", "mouse"])
    names = ["Cat", "boat", "dog"]
    rng = np.random.default_rng(2)
    samples = []
    for n in range(2):
        image = np.kron(rng.integers(0, 256, (5, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        samples.append(Sample(str(n), image, rng.choice([0, 1, 2, 3, 255], image.shape[:2]).astype(np.uint8)))
    expected = np.zeros((2, 4, 4), int)
    for matrix, sample in zip(expected, samples, strict=True):
        labels = ovdiff.segment(sample.image, bank).class_names
        found = ovdiff.segment(sample.image, bank).labels
        for true, guess in zip(sample.labels.ravel(), found.ravel(), strict=True):
            if true != 255:
                matrix[labels.index({0: "background", 1: "cat", 2: "background", 3: "dog"}[int(true)]), guess] += 1
    matrices = confusions(ovdiff, bank, samples, names)
    assert np.array_equal(matrices, expected) and expected[:, 1].sum() and expected[:, 2].sum() and not expected[:, 3].any()


def test_the_figure_shows_every_share_and_greys_what_is_missing():
    table = np.array([[np.nan, 0.25, 0.001], [0.8, np.nan, 0.6]])
    rows, columns = ["bottle", "a rather long class name"], ["bottle", "water bottle", "clock"]
    figure = share_tables({"foreseen": table, "measured": table.T[:2, [0, 1, 1]]}, rows, columns, "true class")
    first, second = figure.axes
    assert [t.get_text() for t in first.texts] == ["25", "80", "60"] and first.get_title() == "foreseen"
    assert [t.get_text() for t in first.get_xticklabels()] == columns
    assert [t.get_text() for t in first.get_yticklabels()] == rows and first.get_ylabel() == "true class"
    assert not any(t.get_text() for t in second.get_yticklabels())
    figure.canvas.draw()
    inside, pixels = first.get_window_extent(), np.asarray(figure.canvas.buffer_rgba())
    corner = pixels[int(figure.bbox.y1 - inside.y1) + 6, int(inside.x0) + 6, :3]
    assert corner.tolist() == [0xDF, 0xE3, 0xE8]  # the first cell holds no number


# ---------------------------------------------------------------------- the command

@pytest.fixture
def tiny(tiny_models, folder) -> list[str]:
    return [*assigned(tiny_overrides(tiny_models)), "--library", str(folder)]


def test_the_command(tiny, capsys):
    assert main(["vocabulary", "cat, mouse", *tiny]) == 1
    assert "it can mean animal; device of a computer" in capsys.readouterr().out
    assert main(["vocabulary", "cat, mouse, water", "--stuff", "water", *tiny]) == 1
    assert "water (stuff)" in capsys.readouterr().out


def test_the_library_is_not_asked_where_networks_run(tiny_profile, tmp_path, monkeypatch):
    """Its lock comes before theirs, everywhere: the other way round two threads could wait for each other."""
    asked = []
    get_or = Library._get_or
    monkeypatch.setattr(Library, "_get_or", lambda *given: (asked.append(instruments._lock._is_owned()), get_or(*given))[1])
    ovdiff = OVDiff(tiny_profile, {"support.size": 2}, library=tmp_path, progress=False)
    examine(ovdiff, NAMES)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    ovdiff.build_from({"cat": pictures}, masks={"cat": np.ones((2, 40, 60), bool)})
    assert len(asked) > 8 and not any(asked)
