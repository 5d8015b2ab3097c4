"""What ``ovdiff segment`` writes for an image: palette PNG of labels, overlay with legend, JSON of classes and
scores."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ovdiff_lib.files import write_atomic
from ovdiff_lib.images import save_label_png
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.segmentation import Segmentation


def output_stems(paths: list[Path]) -> list[str]:
    """One output stem an image, no two alike whatever their case: the file's stem, with the suffix where two images
    share it ("a.png", "a.jpg" -> "a_png", "a_jpg"), and with a number where that is taken too."""
    counts = Counter(p.stem.casefold() for p in paths)
    taken = {stem for stem, count in counts.items() if count == 1}
    stems = []
    for path in paths:
        stem = path.stem
        if counts[stem.casefold()] > 1:
            wanted = f"{path.stem}_{path.suffix[1:]}"
            tries = itertools.chain([wanted], (f"{wanted}_{n}" for n in itertools.count(2)))
            stem = next(s for s in tries if s.casefold() not in taken)
            taken.add(stem.casefold())
        stems.append(stem)
    return stems


def write_segmentation(result: Segmentation, folder: str | Path, stem: str, profile: Profile) -> tuple[Path, Path,
                                                                                                       Path]:
    """Write ``stem_labels.png``, ``stem_overlay.png`` and ``stem.json`` into ``folder``; returns the three paths."""
    folder = Path(folder)
    labels, overlay, table = folder / f"{stem}_labels.png", folder / f"{stem}_overlay.png", folder / f"{stem}.json"
    colours = colours_of(result.class_names)
    save_label_png(labels, result.labels, colours)
    buffer = io.BytesIO()
    result.overlay().save(buffer, "PNG")
    write_atomic(overlay, buffer.getvalue())
    rows, rank = [], {0: 0, **{k + 1: i + 1 for i, k in enumerate(result.kept)}}
    for index, name in enumerate(result.class_names):
        inside = result.labels == index
        mean = float(result.kept_scores[rank[index]][inside].mean()) if inside.any() else None
        probability = None if index == 0 else float(result.filter_scores[index - 1])
        probability = None if probability is None or np.isnan(probability) else probability
        rows.append({"label": index, "name": name, "colour": colours[index].tolist(), "share": float(inside.mean()),
                     "mean_score": mean,
                     "kept": index == 0 or index - 1 in result.kept, "filter_probability": probability})
    shown = os.fsencode(stem).decode(errors="replace")  # a file name need not be text, JSON must be
    record = {"image": shown, "size": list(result.labels.shape), "classes": rows, "profile": profile.name,
              "settings": profile.digest(),
              "version": version("ovdiff-lib")}
    write_atomic(table, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    return labels, overlay, table
