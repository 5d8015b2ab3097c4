"""What the models make of a word: how it is cut into tokens, what lies near it, and whether CLIP recognises what was drawn for it.

Sec. 4.5 asks for anything; a word that the networks never met still gets prototypes, and this is how to see it before they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ovdiff_lib.errors import InputError
from ovdiff_lib.types import Category, Vocabulary

if TYPE_CHECKING:
    from ovdiff_lib.filters.category import CategoryFilter


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
