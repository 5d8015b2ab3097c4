"""``ovdiff benchmark``: each scenario takes a :class:`Session` and gives ratios of time to a named alternative."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, OVDiffError, legal
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.mini.world import load_world
from ovdiff_lib.networks.clip_text import TextEncoder
from ovdiff_lib.networks.loading import load_clip, resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.prototypes.kmeans import kmeans
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank, Prototypes
from ovdiff_lib.workbench.cost import architectures, plain
from ovdiff_lib.workbench.cost.cells import Check, Ratio, prototype_rows
from ovdiff_lib.workbench.cost.instruments import Measured, alternate
from ovdiff_lib.workbench.data.datasets import load_dataset

FEW, MANY, TOGETHER = 20, 2000, 8
"""Classes of PASCAL VOC and of the paper's times, of a large vocabulary; images of a round."""

PAPER_POINTS = (65_536, 7_680)
"""Half of the 32 x 64 x 64 support features of a class, and Stable Diffusion's channels (App. C.2)."""

NAMES = ("cat", "dog", "boat", "car", "bus", "chair", "horse", "sheep", "train", "bird")
"""One token each for CLIP; all 1,023 subsets of ten make the prompts of an image that shows many things."""


class Session:
    """What the scenarios share: ``profile`` with the extractor sd alone, ``repeats`` rounds, images, classes."""

    def __init__(self, profile: Profile, repeats: int = 3) -> None:
        self.profile, self.category = profile.override({"features.extractors": ["sd"]}), Category("dog")
        self.repeats, self.device = repeats, resolve_device(self.profile)
        self.ovdiff = OVDiff(self.profile, progress=False)

    def take_turns(self, *ways: Callable[[int], Any], rounds: int | None = None) -> list[Measured]:
        """Each way with the numbers of the rounds (see ``alternate``); a slow one is not repeated for long."""
        return alternate(ways, self.repeats if rounds is None else rounds, self.device, budget=45)

    @functools.cached_property
    def images(self) -> Sequence[np.ndarray]:
        """64 validation images u8 (H, W, 3) of the mini world, which ships: they are at hand for every profile."""
        return [sample.image for sample in itertools.islice(load_dataset("mini-voc"), 64)]

    def made_up(self, count: int) -> PrototypeBank:
        """Classes "w0001", "w0002", ... of random prototypes, as many as a class may have. Their prompts are two or
        three words of the mini world, no two alike: as long as names of large vocabularies are."""
        words, rows = load_world().names, prototype_rows(self.profile)
        prompts = itertools.chain(*(itertools.product(words, repeat=length) for length in (2, 3)))
        vocabulary = Vocabulary(tuple(Category(f"w{i:04}", " ".join(next(prompts))) for i in range(1, count + 1)))
        rng, shape = np.random.default_rng(0), (rows, self.ovdiff.extractors["sd"].channels)
        none, nowhere = np.full(rows, -1, np.int32), np.zeros((1, 1, 1), np.int16)
        kind, region = np.full(rows, "class"), np.where(np.arange(rows) % 2, "background", "foreground")
        return PrototypeBank(vocabulary, {"sd": tuple(
            Prototypes(rng.standard_normal(shape, np.float32), kind, region, none, none, nowhere) for _ in vocabulary)})


def difference(left: np.ndarray | torch.Tensor, right: np.ndarray | torch.Tensor) -> float:
    """Largest absolute difference of two arrays of one shape; infinite values at the same places are equal."""
    left, right = (np.nan_to_num(torch.as_tensor(side).cpu().double().numpy(), nan=np.nan) for side in (left, right))
    return float(np.abs(left - right).max())


def same(what: str, ours: Measured, theirs: Measured, limit: float) -> Check:
    """By how much the last results of both ways differ at most."""
    return Check(f"largest difference of {what}", difference(ours.result, theirs.result), limit)


def sampling(session: Session, full: bool = False) -> list[Ratio]:
    """Drawing a support set with its attribution (Sec. 3.1) against the bare pipeline, which draws the same images.
    ``full``: at the size of Stable Diffusion v1.5, random weights, one image of 512 x 512 pixels in two steps."""
    pipe, profile = session.ovdiff.diffusion, session.profile
    if full:
        torch.manual_seed(0)
        pipe = architectures.stable_diffusion().to(session.device)
        profile = profile.override({"support.size": 1, "support.image_size": 512, "support.steps": 2,
                                    "support.guidance_scale": 8.0})
    count, used = profile.support.size, [profile.override({"support.steps": 1}), profile]  # one step to warm up
    sides = session.take_turns(
        lambda number: sample_support(pipe, session.category, used[number > 0], count, progress=False).images,
        lambda number: plain.draw(pipe, session.category, used[number > 0], count))
    return [Ratio("sampling-attribution" + ", full size" * full,
                  "the bare StableDiffusionPipeline with its own attention processors, same images and steps", *sides,
                  # Another attention kernel rounds otherwise.
                  1.05 if full else 1.15, same("the drawings, of 255 levels", *sides, 2))]


def building(session: Session) -> list[Ratio]:
    """All steps of a class with the extractor sd against the bare pipeline and one bare pass over each image."""
    profile, pipe = session.profile, session.ovdiff.diffusion
    segmenter, extractor = session.ovdiff.segmenter, session.ovdiff.extractors["sd"]

    def ours(_: int) -> None:
        support = sample_support(pipe, session.category, profile, progress=False)
        masks = make_masks(support, profile, segmenter)
        build_prototypes(extractor(support.images, support.seeds), masks, profile.prototypes, profile.masks.resize)

    def theirs(_: int) -> None:
        drawn = plain.draw(pipe, session.category, profile, profile.support.size)
        plain.bare_features(pipe, profile.features, list(drawn), profile.features.batch_size)()

    return [Ratio("building a class", "the bare StableDiffusionPipeline, then VAE encoder and one UNet pass over each "
                  "image, resized and noised as well", *session.take_turns(ours, theirs), 1.15)]


def clusters(session: Session, full: bool = False) -> list[Ratio]:
    """k-means (Sec. 3.3) of a class of the profile, half of whose features are foreground, against scikit-learn's: a
    new seed every round, and as inertia depends on the seed means are compared. ``full``: of a class of the paper."""
    from sklearn.cluster import KMeans

    profile, found, other = session.profile, [], []
    extractor, k = session.ovdiff.extractors["sd"], profile.prototypes.clusters
    cells = (profile.features.sd_input_size // extractor.pipe.vae_scale_factor) ** 2
    shape = max(k, profile.support.size * cells // 2), extractor.channels
    array = spread_points(*(PAPER_POINTS if full else shape))
    points = torch.from_numpy(array)

    def ours(seed: int) -> None:
        found.append(kmeans(points if seed else points[: 4 * k], k, seed=seed))

    def theirs(seed: int) -> None:
        other.append(KMeans(k, n_init="auto", random_state=seed).fit(array if seed else array[: 4 * k]).inertia_)

    sides = session.take_turns(ours, theirs, rounds=session.repeats * (1 if full else 5))
    worse = np.mean([inertia(points, *one) for one in found[1:]]) / np.mean(other[1:]) - 1  # without the warm-up
    return [Ratio("k-means, full size" if full else "k-means, profile's shape",
                  f'sklearn.cluster.KMeans({k}, n_init="auto")', *sides, 0.1 if full else None,
                  Check("share of mean inertia above the alternative's", float(worse), 0.01))]


def inertia(points: torch.Tensor, centroids: torch.Tensor, assignment: torch.Tensor) -> float:
    """Sum of squared distances of the points (M, D) to the centroids they are assigned to."""
    parts = zip(points.split(4096), assignment.split(4096), strict=True)  # not all differences at a time
    return sum(float((part - centroids[index]).square().sum(dtype=torch.float64)) for part, index in parts)


def spread_points(count: int, channels: int) -> np.ndarray:
    """Points f32 (count, channels) within 64 directions, as features have few independent ones, plus white noise."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((64, channels), np.float32) / np.arange(1, 65, dtype=np.float32)[:, None] ** 0.5
    points = rng.standard_normal((count, 64), np.float32) @ directions
    return points + 0.1 * rng.standard_normal(points.shape, np.float32)


def texts(session: Session, full: bool = False) -> list[Ratio]:
    """The category filter's joined prompts (Sec. 3.4), shared beginnings once, against each encoded alone. ``full``:
    with a text tower of ViT-B/16's size, random weights, not the profile's CLIP."""
    clip, tokenizer = architectures.random_clip_text() if full else load_clip(session.profile)
    clip, settings = clip.to(session.device), session.profile.filters
    subsets = [s for size in range(1, len(NAMES) + 1) for s in itertools.combinations(NAMES, size)]
    joined = [settings.category_prompt.replace("{names}", settings.category_joiner.join(subset)) for subset in subsets]
    texts = list(itertools.compress(joined, TextEncoder(clip, tokenizer).fits(joined)))
    sides = session.take_turns(lambda number: TextEncoder(clip, tokenizer)(texts if number else texts[:64]),
                               lambda number: plain.padded_texts(clip, tokenizer, texts if number else texts[:64]))
    length = clip.config.text_config.max_position_embeddings
    return [Ratio("filter texts, ViT-B/16" if full else "filter texts, profile's CLIP",
                  f"CLIPModel.get_text_features of each prompt, padded to {length} tokens, 64 at a time", *sides,
                  0.1 if full else None, same("the embeddings", *sides, 1e-5))]


def segmenting(session: Session) -> list[Ratio]:
    """Images against 20 classes, texts known, one by one and in one call, against the bare networks and each other."""
    bank, images, profile = session.made_up(FEW), session.images[:TOGETHER], session.profile
    crops, size = [plain.window_crops(image, profile) for image in images], profile.matching.batch_size
    bare = [plain.bare_features(session.ovdiff.diffusion, profile.features, part, size) for part in crops]
    every = plain.bare_features(session.ovdiff.diffusion, profile.features, list(itertools.chain(*crops)), size)

    def scores(found: Iterator) -> np.ndarray:
        return np.concatenate([one.kept_scores.ravel() for one in found])

    single, passes, together, pass_of_all = session.take_turns(
        lambda _: scores(session.ovdiff.segment(image, bank) for image in images), lambda _: [run() for run in bare],
        lambda _: scores(session.ovdiff.segment_many(images, bank)), lambda _: every())
    return [Ratio("segmenting", "VAE encoder and one UNet pass over the same windows, prepared before, those of an "
                  f"image in batches of {size}", single, passes, 1.2),
            Ratio("segmenting together", f"the same bare pass, windows of all images in batches of {size}",
                  together, pass_of_all, 1.2),
            Ratio("images together", "one image after the other", together, single,
                  check=same("a score", together, single, 1e-4))]


def large_vocabulary(session: Session) -> list[Ratio]:
    """2,000 classes against the first 20 of them: images whose joined prompts the filter knows, and new images."""
    bank = session.made_up(MANY)

    def segment(used: PrototypeBank, step: int, number: int) -> None:
        for i in range(number * step, number * step + TOGETHER):
            session.ovdiff.segment(session.images[i % len(session.images)], used)

    return [Ratio(f"vocabulary of 2,000, {kind}", f"the same against the first {FEW}", *session.take_turns(
                *(functools.partial(segment, used, step) for used in (bank, bank.restrict(range(FEW))))), 1.5)
            for step, kind in ((0, "all prompts known"), (TOGETHER, "new images"))]


SCENARIOS: dict[str, Callable[[Session], list[Ratio]]] = {
    "sampling": sampling, "building": building, "kmeans": clusters,
    "texts": texts, "texts-vit-b16": functools.partial(texts, full=True), "segmenting": segmenting,
    "vocabulary-2000": large_vocabulary, "sampling-full-size": functools.partial(sampling, full=True),
    "kmeans-full-size": functools.partial(clusters, full=True)}
"""Name -> scenario, in the order they run."""

BY_NAME = ("sampling-full-size", "kmeans-full-size")  # run only when named: 7 GB of memory and some minutes


def run(profile: Profile, only: Sequence[str] | None = None, repeats: int = 3) -> Iterator[Ratio]:
    """The ratios of the scenarios in ``only``, by default all but :data:`BY_NAME`, each as soon as it is measured.
    ``InputError`` for a name that is none, ``OVDiffError`` for a scenario that runs out of memory or the like."""
    for name in only or ():
        if name not in SCENARIOS:
            raise InputError(f"There is no scenario {name!r}; {legal(name, SCENARIOS)}")
    session = Session(profile, repeats)
    for name in [name for name in SCENARIOS if (name in only if only else name not in BY_NAME)]:
        try:
            yield from SCENARIOS[name](session)
        except (RuntimeError, MemoryError) as problem:
            raise OVDiffError(f"The scenario {name} failed: {problem!r}".splitlines()[0]) from problem
