"""What the benchmark compares: each scenario takes a ``Session`` and gives ratios."""

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
from typing import Any

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

FEW, SOME, STORED, MANY, TOGETHER = 20, 500, 1000, 2000, 8
"""Classes of PASCAL VOC and of the paper's times, of larger vocabularies; images of a round."""

LEVELS, SAME_MAPS, SAME_SCORES = 2, 1e-5, 1e-4
"""Largest differences: of drawings (of 255; another attention kernel rounds otherwise), of attribution, of scores."""

PIXELS = (448, 600)
"""An image of PASCAL VOC as matching sees it."""

PAPER_POINTS = (65_536, 7_680)
"""Half of the 32 x 64 x 64 support features of a class, and Stable Diffusion's channels (App. C.2)."""

NAMES = ("cat", "dog", "boat", "car", "bus", "chair", "horse", "sheep", "train", "bird")
"""One token each for CLIP; all 1,023 subsets of ten make the prompts of an image that shows many things."""


# ---- drawing and building

def sampling(session: Session, full: bool = False) -> list[Ratio]:
    """Drawing a support set with its attribution (Sec. 3.1) against the bare pipeline, which draws the same images.
    ``full``: at the size of Stable Diffusion v1.5, random weights, one image of 512 x 512 pixels in two steps."""
    pipe, profile = session.pipe, session.profile
    if full:
        pipe = architectures.random_diffusion().to(session.device)
        profile = profile.override({"support.size": 1, "support.image_size": 512, "support.steps": 2,
                                    "support.guidance_scale": 8.0})
    count, used = profile.support.size, [profile.override({"support.steps": 1}), profile]  # one step to warm up
    sides = alternate(
        (lambda number: sample_support(pipe, session.category, used[number > 0], count, progress=False).images,
         lambda number: plain.draw(pipe, session.category, used[number > 0], count)), session.repeats, session.device)
    same = Check("levels of 255 between the drawings", difference(*(side.result for side in sides)), LEVELS)
    return [Ratio("sampling-attribution" + ", full size" * full,
                  f"{count} support image{'s' * (count > 1)} of {profile.support.steps} steps, with attribution",
                  "the bare StableDiffusionPipeline with its own attention processors, same images and steps", *sides,
                  1.05 if full else 1.15, (same,))]


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

    what = (f"{profile.support.size} images: drawing, attribution, masks ({profile.masks.segmenter}), features, "
            "prototypes")
    against = ("the bare StableDiffusionPipeline, then VAE encoder and one UNet pass over each image, resized and "
               "noised as well")
    return [Ratio("building a class", what, against,
                  *alternate((ours, theirs), session.repeats, session.device), 1.15)]


def clusters(session: Session, full: bool = False) -> list[Ratio]:
    """k-means (Sec. 3.3) of a class of the profile, half of whose features are foreground, against scikit-learn's: a
    new seed every round, and as inertia depends on the seed means are compared. ``full``: of a class of the paper."""
    from sklearn.cluster import KMeans

    profile, found, other = session.profile, [], []
    cells, k = (profile.features.sd_input_size // session.pipe.vae_scale_factor) ** 2, profile.prototypes.clusters
    shape = max(k, profile.support.size * cells // 2), session.ovdiff.extractors["sd"].channels
    array = clustered_points(*(PAPER_POINTS if full else shape)).numpy()
    points = torch.from_numpy(array).to(session.device)

    def ours(seed: int) -> None:
        found.append(kmeans(points if seed else points[: 4 * k], k, seed=seed))

    def theirs(seed: int) -> None:
        other.append(KMeans(k, n_init="auto", random_state=seed).fit(array if seed else array[: 4 * k]).inertia_)

    sides = alternate((ours, theirs), session.repeats * (1 if full else 5), session.device, budget=90)
    worse = np.mean([inertia(points, *one) for one in found[1:]]) / np.mean(other[1:]) - 1  # without the warm-up
    return [Ratio("k-means, full size" if full else "k-means, profile's shape",
                  f"k-means of {len(points):,} x {points.shape[1]:,} points in {k} clusters",
                  f'sklearn.cluster.KMeans({k}, n_init="auto")', *sides, 10 if full else None, faster=full,
                  checks=(Check("share of mean inertia above the alternative's", float(worse), 0.01),
                          Check("bytes added to the points", sides[0].added, 1e9)))]


def clustered_points(count: int, channels: int) -> torch.Tensor:
    """Points f32 (count, channels) that are like features of images: in 200 groups of different sizes, which overlap,
    within 64 directions whose variances fall off as 1 / rank, plus white noise of 5 %. Features have few independent
    directions, and there are more groups than clusters, so that there is no one right answer."""
    generator, rank = torch.Generator().manual_seed(0), min(64, channels)
    scale = torch.arange(1, rank + 1).float().rsqrt()
    sizes = torch.rand(200, generator=generator).square()
    group = torch.multinomial(sizes, count, replacement=True, generator=generator)
    centres = torch.randn(200, rank, generator=generator) * scale
    inner = centres[group] + 0.5 * torch.randn(count, rank, generator=generator) * scale
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=generator))[0].T * math.sqrt(channels / rank)
    return torch.randn(count, channels, generator=generator).mul_(0.05).addmm_(inner, basis)


# ---- segmenting

def texts(session: Session, full: bool = False) -> list[Ratio]:
    """The category filter's joined prompts (Sec. 3.4), shared beginnings once, against each encoded alone. ``full``:
    with a text tower of ViT-B/16's size, random weights, not the profile's CLIP."""
    clip, tokenizer = architectures.random_clip_text(session.device) if full else load_clip(session.profile)
    settings, length = session.profile.filters, clip.config.text_config.max_position_embeddings
    subsets = [s for size in range(1, len(NAMES) + 1) for s in itertools.combinations(NAMES, size)]
    joined = [settings.category_prompt.replace("{names}", settings.category_joiner.join(subset)) for subset in subsets]
    texts = list(itertools.compress(joined, TextEncoder(clip, tokenizer).fits(joined)))
    ours, theirs = alternate(
        (lambda number: TextEncoder(clip, tokenizer)(texts if number else texts[:64]),
         lambda number: plain.padded_texts(clip, tokenizer, texts if number else texts[:64])),
        session.repeats, session.device, budget=45)
    # Of unit vectors: no cosine with any image differs by more.
    same = Check("largest difference of a score", float((ours.result - theirs.result).norm(dim=1).max()), SAME_SCORES)
    return [Ratio("filter texts, ViT-B/16" if full else "filter texts, profile's CLIP",
                  f"embeddings of {len(texts):,} joined prompts of {len(NAMES)} names",
                  f"CLIPModel.get_text_features of each prompt, padded to {length} tokens, 64 at a time", ours, theirs,
                  10 if full else None, (same,), faster=full)]


def segmenting(session: Session) -> list[Ratio]:
    """Images against 20 classes, texts known, one by one and in one call, against the bare networks and each other."""
    bank, images, profile = session.made_up(FEW), [session.image(i) for i in range(TOGETHER)], session.profile
    crops, size = [plain.window_crops(image, profile) for image in images], profile.matching.batch_size
    bare = [plain.bare_features(session.pipe, profile.features, part, size) for part in crops]
    every = plain.bare_features(session.pipe, profile.features, list(itertools.chain(*crops)), size)
    single, passes, together, pass_of_all = alternate(
        (lambda _: [session.ovdiff.segment(image, bank) for image in images], lambda _: [run() for run in bare],
         lambda _: list(session.ovdiff.segment_many(images, bank)), lambda _: every()),
        session.repeats, session.device)
    worst = max(difference(a.kept_scores, b.kept_scores) for a, b in zip(single.result, together.result, strict=True))
    what = (f"{TOGETHER} images, {np.mean([len(part) for part in crops]):.1f} windows each, against {FEW} classes, "
            f"category filter {'on with known texts' if profile.filters.category else 'off'}")
    bare_pass = "VAE encoder and one UNet pass over the same windows, prepared before"
    return [Ratio("segmenting", what, f"{bare_pass}, those of an image in batches of {size}", single, passes, 1.2),
            Ratio("segmenting together", f"the same {TOGETHER} images in one call",
                  f"the same bare pass, windows of all images in batches of {size}", together, pass_of_all, 1.2),
            Ratio("images together", f"{TOGETHER} images against {FEW} classes, windows of several in one batch",
                  "one image after the other", together, single,
                  checks=(Check("largest difference of a score", worst, SAME_SCORES),))]


def large_vocabulary(session: Session) -> list[Ratio]:
    """2,000 classes against the first 20 of them: images whose joined prompts the filter knows, and new images."""
    bank, rows = session.made_up(MANY), []

    def segment(used: PrototypeBank, step: int, number: int) -> None:
        for i in range(TOGETHER):
            session.ovdiff.segment(session.image(number * step + i), used)

    for step, kind in ((0, "all prompts known"), (TOGETHER, "new images")):
        ways = [functools.partial(segment, used, step) for used in (bank, bank.restrict(range(FEW)))]
        sides = alternate(ways, session.repeats, session.device)
        rows.append(Ratio(f"vocabulary of 2,000, {kind}", f"{TOGETHER} images against {MANY:,} copies of real classes",
                          f"the same against the first {FEW}", *sides, 1.5))
    return rows


def stored_vocabulary(session: Session) -> list[Ratio]:
    """1,000 classes put into the library here; a new process loads them and segments with all and with 20."""
    bank, table = session.made_up(STORED), made_from(session.profile, "sd")
    for category, prototypes in zip(bank.vocabulary, bank.prototypes["sd"], strict=True):
        session.ovdiff.library.put("prototypes", for_words(table, category.prompt)[0], prototypes)
    load, resident, ours, theirs = in_new_process(_loaded, session.profile, session.library, STORED, FEW,
                                                  3 * session.repeats)
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
            step = measured(session.ovdiff.segment, [(session.image(number % seen), used)], device=session.device)
            side.append(replace(step, result=None))
    resident = max(step.peak for side in steps for step in side)
    return load, resident, *(joined(side[seen:]) for side in steps)  # by then the filter knows every image's prompts


# ---- memory, each side in a new process

Way = tuple[Callable[..., Any], tuple, tuple]
"""What is called, with little to do (which loads what it needs, and whose results are compared) and with all of it."""


def _memory(session: Session, way: Callable[[Session, bool], Way], name: str, measures: str, alternative: str,
            compared: str, limit: float) -> list[Ratio]:
    """What ``way(session, False)`` and the plain ``way(session, True)`` add to the memory of a process."""
    session.ovdiff.build(benchmark.CLASSES)  # into the library: drawing in the new process would leave memory free
    ours, theirs = (in_new_process(_side, way, session.profile, session.library, plainly) for plainly in (False, True))
    same = Check(f"largest difference of {compared}", difference(ours.result, theirs.result), limit)
    return [Ratio(name, measures, alternative, ours, theirs, checks=(same,), memory=True)]


def _side(way: Callable[[Session, bool], Way], profile: Profile, library: Path, plainly: bool) -> Measured:
    session = Session(profile, library)
    call, little, whole = way(session, plainly)
    result = torch.as_tensor(call(*little)).cpu()
    return replace(measured(call, [whole], device=session.device), result=result)


def _attribution(session: Session, stored: bool) -> Way:
    def summed(*given: Any) -> np.ndarray:
        return sample_support(*given, progress=False).attribution

    count = session.profile.support.size
    given = session.pipe, session.category, session.profile.override({"support.batch_size": count})
    return plain.stored_attribution if stored else summed, (*given, 1), (*given, count)


def _matching(session: Session, at_once: bool) -> Way:
    bank, image = session.made_up(SOME), session.image(0)
    ovdiff = session.ovdiff.replaced({"filters.category": False, "filters.stuff": False, "matching.refine": "none"})

    def class_by_class(image: np.ndarray, bank: PrototypeBank) -> np.ndarray:
        return ovdiff.segment(image, bank).kept_scores

    together = functools.partial(plain.scores_at_once, ovdiff.extractors["sd"], session.profile)
    return together if at_once else class_by_class, (image, bank.restrict(range(FEW))), (image, bank)


def _pamr(session: Session, unfolded: bool) -> Way:
    image = np.random.default_rng(0).integers(0, 256, (*PIXELS, 3), dtype=np.uint8)
    scores = torch.rand(21, *PIXELS, generator=torch.Generator().manual_seed(0)).to(session.device)
    return plain.pamr_unfolded if unfolded else pamr, (image[:64, :80], scores[:, :64, :80]), (image, scores)


# ---- running them

SCENARIOS: dict[str, Callable[[Session], list[Ratio]]] = {
    "sampling": sampling, "building": building,
    "attribution-memory": functools.partial(
        _memory, way=_attribution, name="attribution memory", compared="the maps", limit=SAME_MAPS,
        measures="a support set drawn in one batch, attribution summed as it comes",
        alternative="the attention of every layer and step kept until the end, then summed"),
    "kmeans": clusters, "texts": texts, "texts-vit-b16": functools.partial(texts, full=True), "segmenting": segmenting,
    "vocabulary-2000": large_vocabulary, "library-1000": stored_vocabulary,
    "matching-memory": functools.partial(
        _memory, way=_matching, name="matching memory", compared="a score", limit=SAME_SCORES,
        measures=f"an image against {SOME} classes, class by class, category filter off",
        alternative="all pixels x all prototypes at once"),
    "pamr": functools.partial(
        _memory, way=_pamr, name="PAMR", compared="a score", limit=1e-5,
        measures=f"scores of 21 classes at {PIXELS[0]} x {PIXELS[1]} pixels refined in blocks of rows",
        alternative="all neighbours of all classes unfolded at once"),
    "sampling-full-size": functools.partial(sampling, full=True),
    "kmeans-full-size": functools.partial(clusters, full=True),
}
"""Name -> scenario, in the order they run."""

BY_NAME = ("sampling-full-size", "kmeans-full-size")
"""Run only when named: 7 GB of memory and some minutes."""


def run(profile: Profile, only: Sequence[str] | None = None,
        repeats: int = 3) -> Iterator[tuple[str, list[Ratio], str]]:
    """Run the scenarios in ``only``, by default all but :data:`BY_NAME`, one after the other: (name, ratios, "") or, of
    one that failed, (name, [], one sentence); the others go on. ``InputError`` for a name that is none."""
    for name in only or ():
        if name not in SCENARIOS:
            near = difflib.get_close_matches(name.lower(), SCENARIOS, 1) or SCENARIOS
            raise InputError(f"There is no scenario {name!r}; choose from {', '.join(near)}.")
    if repeats < 1:
        raise InputError(f"The number of repeats is {repeats}; give at least 1.")
    with tempfile.TemporaryDirectory(prefix="ovdiff-benchmark-") as folder:
        session = Session(profile, Path(folder) / "library", repeats)
        for name in [name for name in SCENARIOS if (name in only if only else name not in BY_NAME)]:
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
