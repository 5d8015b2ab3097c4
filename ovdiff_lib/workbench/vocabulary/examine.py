"""The vocabulary doctor: which classes will get in each other's way, which words the models do not know and which
drawings show something else, before any image is segmented. Every check measures what the method itself will use, and
leaves a sentence and a verdict with the class: "look" (before trusting it) or "bad"."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.filters.stuff import bare, filter_stuff, without_background
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.loading import resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.support.attribution import class_token_positions
from ovdiff_lib.types import ForegroundBackground, PrototypeBank, Prototypes
from ovdiff_lib.workbench.data.classes import synonyms
from ovdiff_lib.workbench.data.things import with_kinds

AMBIGUOUS = Path(__file__).with_name("ambiguous.csv")
"""Our list of nouns that mean several things that can be drawn, with rewordings: columns noun, senses, rewordings."""

VERDICTS = ("fine", "look", "bad")

COLUMNS = {
    "with_foreground": "with foreground", "foreground_area": "area", "recognised": "read as itself",
    "rival": "nearest rival", "lost": "lost to it", "passes": "passes for it", "highest": "highest cosine",
    "background_rival": "background of", "sunk": "sunk in it", "background_left": "background left", "pieces": "pieces"}
"""Value of a class -> its heading in the table."""


@dataclass(frozen=True)
class Collisions:
    """How C classes lie to each other in one extractor's space; f32 (C, C) each, row A, column B; nan on the diagonal
    and where a class has foreground in fewer than two images, or no background prototypes."""

    highest: np.ndarray  # cosine of the foreground prototypes of A and of B
    lost: np.ndarray  # share of A's images nearer to B (its class and instance prototypes) than to A without that image
    passes: np.ndarray  # share of A's images as near to B as half of B's own images are to B without them
    sunk: np.ndarray  # share of A's images nearer to a background prototype of B than to A without that image


@dataclass(frozen=True)
class Limits:
    """From which value on a measurement is worth a look or bad; shares are in [0, 1] of a class's support images."""

    collide_look: float = 0.2  # lost to, sunk in or passing for another class
    collide_bad: float = 0.5
    recognised_look: float = 0.75  # that CLIP reads as the class; less is worth a look
    recognised_bad: float = 0.5
    foreground_bad: float = 0.5  # whose mask has any foreground; less is bad
    masks_look: float = 0.5  # whose mask is empty or full, or fell back to thresholds
    full: float = 0.95  # area from which on a foreground counts as full
    pieces: int = 2  # tokens that one word may be cut into


@dataclass
class ClassReport:
    """One class: what speaks against it, ``found`` as (verdict, sentence), and the ``values`` that were measured."""

    name: str
    kind: str
    found: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, verdict: str, sentence: str) -> None:
        """A reason for "look" or "bad"."""
        self.found.append((verdict, sentence))

    def measure(self, **values: Any) -> None:
        """Keep values, but for numbers that are not finite, where there was nothing to measure."""
        plain = {name: np.asarray(value).item() for name, value in values.items()}
        self.values |= {name: value for name, value in plain.items() if isinstance(value, str) or np.isfinite(value)}

    verdict = property(lambda self: max((one for one, _ in self.found), key=VERDICTS.index, default="fine"))
    """The worst of its reasons, of :data:`VERDICTS`."""


@dataclass(frozen=True)
class VocabularyReport:
    """``classes`` in vocabulary order, ``notes`` on the vocabulary as a whole and on what was not examined; ``tables``:
    extractor -> ``Collisions`` of the classes ``built``; ``print`` it."""

    classes: tuple[ClassReport, ...]
    limits: Limits
    notes: tuple[str, ...]
    built: tuple[str, ...]
    tables: dict[str, Collisions] = field(repr=False)

    def __str__(self) -> str:
        """A table, a row a class; reasons for each that is not fine, the worst first; notes; how many are fine."""
        names = [f"{c.name} (stuff)" if c.kind == "stuff" else c.name for c in self.classes]
        rows = [{"verdict": c.verdict, **c.values} for c in self.classes]
        table = pd.DataFrame(rows, names, ["verdict", *COLUMNS]).rename(columns=COLUMNS).dropna(axis=1, how="all")
        lines = [table.to_string(float_format="{:.2f}".format, na_rep="-"), ""]
        for c in (c for c in self.classes if c.found):
            worst_first = sorted(c.found, key=lambda reason: -VERDICTS.index(reason[0]))
            lines += [f"{c.name}:", *(f"  {verdict}: {why}" for verdict, why in worst_first), ""]
        said = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
        return "\n".join([*lines, *self.notes, f"Of {len(names)} classes: {said}."])


def examine(ovdiff: OVDiff, classes: Vocabulary | Iterable[str | Category] | str, stuff: Iterable[str] = (),
            limits: Limits | None = None, among: Iterable[str] = ()) -> VocabularyReport:
    """Build the classes, or take them from the library, and examine them as ``ovdiff`` would use them.

    ``among``: further words that CLIP reads the drawings beside; not drawn. Classes that cannot be built (a name too
    long, no drawing with a foreground) are bad, the others examined without them. Otherwise raises as ``OVDiff.build``.
    """
    limits, vocabulary, profile = limits or Limits(), Vocabulary.of(classes, stuff), ovdiff.profile
    reports = [ClassReport(category.name, category.kind) for category in vocabulary]
    _examine_words(reports, vocabulary, ovdiff, limits)
    prototypes = _build(reports, vocabulary, ovdiff)
    drawn, built = [reports[i] for i in prototypes], [vocabulary.categories[i] for i in prototypes]
    for report, category in zip(drawn, built, strict=True):
        _examine_masks(report, ovdiff.masks_of(category), profile.masks.segmenter, limits)
    notes, tables = [], {}
    if profile.filters.category:
        known = {category.name.casefold() for category in built}
        others = [category for category in map(Category, among) if category.name.casefold() not in known]
        _examine_readings(drawn, [*built, *others], ovdiff, limits)
    else:
        notes.append("Without category filter (filters.category) CLIP's reading of words and drawings is not examined.")
    if len(built) > 1:
        rows = {name: tuple(made[name] for made in prototypes.values()) for name in profile.features.extractors}
        bank = PrototypeBank(Vocabulary(tuple(built)), rows)
        left = filter_stuff(bank, profile.filters) if profile.filters.stuff else bank
        if left is not bank:
            notes += bare(bank, left, profile.filters)
            _examine_background(drawn, bank, left, without_background(bank, left, profile.filters))
        tables = {name: collide(kept, resolve_device(profile)) for name, kept in left.prototypes.items()}
        _examine_collisions(drawn, tables, limits)
    return VocabularyReport(tuple(reports), limits, tuple(notes), tuple(c.name for c in built), tables)


def _examine_words(reports: Sequence[ClassReport], vocabulary: Vocabulary, ovdiff: OVDiff, limits: Limits) -> None:
    """What can be said of the words alone: tokens, regions, senses, doubles."""
    cut, senses = ovdiff.diffusion.tokenizer.tokenize, pd.read_csv(AMBIGUOUS, index_col="noun")
    regions = {category.name for table in ("c8", "coco-stuff") for category in with_kinds(vocabulary, table)
               if category.kind == "stuff"}
    for report, category in zip(reports, vocabulary, strict=True):
        report.measure(pieces=len(cut(category.prompt)))
        if (most := max(len(cut(word)) for word in category.prompt.split())) > limits.pieces:
            report.add("look", f"the tokenizer cuts a word of it into {most} pieces: the models may never have met it")
        if category.kind == "thing" and ovdiff.profile.filters.stuff and category.name in regions:
            report.add("look", "it is usually a region: name it as stuff, or it competes with the background of others")
        if (noun := category.prompt.casefold()) in senses.index:
            report.add("look", f"it can mean {senses.senses[noun]}: say {senses.rewordings[noun]}")
    alike, prompts = synonyms(), [category.prompt.casefold() for category in vocabulary]
    for (one, first), (other, second) in itertools.permutations(zip(reports, prompts, strict=True), 2):
        if first in alike.get(second, ()) or second in alike.get(first, ()):
            one.add("look", f"it and {other.name!r} are synonyms, or one is a kind of the other: keep one")


def _build(reports: Sequence[ClassReport], vocabulary: Vocabulary, ovdiff: OVDiff) -> dict[int, dict[str, Prototypes]]:
    """Of the classes that can be built: their number -> extractor -> prototypes."""
    found = {}
    for i, category in enumerate(tqdm(vocabulary, "building classes", unit="class", disable=not ovdiff.progress)):
        of_word = InputError  # the error for which the class is bad; any other is not the word's fault
        try:
            class_token_positions(ovdiff.diffusion.tokenizer, ovdiff.profile.support.prompt, category.prompt)
            of_word = OVDiffError
            found[i] = ovdiff.build_class(category)
        except OVDiffError as error:
            if type(error) is not of_word:
                raise
            reports[i].add("bad", str(error))
    return found


def _examine_masks(report: ClassReport, masks: ForegroundBackground, segmenter: str, limits: Limits) -> None:
    """How many drawings have a foreground, how large it is, and where it is from."""
    area = masks.foreground.mean((1, 2))
    some, full = (area > 0).mean(), (area >= limits.full).mean()
    fallback = np.mean([source == "threshold" != segmenter for source in masks.source])
    report.measure(with_foreground=some, foreground_area=area[area > 0].mean() if some else 0.0)
    if some < limits.foreground_bad:
        report.add("bad", f"{1 - some:.0%} of its drawings have no foreground")
    if full >= limits.masks_look:
        report.add("look", f"the foreground fills {full:.0%} of its drawings")
    if fallback >= limits.masks_look and report.kind == "thing":
        report.add("look", f"the segmenter {segmenter!r} found nothing in {fallback:.0%} of its drawings")


def _examine_background(reports: Sequence[ClassReport], bank: PrototypeBank, left: PrototypeBank,
                        lost: dict[str, list[str]]) -> None:
    """The share of its background prototypes that the "stuff" filter left a class; by extractor who ``lost`` all."""
    had, has = (np.sum(list(one.counts("background").values()), axis=0) for one in (bank, left))
    for report, before, after in zip(reports, had, has, strict=True):
        report.measure(background_left=after / before if before else np.nan)
        if gone := [name for name, classes in lost.items() if report.name in classes]:
            report.add("look", f'the "stuff" filter left it no background prototypes of {", ".join(gone)}')


def _examine_collisions(reports: Sequence[ClassReport], tables: dict[str, Collisions], limits: Limits) -> None:
    """Nearest rivals, and what images can be taken for or lost in, by the mean over extractors."""
    highest, lost, passes, sunk = (np.mean([vars(table)[name] for table in tables.values()], axis=0)
                                   for name in ("highest", "lost", "passes", "sunk"))
    for rival, said, share, shown in (
            ("rival", "taken for", np.fmax(lost, passes), {"lost": lost, "passes": passes, "highest": highest}),
            ("background_rival", "lost in the background of", sunk, {"sunk": sunk})):
        for a, report in enumerate(reports):
            # The worst first; of rivals that take the same share the one whose foreground is nearest.
            order = [b for b in np.lexsort((-highest[a], -share[a])) if np.isfinite(share[a, b])]
            for worst in order[:1]:
                report.measure(**{rival: reports[worst].name}, **{name: of[a, worst] for name, of in shown.items()})
            found = [f"{reports[b].name!r} ({share[a, b]:.0%})" for b in order if share[a, b] >= limits.collide_look]
            if found:
                report.add("bad" if share[a, order[0]] >= limits.collide_bad else "look",
                           f"drawings of it can be {said} {', '.join(found)}")


def _examine_readings(reports: Sequence[ClassReport], categories: Sequence[Category], ovdiff: OVDiff,
                      limits: Limits) -> None:
    """What CLIP, which filters the categories, reads in the drawings of each class, the word of highest cosine, and its
    nearest word. ``categories``: the classes of the ``reports``, then other words. Stuff always kept is not judged."""
    clip, settings = ovdiff.category_filter, ovdiff.profile.filters
    words = clip.text([settings.category_prompt.replace("{names}", category.prompt) for category in categories])
    with undisturbed():
        cosine = (words @ words.T).fill_diagonal_(-1).numpy()
    judged = np.array([i for i, category in enumerate(categories)
                       if category.kind == "thing" or not settings.category_keep_stuff])
    for i, report in enumerate(reports if len(categories) > 1 else ()):
        report.measure(nearest_word=categories[cosine[i].argmax()].name, text_cosine=cosine[i].max())
        if i in judged and len(judged) > 1:
            images = ovdiff.support(categories[i]).images  # not in there: the library has a lock, too
            with undisturbed():
                embeddings = torch.stack([clip.embed_image(image) for image in images])
                best = judged[(embeddings @ words[judged].T).argmax(1).numpy()]
            share = np.bincount(best, minlength=len(categories)) / len(best)
            report.measure(recognised=share[i], read_as=categories[share.argmax()].name)
            if share[i] < limits.recognised_look:
                other = max((k for k in judged if k != i), key=lambda k: share[k])
                report.add("bad" if share[i] < limits.recognised_bad else "look",
                           f"CLIP reads {share[i]:.0%} of its drawings as it, {share[other]:.0%} as "
                           f"{categories[other].name!r}")


@undisturbed()
def collide(prototypes: Sequence[Prototypes], device: str | torch.device = "cpu") -> Collisions:
    """Which of C >= 1 classes get in each other's way, from the prototypes of one extractor alone, pair by pair.

    Matching (Eq. 4) gives a pixel to the class of its nearest prototype, so two classes collide where images of one lie
    nearer to the other's prototypes than to those of their own class, or as near as the other's own images do. Each
    support image stands for an image the method has not seen, by its instance prototype, and its own class answers
    without it. That needs no threshold on a cosine, which would differ between extractors. Parts of the foreground
    count in ``highest`` alone: they may hold cells of the image left out. ``InputError`` without instance prototypes.
    """
    front, back = ([p.select(p.region == region) for p in prototypes] for region in ("foreground", "background"))
    if not all((p.kind == "instance").any() for p in front):
        raise InputError("Collisions are judged by instance prototypes; add instance to prototypes.kinds.")
    own = [own_similarity(p).to(device) for p in prototypes]
    half = [similarity.quantile(0.5) for similarity in own]
    everything, behind = ([_unit(p, device) for p in chosen] for chosen in (front, back))
    whole, images = ([_unit(p.select(keep(p.kind)), device) for p in front] for keep in (
        lambda kind: kind != "part", lambda kind: kind == "instance"))
    highest, lost, passes, sunk = tables = torch.full((4, len(front), len(front)), torch.nan, dtype=torch.float32,
                                                        device="cpu")
    for a, b in itertools.permutations(range(len(front)), 2):
        highest[a, b] = (everything[a] @ everything[b].T).max()
        near = (images[a] @ whole[b].T).amax(1)
        if len(own[b]) > 1:
            passes[a, b] = (near >= half[b]).float().mean()
        if len(own[a]) > 1:
            lost[a, b] = (near > own[a]).float().mean()
        if len(own[a]) > 1 and len(behind[b]):
            sunk[a, b] = ((images[a] @ behind[b].T).amax(1) > own[a]).float().mean()
    return Collisions(*tables.numpy())


@undisturbed()
def own_similarity(prototypes: Prototypes) -> torch.Tensor:
    """How near each image of a class is to the class without it: f32 (n,) for the n images with foreground, the highest
    cosine of its foreground instance prototype to the others' and to their mean foreground feature; nan if alone."""
    chosen = prototypes.select((prototypes.region == "foreground") & (prototypes.kind == "instance"))
    if len(chosen) < 2:
        return torch.full((len(chosen),), torch.nan, dtype=torch.float32, device="cpu")
    cells = torch.from_numpy(prototypes.cells("foreground").sum((1, 2))[chosen.image]).float()
    unit, weighted = _unit(chosen), torch.from_numpy(chosen.vectors).float() * cells[:, None]
    others = F.normalize(weighted.sum(0) - weighted, dim=1)  # a mean's length does not matter to a cosine
    return torch.maximum((unit @ unit.T).fill_diagonal_(-1).amax(1), (unit * others).sum(1))


def _unit(prototypes: Prototypes, device: str | torch.device = "cpu") -> torch.Tensor:
    """The prototypes as unit vectors f32 (p, D)."""
    return F.normalize(torch.from_numpy(prototypes.vectors).float().to(device), dim=1)
