"""``ovdiff segment | build``, and what the first writes for an image: labels, overlay and legend, table of classes."""

import argparse
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovdiff_lib.cli.options import CLASSES, ENGINE, argument, built, engine_of, ovdiff_of, takes, vocabulary_of
from ovdiff_lib.errors import InputError
from ovdiff_lib.files import shown, written_whole
from ovdiff_lib.images import list_images, read_image
from ovdiff_lib.matching.windows import check_image
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.segmentation import Segmentation, label_ids
from ovdiff_lib.workbench.console import check_output, counted, write_json


@takes(argument("image", type=Path, help="an image (PNG, JPEG, WebP) or a folder of them"), *CLASSES,
       argument("--out", type=Path, default=Path("out"),
                help="folder for label maps, overlays and JSON (default: out)"))
def segment(options: argparse.Namespace) -> None:
    """Label the pixels of an image, or of every image in a folder."""
    ovdiff, paths = ovdiff_of(options), list_images(options.image)
    if len(paths) == 1:
        check_image(read_image(paths[0]))  # a broken image is reported before classes are built
    check_output(options.out)
    bank = built(ovdiff, vocabulary_of(options, ovdiff))
    broken, read = [], []

    def images():
        bar = tqdm(paths, "segmenting", unit="image", disable=len(paths) == 1)
        for path, stem in zip(bar, output_stems(paths), strict=True):
            try:
                check_image(image := read_image(path))
            except InputError as error:
                broken.append(str(error) if shown(path) in str(error) else f"{shown(path)}: {error}")
                continue
            read.append(stem)
            yield image

    for result, stem in zip(ovdiff.segment_many(images(), bank), read, strict=True):
        write_segmentation(result, options.out, stem, ovdiff.profile)
    for message in broken:
        print(f"ovdiff: {message}", file=sys.stderr)
    if broken:
        raise InputError(f"{len(broken)} of {len(paths)} images failed; the others are in {shown(options.out)}.")
    print(f"{counted(len(paths), 'image')} segmented; results in {shown(options.out)}")


@takes(*CLASSES, *ENGINE)
def build(options: argparse.Namespace) -> None:
    """Build the prototypes of classes into the library."""
    ovdiff, started = ovdiff_of(options), time.time()
    bank = built(ovdiff, vocabulary_of(options, ovdiff), engine_of(options, ovdiff.profile))
    for name in bank.extractors:
        count = sum(len(p) for p in bank.prototypes[name])
        print(f"{counted(len(bank.vocabulary), 'class', 'classes')}, {counted(count, 'prototype')} of extractor "
              f"{name!r}, {time.time() - started:.0f} s, in {ovdiff.library.root}")


def output_stems(paths: list[Path]) -> list[str]:
    """What the outputs of each image are called: the files' stems, or, where two are alike in any case, their names."""
    stems = {path.stem.casefold() for path in paths}
    return [path.stem if len(stems) == len(paths) else path.name for path in paths]


def write_segmentation(result: Segmentation, folder: str | Path, stem: str, profile: Profile) -> list[Path]:
    """Write ``stem_labels.png``, ``stem_overlay.png`` and ``stem.json`` into ``folder``; returns the three paths."""
    labels, overlay, table = paths = [Path(folder, f"{stem}{end}") for end in ("_labels.png", "_overlay.png", ".json")]
    colours, kept = colours_of(result.class_names), label_ids(result.kept).tolist()
    for path, picture in ((labels, label_image(result.labels, colours)), (overlay, result.overlay())):
        with written_whole(path) as file:
            picture.save(file, "PNG")
    rows = []
    for index, name in enumerate(result.class_names):
        inside = result.labels == index
        mean = float(result.kept_scores[kept.index(index)][inside].mean()) if inside.any() else None
        probability = float(result.filter_scores[index - 1]) if index else np.nan  # NaN without the filter, too
        rows.append({"label": index, "name": name, "colour": colours[index].tolist(), "share": float(inside.mean()),
                     "mean_score": mean, "kept": index in kept,
                     "filter_probability": None if np.isnan(probability) else probability})
    image = os.fsencode(stem).decode(errors="replace")  # a file name need not be text, JSON must be
    write_json(table, {"image": image, "size": list(result.labels.shape), "classes": rows, "profile": profile.name,
                       "settings": profile.digest(), "version": version("ovdiff-lib")})
    return paths


def label_image(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Labels (H, W) in [0, n) as pixel values, their ``colours`` u8 (n, 3) as palette; beyond 256 16-bit grey."""
    image = Image.fromarray(labels.astype(np.uint16 if len(colours) > 256 else np.uint8))
    if len(colours) <= 256:
        image.putpalette(np.ascontiguousarray(colours, np.uint8).tobytes())
    return image
