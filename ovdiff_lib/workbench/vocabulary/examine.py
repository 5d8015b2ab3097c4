"""The vocabulary doctor: which classes will get in each other's way, which words the models do not know and which drawings show something
else, before any image is segmented.

Every check measures something that the method itself will use: the support images, their masks, the prototypes, CLIP's reading of
words. What it finds is a sentence for each class and a verdict, "fine", "look" (look at it before trusting it) or "bad".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.types import ForegroundBackground, PrototypeBank
from ovdiff_lib.workbench.vocabulary.collisions import Collisions, collide
from ovdiff_lib.workbench.vocabulary.report import Findings, Limits, Pair, VocabularyReport
from ovdiff_lib.workbench.vocabulary.words import ambiguity, drawings_read, read_tokens, same_meaning

if TYPE_CHECKING:
    from ovdiff_lib.pipeline import OVDiff
from collections import Counter

from ovdiff_lib.workbench.vocabulary.words import filter_prompt

if TYPE_CHECKING:
    import torch

    from ovdiff_lib.filters.category import CategoryFilter


NAMED = 3
"""Rivals that a sentence about one class names."""


def examine(ovdiff: OVDiff, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] = (),
            limits: Limits | None = None) -> VocabularyReport:
    """Build the classes, or take them from the library, and examine them as ``ovdiff`` would use them.

    Classes that cannot be built (a name too long, no drawing with a foreground) are bad, and the others are examined without them. Where
    the profile has no category filter CLIP is not asked. Raises ``ProfileError``, ``ModelNotAvailable`` and ``InputError`` as
    :meth:`~ovdiff_lib.pipeline.OVDiff.build` does for whatever else is wrong.
    """
    from ovdiff_lib.checks import check_profile

    limits = limits or Limits()
    vocabulary = Vocabulary.of(classes, stuff)
    check_profile(ovdiff.profile)
    findings, skipped = Findings(vocabulary), []
    _examine_words(findings, ovdiff, limits)
    bank, kept = _build(findings, ovdiff)
    clip = ovdiff.category_filter if ovdiff.profile.filters.category else None
    if clip is None:
        skipped.append("The profile has no category filter (filters.category), so CLIP's reading of words and drawings was not examined.")
    read = {}
    for i in tqdm(kept, desc="examining drawings", unit="class", disable=not ovdiff.progress or len(kept) < 2):
        _examine_masks(findings, i, ovdiff.masks_of(vocabulary.categories[i]), ovdiff.profile.masks.segmenter, limits)
        if clip is not None:
            read[i] = drawings_read(clip, ovdiff.support(vocabulary.categories[i]).images)
    if clip is not None:
        examine_readings(findings, clip, read, limits, skipped)
    pairs, tables = (), {}
    if len(kept) < 2:
        skipped.append("Fewer than two classes could be built, so there is nothing that could collide.")
    else:
        pairs, tables = _examine_collisions(findings, bank, kept, ovdiff, limits)
    notes = tuple(_notes(bank, findings, kept, ovdiff))
    return VocabularyReport(ovdiff.profile.name, findings.report(), pairs, limits, tuple(skipped), notes,
                            tuple(vocabulary.names[i] for i in kept), tables)


def _examine_words(findings: Findings, ovdiff: OVDiff, limits: Limits) -> None:
    """What can be said of the words alone: tokens, length, senses, doubles."""
    from ovdiff_lib.support.attribution import class_token_positions

    tokenizer = ovdiff.diffusion.tokenizer
    for i, category in enumerate(findings.vocabulary):
        tokens = read_tokens(tokenizer, category.prompt)
        findings.values[i] |= {"pieces": len(tokens.pieces), "unknown_pieces": tokens.unknown}
        if tokens.unknown:
            findings.add(i, "bad", f"the tokenizer does not know {tokens.unknown} of its {len(tokens.pieces)} pieces")
        elif tokens.most > limits.pieces:
            findings.add(i, "look", f"the tokenizer cuts a word of it into {tokens.most} pieces, so the models may never have met it")
        try:
            class_token_positions(tokenizer, ovdiff.profile.support.prompt, category.prompt)
        except InputError as error:
            findings.values[i]["cannot_be_built"] = str(error)
            findings.add(i, "bad", str(error))
        if category.kind == "thing" and ovdiff.profile.filters.stuff and _is_stuff(category):
            findings.add(i, "look", "it is usually a region, not a thing: name it as stuff, or it competes with the background of others")
        if found := ambiguity(category.prompt):
            findings.values[i] |= {"senses": list(found.senses), "rewordings": list(found.rewordings)}
            findings.add(i, "look", f"“{found.noun}” can mean {', '.join(found.senses)}; say {' or '.join(map(repr, found.rewordings))}")
    for first, second, why in same_meaning(findings.vocabulary):
        for i, j in ((first, second), (second, first)):
            findings.add(i, "look", f"it and {findings.vocabulary.names[j]!r} {why}; keep one")


def _is_stuff(category: Category) -> bool:
    """Whether one of the shipped tables of things and stuff calls the category stuff."""
    from ovdiff_lib.workbench.data.things import kinds

    return any(kinds([category], table, "thing")[category.name] == "stuff" for table in ("c8", "coco-stuff"))


def _build(findings: Findings, ovdiff: OVDiff) -> tuple[PrototypeBank, list[int]]:
    """The bank of the classes that can be built, after the stuff filter where the profile has one, and their indices."""
    from ovdiff_lib.filters.stuff import filter_stuff

    rows, kept = {name: [] for name in ovdiff.profile.features.extractors}, []
    todo = [i for i, values in enumerate(findings.values) if "cannot_be_built" not in values]
    for i in tqdm(todo, desc="building classes", unit="class", disable=not ovdiff.progress or len(todo) < 2):
        try:
            built = ovdiff.build_class(findings.vocabulary.categories[i])
        except OVDiffError as error:
            if type(error) is not OVDiffError:  # not the word's fault
                raise
            findings.values[i]["cannot_be_built"] = str(error)
            findings.add(i, "bad", str(error))
            continue
        kept.append(i)
        for name, prototypes in built.items():
            rows[name].append(prototypes)
    bank = PrototypeBank(Vocabulary(tuple(findings.vocabulary.categories[i] for i in kept)) if kept else findings.vocabulary,
                         {name: tuple(made) for name, made in rows.items()})
    if not kept or not ovdiff.profile.filters.stuff:
        return bank, kept
    filtered = filter_stuff(bank, ovdiff.profile.filters)
    for place, i in enumerate(kept):
        before, after = (sum(int((rows[place].region == "background").sum()) for rows in b.prototypes.values()) for b in (bank, filtered))
        findings.values[i]["background_removed_by_stuff_filter"] = (before - after) / before if before else None
    return filtered, kept


def _examine_masks(findings: Findings, index: int, masks: ForegroundBackground, segmenter: str, limits: Limits) -> None:
    area = masks.foreground.mean((1, 2))
    some, full, count = area > 0, area >= limits.full, len(area)
    fallback = np.array([source == "threshold" and segmenter != "threshold" for source in masks.source])
    findings.values[index] |= {
        "images": count, "with_foreground": some.mean(), "foreground_area": area[some].mean() if some.any() else 0.0,
        "full_masks": full.mean(), "without_background": (~masks.background.any((1, 2))).mean(), "fallback_to_thresholds": fallback.mean()}
    if some.mean() < limits.foreground_bad:
        findings.add(index, "bad", f"only {int(some.sum())} of {count} drawings have any foreground, so it has few prototypes")
    elif (~some).mean() >= limits.masks_look:
        findings.add(index, "look", f"{int((~some).sum())} of {count} drawings have no foreground")
    if full.mean() >= limits.masks_look:
        findings.add(index, "look", f"the foreground of {int(full.sum())} of {count} drawings fills the image")
    if fallback.mean() >= limits.masks_look and findings.vocabulary.categories[index].kind == "thing":
        findings.add(index, "look", f"the segmenter {segmenter!r} found nothing in {int(fallback.sum())} of {count} drawings, "
                                    "whose masks are thresholds")


def _examine_collisions(findings: Findings, bank: PrototypeBank, kept: Sequence[int], ovdiff: OVDiff,
                        limits: Limits) -> tuple[tuple[Pair, ...], dict[str, Collisions]]:
    """Pairs that collide, the worst first, and the tables of each extractor; every class gets its nearest rival and what was measured."""
    from ovdiff_lib.networks.loading import resolve_device

    device = resolve_device(ovdiff.profile)
    tables = {name: collide(rows, device) for name, rows in bank.prototypes.items()}
    mean = {name: np.mean([getattr(table, name) for table in tables.values()], axis=0)  # over extractors, as matching takes it of cosines
            for name in ("lost", "passes", "sunk", "highest", "mean", "background", "own")}
    names, pairs = bank.vocabulary.names, []
    for what, share, cosine, said in (("foreground", np.fmax(mean["lost"], mean["passes"]), mean["highest"], "can be taken for"),
                                      ("background", mean["sunk"], mean["background"].T, "can be lost in the background of")):
        for a, i in enumerate(kept):
            ranked = sorted((b for b in range(len(names)) if np.isfinite(cosine[a, b])),
                            key=lambda b: (-np.nan_to_num(share[a, b], nan=-1), -cosine[a, b]))
            if not ranked:
                continue
            first = ranked[0]
            if what == "foreground":
                findings.values[i] |= {"rival": names[first], "own": mean["own"][a]}
                findings.values[i] |= {name: mean[name][a, first] for name in ("lost", "passes", "highest", "mean")}
            else:
                findings.values[i] |= {"background_rival": names[first], "sunk": share[a, first], "background_highest": cosine[a, first]}
            found = [b for b in ranked if share[a, b] >= limits.collide_look]
            pairs += [_pair(names, tables, what, a, b, float(share[a, b]), limits) for b in found]
            if found:
                rivals = ", ".join(f"{names[b]!r} ({100 * share[a, b]:.0f} %)" for b in found[:NAMED])
                more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
                findings.add(i, pairs[-len(found)].level, f"drawings of it {said} {rivals}{more}")
    return tuple(sorted(pairs, key=lambda pair: -pair.share)), tables


def _pair(names: Sequence[str], tables: dict[str, Collisions], what: str, a: int, b: int, share: float, limits: Limits) -> Pair:
    values = {}
    for name, table in tables.items():
        if what == "foreground":
            found = {"lost": table.lost[a, b], "passes": table.passes[a, b], "highest": table.highest[a, b], "mean": table.mean[a, b]}
        else:
            found = {"sunk": table.sunk[a, b], "highest": table.background[b, a]}
        values[name] = {key: float(value) for key, value in found.items() if np.isfinite(value)}
    return Pair(names[a], names[b], what, "bad" if share >= limits.collide_bad else "look", share, values)


def _notes(bank: PrototypeBank, findings: Findings, kept: Sequence[int], ovdiff: OVDiff) -> list[str]:
    """What is to be said of the vocabulary as a whole."""
    removed = sum(findings.values[i].get("background_removed_by_stuff_filter") or 0 for i in kept)
    empty = [name for name, rows in bank.prototypes.items() if not any((p.region == "background").any() for p in rows)]
    if not (removed and empty):
        return []
    threshold = ovdiff.profile.filters.stuff_threshold
    return [f"With this vocabulary's stuff the stuff filter (filters.stuff_threshold {threshold:g}) removes all background prototypes of "
            f"{', '.join(empty)}: every pixel will get a class, so name everything that images show."]


# ------------------------------------------------------------------ The vocabulary doctor's questions to CLIP: what it reads in a class's drawings, and which words it can hardly tell apart.

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
