"""The vocabulary doctor's questions to CLIP: what it reads in a class's drawings, and which words it can hardly tell apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ovdiff_lib.vocabulary_report import Findings, Limits
from ovdiff_lib.words import filter_prompt

if TYPE_CHECKING:
    import torch

    from ovdiff_lib.filters.category import CategoryFilter

FEW = 5
"""Words from which on their cosines are many enough for quartiles."""


def examine_readings(findings: Findings, clip: CategoryFilter, read: dict[int, torch.Tensor], limits: Limits, skipped: list[str]) -> None:
    """What CLIP, which filters the categories, reads in the drawings ``read`` (class -> embeddings (n, E)) and how near words are to it.

    A drawing is read as the word of highest cosine. Words compete as in the filter: stuff that the filter always keeps
    (``filters.category_keep_stuff``) is not judged.
    """
    vocabulary, settings = findings.vocabulary, clip.settings
    prompts = [filter_prompt(clip, category.prompt) for category in vocabulary]
    known = [i for i, fits in enumerate(clip.text.fits(prompts)) if fits]
    for i in sorted(set(range(len(vocabulary))) - set(known)):
        findings.add(i, "bad", f"its prompt is longer than CLIP's {clip.text.length} tokens, so the category filter refuses it; shorten it")
    words = clip.text([prompts[i] for i in known])
    _examine_nearness(findings, known, (words @ words.T).numpy(), limits, skipped)
    judged = [k for k, i in enumerate(known) if not (settings.category_keep_stuff and vocabulary.categories[i].kind == "stuff")]
    if len(judged) < 2:
        skipped.append("The category filter judges fewer than two classes, so CLIP's reading of the drawings was not examined.")
    for k in judged:
        i = known[k]
        if i not in read or len(judged) < 2:
            continue
        best = Counter(known[judged[b]] for b in (read[i] @ words[judged].T).argmax(1).tolist())
        share, most = best[i] / len(read[i]), min(best, key=lambda b: (-best[b], b))
        findings.values[i] |= {"recognised": share, "read_as": vocabulary.names[most]}
        if share < limits.recognised_look:
            instead = min((b for b in best if b != i), key=lambda b: (-best[b], b))
            findings.add(i, "bad" if share < limits.recognised_bad else "look",
                         f"CLIP reads {best[i]} of its {len(read[i])} drawings as it, and {best[instead]} as {vocabulary.names[instead]!r}")
    for i, embeddings in read.items():
        if rewordings := findings.values[i].get("rewordings"):
            texts = [filter_prompt(clip, words) for words in rewordings]
            seen = Counter((embeddings @ clip.text(texts).T).argmax(1).tolist())
            findings.values[i]["drawn_as"] = {word: seen[n] for n, word in enumerate(rewordings)}


def _examine_nearness(findings: Findings, known: Sequence[int], cosine: np.ndarray, limits: Limits, skipped: list[str]) -> None:
    """Nearest words by ``cosine`` f32 (k, k) of the classes ``known``, and those that are outliers of the vocabulary."""
    if len(known) < 2:
        return
    pairs = cosine[np.triu_indices(len(known), 1)]
    low, high = np.percentile(pairs, [25, 75])
    fence = high + limits.text_fence * (high - low) if len(known) >= FEW else np.inf
    if len(known) < FEW:
        skipped.append(f"With fewer than {FEW} words their nearness in CLIP's text space is shown and not judged.")
    apart = cosine - 3 * np.eye(len(known), dtype=cosine.dtype)
    for k, nearest in enumerate(apart.argmax(1)):
        name, value = findings.vocabulary.names[known[nearest]], apart[k, nearest]
        findings.values[known[k]] |= {"nearest_word": name, "text_cosine": value}
        if value > fence:
            findings.add(known[k], "look", f"to CLIP's text encoder it is nearly {name!r}: cosine {value:.2f}, where most words "
                                           f"of this vocabulary stay below {high:.2f}")
