"""Scenarios of large vocabularies: time an image with 2,000 classes, and 1,000 classes from the library in a new process."""

from __future__ import annotations

from collections.abc import Callable

from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.cost.fresh import run_fresh
from ovdiff_lib.workbench.cost.ratio import Bound, Check, Ratio, Side, alternate
from ovdiff_lib.workbench.cost.scene import Scene, quiet
from ovdiff_lib.workbench.cost.segmenting import FEW, TOGETHER

MANY, STORED = 2000, 1000

LOAD, RESIDENT = 2.0, 2e9
"""Seconds to load the stored vocabulary, and bytes of memory that its whole process may hold."""

GROWTH = 1.5


def growing(scene: Scene) -> list[Ratio]:
    """2,000 classes against the first 20 of them: images whose prompts the filter knows, and images that were not seen before, for which
    it knows the single names but not the joined ones.

    Among many classes a new image always has eta likely ones, and so up to 2^eta - 1 joined prompts to encode; among few classes it has
    fewer. That does not grow further with the vocabulary, but beside small networks it takes long.
    """
    bank = scene.made_up(MANY)
    part = bank.restrict(range(FEW))

    def segment(used: PrototypeBank, new: int) -> Callable[[int], list[Segmentation]]:
        return lambda number: [scene.ovdiff.segment(scene.image(new * number * TOGETHER + i), used) for i in range(TOGETHER)]

    rows = []
    for new, kind in enumerate(("all prompts known", "new images")):
        with quiet():
            pair = alternate(segment(bank, new), segment(part, new), scene.repeats, device=scene.device)
        rows.append(Ratio(f"vocabulary of 2,000, {kind}", f"{TOGETHER} images against {MANY:,} classes, copies of real ones with noise",
                          f"the same against the first {FEW}", pair.ours, pair.theirs, Bound(GROWTH),
                          note=_too_long(scene) + "; joined prompts are encoded for every image" * new))
    return rows


def stored(scene: Scene) -> list[Ratio]:
    """1,000 classes put into the library here; a new process loads them and segments with all and with 20."""
    bank = scene.made_up(STORED)
    library = scene.ovdiff.library
    for name, rows in bank.prototypes.items():
        for category, prototypes in zip(bank.vocabulary, rows, strict=True):
            library.put_prototypes(scene.ovdiff._key(name, category), prototypes)
    found = run_fresh(scene, "library", classes=STORED, few=FEW, repeats=max(3, 3 * scene.repeats))
    checks = (Check("seconds to load the classes in a new process", found["load"], LOAD),
              Check("bytes of memory of the whole process", found["resident"], RESIDENT))
    ours, theirs = (Side(tuple(found[key]), added, whole=found["resident"])
                    for key, added in zip(("all", "few"), found["added"], strict=True))
    return [Ratio("library of 1,000", f"an image seen before against {STORED:,} classes that came from the library",
                  f"the same against {FEW} of them", ours, theirs, Bound(GROWTH), checks, note=_too_long(scene))]


def _too_long(scene: Scene) -> str:
    return "joined prompts beyond CLIP's length are left out" if scene.profile.filters.category else "category filter off"
