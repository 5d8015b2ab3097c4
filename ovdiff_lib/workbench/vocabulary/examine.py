"""The vocabulary doctor: which classes will get in each other's way, which words the models do not know and which
drawings show something else, before any image is segmented.

Every check measures something that the method itself will use: the support images, their masks, the prototypes, CLIP's
reading of words. What it finds is a sentence for each class and a verdict, "fine", "look" (before trusting it) or
"bad".
"""

from __future__ import annotations

import csv
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.types import ForegroundBackground, PrototypeBank
from ovdiff_lib.workbench.vocabulary.collisions import Collisions, collide
from ovdiff_lib.workbench.vocabulary.report import CollidingPair, Findings, Limits, VocabularyReport

if TYPE_CHECKING:
    from ovdiff_lib.filters.category import CategoryFilter
    from ovdiff_lib.pipeline import OVDiff

NAMED, FEW = 3, 5
"""Rivals that a sentence names; words from which on their cosines are many enough for quartiles."""

AMBIGUOUS = Path(__file__).with_name("ambiguous.csv")
"""Our list of nouns that mean several things that can be drawn, with rewordings: columns noun, senses, rewordings."""


def examine(ovdiff: OVDiff, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] = (),
            limits: Limits | None = None, among: Iterable[str] = ()) -> VocabularyReport:
    """Build the classes, or take them from the library, and examine them as ``ovdiff`` would use them.

    ``among``: further words that CLIP reads the drawings beside; they are not drawn. Classes that cannot be built (a
    name too long, no drawing with a foreground) are bad, and the others are examined without them. Where the profile
    has no category filter CLIP is not asked. Whatever else is wrong raises as :meth:`~ovdiff_lib.pipeline.OVDiff.build`
    does.
    """
    from ovdiff_lib.keys import check_profile

    limits, vocabulary = limits or Limits(), Vocabulary.of(classes, stuff)
    check_profile(ovdiff.profile)
    findings, skipped, read = Findings(vocabulary), [], {}
    _examine_words(findings, ovdiff, limits)
    bank, kept = _build(findings, ovdiff)
    clip = ovdiff.category_filter if ovdiff.profile.filters.category else None
    for i in tqdm(kept, desc="examining drawings", unit="class", disable=not ovdiff.progress or len(kept) < 2):
        category = vocabulary.categories[i]
        _examine_masks(findings, i, ovdiff.masks_of(category), ovdiff.profile.masks.segmenter, limits)
        if clip is not None:
            read[i] = torch.stack([clip.embed_image(image) for image in ovdiff.support(category).images])
    if clip is not None:
        _examine_readings(findings, clip, read, limits, skipped, among)
    else:
        skipped.append("The profile has no category filter (filters.category), so CLIP's reading of words and drawings "
                       "was not examined.")
    pairs, tables = (), {}
    if len(kept) < 2:
        skipped.append("Fewer than two classes could be built, so there is nothing that could collide.")
    else:
        pairs, tables = _examine_collisions(findings, bank, kept, ovdiff, limits)
    notes = tuple(_notes(bank, findings, kept, ovdiff))
    return VocabularyReport(ovdiff.profile.name, findings.report(), pairs, limits, tuple(skipped), notes,
                            tuple(vocabulary.names[i] for i in kept), tables)


# ---- words alone

def _examine_words(findings: Findings, ovdiff: OVDiff, limits: Limits) -> None:
    """What can be said of the words alone: tokens, length, senses, doubles."""
    from ovdiff_lib.support.attribution import class_token_positions
    from ovdiff_lib.workbench.data.things import kinds

    tokenizer, vocabulary = ovdiff.diffusion.tokenizer, findings.vocabulary
    for i, category in enumerate(vocabulary):
        pieces, most, unknown = read_tokens(tokenizer, category.prompt)
        findings.values[i] |= {"pieces": pieces, "unknown_pieces": unknown}
        if unknown:
            findings.add(i, "bad", f"the tokenizer does not know {unknown} of its {pieces} pieces")
        elif most > limits.pieces:
            findings.add(i, "look", f"the tokenizer cuts a word of it into {most} pieces, so the models may never have "
                                    "met it")
        try:
            class_token_positions(tokenizer, ovdiff.profile.support.prompt, category.prompt)
        except InputError as error:
            findings.values[i]["cannot_be_built"] = str(error)
            findings.add(i, "bad", str(error))
        said = {kinds([category], table, "thing")[category.name] for table in ("c8", "coco-stuff")}
        if category.kind == "thing" and ovdiff.profile.filters.stuff and "stuff" in said:
            findings.add(i, "look", "it is usually a region, not a thing: name it as stuff, or it competes with the "
                                    "background of others")
        if found := ambiguity(category.prompt):
            findings.values[i] |= {"senses": list(found.senses), "rewordings": list(found.rewordings)}
            better = " or ".join(map(repr, found.rewordings))
            findings.add(i, "look", f"“{found.noun}” can mean {', '.join(found.senses)}; say {better}")
    for first, second, why in same_meaning(vocabulary):
        for i, j in ((first, second), (second, first)):
            findings.add(i, "look", f"it and {vocabulary.names[j]!r} {why}; keep one")


def read_tokens(tokenizer, words: str) -> tuple[int, int, int]:
    """Pieces that ``tokenizer`` cuts ``words`` into, the most that one word is cut into, and how many it does not know.

    A tokenizer of bytes knows everything and cuts what it has not met into many pieces; one of whole words says so.
    """
    pieces = tokenizer.tokenize(words)
    most = max((len(tokenizer.tokenize(word)) for word in words.split()), default=0)
    return len(pieces), most, sum(piece == tokenizer.unk_token for piece in pieces)


class Ambiguity(NamedTuple):
    """A ``noun`` with several ``senses`` that can be drawn, and ``rewordings`` that mean one of them each."""

    noun: str
    senses: tuple[str, ...]
    rewordings: tuple[str, ...]


def ambiguity(words: str) -> Ambiguity | None:
    """The entry of :data:`AMBIGUOUS` for a class's words, in any case; None for words that are in no entry."""
    return _ambiguities().get(" ".join(words.split()).casefold())


@functools.cache
def _ambiguities() -> dict[str, Ambiguity]:
    with open(AMBIGUOUS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {row["noun"]: [tuple(row[name].split("; ")) for name in ("senses", "rewordings")] for row in rows}
    return {noun: Ambiguity(noun, *both) for noun, both in parts.items()}


def plain_form(words: str) -> str:
    """The same text for spellings of one name: without case, articles, spaces, hyphens and signs, and without an s at
    the end ("TV-monitors" and "tv monitor" are "tvmonitor")."""
    parts = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", words).casefold()).split()
    joined = "".join([part for part in parts if part not in ("a", "an", "the")] or parts)
    plural = len(joined) > 3 and joined.endswith("s") and not joined.endswith(("ss", "us", "is"))
    return joined[:-1] if plural else joined or words.strip()


def same_meaning(vocabulary: Vocabulary) -> list[tuple[int, int, str]]:
    """Pairs of classes (i, j, why), i < j, whose words mean the same or one a kind of the other: by :func:`plain_form`,
    or by the project's list of synonyms and subclasses."""
    from ovdiff_lib.workbench.data.classes import synonyms

    kinds = {plain_form(name): {plain_form(word) for word in words} for name, words in synonyms().items()}
    forms = [plain_form(category.prompt) for category in vocabulary]
    found, holders = [], {}  # a class is looked up by its form: a thousand classes need no million comparisons
    for i, form in enumerate(forms):
        holders.setdefault(form, []).append(i)
    for i, form in enumerate(forms):
        found += [(i, j, "differ in spelling alone") for j in holders[form] if j > i]
        near = [j for word in sorted(kinds.get(form, ())) if word != form for j in holders.get(word, ())]
        found += [(*sorted((i, j)), "are synonyms, or one is a kind of the other") for j in near]
    return sorted(dict.fromkeys(found))


# ---- drawings, masks, prototypes

def _build(findings: Findings, ovdiff: OVDiff) -> tuple[PrototypeBank, list[int]]:
    """The bank of the classes that can be built, after the stuff filter where the profile has one, and their
    indices."""
    from ovdiff_lib.filters.stuff import filter_stuff

    rows, kept = {name: [] for name in ovdiff.profile.features.extractors}, []
    categories = findings.vocabulary.categories
    todo = [i for i, values in enumerate(findings.values) if "cannot_be_built" not in values]
    for i in tqdm(todo, desc="building classes", unit="class", disable=not ovdiff.progress or len(todo) < 2):
        try:
            built = ovdiff.build_class(categories[i])
        except OVDiffError as error:
            if type(error) is not OVDiffError:  # not the word's fault
                raise
            findings.values[i]["cannot_be_built"] = str(error)
            findings.add(i, "bad", str(error))
            continue
        kept.append(i)
        for name, prototypes in built.items():
            rows[name].append(prototypes)
    built = Vocabulary(tuple(categories[i] for i in kept)) if kept else findings.vocabulary
    bank = PrototypeBank(built, {name: tuple(made) for name, made in rows.items()})
    if not kept or not ovdiff.profile.filters.stuff:
        return bank, kept
    filtered = filter_stuff(bank, ovdiff.profile.filters)
    for place, i in enumerate(kept):
        before, after = (sum(int((rows[place].region == "background").sum()) for rows in b.prototypes.values())
                         for b in (bank, filtered))
        findings.values[i]["background_removed_by_stuff_filter"] = (before - after) / before if before else None
    return filtered, kept


def _examine_masks(findings: Findings, index: int, masks: ForegroundBackground, segmenter: str, limits: Limits) -> None:
    area = masks.foreground.mean((1, 2))
    some, full, count = area > 0, area >= limits.full, len(area)
    fallback = np.array([source == "threshold" and segmenter != "threshold" for source in masks.source])
    findings.values[index] |= {
        "images": count, "with_foreground": some.mean(), "foreground_area": area[some].mean() if some.any() else 0.0,
        "full_masks": full.mean(), "without_background": (~masks.background.any((1, 2))).mean(),
        "fallback_to_thresholds": fallback.mean()}
    if some.mean() < limits.foreground_bad:
        findings.add(index, "bad", f"only {int(some.sum())} of {count} drawings have any foreground, so it has few "
                                   "prototypes")
    elif (~some).mean() >= limits.masks_look:
        findings.add(index, "look", f"{int((~some).sum())} of {count} drawings have no foreground")
    if full.mean() >= limits.masks_look:
        findings.add(index, "look", f"the foreground of {int(full.sum())} of {count} drawings fills the image")
    if fallback.mean() >= limits.masks_look and findings.vocabulary.categories[index].kind == "thing":
        findings.add(index, "look", f"the segmenter {segmenter!r} found nothing in {int(fallback.sum())} of {count} "
                                    "drawings, whose masks are thresholds")


def _examine_collisions(findings: Findings, bank: PrototypeBank, kept: Sequence[int], ovdiff: OVDiff,
                        limits: Limits) -> tuple[tuple[CollidingPair, ...], dict[str, Collisions]]:
    """Pairs that collide, the worst first, and the tables of each extractor; every class gets its nearest rival."""
    from ovdiff_lib.networks.loading import resolve_device

    tables = {name: collide(rows, resolve_device(ovdiff.profile)) for name, rows in bank.prototypes.items()}
    measured = ("lost", "passes", "sunk", "highest", "mean", "background", "own")
    mean = {name: np.mean([getattr(table, name) for table in tables.values()], axis=0) for name in measured}
    names, pairs = bank.vocabulary.names, []
    both = np.fmax(mean["lost"], mean["passes"])
    for what, share, cosine, said in (
            ("foreground", both, mean["highest"], "can be taken for"),
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
                findings.values[i] |= {"background_rival": names[first], "sunk": share[a, first],
                                       "background_highest": cosine[a, first]}
            found = [b for b in ranked if share[a, b] >= limits.collide_look]
            for b in found:
                level = "bad" if share[a, b] >= limits.collide_bad else "look"
                values = _measured(tables, what, a, b)
                pairs.append(CollidingPair(names[a], names[b], what, level, float(share[a, b]), values))
            if found:
                rivals = ", ".join(f"{names[b]!r} ({100 * share[a, b]:.0f} %)" for b in found[:NAMED])
                more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
                findings.add(i, pairs[-len(found)].level, f"drawings of it {said} {rivals}{more}")
    return tuple(sorted(pairs, key=lambda pair: -pair.share)), tables


def _measured(tables: dict[str, Collisions], what: str, a: int, b: int) -> dict[str, dict[str, float]]:
    values = {}
    for name, table in tables.items():
        found = {part: getattr(table, part)[a, b] for part in ("lost", "passes", "highest", "mean")}
        if what == "background":
            found = {"sunk": table.sunk[a, b], "highest": table.background[b, a]}
        values[name] = {part: float(value) for part, value in found.items() if np.isfinite(value)}
    return values


def _notes(bank: PrototypeBank, findings: Findings, kept: Sequence[int], ovdiff: OVDiff) -> list[str]:
    """What is to be said of the vocabulary as a whole."""
    removed = sum(findings.values[i].get("background_removed_by_stuff_filter") or 0 for i in kept)
    empty = [name for name, rows in bank.prototypes.items() if not any((p.region == "background").any() for p in rows)]
    if not (removed and empty):
        return []
    threshold = ovdiff.profile.filters.stuff_threshold
    return [f"With this vocabulary's stuff the stuff filter (filters.stuff_threshold {threshold:g}) removes all "
            f"background prototypes of {', '.join(empty)}: every pixel will get a class, so name everything that "
            "images show."]


# ---- what CLIP reads

def _examine_readings(findings: Findings, clip: CategoryFilter, read: dict[int, torch.Tensor], limits: Limits,
                      skipped: list[str], among: Iterable[str]) -> None:
    """What CLIP, which filters the categories, reads in the drawings ``read`` (class -> embeddings (n, E)), the word of
    highest cosine, and how near words are to it. Stuff that the filter always keeps is not judged."""
    own, settings = findings.vocabulary, clip.settings
    known = {name.casefold() for name in own.names}
    categories = [*own, *(c for c in map(Category, among) if c.name.casefold() not in known)]
    texts = [settings.category_prompt.replace("{names}", category.prompt) for category in categories]
    fits = clip.text.fits(texts)
    for i in range(len(own)):
        if not fits[i]:
            findings.add(i, "bad", f"its prompt is longer than CLIP's {clip.text.length} tokens, so the category "
                                   "filter refuses it; shorten it")
    known = [i for i, good in enumerate(fits) if good]
    words = clip.text([texts[i] for i in known])
    names = [category.name for category in categories]
    _examine_nearness(findings, [names[i] for i in known], [i for i in known if i < len(own)],
                      (words @ words.T).numpy(), limits, skipped)
    judged = [k for k, i in enumerate(known) if not (settings.category_keep_stuff and categories[i].kind == "stuff")]
    if len(judged) < 2:
        skipped.append("The category filter judges fewer than two classes, so CLIP's reading of the drawings was not "
                       "examined.")
    for i in [known[k] for k in judged if known[k] in read and len(judged) > 1]:
        best = Counter(known[judged[b]] for b in (read[i] @ words[judged].T).argmax(1).tolist())
        share = best[i] / len(read[i])
        ranked = sorted(best, key=lambda b: (-best[b], b))
        findings.values[i] |= {"recognised": share, "read_as": names[ranked[0]]}
        if share < limits.recognised_look:
            other = next(b for b in ranked if b != i)
            findings.add(i, "bad" if share < limits.recognised_bad else "look", f"CLIP reads {best[i]} of its "
                         f"{len(read[i])} drawings as it, and {best[other]} as {names[other]!r}")
    for i, embeddings in read.items():
        if rewordings := findings.values[i].get("rewordings"):
            prompts = [settings.category_prompt.replace("{names}", words) for words in rewordings]
            seen = Counter((embeddings @ clip.text(prompts).T).argmax(1).tolist())
            findings.values[i]["drawn_as"] = {word: seen[n] for n, word in enumerate(rewordings)}


def _examine_nearness(findings: Findings, names: Sequence[str], own: Sequence[int], cosine: np.ndarray, limits: Limits,
                      skipped: list[str]) -> None:
    """Nearest words by ``cosine`` f32 (k, k) of ``names``, and those of the classes ``own``, the first, that are
    outliers."""
    if len(names) < 2:
        return
    low, high = np.percentile(cosine[np.triu_indices(len(names), 1)], [25, 75])
    fence = high + limits.text_fence * (high - low) if len(names) >= FEW else np.inf
    if len(names) < FEW:
        skipped.append(f"With fewer than {FEW} words their nearness in CLIP's text space is shown and not judged.")
    apart = cosine - 3 * np.eye(len(names), dtype=cosine.dtype)
    for k, i in enumerate(own):
        value, name = apart[k].max(), names[apart[k].argmax()]
        findings.values[i] |= {"nearest_word": name, "text_cosine": value}
        if value > fence:
            findings.add(i, "look", f"to CLIP's text encoder it is nearly {name!r}: cosine {value:.2f}, where most "
                                    f"words of this vocabulary stay below {high:.2f}")
