"""Things and stuff: the shipped tables against what the paper says of them."""

import csv

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.workbench.data.classes import vocabulary_of
from ovdiff_lib.workbench.data.things import TABLES, kinds, with_kinds

CONTEXT_STUFF = ("bedclothes ceiling cloth curtain fence floor grass ground mountain platform road rock sidewalk sky "
                 "snow track wall water wood")


def rows(name):
    with TABLES[name].open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_shipped_tables():
    table = rows("c8")
    names = [r["class"] for r in table]
    assert len(names) == len(set(names)) == 171 == 3 * 57 and {r["label"] for r in table} == {"thing", "stuff"}
    assert set(table[0]) == {"class", "label", "note"} and sum(r["note"].startswith("UNCERTAIN") for r in table) == 6
    # App. C.6 on the answers: these are called stuff although instances, those things although regions.
    said = kinds(["glass", "blanket", "trade name", "land", "sand", "snow", "ground"], "c8")
    assert list(said.values()) == ["stuff", "stuff", "stuff", "thing", "thing", "stuff", "stuff"]
    table = rows("coco-stuff")
    assert [r["label"] for r in table] == ["thing"] * 80 + ["stuff"] * 91 and len({r["class"] for r in table}) == 171
    assert kinds(["Person", "toothbrush", "banner", "wall-brick", "dining table"], "coco-stuff") == {
        "Person": "thing", "toothbrush": "thing", "banner": "stuff", "wall-brick": "stuff", "dining table": "thing"}


def test_context_and_voc_by_the_names_that_the_data_sets_give():
    found = kinds(vocabulary_of("context").names, "c8")
    assert len(found) == 59 and [n for n, k in found.items() if k == "stuff"] == CONTEXT_STUFF.split()
    assert set(kinds(vocabulary_of("voc").names, "c8").values()) == {"thing"}
    prompts = Vocabulary((Category("tvmonitor", "tv monitor"), Category("mouse", "computer mouse"),
                          Category("lawn", "grass")))
    assert list(kinds(prompts, "c8").values()) == ["thing", "thing", "stuff"]


def test_with_kinds_keeps_names_prompts_and_order():
    vocabulary = Vocabulary((Category("Sky", "blue sky"), Category("cat", kind="stuff"), Category("boat")))
    made = with_kinds(vocabulary, "c8")
    assert made.names == ("Sky", "cat", "boat") and [c.prompt for c in made] == ["blue sky", "cat", "boat"]
    assert [c.kind for c in made] == ["stuff", "thing", "thing"]
    assert [c.kind for c in vocabulary] == ["thing", "stuff", "thing"]  # as it was


def test_names_that_are_not_known_take_the_default():
    assert kinds(["CAT", "unicorn", "Grass"]) == {"CAT": "thing", "unicorn": "thing", "Grass": "stuff"}
    assert kinds("cat, unicorn", default="stuff") == {"cat": "thing", "unicorn": "stuff"}
