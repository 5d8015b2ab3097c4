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
from ovdiff_lib.filters.stuff import filter_stuff
from ovdiff_lib.keys import check_profile
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.support.attribution import class_token_positions
from ovdiff_lib.types import ForegroundBackground, PrototypeBank
from ovdiff_lib.workbench.data.classes import synonyms
from ovdiff_lib.workbench.data.things import kinds
from ovdiff_lib.workbench.vocabulary.collisions import Collisions, collide
from ovdiff_lib.workbench.vocabulary.report import ClassReport, CollidingPair, Limits, VocabularyReport

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
    limits, vocabulary = limits or Limits(), Vocabulary.of(classes, stuff)
    check_profile(ovdiff.profile)
    reports, skipped, read = [ClassReport(category.name, category.kind) for category in vocabulary], [], {}
    _examine_words(reports, vocabulary, ovdiff, limits)
    bank, kept = _build(reports, vocabulary, ovdiff)
    clip = ovdiff.category_filter if ovdiff.profile.filters.category else None
    for i in tqdm(kept, desc="examining drawings", unit="class", disable=not ovdiff.progress or len(kept) < 2):
        category = vocabulary.categories[i]
        _examine_masks(reports[i], ovdiff.masks_of(category), ovdiff.profile.masks.segmenter, limits)
        if clip is not None:
            read[i] = torch.stack([clip.embed_image(image) for image in ovdiff.support(category).images])
    if clip is not None:
        known = {name.casefold() for name in vocabulary.names}
        others = [category for category in map(Category, among) if category.name.casefold() not in known]
        skipped += _examine_readings(reports, [*vocabulary, *others], clip, read, limits)
    else:
        skipped.append("The profile has no category filter (filters.category), so CLIP's reading of words and drawings "
                       "was not examined.")
    pairs, tables = (), {}
    if len(kept) < 2:
        skipped.append("Fewer than two classes could be built, so there is nothing that could collide.")
    else:
        tables = {name: collide(rows, resolve_device(ovdiff.profile)) for name, rows in bank.prototypes.items()}
        pairs = _examine_collisions([reports[i] for i in kept], tables, limits)
    return VocabularyReport(ovdiff.profile.name, tuple(reports), pairs, limits, tuple(skipped),
                            _notes(bank, reports, ovdiff), tuple(vocabulary.names[i] for i in kept), tables)


# ---- words alone

def _examine_words(reports: Sequence[ClassReport], vocabulary: Vocabulary, ovdiff: OVDiff, limits: Limits) -> None:
    """What can be said of the words alone: tokens, length, senses, doubles."""
    tokenizer = ovdiff.diffusion.tokenizer
    for report, category in zip(reports, vocabulary, strict=True):
        pieces, most, unknown = read_tokens(tokenizer, category.prompt)
        report.measure(pieces=pieces, unknown_pieces=unknown)
        if unknown:
            report.add("bad", f"the tokenizer does not know {unknown} of its {pieces} pieces")
        elif most > limits.pieces:
            report.add("look", f"the tokenizer cuts a word of it into {most} pieces, so the models may never have met "
                               "it")
        try:
            class_token_positions(tokenizer, ovdiff.profile.support.prompt, category.prompt)
        except InputError as error:
            report.measure(cannot_be_built=str(error))
            report.add("bad", str(error))
        said = {kinds([category], table, "thing")[category.name] for table in ("c8", "coco-stuff")}
        if category.kind == "thing" and ovdiff.profile.filters.stuff and "stuff" in said:
            report.add("look", "it is usually a region, not a thing: name it as stuff, or it competes with the "
                               "background of others")
        if found := ambiguity(category.prompt):
            report.measure(senses=found.senses, rewordings=found.rewordings)
            better = " or ".join(map(repr, found.rewordings))
            report.add("look", f"“{found.noun}” can mean {', '.join(found.senses)}; say {better}")
    for first, second, why in same_meaning(vocabulary):
        for i, j in ((first, second), (second, first)):
            reports[i].add("look", f"it and {vocabulary.names[j]!r} {why}; keep one")


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
    senses: list[str]
    rewordings: list[str]


def ambiguity(words: str) -> Ambiguity | None:
    """The entry of :data:`AMBIGUOUS` for a class's words, in any case; None for words that are in no entry."""
    return _ambiguities().get(" ".join(words.split()).casefold())


@functools.cache
def _ambiguities() -> dict[str, Ambiguity]:
    with AMBIGUOUS.open(encoding="utf-8", newline="") as file:
        return {row["noun"]: Ambiguity(row["noun"], row["senses"].split("; "), row["rewordings"].split("; "))
                for row in csv.DictReader(file)}


def plain_form(words: str) -> str:
    """The same text for spellings of one name: without case, articles, spaces, hyphens and signs, and without an s at
    the end ("TV-monitors" and "tv monitor" are "tvmonitor")."""
    parts = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", words).casefold()).split()
    joined = "".join([part for part in parts if part not in ("a", "an", "the")] or parts)
    plural = len(joined) > 3 and joined.endswith("s") and not joined.endswith(("ss", "us", "is"))
    return joined[:-1] if plural else joined or words.strip()


def same_meaning(vocabulary: Vocabulary) -> list[tuple[int, int, str]]:
    """Pairs of classes (i, j, why), i < j, of one :func:`plain_form`, or in the project's list of synonyms."""
    kinds_of = {plain_form(name): {plain_form(word) for word in words} for name, words in synonyms().items()}
    forms = [plain_form(category.prompt) for category in vocabulary]
    found, holders = set(), {}  # a class is looked up by its form: a thousand classes need no million comparisons
    for i, form in enumerate(forms):
        holders.setdefault(form, []).append(i)
    for i, form in enumerate(forms):
        found |= {(i, j, "differ in spelling alone") for j in holders[form] if j > i}
        near = [j for word in kinds_of.get(form, ()) if word != form for j in holders.get(word, ())]
        found |= {(min(i, j), max(i, j), "are synonyms, or one is a kind of the other") for j in near}
    return sorted(found)


# ---- drawings, masks, prototypes

def _build(reports: Sequence[ClassReport], vocabulary: Vocabulary, ovdiff: OVDiff) -> tuple[PrototypeBank, list[int]]:
    """The bank of the classes that can be built, after the profile's stuff filter, and their indices."""
    rows, kept = {name: [] for name in ovdiff.profile.features.extractors}, []
    todo = [i for i, report in enumerate(reports) if "cannot_be_built" not in report.values]
    for i in tqdm(todo, desc="building classes", unit="class", disable=not ovdiff.progress or len(todo) < 2):
        try:
            built = ovdiff.build_class(vocabulary.categories[i])
        except OVDiffError as error:
            if type(error) is not OVDiffError:  # not the word's fault
                raise
            reports[i].measure(cannot_be_built=str(error))
            reports[i].add("bad", str(error))
            continue
        kept.append(i)
        for name, prototypes in built.items():
            rows[name].append(prototypes)
    categories = [vocabulary.categories[i] for i in kept] or vocabulary.categories
    bank = PrototypeBank(Vocabulary(tuple(categories)), {name: tuple(made) for name, made in rows.items()})
    if not kept or not ovdiff.profile.filters.stuff:
        return bank, kept
    filtered = filter_stuff(bank, ovdiff.profile.filters)
    for place, i in enumerate(kept):
        before, after = (sum(int((rows[place].region == "background").sum()) for rows in b.prototypes.values())
                         for b in (bank, filtered))
        reports[i].measure(background_removed_by_stuff_filter=(before - after) / before if before else None)
    return filtered, kept


def _examine_masks(report: ClassReport, masks: ForegroundBackground, segmenter: str, limits: Limits) -> None:
    area = masks.foreground.mean((1, 2))
    some, full, count = area > 0, area >= limits.full, len(area)
    fallback = np.array([source == "threshold" and segmenter != "threshold" for source in masks.source])
    report.measure(images=count, with_foreground=some.mean(), foreground_area=area[some].mean() if some.any() else 0.0,
                   full_masks=full.mean(), without_background=(~masks.background.any((1, 2))).mean(),
                   fallback_to_thresholds=fallback.mean())
    if some.mean() < limits.foreground_bad:
        report.add("bad", f"only {some.sum()} of {count} drawings have any foreground, so it has few prototypes")
    elif (~some).mean() >= limits.masks_look:
        report.add("look", f"{(~some).sum()} of {count} drawings have no foreground")
    if full.mean() >= limits.masks_look:
        report.add("look", f"the foreground of {full.sum()} of {count} drawings fills the image")
    if fallback.mean() >= limits.masks_look and report.kind == "thing":
        report.add("look", f"the segmenter {segmenter!r} found nothing in {fallback.sum()} of {count} drawings, whose "
                           "masks are thresholds")


def _examine_collisions(reports: Sequence[ClassReport], tables: dict[str, Collisions],
                        limits: Limits) -> tuple[CollidingPair, ...]:
    """Pairs of classes that collide, the worst first, by the ``tables`` of each extractor; each gets its rival."""
    mean = {name: np.mean([vars(table)[name] for table in tables.values()], axis=0)
            for name in ("lost", "passes", "sunk", "highest", "mean", "background", "own")}
    pairs = []
    for what, share, cosine, said in (
            ("foreground", np.fmax(mean["lost"], mean["passes"]), mean["highest"], "can be taken for"),
            ("background", mean["sunk"], mean["background"].T, "can be lost in the background of")):
        for a, report in enumerate(reports):
            ranked = sorted((b for b in range(len(reports)) if np.isfinite(cosine[a, b])),
                            key=lambda b: (-np.nan_to_num(share[a, b], nan=-1), -cosine[a, b]))
            if not ranked:
                continue
            b = ranked[0]
            if what == "foreground":
                report.measure(rival=reports[b].name, own=mean["own"][a],
                               **{name: mean[name][a, b] for name in ("lost", "passes", "highest", "mean")})
            else:
                report.measure(background_rival=reports[b].name, sunk=share[a, b], background_highest=cosine[a, b])
            found = [CollidingPair(report.name, reports[b].name, what,
                                   "bad" if share[a, b] >= limits.collide_bad else "look", float(share[a, b]),
                                   {name: _values(table, what, a, b) for name, table in tables.items()})
                     for b in ranked if share[a, b] >= limits.collide_look]
            if found:
                rivals = ", ".join(f"{pair.second!r} ({100 * pair.share:.0f} %)" for pair in found[:NAMED])
                more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
                report.add(found[0].level, f"drawings of it {said} {rivals}{more}")
            pairs += found
    return tuple(sorted(pairs, key=lambda pair: -pair.share))


def _values(table: Collisions, what: str, a: int, b: int) -> dict[str, float]:
    found = {name: vars(table)[name][a, b] for name in ("lost", "passes", "highest", "mean")}
    if what == "background":
        found = {"sunk": table.sunk[a, b], "highest": table.background[b, a]}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _notes(bank: PrototypeBank, reports: Sequence[ClassReport], ovdiff: OVDiff) -> tuple[str, ...]:
    """What is to be said of the vocabulary as a whole."""
    removed = any(report.values.get("background_removed_by_stuff_filter") for report in reports)
    empty = [name for name, rows in bank.prototypes.items() if not any((p.region == "background").any() for p in rows)]
    if not (removed and empty):
        return ()
    threshold = ovdiff.profile.filters.stuff_threshold
    return (f"With this vocabulary's stuff the stuff filter (filters.stuff_threshold {threshold:g}) removes all "
            f"background prototypes of {', '.join(empty)}: every pixel will get a class, so name everything that "
            "images show.",)


# ---- what CLIP reads

def _examine_readings(reports: Sequence[ClassReport], categories: Sequence[Category], clip: CategoryFilter,
                      read: dict[int, torch.Tensor], limits: Limits) -> list[str]:
    """What CLIP, which filters the categories, reads in the drawings ``read`` (class -> embeddings (n, E)), the word of
    highest cosine, and how near words are to it; what was not examined. ``categories``: the classes, and other words.
    Stuff that the filter always keeps is not judged."""
    settings, skipped = clip.settings, []
    texts = [settings.category_prompt.replace("{names}", category.prompt) for category in categories]
    fits = clip.text.fits(texts)
    for report, good in zip(reports, fits, strict=False):
        if not good:
            report.add("bad", f"its prompt is longer than CLIP's {clip.text.length} tokens, so the category filter "
                              "refuses it; shorten it")
    known = [i for i, good in enumerate(fits) if good]
    words = clip.text([texts[i] for i in known])
    if 1 < len(known) < FEW:
        skipped.append(f"With fewer than {FEW} words their nearness in CLIP's text space is shown and not judged.")
    if len(known) > 1:
        names = [categories[i].name for i in known]
        _examine_nearness([reports[i] for i in known if i < len(reports)], names, (words @ words.T).numpy(), limits)
    judged = [k for k, i in enumerate(known) if not (settings.category_keep_stuff and categories[i].kind == "stuff")]
    if len(judged) < 2:
        skipped.append("The category filter judges fewer than two classes, so CLIP's reading of the drawings was not "
                       "examined.")
    for i in [known[k] for k in judged if known[k] in read and len(judged) > 1]:
        best = Counter(known[judged[b]] for b in (read[i] @ words[judged].T).argmax(1).tolist())
        share, ranked = best[i] / len(read[i]), sorted(best, key=lambda b: (-best[b], b))
        reports[i].measure(recognised=share, read_as=categories[ranked[0]].name)
        if share < limits.recognised_look:
            other = next(b for b in ranked if b != i)
            reports[i].add("bad" if share < limits.recognised_bad else "look", f"CLIP reads {best[i]} of its "
                           f"{len(read[i])} drawings as it, and {best[other]} as {categories[other].name!r}")
    for i, embeddings in read.items():
        if rewordings := reports[i].values.get("rewordings"):
            prompts = [settings.category_prompt.replace("{names}", words) for words in rewordings]
            seen = Counter((embeddings @ clip.text(prompts).T).argmax(1).tolist())
            reports[i].measure(drawn_as={word: seen[n] for n, word in enumerate(rewordings)})
    return skipped


def _examine_nearness(reports: Sequence[ClassReport], names: Sequence[str], cosine: np.ndarray, limits: Limits) -> None:
    """Nearest words by ``cosine`` f32 (k, k) of ``names``, and which classes, the first of them, are outliers."""
    low, high = np.percentile(cosine[np.triu_indices(len(names), 1)], [25, 75])
    fence = high + limits.text_fence * (high - low) if len(names) >= FEW else np.inf
    apart = cosine - 3 * np.eye(len(names), dtype=cosine.dtype)
    for report, row in zip(reports, apart, strict=False):
        value, name = row.max(), names[row.argmax()]
        report.measure(nearest_word=name, text_cosine=value)
        if value > fence:
            report.add("look", f"to CLIP's text encoder it is nearly {name!r}: cosine {value:.2f}, where most words of "
                               f"this vocabulary stay below {high:.2f}")
