"""What exists in the mini world, read from ``world.yaml``: nouns, stuff, contexts, and one id for each label."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

IGNORE = 255
"""Label of pixels that no metric counts (object edges)."""


@dataclass(frozen=True)
class Thing:
    """A noun of the mini world: where it is found, how placed, how common, and, for who draws it, its glyphs."""

    name: str
    contexts: tuple[str, ...]
    place: str = "ground"
    voc: bool = False
    rare: bool = False
    glyphs: dict[str, tuple[str, ...]] = field(default_factory=dict)  # style -> keys in its art set
    held: frozenset[str] = frozenset()  # "style/key" of glyphs that no model is trained on


@dataclass(frozen=True)
class World:
    """The whole table. Label ids: things are 1..T in table order, stuff T+1..T+S; 0 is unused."""

    things: tuple[Thing, ...]
    stuff: tuple[str, ...]
    contexts: dict[str, tuple[str, ...]]
    train_styles: dict[str, str] = field(default_factory=dict)  # style -> the word captions have for it
    wild_styles: dict[str, str] = field(default_factory=dict)
    crops: dict[str, tuple[float, ...]] = field(default_factory=dict)  # "style/key" -> left, top, right, bottom

    @property
    def names(self) -> tuple[str, ...]:
        """All label names; ``names[i]`` has id ``i + 1``."""
        return tuple(t.name for t in self.things) + self.stuff

    def label(self, name: str) -> int:
        """Label id of a noun or a stuff."""
        return self.names.index(name) + 1

    def vocabulary(self, key: str) -> tuple[str, ...]:
        """Class names of ``mini-voc`` (20 things), ``mini-object`` (all) or ``mini-context`` (the 20 and all stuff)."""
        voc = tuple(t.name for t in self.things if t.voc)
        every = tuple(t.name for t in self.things)
        return {"mini-voc": voc, "mini-object": every, "mini-context": voc + self.stuff}[key]


def read_world(file: Path) -> World:
    """A world from a YAML file of ``stuff``, ``contexts``, ``things`` and, to be drawn, ``styles`` and ``crops``."""
    table = yaml.safe_load(file.read_text(encoding="utf-8"))
    things = tuple(
        Thing(name, tuple(row["contexts"]), row["place"], row.get("voc", False), row.get("rare", False),
              {style: tuple(keys.split()) for style, keys in row.get("glyphs", {}).items()},
              frozenset(row.get("held", ())))
        for name, row in table["things"].items())
    contexts = {name: tuple(parts) for name, parts in table["contexts"].items()}
    styles = table.get("styles", {"train": {}, "wild": {}})
    return World(things, tuple(table["stuff"]), contexts, styles["train"], styles["wild"], table.get("crops", {}))


@cache
def load_world() -> World:
    """The mini world of this package."""
    return read_world(Path(__file__).with_name("world.yaml"))
