"""What the models make of a word: how it is cut into tokens, what lies near it, and whether CLIP recognises what was drawn for it.

Sec. 4.5 asks for anything; a word that the networks never met still gets prototypes, and this is how to see it before they are used.
"""

from __future__ import annotations

import csv
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError

if TYPE_CHECKING:
    import torch

    from ovdiff_lib.filters.category import CategoryFilter


AMBIGUOUS = Path(__file__).with_name("ambiguous.csv")
"""Our list of nouns that mean several things that can be drawn, with rewordings: columns noun, senses, rewordings, parted by "; "."""

IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot",
             "teeth": "tooth", "knives": "knife", "leaves": "leaf", "shelves": "shelf", "wolves": "wolf", "loaves": "loaf",
             "calves": "calf", "scarves": "scarf", "oxen": "ox", "buses": "bus", "potatoes": "potato", "tomatoes": "tomato"}
"""Plurals that no rule of :func:`plain_form` finds."""


@dataclass(frozen=True)
class WordReport:
    """``pieces`` tokens of a ``word``; ``nearest``, the other word of highest cosine in CLIP's text space, and that ``cosine``; the share
    ``recognised`` of its drawings that CLIP reads as the word, in [0, 1], and ``read_as``, what it reads most of them as."""

    word: str
    pieces: int
    nearest: str
    cosine: float
    recognised: float
    read_as: str


def report_word(category_filter: CategoryFilter, word: str, drawings: np.ndarray, others: Sequence[str]) -> WordReport:
    """How CLIP sees ``word`` and its ``drawings`` u8 (n, H, W, 3) among the words ``others``.

    Raises ``InputError`` without drawings or other words, and for words that no vocabulary can hold.
    """
    vocabulary = Vocabulary.of([word, *(other for other in others if Category(other).name.casefold() != Category(word).name.casefold())])
    if len(vocabulary) < 2 or not len(drawings):
        raise InputError(f"The word {word!r} needs at least one drawing and one other word to be compared with.")
    text = category_filter.text
    embeddings = text([category.prompt for category in vocabulary])
    cosine = (embeddings[1:] @ embeddings[0]).numpy()
    read = Counter(int(category_filter.scores(image, vocabulary).argmax()) for image in drawings)
    best = min(read, key=lambda i: (-read[i], i))
    pieces = len(text.tokenizer.tokenize(vocabulary.categories[0].prompt))
    return WordReport(vocabulary.names[0], pieces, vocabulary.names[1 + int(cosine.argmax())], float(cosine.max()),
                      read[0] / len(drawings), vocabulary.names[best])


@dataclass(frozen=True)
class Tokens:
    """How a tokenizer cuts words: its ``pieces`` in order, the ``most`` that one word is cut into, and how many are ``unknown`` to it."""

    pieces: tuple[str, ...]
    most: int
    unknown: int


def read_tokens(tokenizer, words: str) -> Tokens:
    """How ``tokenizer`` (of transformers) cuts ``words``, a class's prompt.

    A tokenizer of bytes knows everything and cuts what it has not met into many pieces; one of whole words says that it does not know.
    """
    pieces = tuple(tokenizer.tokenize(words))
    most = max((len(tokenizer.tokenize(word)) for word in words.split()), default=0)
    return Tokens(pieces, most, sum(piece == tokenizer.unk_token for piece in pieces))


def drawings_read(category_filter: CategoryFilter, drawings: np.ndarray) -> torch.Tensor:
    """CLIP embeddings f32 (n, E), unit length, of drawings u8 (n, H, W, 3), n >= 1."""
    import torch

    return torch.stack([category_filter.embed_image(image) for image in drawings])


def filter_prompt(category_filter: CategoryFilter, words: str) -> str:
    """The text that the category filter makes of one class's ``words``."""
    return category_filter.settings.category_prompt.replace("{names}", words)


@dataclass(frozen=True)
class Ambiguity:
    """A ``noun`` with several ``senses`` that can be drawn, and ``rewordings`` that mean one of them each."""

    noun: str
    senses: tuple[str, ...]
    rewordings: tuple[str, ...]


def ambiguity(words: str) -> Ambiguity | None:
    """The entry of :data:`AMBIGUOUS` for a class's words, in any case and in the plural too; None for words that are in no entry."""
    table = _ambiguities()
    return table.get(" ".join(words.split()).casefold()) or table.get(plain_form(words))


@functools.cache
def _ambiguities() -> dict[str, Ambiguity]:
    with open(AMBIGUOUS, encoding="utf-8", newline="") as file:
        return {row["noun"]: Ambiguity(row["noun"], *(tuple(row[part].split("; ")) for part in ("senses", "rewordings")))
                for row in csv.DictReader(file)}


def plain_form(words: str) -> str:
    """The same text for spellings that mean the same: without case, articles, spaces, hyphens and signs, and with the last word in the
    singular ("TV-monitors" and "tv monitor" are "tvmonitor"). English rules; a word may come out mutilated, but always alike."""
    parts = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", words).casefold()).split()
    parts = [part for part in parts if part not in ("a", "an", "the")] or parts
    return "".join([*parts[:-1], *map(_singular, parts[-1:])]) or words.strip()


def _singular(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + instead
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def same_meaning(vocabulary: Vocabulary) -> list[tuple[int, int, str]]:
    """Pairs of classes (i, j, why), i < j, whose words mean the same or one a kind of the other: by :func:`plain_form`, or by the project's
    list of synonyms and subclasses (:func:`~ovdiff_lib.workbench.data.synonyms.synonyms`)."""
    from ovdiff_lib.workbench.data.synonyms import synonyms

    kinds = {plain_form(name): {plain_form(word) for word in words} for name, words in synonyms().items()}
    forms = [plain_form(category.prompt) for category in vocabulary]
    found, holders = [], {}  # a class is looked up by its form, so that a thousand classes need no million comparisons
    for i, form in enumerate(forms):
        holders.setdefault(form, []).append(i)
    for i, form in enumerate(forms):
        found += [(i, j, "differ in spelling alone") for j in holders[form] if j > i]
        near = [j for word in sorted(kinds.get(form, ())) if word != form for j in holders.get(word, ())]
        found += [(*sorted((i, j)), "are synonyms, or one is a kind of the other") for j in near]
    return sorted(dict.fromkeys(found))
