"""Which classes are countable things and which are regions of stuff, for the "stuff" filter (Sec. 3.4, App. C.6)."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas

from ovdiff_lib.categories import Category, Vocabulary

FOLDER = Path(__file__).parent
TABLES = {"c8": FOLDER / "things_c8.csv", "coco-stuff": FOLDER / "things_coco_stuff.csv"}
"""Shipped: Table C.8, what ChatGPT told the paper, with a note where its print is unclear; COCO-Stuff's own split."""

SPELLINGS = {
    "aeroplane": "airplane", "diningtable": "table", "dining table": "table", "pottedplant": "plant",
    "potted plant": "plant", "tvmonitor": "monitor", "tv monitor": "monitor", "computer mouse": "mouse"}
"""Names of VOC and Context, and their usual prompts, as Table C.8 words them."""


def with_kinds(names: Vocabulary | Iterable[str | Category] | str, table: str, default: str = "thing") -> Vocabulary:
    """The vocabulary of these names, "thing" or "stuff" by one of :data:`TABLES`; what is not known gets ``default``.

    Names are compared without case; what a table lacks is looked for by its prompt, then by other spellings of both.
    """
    read, found = pandas.read_csv(TABLES[table], keep_default_na=False), []
    known = dict(zip(read["class"], read["label"], strict=True))
    for category in Vocabulary.of(names):
        words = [category.name.casefold(), category.prompt.casefold()]
        words += [SPELLINGS[word] for word in words if word in SPELLINGS]
        found.append(replace(category, kind=next((known[word] for word in words if word in known), default)))
    return Vocabulary(tuple(found))
