"""Class names, prompts and kinds of the published data sets, from the file ``classes.json`` beside this module."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.mini.world import load_world

FILE = Path(__file__).with_name("classes.json")

NAMES = ("fixed", "raw")
"""Selections of prompts: with or without the fixes of ``classes.json`` (App. C.3 made 14 and printed three)."""


@cache
def class_table() -> dict[str, Any]:
    """The contents of ``classes.json``; its field "about" explains them."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def vocabulary_of(data_set: str, names: str = "fixed") -> Vocabulary:
    """The categories of a data set of ``classes.json``, or of the mini world, in evaluation order.

    Prompts follow ``names``: "fixed" (what the paper says or shows it replaced) or "raw" (the names themselves).
    """
    if names not in NAMES:
        raise InputError(f"There is no selection of class names {names!r}; choose {', '.join(NAMES)}.")
    if data_set.startswith("mini-"):
        world = load_world()
        return Vocabulary.of(world.vocabulary(data_set), stuff=world.stuff)
    table = class_table()
    entry, fixes = table["data_sets"][data_set], table["fixes"] if names == "fixed" else ()
    prompts = {fix["name"]: fix["prompt"] for fix in fixes if fix["data_set"] == data_set}
    return Vocabulary(tuple(Category(name, prompts.get(name, ""), "stuff" if name in entry["stuff"] else "thing")
                            for name in entry["classes"]))


def synonyms() -> dict[str, list[str]]:
    """Synonyms and subclasses of the classes of Pascal VOC and of the mini world, by name and by prompt."""
    return json.loads(FILE.with_name("synonyms.json").read_text(encoding="utf-8"))["words"]
