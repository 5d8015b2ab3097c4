"""The words: categories, and vocabularies of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from textwrap import shorten

from ovdiff_lib.errors import InputError

BACKGROUND = "background"
"""Name of class 0 of every segmentation; its positives are the background prototypes of the kept categories."""

MAX_NAME = 80
"""Longest category name, in characters."""


@dataclass(frozen=True)
class Category:
    """One class of a vocabulary.

    ``name`` is what the user calls it, ``prompt`` the words given to the networks (default: the name), ``kind`` whether
    it is a countable "thing" or a region of "stuff" (Sec. 3.4, "stuff" filtering). With ``pictures``, the library's key
    of one's own (:meth:`~ovdiff_lib.pipeline.OVDiff.build_from`), it is not drawn.
    """

    name: str
    prompt: str = ""
    kind: str = "thing"
    pictures: str = ""

    def __post_init__(self) -> None:
        name = unicodedata.normalize("NFC", _readable(self.name))
        # Separators and format characters alone cannot be seen; within emoji and scripts format characters are legal.
        if all(unicodedata.category(c)[0] in "CZ" for c in name):
            raise InputError("A class name is empty: give each class at least one visible character.")
        if len(name) > MAX_NAME:
            raise InputError(f"The class name {name[:30]!r}... has {len(name)} characters; use at most {MAX_NAME}.")
        if self.kind not in ("thing", "stuff"):
            raise InputError(f"The kind of class {name!r} is {self.kind!r}; it must be 'thing' or 'stuff'.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "prompt", _readable(self.prompt) or name)
        object.__setattr__(self, "pictures", _readable(self.pictures))

    @classmethod
    def of(cls, words: Category | str) -> Category:
        """The category itself, or the thing that is called ``words``."""
        return words if isinstance(words, Category) else cls(words)


def _readable(words: str) -> str:
    """The words one space apart; ``InputError`` for no text, control characters, lone surrogates (undecodable)."""
    if not isinstance(words, str):
        raise InputError(f"A class name and its prompt must be text, not {shorten(repr(words), 60)}.")
    text = " ".join(words.split())
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise InputError(f"The class {text[:MAX_NAME]!r} holds a control character or a broken one; remove it.")
    return text


@dataclass(frozen=True)
class Vocabulary:
    """Ordered categories: at least one, no two of one name (compared without case), none called "background"."""

    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        if not self.categories:
            raise InputError("The vocabulary has no class: name at least one, for example --classes \"cat, sofa\".")
        seen = {BACKGROUND}
        for category in self.categories:
            if category.name.casefold() in seen:
                raise InputError(f"The class {category.name!r} is named twice, or the background that the method adds "
                                 "by itself; name each class once.")
            seen.add(category.name.casefold())

    @classmethod
    def of(cls, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] | str = ()) -> Vocabulary:
        """A vocabulary from names ("cat, sofa", ["cat", "sofa"]) or categories; those in ``stuff`` are stuff."""
        if isinstance(classes, Vocabulary):
            return classes
        if isinstance(classes, str):
            classes = classes.split(",")
        if not isinstance(classes, Iterable):
            raise InputError('Classes are names, as in "cat, sofa" or ["cat", "sofa"], or a Vocabulary, not '
                             f"{shorten(repr(classes), 40)}.")
        stuff = [s for s in stuff.split(",") if s.strip()] if isinstance(stuff, str) else stuff
        marked = {Category(s).name.casefold() for s in stuff}
        made = []
        for entry in classes:
            category = Category.of(entry)
            if category is not entry and category.name.casefold() in marked:
                category = Category(category.name, kind="stuff")
            made.append(category)
        return cls(tuple(made))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.categories)

    def __len__(self) -> int:
        return len(self.categories)

    def __iter__(self) -> Iterator[Category]:
        return iter(self.categories)
