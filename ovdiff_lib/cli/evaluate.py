"""``ovdiff evaluate | ladder | convert``."""

import argparse
from pathlib import Path
from typing import Any

from ovdiff_lib.cli.options import ENGINE, argument, built, engine_of, ovdiff_of, profile_of, takes
from ovdiff_lib.files import write_atomic
from ovdiff_lib.workbench.console import check_output
from ovdiff_lib.workbench.data.convert import convert_context
from ovdiff_lib.workbench.data.datasets import load_dataset

DATA_SET = (
    argument("dataset", help="mini-voc, mini-object, mini-context; or, with --data, voc, context, coco-object, and "
                             "without background voc20, context59, coco-stuff, ade20k, cityscapes"),
    argument("--data", type=Path, metavar="FOLDER", help="where the data set is, for example VOCdevkit"),
    argument("--split", default="val", help="val, train, or tune and wild of the mini world (default: val)"))


@takes(*DATA_SET,
       argument("--limit", type=int, help="use the first LIMIT images only"),
       argument("--predictions", type=Path, metavar="FOLDER",
                help="score label maps in this folder, named by image id, instead of segmenting"),
       argument("--json", type=Path, help="write the IoU of every class and the mean to this file too"), *ENGINE)
def evaluate(options: argparse.Namespace) -> None:
    """Measure mIoU on a data set."""
    import pandas as pd

    from ovdiff_lib.keys import of_labels
    from ovdiff_lib.workbench.data.samples import SavedPredictions
    from ovdiff_lib.workbench.evaluation import measure
    from ovdiff_lib.workbench.evaluation.workers import evaluate_on

    if options.json:
        check_output(options.json.parent)
    dataset = _dataset_of(options)
    if options.predictions:
        result = measure.evaluate(SavedPredictions(options.predictions), dataset, limit=options.limit)
        by = f"predictions in {options.predictions}"
    else:
        ovdiff = ovdiff_of(options)
        engine, builder = engine_of(options, ovdiff.profile), measure.for_dataset(ovdiff, dataset)
        measure.image_count(dataset, options.limit)  # a limit of no images is reported before classes are built
        bank = built(builder, dataset.vocabulary, engine)
        if engine:
            result = evaluate_on(engine, ovdiff.profile, bank, dataset, options.limit)
        else:  # the same command goes on where it was interrupted
            result = measure.evaluate(measure.label_predictor(ovdiff, bank, dataset), dataset, limit=options.limit,
                                      folder=ovdiff.library.root / "counts", key={"OVDiff": of_labels(ovdiff.profile)})
        by = f"profile {ovdiff.profile.name}, settings {ovdiff.profile.digest()}"
    iou = pd.Series([*result.iou, result.miou], [*result.class_names, "mIoU"])
    *rows, last = (100 * iou).to_string(float_format="{:.1f}".format, na_rep="-").splitlines()
    print(*rows, sep="\n")
    if not dataset.has_background:
        print("Background is not evaluated: every pixel that counts shows one of the classes.")
    print(f"{last}   {dataset.name} {dataset.split}, {result.images} images, {by}")
    if options.json:
        write_atomic(options.json, iou.to_json(indent=1).encode())  # null for a class that is nowhere


def _dataset_of(options: argparse.Namespace) -> Any:
    # Workers on other machines are elsewhere: they are told the whole path.
    folder = options.data and options.data.expanduser().absolute()
    return load_dataset(options.dataset, split=options.split, folder=folder)


@takes(*DATA_SET,
       argument("--support-split", metavar="SPLIT",
                help="scenes that stand for drawings (default: train, tune or val, the first that is not measured)"),
       argument("--images", type=int, help="use the first IMAGES images only"))
def ladder(options: argparse.Namespace) -> None:
    """Measure where points are lost: the truth in place of the drawings, the category filter and the feature grid."""
    from ovdiff_lib.pipeline import OVDiff
    from ovdiff_lib.workbench.evaluation import ladder as rungs
    from ovdiff_lib.workbench.evaluation.shared import SharedNetworks

    dataset = _dataset_of(options)
    training = rungs.training_of(dataset, options.support_split)
    ovdiff = OVDiff(profile_of(options), library=options.library, networks=SharedNetworks())
    found = rungs.ladder(ovdiff, dataset, training, folder=ovdiff.library.root / "counts", limit=options.images)
    print(found)
    print(f"{dataset.name} {dataset.split}, {found.images} images, true support: {found.amount} scenes of "
          f"{training.split} a class, profile {ovdiff.profile.name}, settings {ovdiff.profile.digest()}")


@takes(argument("dataset", choices=["context"]),
       argument("--data", type=Path, required=True, metavar="FOLDER",
                help="where the data set is; label maps are written into it"),
       argument("--json", type=Path, required=True, help="trainval_merged.json of PASCAL in Detail"), profile=False)
def convert(options: argparse.Namespace) -> None:
    """Make the label maps of PASCAL Context, train and val, from its JSON file."""
    counts = convert_context(options.json, options.data)
    made = ", ".join(f"{count} {phase} images" for phase, count in counts.items())
    print(f"PASCAL Context: {made}; label maps and lists written.")
