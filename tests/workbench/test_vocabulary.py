"""The vocabulary doctor: collisions against brute force and against rebuilt prototypes, words, masks, readings, and the command."""

import csv
import json

import numpy as np
import pytest
import torch
from tiny import tiny_overrides

from ovdiff_lib import InputError, OVDiff, OVDiffError, ProfileError
from ovdiff_lib.categories import Vocabulary
from ovdiff_lib.cli.main import main
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.profiles.schema import PrototypeSettings
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.types import ForegroundBackground, Prototypes
from ovdiff_lib.workbench.analysis.margins import confusions
from ovdiff_lib.workbench.data.classes import class_table, vocabulary_of
from ovdiff_lib.workbench.data.samples import Sample
from ovdiff_lib.workbench.figures.charts import share_tables
from ovdiff_lib.workbench.vocabulary.collisions import Collisions, collide, own_similarity
from ovdiff_lib.workbench.vocabulary.examine import AMBIGUOUS, ambiguity, examine, plain_form, read_tokens, same_meaning
from ovdiff_lib.workbench.vocabulary.report import Limits

GRID = (5, 7)
LOOSE = Limits(collide_look=2, collide_bad=2, recognised_look=0, recognised_bad=0, foreground_bad=0, masks_look=2, pieces=99,
               text_fence=999)
"""Limits that nothing exceeds."""


def support_features(rng, centre, images=4, channels=12, empty=()):
    """Features f32 (N, *GRID, D) around ``centre`` on the foreground of random masks, and the masks."""
    foreground = rng.random((images, *GRID)) < 0.4
    foreground[:, 2, 3] = True
    foreground[list(empty)] = False
    background = ~foreground & (rng.random(foreground.shape) < 0.7)
    features = rng.normal(size=(images, *GRID, channels)).astype(np.float32)
    features[foreground] += centre
    return features, ForegroundBackground(foreground, background, ("threshold",) * images)


def some_classes(count=5, seed=0, kinds=("class", "instance", "part"), channels=12):
    rng = np.random.default_rng(seed)
    settings = PrototypeSettings(clusters=3, kinds=list(kinds))
    made = []
    for k in range(count):
        features, masks = support_features(rng, 0.15 * rng.normal(size=channels).astype(np.float32), empty=(1,) if k == 2 else ())
        made.append((features, masks, build_prototypes(features, masks, settings)))
    return made


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_hand(classes, kinds=("class", "instance", "part")) -> Collisions:
    """The definitions, one pair of vectors at a time; an image is left out by building its class again without it."""
    settings = PrototypeSettings(clusters=3, kinds=list(kinds))
    count = len(classes)
    tables = {name: np.full((count, count), np.nan) for name in ("highest", "mean", "lost", "passes", "background", "sunk")}
    own = []
    for features, masks, p in classes:
        similarity = []
        for n in p.image[(p.kind == "instance") & (p.region == "foreground")]:
            left = masks.foreground.copy()
            left[n] = False
            without = build_prototypes(features, ForegroundBackground(left, masks.background, masks.source), settings)
            mine = features[n][masks.foreground[n]].mean(0)
            similarity.append(max(cosine(mine, v) for v, kind, region in zip(without.vectors, without.kind, without.region, strict=True)
                                  if region == "foreground" and kind != "part"))
        own.append(similarity)

    def chosen(p, region, parts=True):
        return [v for v, kind, r in zip(p.vectors, p.kind, p.region, strict=True) if r == region and (parts or kind != "part")]

    for a, (_, _, p) in enumerate(classes):
        images = list(zip(p.vectors[(p.kind == "instance") & (p.region == "foreground")], own[a], strict=True))
        for b, (_, _, q) in enumerate(classes):
            if a == b:
                continue
            pairs = [cosine(v, w) for v in chosen(p, "foreground") for w in chosen(q, "foreground")]
            near, sinks = ([max(cosine(v, w) for w in vectors) for v, _ in images]
                           for vectors in (chosen(q, "foreground", False), chosen(q, "background")))
            tables["highest"][a, b], tables["mean"][a, b] = max(pairs), np.mean(pairs)
            tables["background"][a, b] = max(cosine(v, w) for v in chosen(p, "background") for w in chosen(q, "foreground"))
            tables["lost"][a, b], tables["sunk"][a, b] = (np.mean([x > s for x, (_, s) in zip(found, images, strict=True)])
                                                          for found in (near, sinks))
            tables["passes"][a, b] = np.mean([x >= np.median(own[b]) for x in near])
    return Collisions(**tables, own=np.array([np.median(s) for s in own]))


def same(found: Collisions, expected: Collisions):
    for name in ("highest", "mean", "lost", "passes", "background", "sunk", "own"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name)


# ---------------------------------------------------------------------- collisions

@pytest.mark.parametrize("kinds", [("class", "instance", "part"), ("class", "instance"), ("instance",)])
def test_the_tables_are_those_of_the_definitions(kinds):
    classes = some_classes(5 if "part" in kinds else 3, 4, kinds)
    found = collide([p for _, _, p in classes])
    assert np.isfinite(found.lost[~np.eye(len(classes), dtype=bool)]).all()
    if "class" in kinds:
        same(found, by_hand(classes, kinds))
    if "part" in kinds:
        assert all(0 < np.nanmean(table) < 1 for table in (found.lost, found.passes, found.sunk))  # they can be wrong


def test_collisions_need_instance_prototypes():
    with pytest.raises(InputError, match="instance"):
        collide([p for _, _, p in some_classes(2, 5, ("class", "part"))])


def test_what_cannot_be_compared_is_nan():
    full, lonely, bare = (p for _, _, p in some_classes(3, 6))
    lonely = lonely.select((lonely.kind != "instance") | (lonely.image == 0))
    bare = bare.select(bare.region == "foreground")
    found = collide([full, lonely, bare])
    assert np.isnan(found.own[1]) and np.isnan(found.lost[1]).all() and np.isnan(found.sunk[1]).all()
    assert np.isnan(found.background[2]).all() and np.isnan(found.sunk[:, 2]).all()
    assert np.isfinite(found.lost[[0, 0, 2, 2], [1, 2, 0, 1]]).all() and np.isfinite(found.background[[0, 0, 1], [1, 2, 0]]).all()
    assert np.isnan(found.passes[:, 1]).all() and np.isfinite(found.passes[[0, 1, 1, 2], [2, 0, 2, 0]]).all()
    assert np.isnan(np.diag(found.highest)).all() and np.isnan(own_similarity(lonely)).all()
    alone = collide([full])
    assert alone.lost.shape == (1, 1) and np.isnan(alone.lost).all() and np.isfinite(alone.own).all()


def synthetic(rng, centre, around, images=16, parts=16):
    """66 prototypes of one class as they lie in a bank: 1 + 16 + 16 in each region."""
    half = 1 + images + parts
    vectors = np.concatenate([centre + 0.5 * rng.normal(size=(half, len(centre))), around + 0.5 * rng.normal(size=(half, len(centre)))])
    for start in (0, half):  # the class prototype is a mean
        vectors[start] = vectors[start + 1 : start + 1 + images].mean(0)
    kind = np.array((["class"] + ["instance"] * images + ["part"] * parts) * 2)
    image = np.where(kind == "instance", np.tile(np.r_[-1, np.arange(images), [-1] * parts], 2), -1).astype(np.int32)
    codes, none = np.arange(1, parts + 1), [0] * (1 + images)
    cluster = np.r_[none, codes, none, -codes]
    assignment = rng.integers(-parts, parts + 1, (images, 4, 6)).astype(np.int16)
    return Prototypes(vectors.astype(np.float32), kind, np.repeat(["foreground", "background"], half), image, cluster.astype(np.int32),
                      assignment)


def test_hundreds_of_classes():
    """Twins and a class that another's background shows are found among 300 classes of 66 prototypes."""
    rng = np.random.default_rng(1)
    centres, around = rng.normal(size=(300, 48)), rng.normal(size=(300, 48))
    centres[240], around[7] = centres[17], centres[181]
    classes = [synthetic(rng, c, a) for c, a in zip(centres, around, strict=True)]
    assert len(classes[0]) == 66
    found = collide(classes)
    for table, expected in ((found.lost, {(17, 240), (240, 17)}), (found.passes, {(17, 240), (240, 17)}), (found.sunk, {(181, 7)})):
        assert set(map(tuple, np.argwhere(table > 0.3))) == expected
    assert np.nanargmax(found.background) == 7 * 300 + 181
    for a, b in ((17, 240), (3, 299)):
        pairs = [cosine(v, w) for v in classes[a].vectors[:33] for w in classes[b].vectors[:33]]
        assert found.highest[a, b] == pytest.approx(max(pairs), abs=1e-5) and found.mean[a, b] == pytest.approx(np.mean(pairs), abs=1e-5)


# ---------------------------------------------------------------------- words

def test_the_list_of_ambiguous_nouns_is_whole_and_content_with_its_own_advice():
    with open(AMBIGUOUS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100 and len({row["noun"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"noun", "senses", "rewordings"} and len(row["senses"].split("; ")) >= 2, row
        for words in [row["noun"], *row["rewordings"].split("; ")]:
            assert words == words.strip().casefold() and words, row
            assert (ambiguity(words) is not None) == (words == row["noun"]), words
    data_sets = {name for key in class_table()["data_sets"] for name in vocabulary_of(key).names}
    assert len(data_sets & {row["noun"] for row in rows}) > 20
    assert not any(ambiguity(name) for name in load_world().names)  # nothing is ambiguous in the mini world


def test_ambiguous_words_are_found_in_any_case():
    assert ambiguity("Mouse").noun == ambiguity(" mouse ").noun == "mouse" and "computer mouse" in ambiguity("mouse").rewordings
    assert ambiguity("glasses").noun == "glasses" and ambiguity("Glass").noun == "glass"
    assert not any(map(ambiguity, ("computer mouse", "cat", "🐈")))


def test_spellings_of_one_name():
    for one, other in (("TV-monitors", "tv monitor"), ("tvmonitor", "tv monitor"), ("the cat", "cat"), ("potted_plants", "potted plant"),
                       ("ＣＡＴ", "cat")):
        assert plain_form(one) == plain_form(other), one
    words = ["glass", "bus", "tennis", "gas", "cloth", "clothes", "cat", "car", "a", "water", "🐈", "🐕", "horse", "house"]
    assert len({plain_form(word) for word in words}) == len(words)


def test_doubles_of_meaning():
    vocabulary = Vocabulary.of("cats, dog, cat, sofa, couch, Dogs, child, person, tree")
    found = {(vocabulary.names[i], vocabulary.names[j]): why for i, j, why in same_meaning(vocabulary)}
    assert set(found) == {("cats", "cat"), ("dog", "Dogs"), ("sofa", "couch"), ("child", "person")}
    assert "spelling" in found["cats", "cat"] and "synonyms" in found["sofa", "couch"]


def test_tokens_of_bytes_and_of_whole_words(tiny_models):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    of_bytes = CLIPTokenizer.from_pretrained(tiny_models / "clip")
    assert read_tokens(of_bytes, "cat") == (1, 1, 0) and read_tokens(of_bytes, "chest of drawers") == (3, 1, 0)
    assert read_tokens(of_bytes, "corgi cat") == (6, 5, 0)
    whole = Tokenizer(models.WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    assert read_tokens(PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[UNK]"), "corgi cat") == (2, 1, 1)


# ---------------------------------------------------------------------- the examination

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def ovdiff(tiny_profile, folder) -> OVDiff:
    return OVDiff(tiny_profile, library=folder, progress=False)


NAMES = "cat, dog, mouse, water"


def text_by_hand(ovdiff, words):
    """Unit CLIP text embeddings by the model itself."""
    clip, tokenizer = ovdiff.category_filter.clip, ovdiff.category_filter.text.tokenizer
    with torch.no_grad():
        found = clip.get_text_features(**tokenizer(words, padding=True, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(found, dim=-1)


def read_by_hand(ovdiff, name, words):
    """The word of highest cosine for each drawing of a class."""
    texts = text_by_hand(ovdiff, words)
    return [words[int((texts @ ovdiff.category_filter.embed_image(image)).argmax())] for image in ovdiff.support(name).images]


def nearest_by_hand(ovdiff, name, words):
    others = [word for word in words if word != name]
    found = text_by_hand(ovdiff, others) @ text_by_hand(ovdiff, [name])[0]
    return others[int(found.argmax())], float(found.max())


@pytest.fixture(scope="module")
def report(ovdiff):
    return examine(ovdiff, NAMES, ["water"])


def test_every_value_is_that_of_its_own_step(ovdiff, report):
    assert [c.name for c in report.classes] == ["cat", "dog", "mouse", "water"] and report.classes[3].kind == "stuff"
    assert report.built == ("cat", "dog", "mouse", "water") and set(report.tables) == {"sd"} and report.skipped == (
        "With fewer than 5 words their nearness in CLIP's text space is shown and not judged.",)
    for c in report.classes:
        support, values = ovdiff.support(c.name), c.values
        masks = ovdiff.masks(support)
        assert values["images"] == len(support) == 3
        assert values["with_foreground"] == pytest.approx(np.mean([m.any() for m in masks.foreground]))
        assert values["foreground_area"] == pytest.approx(np.mean([m.mean() for m in masks.foreground if m.any()]))
        assert values["fallback_to_thresholds"] == pytest.approx(np.mean([s == "threshold" for s in masks.source]))
        if c.kind == "thing":  # the mini profile keeps stuff always, so things compete among themselves
            read = read_by_hand(ovdiff, c.name, ["cat", "dog", "mouse"])
            assert values["recognised"] == pytest.approx(read.count(c.name) / 3)
            assert read.count(values["read_as"]) == max(map(read.count, read))
        nearest, similarity = nearest_by_hand(ovdiff, c.name, ["cat", "dog", "mouse", "water"])
        assert values["nearest_word"] == nearest and values["text_cosine"] == pytest.approx(similarity, abs=1e-5)
        assert values["pieces"] == len(ovdiff.category_filter.text.tokenizer.tokenize(c.name))
    assert report.classes[3].values.get("recognised") is None
    mouse = report.classes[2]
    assert mouse.verdict != "fine" and sum(mouse.values["drawn_as"].values()) == 3
    assert any("can mean" in r and "'computer mouse'" in r for r in mouse.reasons) and any("into 5 pieces" in r for r in mouse.reasons)


def test_a_word_is_read_among_others_that_are_not_drawn(ovdiff, monkeypatch):
    built, build = [], OVDiff.build_class
    monkeypatch.setattr(OVDiff, "build_class", lambda self, category: built.append(category.name) or build(self, category))
    others = ["dog", "sofa", "Cat", "boat", "water"]
    found = examine(ovdiff, "cat", among=others).classes[0]
    words = ["cat", "dog", "sofa", "boat", "water"]
    read, (nearest, similarity) = read_by_hand(ovdiff, "cat", words), nearest_by_hand(ovdiff, "cat", words)
    assert found.values["recognised"] == pytest.approx(read.count("cat") / 3) and built == ["cat"]
    assert found.values["nearest_word"] == nearest and found.values["text_cosine"] == pytest.approx(similarity, abs=1e-5)


def test_rivals_and_pairs_come_from_the_tables(ovdiff, report):
    from ovdiff_lib.filters.stuff import filter_stuff

    bank = filter_stuff(ovdiff.build(NAMES, ["water"]), ovdiff.profile.filters)
    table, names = collide(bank.prototypes["sd"]), bank.vocabulary.names
    same(report.tables["sd"], table)
    taken = np.maximum(table.lost, table.passes)
    lost = {(names[a], names[b]): taken[a, b] for a in range(4) for b in range(4) if taken[a, b] >= 0.2}
    sunk = {(names[a], names[b]): table.sunk[a, b] for a in range(4) for b in range(4) if table.sunk[a, b] >= 0.2}
    assert {(p.first, p.second): p.share for p in report.pairs if p.what == "foreground"} == pytest.approx(lost) and lost
    assert {(p.first, p.second): p.share for p in report.pairs if p.what == "background"} == pytest.approx(sunk)
    for a, c in enumerate(report.classes):
        b = names.index(c.values["rival"])
        assert taken[a, b] == np.nanmax(taken[a]) == pytest.approx(max(c.values["lost"], c.values["passes"]))
        assert table.lost[a, b] == pytest.approx(c.values["lost"])
        assert c.values["highest"] == pytest.approx(table.highest[a, b]) and c.values["mean"] == pytest.approx(table.mean[a, b])
        collides = any(p.first == c.name for p in report.pairs)
        assert any("drawings of it can be" in reason for reason in c.reasons) == collides
    assert [p.share for p in report.pairs] == sorted((p.share for p in report.pairs), reverse=True)
    for p in report.pairs:
        assert p.level == ("bad" if p.share >= 0.5 else "look") and repr(p.second) in str(p)


def test_the_verdict_is_that_of_the_worst_reason(report):
    for c in report.classes:
        levels = [reason.split(":")[0] for reason in c.reasons]
        assert c.verdict == ("bad" if "bad" in levels else "look" if "look" in levels else "fine")
        assert levels == sorted(levels)  # bad before look
    text = str(report)
    assert text.splitlines()[-1] == report.summary() and all(c.name in text for c in report.classes)
    assert all(reason in text for c in report.classes for reason in c.reasons)
    table = json.loads(report.to_json())
    assert [c["verdict"] for c in table["classes"]] == [c.verdict for c in report.classes] and len(table["pairs"]) == len(report.pairs)
    assert table["limits"]["collide_bad"] == 0.5


def test_limits_decide_and_nothing_else(ovdiff):
    fine = examine(ovdiff, "cat, dog", limits=LOOSE)
    assert [c.verdict for c in fine.classes] == ["fine", "fine"] and fine.pairs == () and "2 fine; no classes collide" in fine.summary()
    strict = examine(ovdiff, "cat, dog", limits=Limits.of({"recognised_look": 2, "recognised_bad": 2, "full": 0, "masks_look": 0}))
    for c in strict.classes:
        assert c.verdict == "bad" and all(words in "\n".join(c.reasons) for words in ("CLIP reads", "fills the image"))
    for wrong in ({"collide": 0.3}, *({"collide_bad": value} for value in ("half", True, -1, float("inf")))):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Limits.of(wrong)


def test_words_near_each_other_are_judged_by_the_vocabulary(ovdiff):
    """The same six words; only where the fence stands changes, and the nearest pair of all is the first to cross it."""
    names = ["cat", "dog", "sofa", "boat", "water", "picture"]
    texts = ovdiff.category_filter.text(names).numpy()
    pairs = np.array([cosine(texts[a], texts[b]) for a in range(6) for b in range(a)])
    low, high = np.percentile(pairs, [25, 75])
    top = (pairs.max() - high) / (high - low)
    for fence, expected in ((top - 0.01, True), (top + 0.01, False)):
        found = examine(ovdiff, names, limits=Limits(**{**vars(LOOSE), "text_fence": fence}))
        assert any("nearly" in reason for c in found.classes for reason in c.reasons) == expected


def test_a_class_that_cannot_be_built_is_bad_and_the_others_are_examined(ovdiff, monkeypatch):
    build = OVDiff.build_class

    def refuse(self, category):
        if category.name == "dog":
            raise OVDiffError("None of the 3 support images has any foreground.")
        return build(self, category)

    monkeypatch.setattr(OVDiff, "build_class", refuse)
    long = "z" * 40  # the tiny tokenizer knows no such word: 40 tokens, where its text encoder reads 32
    found = examine(ovdiff, ["cat", long, "dog", "sofa"], limits=LOOSE)
    assert [c.verdict for c in found.classes] == ["fine", "bad", "bad", "fine"] and found.built == ("cat", "sofa")
    assert "shorten the class name" in found.classes[1].reasons[0] and "any foreground" in found.classes[2].reasons[0]
    assert found.classes[2].values["cannot_be_built"] and found.tables["sd"].lost.shape == (2, 2)
    assert "cannot_be_built" in json.loads(found.to_json())["classes"][1]["values"] and str(found)
    monkeypatch.setattr(OVDiff, "build_class", lambda self, category: (_ for _ in ()).throw(OVDiffError("no foreground")))
    nothing = examine(ovdiff, ["cat", "dog"])
    assert {c.verdict for c in nothing.classes} == {"bad"} and nothing.tables == {} and any("Fewer than two" in s for s in nothing.skipped)


def test_what_is_not_the_words_fault_is_an_error(ovdiff, monkeypatch):
    monkeypatch.setattr(OVDiff, "build_class", lambda self, category: (_ for _ in ()).throw(InputError("the disk is full")))
    for changed, error in ({}, InputError), ({"matching.stride": 999}, ProfileError):
        with pytest.raises(error):
            examine(ovdiff.replaced(changed), ["cat", "dog"])


def masks_of(areas, source):
    """Masks (N, 8, 12) whose foreground covers these shares of the image from the left."""
    foreground = np.arange(12)[None, None] < 12 * np.array(areas)[:, None, None]
    foreground = np.broadcast_to(foreground, (len(areas), 8, 12))
    return ForegroundBackground(foreground, ~foreground, tuple(source))


@pytest.mark.parametrize(("areas", "source", "said"), [
    ([0, 0, 0.5], ["detector"] * 3, "bad: only 1 of 3 drawings have any foreground"),
    ([0, 0.5], ["detector"] * 2, "look: 1 of 2 drawings have no foreground"),
    ([1, 1, 0.5], ["detector"] * 3, "look: the foreground of 2 of 3 drawings fills the image"),
    ([0.25, 0.5], ["threshold"] * 2, "look: the segmenter 'detector' found nothing in 2 of 2 drawings"),
    ([0.25, 0.5, 0.75], ["detector", "detector", "threshold"], "")])
def test_masks(ovdiff, monkeypatch, areas, source, said):
    monkeypatch.setattr(OVDiff, "masks_of", lambda self, category: masks_of(areas, source))
    found = examine(ovdiff, ["cat", "dog"], limits=Limits(**{**vars(LOOSE), "foreground_bad": 0.5, "masks_look": 0.5}))
    reasons = found.classes[0].reasons
    assert (len(reasons) == 1 and reasons[0].startswith(said)) if said else reasons == ()
    assert found.classes[0].values["foreground_area"] == pytest.approx(np.mean([a for a in areas if a]))


def test_without_category_filter_clip_is_not_asked(ovdiff):
    found = examine(ovdiff.replaced({"filters.category": False, "models.clip": "nobody/nowhere"}), ["cat", "dog"])
    assert any("no category filter" in sentence for sentence in found.skipped)
    assert all("recognised" not in c.values and "nearest_word" not in c.values for c in found.classes)
    assert "Not examined: The profile has no category filter" in str(found)


def test_regions_that_are_not_marked_as_stuff(ovdiff):
    found = examine(ovdiff, "cat, water, Grass", ["Grass"], LOOSE)
    said = ["usually a region" in " ".join(c.reasons) for c in found.classes]
    assert said == [False, True, False]
    without = examine(ovdiff.replaced({"filters.stuff": False}), "cat, water")
    assert not any("usually a region" in reason for c in without.classes for reason in c.reasons)


def test_a_vocabulary_that_leaves_no_background_says_so(ovdiff):
    """A threshold that every cosine exceeds, and one that none does."""
    everything, nothing = (examine(ovdiff.replaced({"filters.stuff_threshold": t}), "cat, dog, water", ["water"], LOOSE)
                           for t in (-1.0, 1.0))
    note, = everything.notes
    assert "every pixel will get a class" in note and note in str(everything) and nothing.notes == ()
    removed = [[c.values["background_removed_by_stuff_filter"] for c in found.classes] for found in (everything, nothing)]
    assert removed == [[1, 1, 1], [0, 0, 1]]


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
    expected = np.zeros((4, 4), int)
    for sample in samples:
        labels = ovdiff.segment(sample.image, bank).class_names
        found = ovdiff.segment(sample.image, bank).labels
        for true, guess in zip(sample.labels.ravel(), found.ravel(), strict=True):
            if true != 255:
                expected[labels.index({0: "background", 1: "cat", 2: "background", 3: "dog"}[int(true)]), guess] += 1
    matrix = confusions(ovdiff, bank, samples, names, progress=False)
    assert np.array_equal(matrix.counts, expected) and expected[1].sum() and expected[2].sum() and not expected[3].any()


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
    for text in [*first.get_xticklabels(), *first.get_yticklabels(), first.title, first.yaxis.label]:
        box, room = text.get_window_extent(), figure.bbox
        assert room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1, text.get_text()
    inside, pixels = first.get_window_extent(), np.asarray(figure.canvas.buffer_rgba())
    corner = pixels[int(figure.bbox.y1 - inside.y1) + 6, int(inside.x0) + 6, :3]
    assert corner.tolist() == [0xDF, 0xE3, 0xE8]  # the first cell holds no number


# ---------------------------------------------------------------------- the command

@pytest.fixture
def tiny(tiny_models, folder) -> list[str]:
    return [*(o for key, value in tiny_overrides(tiny_models).items() for o in ("--set", f"{key}={json.dumps(value)}")),
            "--library", str(folder)]


def test_the_command(tiny, tmp_path, capsys):
    target = tmp_path / "deep" / "report.json"
    assert main(["vocabulary", "cat, mouse", "--json", str(target), *tiny]) == 1
    said = capsys.readouterr().out
    table = json.loads(target.read_text(encoding="utf-8"))
    assert said.splitlines()[-1] == table["summary"] and [c["name"] for c in table["classes"]] == ["cat", "mouse"]
    assert "“mouse” can mean animal, device of a computer" in said
    loose = [o for name, value in vars(LOOSE).items() for o in ("--limit", f"{name}={value}")]
    (tmp_path / "classes.txt").write_text("cat\n\ndog\nwater\n", encoding="utf-8")
    assert main(["vocabulary", "--classes-file", str(tmp_path / "classes.txt"), "--stuff", "water", *loose, *tiny]) == 0
    assert "water (stuff)" in capsys.readouterr().out
    assert main(["vocabulary", "--classes", "cat, grass", "--stuff-from", "c8", "--stuff-default", "thing", *loose, *tiny]) == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["cat", "--classes", "dog"], "Name the classes once"), ([], "Name the classes once"), ([""], "no class"), (["cat, Cat"], "twice"),
    (["cat", "--limit", "collide=1"], "no limit 'collide'"), (["cat", "--limit", "collide_bad"], "NAME=VALUE"),
    (["--classes-file", "nowhere.txt"], "nowhere.txt"), (["cat", "--stuff", "sky"], "'sky'"), (["cat", "--profile", "big"], "'big'"),
    (["cat", "--json", "/proc/none/x.json"], "cannot be written")])
def test_mistakes_are_one_sentence(tiny, capsys, arguments, words):
    assert main(["vocabulary", *arguments, *tiny]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("ovdiff: ") and said.err.count("\n") == 1 and said.out == ""
