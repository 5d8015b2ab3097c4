"""Measurements that need a process of their own: what memory a step takes is not to be seen where an earlier one left some free.

``python -m ovdiff_lib.workbench.cost.fresh TASK JSON`` runs a task of :data:`TASKS` and prints its result as one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ovdiff_lib.errors import OVDiffError
from ovdiff_lib.workbench.cost.ratio import Pair, Side

if TYPE_CHECKING:
    from ovdiff_lib.workbench.cost.instruments import Measured
    from ovdiff_lib.workbench.cost.scene import Scene


Record = dict[str, Any]

SEEN = 3
"""Images of the task `library`, in turns."""


def run_fresh(scene: Scene, task: str, **arguments: Any) -> Record:
    """What a task of :data:`TASKS` gives in a new process with the scene's profile, library and number of threads.

    Raises ``OVDiffError`` with the last line of its error output if it fails.
    """
    import torch

    given = {"profile": str(scene.profile_file), "library": str(scene.library), "threads": torch.get_num_threads(), **arguments}
    command = [sys.executable, "-m", "ovdiff_lib.workbench.cost.fresh", task, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OVDiffError(f"The measurement {task!r} in a process of its own failed ({reason}).")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternate_fresh(scene: Scene, task: str, ours: Record, theirs: Record, rounds: int = 1) -> Pair:
    """Both ways of a task in turns, each time in a new process; results are the last records."""
    records = [(run_fresh(scene, task, **ours), run_fresh(scene, task, **theirs)) for _ in range(rounds)]
    sides = [Side(tuple(r["seconds"] for r in side), max(r["added"] for r in side),
                  max((r["device"] for r in side if r["device"] is not None), default=None), max(r["whole"] for r in side))
             for side in zip(*records, strict=True)]
    return Pair(*sides, *records[-1])


def _record(step: Measured) -> Record:
    return {"seconds": step.median, "added": step.peak - step.held, "whole": step.peak, "device": step.device}


def attribution(scene: Scene, stored: bool) -> Record:
    """Drawing a support set with its attribution accumulated, or with all attention stored; one drawing of one step warms up."""
    from ovdiff_lib.support.sampler import sample_support
    from ovdiff_lib.workbench.cost.instruments import measured
    from ovdiff_lib.workbench.cost.plain import stored_attribution

    def accumulated(pipe, category, profile, count):
        return sample_support(pipe, category, profile, count, progress=False).attribution

    draw, count = stored_attribution if stored else accumulated, scene.profile.support.size
    whole = scene.profile.override({"support.batch_size": count})
    draw(scene.pipe, scene.category, whole.override({"support.steps": 1}), 1)
    return _record(measured(draw, [(scene.pipe, scene.category, whole, count)], device=scene.device))


def pamr(scene: Scene, unfolded: bool, shape: list[int], classes: int) -> Record:
    """PAMR of random scores (classes, H, W) of a random image of ``shape`` (H, W), in blocks of rows or with all neighbours laid out."""
    import torch

    from ovdiff_lib.matching.pamr import pamr as in_blocks
    from ovdiff_lib.workbench.cost.instruments import measured
    from ovdiff_lib.workbench.cost.plain import pamr_unfolded

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scores = torch.rand(classes, *shape, generator=torch.Generator().manual_seed(0)).to(scene.device)
    refine = pamr_unfolded if unfolded else in_blocks
    refine(image[:32, :48], scores[:, :32, :48])
    return _record(measured(refine, [(image, scores)], device=scene.device))


def matching(scene: Scene, at_once: bool, classes: int) -> Record:
    """An image against ``classes`` made-up classes without the category filter, class by class or with one matrix of all."""
    from ovdiff_lib.workbench.cost.instruments import measured
    from ovdiff_lib.workbench.cost.plain import scores_at_once

    bank, ovdiff = scene.made_up(classes), scene.method({"filters.category": False, "filters.stuff": False, "matching.refine": "none"})
    few, image = bank.restrict([0, 1]), scene.image(0)
    extractor = ovdiff.extractors["sd"]

    def score(bank):
        return scores_at_once(extractor, scene.profile, image, bank) if at_once else ovdiff.segment(image, bank).kept_scores

    score(few)
    return _record(measured(score, [(bank,)], device=scene.device))


def library(scene: Scene, classes: int, few: int, repeats: int) -> Record:
    """A vocabulary of ``classes`` that is all in the library: seconds to build it, seconds an image with all and with ``few`` of the
    classes in turns, images that were seen before, and the most memory of the whole process, first images included. What every use imports
    and the hashes of the weights' files, which are the same for one class, are not part of the seconds to build: one class is built before.
    """
    from ovdiff_lib.workbench.cost.instruments import measured
    from ovdiff_lib.workbench.cost.scene import made_up_vocabulary

    names = made_up_vocabulary(classes)
    scene.ovdiff.build(names.categories[:1])
    started = time.perf_counter()
    bank = scene.ovdiff.build(names)
    load = time.perf_counter() - started
    part, steps = bank.restrict(range(few)), ([], [])
    for number in range(repeats + SEEN):
        for side, used in zip(steps, (bank, part), strict=True):
            found = measured(scene.ovdiff.segment, [(scene.image(number % SEEN), used)], device=scene.device)
            side.append(replace(found, result=None))
    timed = [side[SEEN:] for side in steps]  # by then every image was seen, and the filter knows its prompts
    return {"load": load, "all": [step.median for step in timed[0]], "few": [step.median for step in timed[1]],
            "resident": max(step.peak for side in steps for step in side),
            "added": [max(step.peak - step.held for step in side) for side in timed]}


TASKS: dict[str, Callable[..., Record]] = {"attribution": attribution, "pamr": pamr, "matching": matching, "library": library}


def main(task: str, given: str) -> None:
    """Run a task with arguments as JSON and print its record."""
    import torch

    from ovdiff_lib.profiles.reading import load_profile
    from ovdiff_lib.workbench.cost.scene import Scene, quiet

    arguments = json.loads(given)
    torch.set_num_threads(arguments.pop("threads"))
    profile, library = load_profile(arguments.pop("profile")), arguments.pop("library")
    with quiet(), Scene(profile, library=library) as scene:
        print(json.dumps(TASKS[task](scene, **arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
