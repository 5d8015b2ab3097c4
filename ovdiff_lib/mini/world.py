"""What exists in the mini world, read from ``world.yaml``: nouns, stuff, contexts, styles, and one id for each label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

IGNORE = 255
"""Label of pixels that no metric counts (object edges)."""


@dataclass(frozen=True)
class Thing:
    """A noun of the mini world: where it is found, how it is placed, and the code points of the glyphs that draw it."""

    name: str
    codes: tuple[str, ...]
    contexts: tuple[str, ...]
    place: str = "ground"
    voc: bool = False


@dataclass(frozen=True)
class World:
    """The whole table. Label ids: things are 1..T in table order, stuff T+1..T+S; 255 is :data:`IGNORE`; 0 is unused."""

    things: tuple[Thing, ...]
    stuff: tuple[str, ...]
    contexts: dict[str, tuple[str, ...]]
    train_styles: tuple[str, ...]
    wild_styles: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All label names; ``names[i]`` has id ``i + 1``."""
        return tuple(t.name for t in self.things) + self.stuff

    def label(self, name: str) -> int:
        """Label id of a noun or a stuff."""
        return self.names.index(name) + 1

    def vocabulary(self, key: str) -> tuple[str, ...]:
        """Class names of ``mini-voc`` (20 things), ``mini-object`` (all things) or ``mini-context`` (the mini-voc things and all stuff)."""
        voc = tuple(t.name for t in self.things if t.voc)
        table = {"mini-voc": voc, "mini-object": tuple(t.name for t in self.things), "mini-context": voc + self.stuff}
        if key not in table:
            raise ValueError(f"Unknown vocabulary {key!r}; the mini world has {', '.join(table)}.")
        return table[key]


@cache
def load_world() -> World:
    """The mini world of this package."""
    table = yaml.safe_load(files("ovdiff_lib.mini").joinpath("world.yaml").read_text(encoding="utf-8"))
    things = tuple(
        Thing(name, tuple(map(str, row["codes"])), tuple(row["contexts"]), row["place"], row.get("voc", False))
        for name, row in table["things"].items()
    )
    contexts = {name: tuple(parts) for name, parts in table["contexts"].items()}
    return World(things, tuple(table["stuff"]), contexts, tuple(table["styles"]["train"]), tuple(table["styles"]["wild"]))
