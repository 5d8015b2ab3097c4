"""What the benchmark compares: each scenario takes a :class:`~ovdiff_lib.workbench.cost.benchmark.Session` and gives
ratios."""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ovdiff_lib.errors import InputError, OVDiffError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.keys import for_words, made_from
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.matching.pamr import pamr
from ovdiff_lib.networks.clip_text import TextEncoder
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.prototypes.kmeans import inertia, kmeans
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.cost import architectures, benchmark, plain
from ovdiff_lib.workbench.cost.benchmark import Check, Ratio, Session, alternate, difference, in_new_process
from ovdiff_lib.workbench.cost.instruments import Measured, joined, measured

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

FEW, MANY, STORED, TOGETHER = 20, 2000, 1000, 8
"""Classes of PASCAL VOC and of the paper's times; a large vocabulary; one of the library; images of a round."""

LEVELS, SAME_MAPS, SAME_SCORES = 2, 1e-5, 1e-4
"""Largest differences: of drawings in levels of 255 (another attention kernel rounds otherwise), of attribution, of
scores."""

PLAIN_MATCHING = {"filters.category": False, "filters.stuff": False, "matching.refine": "none"}

PAPER_POINTS = (65_536, 7_680)
"""Half of the 32 x 64 x 64 support features of a class, and Stable Diffusion's channels (App. C.2)."""

NAMES = ("cat", "dog", "boat", "car", "bus", "chair", "horse", "sheep", "train", "bird")
"""One token each for CLIP; all 1,023 subsets of ten make the prompts of an image that shows many things."""


def sampling(session: Session) -> list[Ratio]:
    """Drawing a support set with its attribution against the bare pipeline, which draws the same images (Sec. 3.1)."""
    count = session.profile.support.size
    return [_sampling(session, session.pipe, session.profile, count, 1.15, "sampling-attribution")]


def sampling_full_size(session: Session) -> list[Ratio]:
    """The same at the size of Stable Diffusion v1.5, random weights: one image of 512 x 512 pixels, two steps."""
    profile = session.profile.override({"support.image_size": 512, "support.steps": 2, "support.guidance_scale": 8.0})
    pipe = architectures.random_diffusion().to(session.device)
    return [_sampling(session, pipe, profile, 1, 1.05, "sampling-attribution, full size")]


def _sampling(session: Session, pipe: StableDiffusionPipeline, profile: Profile, count: int, limit: float,
              name: str) -> Ratio:
    def ours(_: int, used: Profile = profile):
        return sample_support(pipe, session.category, used, count, progress=False).images

    def theirs(_: int, used: Profile = profile):
        return plain.draw(pipe, session.category, used, count)

    short = profile.override({"support.steps": 1})
    warm_up = (lambda: ours(0, short), lambda: theirs(0, short))
    found = alternate(ours, theirs, session.repeats, session.device, warm_up=warm_up)
    same = Check("levels of 255 between the drawings", difference(found[0].result, found[1].result), LEVELS)
    return Ratio(name, f"{count} support image{'s' * (count > 1)} of {profile.support.steps} steps, with attribution",
                 "the bare StableDiffusionPipeline with its own attention processors, same images and steps", *found,
                 limit, (same,))


def building(session: Session) -> list[Ratio]:
    """All steps of a class with the extractor sd against the bare pipeline and one bare pass over each image."""
    profile, pipe = session.profile, session.pipe
    segmenter, extractor = build_segmenter(profile), EXTRACTORS["sd"](profile)

    def ours(_: int) -> None:
        support = sample_support(pipe, session.category, profile, progress=False)
        masks = make_masks(support, profile, segmenter)
        build_prototypes(extractor(support.images, support.seeds), masks, profile.prototypes, profile.masks.resize)

    def theirs(_: int) -> None:
        drawn = plain.draw(pipe, session.category, profile, profile.support.size)
        plain.bare_features(pipe, profile.features, list(drawn), profile.features.batch_size)()

    name = profile.masks.segmenter
    what = f"{profile.support.size} images: drawing, attribution, masks ({name}), features, prototypes"
    against = ("the bare StableDiffusionPipeline, then VAE encoder and one UNet pass over each image, resized and "
               "noised as well")
    return [Ratio("building a class", what, against, *alternate(ours, theirs, session.repeats, session.device), 1.15)]


def attribution_memory(session: Session) -> list[Ratio]:
    """Attribution summed as it comes against all attention stored: memory of each, and that the maps are the same."""
    few, profile, pipe = min(4, session.profile.support.size), session.profile, session.pipe
    sides = (in_new_process(_attribution, profile, session.library, stored) for stored in (False, True))
    maps = (sample_support(pipe, session.category, profile, few, progress=False).attribution,
            plain.stored_attribution(pipe, session.category, profile, few))
    what = f"drawing {profile.support.size} images in one batch, attribution summed as it comes"
    return [Ratio("attribution memory", what, "the attention of every layer and step kept until the end, then summed",
                  *sides, memory=True, checks=(Check("largest difference of the maps", difference(*maps), SAME_MAPS),))]


def _attribution(profile: Profile, library: Path, stored: bool) -> Measured:
    session, count = Session(profile, library), profile.support.size

    def accumulated(pipe, category, profile, count):
        return sample_support(pipe, category, profile, count, progress=False)

    draw = plain.stored_attribution if stored else accumulated
    whole = session.profile.override({"support.batch_size": count})
    draw(session.pipe, session.category, whole.override({"support.steps": 1}), 1)
    return _bare(measured(draw, [(session.pipe, session.category, whole, count)], device=session.device))


def clusters(session: Session) -> list[Ratio]:
    """k-means of a class of the profile, half of whose support features are foreground, against scikit-learn's (Sec.
    3.3)."""
    profile, channels = session.profile, session.ovdiff.extractors["sd"].channels
    cells = (profile.features.sd_input_size // session.pipe.vae_scale_factor) ** 2
    count = max(profile.prototypes.clusters, profile.support.size * cells // 2)
    points = clustered_points(count, channels)
    return [_clusters(session, points, "k-means, profile's shape", None, 5 * session.repeats)]


def clusters_full_size(session: Session) -> list[Ratio]:
    """k-means of a class of the paper."""
    points = clustered_points(*PAPER_POINTS)
    return [_clusters(session, points, "k-means, full size", 10, session.repeats, budget=90)]


def clustered_points(count: int, channels: int) -> torch.Tensor:
    """Points f32 (count, channels) that are like features of images: in 200 groups of different sizes, which overlap,
    within 64 directions whose variances fall off as 1 / rank, plus white noise of 5 %. Features have far fewer
    independent directions than channels, and there are more groups than clusters, so that there is no one right
    answer."""
    generator = torch.Generator().manual_seed(0)
    rank = min(64, channels)
    scale = torch.arange(1, rank + 1).float().rsqrt()
    sizes = torch.rand(200, generator=generator).square()
    group = torch.multinomial(sizes, count, replacement=True, generator=generator)
    centres = torch.randn(200, rank, generator=generator) * scale
    inner = centres[group] + 0.5 * torch.randn(count, rank, generator=generator) * scale
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=generator))[0].T * math.sqrt(channels / rank)
    return torch.randn(count, channels, generator=generator).mul_(0.05).addmm_(inner, basis)


def _clusters(session: Session, points: torch.Tensor, name: str, limit: float | None, rounds: int,
              budget: float = math.inf) -> Ratio:
    """Both on the same points, a new seed every round. Inertia depends on the seed: means are compared."""
    from sklearn.cluster import KMeans

    k, array, found, other = session.profile.prototypes.clusters, points.numpy(), [], []
    points = points.to(session.device)

    def ours(seed: int) -> None:
        found.append(kmeans(points, k, seed=seed))

    def theirs(seed: int) -> None:
        other.append(float(KMeans(k, n_init="auto", random_state=seed).fit(array).inertia_))

    warm_up = (lambda: kmeans(points[: 4 * k], k), lambda: KMeans(k, n_init="auto", random_state=0).fit(array[: 4 * k]))
    ours, theirs = alternate(ours, theirs, rounds, session.device, budget, warm_up)
    worse = np.mean([inertia(points, *one) for one in found]) / np.mean(other) - 1
    return Ratio(name, f"k-means of {len(points):,} x {points.shape[1]:,} points in {k} clusters",
                 f'sklearn.cluster.KMeans({k}, n_init="auto")', ours, theirs, limit, faster=limit is not None,
                 checks=(Check("share of mean inertia above the alternative's", float(worse), 0.01),
                         Check("bytes added to the points", ours.added, 1e9)))


def texts(session: Session) -> list[Ratio]:
    """The category filter's joined prompts with the profile's CLIP, shared beginnings once, against each alone (Sec.
    3.4)."""
    return _texts(session, *load_clip(session.profile), "filter texts, profile's CLIP", None)


def texts_full_size(session: Session) -> list[Ratio]:
    """The same with a text tower of ViT-B/16's size, random weights."""
    return _texts(session, *architectures.random_clip_text(session.device), "filter texts, ViT-B/16", 10, budget=45)


def joined_prompts(profile: Profile) -> list[str]:
    """The joined prompts of :data:`NAMES` as the profile words them."""
    subsets = [s for size in range(1, len(NAMES) + 1) for s in itertools.combinations(NAMES, size)]
    settings = profile.filters
    return [settings.category_prompt.replace("{names}", settings.category_joiner.join(subset)) for subset in subsets]


def _texts(session: Session, clip: CLIPModel, tokenizer: CLIPTokenizer, name: str, limit: float | None,
           budget: float = math.inf) -> list[Ratio]:
    texts, length = joined_prompts(session.profile), clip.config.text_config.max_position_embeddings
    texts = [text for text, fits in zip(texts, TextEncoder(clip, tokenizer).fits(texts), strict=True) if fits]

    def anew(_: int, some: Sequence[str] = texts) -> torch.Tensor:
        return TextEncoder(clip, tokenizer)(some)

    def padded(_: int, some: Sequence[str] = texts) -> torch.Tensor:
        return plain.padded_texts(clip, tokenizer, some)

    ours, theirs = alternate(anew, padded, session.repeats, session.device, budget,
                             (lambda: anew(0, texts[:64]), lambda: padded(0, texts[:64])))
    # Of unit vectors: no cosine with any image differs by more.
    same = Check("largest difference of a score", float((ours.result - theirs.result).norm(dim=1).max()), SAME_SCORES)
    return [Ratio(name, f"embeddings of {len(texts):,} joined prompts of {len(NAMES)} names",
                  f"CLIPModel.get_text_features of each prompt, padded to {length} tokens, 64 at a time", ours, theirs,
                  limit, (same,), faster=limit is not None)]


def segmenting(session: Session) -> list[Ratio]:
    """Images against 20 classes, texts known, one by one and in one call, against the networks alone on the same
    windows."""
    bank, images, settings = session.made_up(FEW), [session.image(i) for i in range(TOGETHER)], session.profile
    crops, size = [plain.window_crops(image, settings) for image in images], settings.matching.batch_size
    bare = [plain.bare_features(session.pipe, settings.features, part, size) for part in crops]
    every = plain.bare_features(session.pipe, settings.features, list(itertools.chain(*crops)), size)
    passes = "VAE encoder and one UNet pass over the same windows, prepared before"
    on = "on with known texts" if settings.filters.category else "off"

    windows = np.mean([len(part) for part in crops])
    alone = alternate(lambda _: [session.ovdiff.segment(image, bank) for image in images],
                      lambda _: [run() for run in bare], session.repeats, session.device)
    together = alternate(lambda _: list(session.ovdiff.segment_many(images, bank)), lambda _: every(), session.repeats,
                         session.device)
    what = f"{TOGETHER} images, {windows:.1f} windows each, against {FEW} classes, category filter {on}"
    return [Ratio("segmenting", what, f"{passes}, those of an image in batches of {size}", *alone, 1.2),
            Ratio("segmenting together", f"the same {TOGETHER} images in one call",
                  f"the same bare pass, windows of all images in batches of {size}", *together, 1.2)]


def images_together(session: Session) -> list[Ratio]:
    """Windows of many images in common batches against one image after the other."""
    bank, images = session.made_up(FEW), [session.image(i) for i in range(2 * TOGETHER)]
    ours, theirs = alternate(lambda _: list(session.ovdiff.segment_many(images, bank)),
                             lambda _: [session.ovdiff.segment(image, bank) for image in images],
                             session.repeats, session.device)
    worst = max(difference(a.kept_scores, b.kept_scores) for a, b in zip(ours.result, theirs.result, strict=True))
    return [Ratio("images together", f"{len(images)} images against {FEW} classes, windows of several in one batch",
                  "one image after the other", ours, theirs,
                  checks=(Check("largest difference of a score", worst, SAME_SCORES),))]


def large_vocabulary(session: Session) -> list[Ratio]:
    """2,000 classes against the first 20 of them: images whose joined prompts the filter knows, and new images."""
    bank, rows = session.made_up(MANY), []

    def segment(used: PrototypeBank, first: int) -> None:
        for i in range(TOGETHER):
            session.ovdiff.segment(session.image(first + i), used)

    for step, kind in ((0, "all prompts known"), (TOGETHER, "new images")):
        ours, theirs = (functools.partial(lambda used, number, step: segment(used, number * step), used, step=step)
                        for used in (bank, bank.restrict(range(FEW))))
        found = alternate(ours, theirs, session.repeats, session.device)
        rows.append(Ratio(f"vocabulary of 2,000, {kind}", f"{TOGETHER} images against {MANY:,} copies of real classes",
                          f"the same against the first {FEW}", *found, 1.5))
    return rows


def stored_vocabulary(session: Session) -> list[Ratio]:
    """1,000 classes put into the library here; a new process loads them and segments with all and with 20."""
    bank, table = session.made_up(STORED), made_from(session.profile, "sd")
    for category, prototypes in zip(bank.vocabulary, bank.prototypes["sd"], strict=True):
        session.ovdiff.library.put("prototypes", for_words(table, category.prompt)[0], prototypes)
    given = session.profile, session.library, STORED, FEW, 3 * session.repeats
    load, resident, ours, theirs = in_new_process(_loaded, *given)
    return [Ratio("library of 1,000", f"an image seen before against {STORED:,} classes that came from the library",
                  f"the same against {FEW} of them", ours, theirs, 1.5,
                  (Check("seconds to load the classes in a new process", load, 2.0),
                   Check("bytes of memory of the whole process", resident, 2e9)))]


def _loaded(profile: Profile, library: Path, classes: int, few: int,
            repeats: int) -> tuple[float, int, Measured, Measured]:
    """Seconds to build a vocabulary that is in the library, the most memory of the process, and an image with all and
    with ``few`` classes. One class is built before: imports and the hashes of the weights' files are not counted."""
    session, names, seen = Session(profile, library), benchmark.made_up_vocabulary(classes), 3
    session.ovdiff.build(names.categories[:1])
    started = time.perf_counter()
    bank = session.ovdiff.build(names)
    load, part, steps = time.perf_counter() - started, bank.restrict(range(few)), ([], [])
    for number in range(repeats + seen):
        for side, used in zip(steps, (bank, part), strict=True):
            image = session.image(number % seen)
            side.append(_bare(measured(session.ovdiff.segment, [(image, used)], device=session.device)))
    resident = max(step.peak for side in steps for step in side)
    return load, resident, *(joined(side[seen:]) for side in steps)  # by then the filter knows every image's prompts


def matching_memory(session: Session, classes: int = 500) -> list[Ratio]:
    """Matching without filters, class by class, against one matrix of all pixels and prototypes: memory, and that
    scores agree."""
    image, bank = session.image(0), session.made_up(FEW)  # real prototypes are in the library now
    sides = (in_new_process(_matching, session.profile, session.library, classes, at_once) for at_once in (False, True))
    ovdiff = session.method(PLAIN_MATCHING)
    at_once = plain.scores_at_once(ovdiff.extractors["sd"], session.profile, image, bank)
    off = difference(ovdiff.segment(image, bank).kept_scores, at_once)
    return [Ratio("matching memory", f"an image against {classes} classes, category filter off",
                  "all pixels x all prototypes at once", *sides, memory=True,
                  checks=(Check("largest difference of a score", off, SAME_SCORES),))]


def _matching(profile: Profile, library: Path, classes: int, at_once: bool) -> Measured:
    session = Session(profile, library)
    bank, ovdiff, image = session.made_up(classes), session.method(PLAIN_MATCHING), session.image(0)
    extractor = ovdiff.extractors["sd"]

    def score(used: PrototypeBank) -> None:
        plain.scores_at_once(extractor, session.profile, image, used) if at_once else ovdiff.segment(image, used)

    score(bank.restrict([0, 1]))
    return measured(score, [(bank,)], device=session.device)


def pamr_memory(session: Session) -> list[Ratio]:
    """PAMR of 21 classes at 448 x 600 pixels in blocks of rows, against all neighbours laid out at once."""
    sides = (in_new_process(_pamr, unfolded, (448, 600), 21, session.device) for unfolded in (False, True))
    image = session.image(0)
    scores = torch.rand(3, *image.shape[:2], generator=torch.Generator().manual_seed(0))
    off = difference(pamr(image, scores), plain.pamr_unfolded(image, scores))
    return [Ratio("PAMR", "scores of 21 classes at 448 x 600 pixels refined in blocks of rows",
                  "all neighbours of all classes unfolded at once", *sides, memory=True,
                  checks=(Check("largest difference of a score", off, 1e-5),))]


def _pamr(unfolded: bool, shape: tuple[int, int], classes: int, device: torch.device) -> Measured:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scores = torch.rand(classes, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    refine = plain.pamr_unfolded if unfolded else pamr
    refine(image[:32, :48], scores[:, :32, :48])
    return _bare(measured(refine, [(image, scores)], device=device))


def _bare(step: Measured) -> Measured:
    """Without its result, which need not travel between processes."""
    return replace(step, result=None)


SCENARIOS: dict[str, Callable[[Session], list[Ratio]]] = {
    "sampling": sampling, "building": building, "attribution-memory": attribution_memory, "kmeans": clusters,
    "texts": texts, "texts-vit-b16": texts_full_size, "segmenting": segmenting, "images-together": images_together,
    "vocabulary-2000": large_vocabulary, "library-1000": stored_vocabulary, "matching-memory": matching_memory,
    "pamr": pamr_memory, "sampling-full-size": sampling_full_size, "kmeans-full-size": clusters_full_size,
}
"""Name -> scenario, in the order they run."""

BY_NAME = ("sampling-full-size", "kmeans-full-size")
"""Run only when named: 7 GB of memory and some minutes."""


def chosen(only: Sequence[str] | None) -> list[str]:
    """Names of the scenarios to run: those in ``only``, else all but :data:`BY_NAME`. ``InputError`` for a name that is
    none."""
    for name in only or ():
        if name not in SCENARIOS:
            near = difflib.get_close_matches(name.lower(), SCENARIOS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"There is no scenario {name!r}; {hint}choose from {', '.join(SCENARIOS)}.")
    return [name for name in SCENARIOS if (name in only if only else name not in BY_NAME)]


def run(profile: Profile, only: Sequence[str] | None = None,
        repeats: int = 3) -> Iterator[tuple[str, list[Ratio], str]]:
    """Run scenarios one after the other: (name, ratios, "") or, of one that failed, (name, [], one sentence); the
    others go on."""
    names = chosen(only)
    if repeats < 1:
        raise InputError(f"The number of repeats is {repeats}; give at least 1.")
    with tempfile.TemporaryDirectory(prefix="ovdiff-benchmark-") as folder:
        session = Session(profile, Path(folder) / "library", repeats)
        for name in names:
            try:
                yield name, SCENARIOS[name](session), ""
            except Exception as problem:
                line = (str(problem).strip().splitlines() or ["no message"])[0]
                yield name, [], line if isinstance(problem, OVDiffError) else f"{type(problem).__name__}: {line}"


def ratios(profile: Profile, only: Sequence[str] | None = None, repeats: int = 3) -> list[Ratio]:
    """The ratios of the scenarios in ``only``. ``OVDiffError`` with the sentence of the first scenario that fails."""
    found: list[Ratio] = []
    for name, rows, error in run(profile, only, repeats):
        if error:
            raise OVDiffError(f"The scenario {name} failed: {error}")
        found += rows
    return found
