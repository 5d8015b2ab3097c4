"""How time and memory grow: with classes, images, support images N and clusters K. Points, and a line through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ovdiff_lib.categories import Category
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.masks import build_segmenter
from ovdiff_lib.masks.select import make_masks
from ovdiff_lib.prototypes.build import build_prototypes
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.cost.instruments import LinearFit, Measured, joined, linear_fit, measured
from ovdiff_lib.workbench.cost.scene import CLASSES, Scene, quiet

CLASS_COUNTS = (20, 100, 500, 1000, 2000, 5000)
IMAGE_COUNTS = (1, 4, 16)
SUPPORT_SIZES = (1, 2, 4, 8, 16)
CLUSTERS = (1, 2, 4, 8, 16, 32, 64)

BUDGET = 10.0
"""Seconds for the rounds of one size; the first is always made."""


@dataclass(frozen=True)
class Growth:
    """``what`` took by its size: ``points`` (size, Measured) by rising size, ``bytes`` what the inputs of each size hold (prototypes,
    features; None where that says nothing), ``fit`` the line through the medians."""

    name: str
    what: str
    size: str
    points: tuple[tuple[int, Measured], ...]
    fit: LinearFit
    bytes: tuple[int, ...] | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One plain row a point, for a table or a figure: seconds, their spread, bytes added at the peak, bytes of the inputs."""
        held = self.bytes or (None,) * len(self.points)
        return [{"growth": self.name, "size": size, "seconds": step.median, "fastest": min(step.seconds), "slowest": max(step.seconds),
                 "rounds": step.n, "added": step.peak - step.held, "bytes": of, "line": float(self.fit(size))}
                for (size, step), of in zip(self.points, held, strict=True)]


def classes(scene: Scene, counts: Iterable[int] = CLASS_COUNTS) -> list[Growth]:
    """Segmenting an image with more and more made-up classes, the names' embeddings known; each round a new image."""
    counts = sorted(counts)
    bank = scene.made_up(counts[-1])
    parts = {count: bank.restrict(range(count)) for count in counts}
    with quiet():
        points = _grow(scene, counts, lambda count, number: scene.ovdiff.segment(scene.image(number), parts[count]))
    what = f"segmenting an image, category filter {'on' if scene.profile.filters.category else 'off'}"
    return [Growth("classes", what, "classes", points, _line(points), tuple(map(_bytes, parts.values())))]


def images(scene: Scene, counts: Iterable[int] = IMAGE_COUNTS) -> list[Growth]:
    """Segmenting more and more images in one call."""
    def segment(count: int, number: int) -> None:
        for _ in scene.ovdiff.segment_many([scene.image(number * count + i) for i in range(count)], scene.bank):
            pass

    points = _grow(scene, sorted(counts), segment)
    return [Growth("images", f"segmenting images against {len(CLASSES)} classes", "images", points, _line(points))]


def support_images(scene: Scene, sizes: Iterable[int] = SUPPORT_SIZES) -> list[Growth]:
    """Building a class from more and more drawings, all steps, the extractor sd."""
    profile, segmenter, extractor = scene.profile, build_segmenter(scene.profile), EXTRACTORS["sd"](scene.profile)

    def build(size: int, _: int):
        support = sample_support(scene.pipe, Category(CLASSES[0]), profile, size, progress=False)
        masks = make_masks(support, profile, segmenter)
        return build_prototypes(extractor(support.images, support.seeds), masks, profile.prototypes, profile.masks.resize)

    points = _grow(scene, sorted(sizes), build)
    return [Growth("N", "building a class", "support images N", points, _line(points),
                   tuple(step.result.vectors.nbytes for _, step in points))]


def clusters(scene: Scene, counts: Iterable[int] = CLUSTERS) -> list[Growth]:
    """Prototypes of a class with more and more parts; drawings, masks and features are the same for all."""
    profile = scene.profile
    support = scene.ovdiff.support(scene.category)
    masks = scene.ovdiff.masks(support)
    features = scene.ovdiff.extractors["sd"](support.images, support.seeds)

    def build(count: int, _: int):
        settings = profile.override({"prototypes.clusters": count, "prototypes.kinds": ["class", "instance", "part"]}).prototypes
        return build_prototypes(features, masks, settings, profile.masks.resize)

    points = _grow(scene, sorted(counts), build)
    return [Growth("K", f"prototypes of {len(support)} drawings", "clusters K", points, _line(points),
                   tuple(step.result.vectors.nbytes for _, step in points))]


def _grow(scene: Scene, sizes: list[int], function: Callable[[int, int], Any]) -> tuple[tuple[int, Measured], ...]:
    """``function(size, round)`` measured for every size, the sizes taking turns; round 0 warms up."""
    found: dict[int, list[Measured]] = {size: [] for size in sizes}
    for number in range(scene.repeats + 1):
        for size, runs in found.items():
            if number == 0:
                function(size, 0)
            elif not runs or sum(sum(run.seconds) for run in runs) < BUDGET:
                runs.append(measured(function, [(size, number)], device=scene.device))
    return tuple((size, joined(runs)) for size, runs in found.items())


def _line(points: Iterable[tuple[int, Measured]]) -> LinearFit:
    points = list(points)
    return linear_fit([size for size, _ in points], [step.median for _, step in points])


def _bytes(bank: PrototypeBank) -> int:
    return sum(p.vectors.nbytes for rows in bank.prototypes.values() for p in rows)
