"""What a profile needs and what of it is here: models, libraries, data sets, the machine; how to get the rest; what a
run costs.

Nothing is loaded or downloaded. Costs are the paper's (Sec. 4.2, App. C.5) and sizes that follow from the profile.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ovdiff_lib.errors import InputError, ModelNotAvailable, ProfileError
from ovdiff_lib.features import EXTRACTORS, check_extractors
from ovdiff_lib.files import size_text
from ovdiff_lib.keys import check_profile
from ovdiff_lib.library.store import Library
from ovdiff_lib.masks import SEGMENTERS, check_segmenter
from ovdiff_lib.networks.identity import PACKAGE, resolve_model
from ovdiff_lib.networks.loading import check_libraries, resolve_device, wrong_type
from ovdiff_lib.networks.published import FILES, MODEL_TYPES, how_to_get, lacking, published
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import NOT_MODELS
from ovdiff_lib.workbench.cost.flops import prototype_bytes, prototype_rows
from ovdiff_lib.workbench.data.datasets import DATASETS, load_dataset

HERE = ("package", "folder", "file", "hub cache")

LIBRARIES = (
    ("detectron2", "detectron2", "segmenter cutler",
     "conda install -c conda-forge detectron2 (environment.yml has it; the Python package index does not)"),
    ("open_clip", "open_clip_torch", "extractors open-clip-*", "pip install open_clip_torch"),
    ("accelerate", "accelerate", "less memory while weights load", "pip install accelerate"),
    ("ray", "ray", "more than one machine or GPU", 'pip install "ray[data]"'),
)
"""Optional libraries: module, distribution, what it serves, how to get it."""


@dataclass(frozen=True)
class Model:
    """One model of the profile. ``state``: package, folder, file, hub cache; or missing, incomplete, wrong model (of
    another architecture).

    ``size`` in bytes on disk, or of the download (None if not known); ``get`` a command, "" if it is here or none is
    known.
    """

    field: str
    identifier: str
    state: str
    where: str
    size: int | None
    licence: str
    used_by: tuple[str, ...]
    get: str
    detail: str = ""

    @property
    def here(self) -> bool:
        return self.state in HERE

    @property
    def needed(self) -> bool:
        return bool(self.used_by)

    def problem(self) -> str:
        """One sentence: who needs it, what is wrong, what helps."""
        detail = f" ({self.detail})" if self.detail else ""
        remedy = f"get it with: {self.get}" if self.get else f"set models.{self.field} to a model that is here"
        return (f"The model {self.identifier or self.field!r} is needed by {', '.join(self.used_by)} and "
                f"{'is a ' * (self.state == 'wrong model')}{self.state}{detail}; {remedy}")


@dataclass(frozen=True)
class ProfileReport:
    """All that :func:`inspect` found; ``print`` shows it.

    ``libraries``: name, version ("" if not installed), what it serves, what of this profile needs it ("": nothing), how
    to get it. ``data``: name, folder, images, problem. ``problems``: a sentence for each thing that is needed and not
    here.
    """

    profile: str
    models: tuple[Model, ...]
    libraries: tuple[dict[str, str], ...]
    data: tuple[dict[str, Any], ...]
    machine: dict[str, Any]
    expected: dict[str, str]
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        machine = self.machine
        models = [(m.field, m.identifier, m.state, ("" if m.here or m.size is None else "~") + size_text(m.size),
                   m.licence, ", ".join(m.used_by) or "(not by this profile)") for m in self.models]
        libraries = [(lib["name"], lib["version"] or "not installed", lib["serves"], lib["needed_by"] or "-")
                     for lib in self.libraries]
        data = [(row["name"] or "?", row["folder"], str(row["images"] or "-")) for row in self.data]
        gpus = ", ".join(f"{gpu['name']} ({size_text(gpu['memory'])})" for gpu in machine["gpus"]) or "none"
        here = [("device", f"{machine['device'] or 'not here'}; GPUs: {gpus}; {machine['cpus']} CPU cores; "
                           f"torch {machine['torch']}"),
                ("memory", size_text(machine["memory"])),
                ("library", f"{machine['library']} ({size_text(machine['library_free'])} free)"),
                ("hub cache", f"{machine['hub_cache']} ({size_text(machine['hub_cache_free'])} free)"),
                *((f"expected {what}", text) for what, text in self.expected.items())]
        found = [(f"  {m.field}", m.where + f" ({m.detail})" * bool(m.detail)) for m in self.models
                 if m.here and m.where]
        unused = [(f"  {m.field}", m.get) for m in self.models if not m.needed and m.get]
        missing = [f"  {problem}".replace("get it with: ", "get it with:\n    ") for problem in self.problems]
        blocks = [[f"Profile {self.profile}"],
                  aligned([("model", "named", "state", "size", "licence", "used by"), *models]),
                  aligned([("library", "version", "serves", "needed by"), *libraries]),
                  data and aligned([("data set", "folder", "images"), *data]), aligned(here),
                  found and ["Found:", *aligned(found)],
                  unused and ["Not needed by this profile, to be had with:", *aligned(unused)],
                  ["Missing:", *missing] if missing else ["Everything needed is here."]]
        return "\n\n".join("\n".join(block) for block in blocks if block)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def inspect(profile: Profile, data: list[str] | None = None, library: Path | None = None) -> ProfileReport:
    """Look for everything that ``profile`` needs; ``data`` holds data set roots, FOLDER or NAME=FOLDER.

    Raises ``ProfileError`` for a part that does not exist; whatever is merely absent is in the report.
    """
    used = uses(profile)
    models, libraries = models_of(profile, used), _libraries(used)
    sets = tuple(row for root in data or [] for row in _data_set(root))
    problems = [*_said(check_libraries), *(m.problem() for m in models if m.needed and not m.here),
                *(f"The library {lib['name']} is needed by {lib['needed_by']} and not installed: {lib['get']}"
                  for lib in libraries if lib["needed_by"] and not lib["version"]),
                *(row["problem"] for row in sets if row["problem"]), *_said(resolve_device, profile)]
    with suppress(ModelNotAvailable):  # the list of models says more
        try:
            check_profile(profile)
        except ProfileError as error:
            problems.append(str(error))
    return ProfileReport(profile.name, models, libraries, sets, _machine(profile, library), expected(profile, models),
                         tuple(problems))


def _said(check: Callable[..., Any], *args: Any) -> list[str]:
    """The sentence of a check that raises, in a list; else nothing."""
    try:
        check(*args)
    except (ModelNotAvailable, ProfileError) as error:
        return [str(error)]
    return []


def uses(profile: Profile) -> dict[str, list[str]]:
    """Field of ``profile.models`` -> the parts that declare to load it. Raises ``ProfileError`` for an unknown part."""
    check_extractors(profile)
    check_segmenter(profile)
    segmenter, parts = profile.masks.segmenter, {"support images": ["diffusion"]}
    named = {f"extractor {name}": (EXTRACTORS[name], "features") for name in profile.features.extractors}
    for label, (part, section) in {**named, f"segmenter {segmenter}": (SEGMENTERS[segmenter], "masks")}.items():
        models, _ = part.depends_on(profile, section)  # a declaration of what no profile has is an error
        parts[label] = [] if part.models is None else list(models)  # of a part that declares nothing nothing is known
    if profile.filters.category:
        parts["category filter"] = ["clip"]
    table: dict[str, list[str]] = {}
    for part, names in parts.items():
        for name in names:
            table.setdefault(name, []).append(part)
    return table


# ---- models: in the package, in a folder, or in the hub cache

def models_of(profile: Profile, used: dict[str, list[str]]) -> tuple[Model, ...]:
    """Every model that the profile names or a part needs; ``used`` says by field which parts load it."""
    found = []
    for name, value in profile.to_dict()["models"].items():
        if name not in NOT_MODELS and (value or name in used):
            found.append(_model(profile, name, tuple(used.get(name, ()))))
    return tuple(found)


def hub_cache() -> Path:
    """The folder of the hub's cache: ``HF_HUB_CACHE``, else ``hub`` in ``HF_HOME``, else in the user's cache folder."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _model(profile: Profile, name: str, used_by: tuple[str, ...]) -> Model:
    identifier = getattr(profile.models, name)
    get, size, licence = _published(identifier)
    state, where, detail = _locate(identifier, FILES.get(name, ()), MODEL_TYPES.get(name, ""))
    file = Path(where).is_file()
    if state in HERE and file != (name == "cutler"):
        state, detail = "incomplete", "a folder of the model is wanted" if file else "a checkpoint file is wanted"
    if state in (*HERE, "wrong model"):
        get, size = "", _size(Path(where))
    licence = "Apache-2.0, as this project" if state == "package" else licence
    return Model(name, identifier, state, where, size, licence, used_by, get, detail)


def _published(source: str) -> tuple[str, int | None, str]:
    """The command that fetches a model, its size where it is known, and its licence."""
    known = published(source)
    return (how_to_get(source), known.size, known.licence) if known else (
        (how_to_get(source), None, "see its card") if source else ("", None, ""))


def _locate(identifier: str, wanted: tuple[tuple[str, ...], ...], model_type: str = "") -> tuple[str, str, str]:
    """(state, where, detail) of a model by ``package:NAME``, path or hub id; ``model_type`` as in ``MODEL_TYPES``."""
    shipped = identifier.startswith(PACKAGE)
    if not identifier:
        return "missing", "", "not set in the profile"
    try:
        source = resolve_model(identifier)
    except ModelNotAvailable:
        return "missing", "", "reinstall ovdiff_lib with its weights" if shipped else "no such file or folder"
    if isinstance(source, Path) and source.is_file():
        return "file", str(source), ""
    kind = "package" if shipped else "folder"
    if not isinstance(source, Path):
        kind, source = "hub cache", _snapshot(source)
        if source is None:
            return "missing", "", f"not in the hub cache {hub_cache()}"
    if model_type and (wrong := wrong_type(source, model_type)):
        return "wrong model", str(source), wrong
    lacks = lacking(source, wanted)
    return ("incomplete" if lacks else kind), str(source), f"lacks {', '.join(lacks)}" if lacks else ""


def _snapshot(hub_id: str) -> Path | None:
    """Folder of the main revision of a model in the hub cache, as the loaders look for it; None if there is none."""
    folder = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if revision and snapshot.is_dir() else None


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder (links followed)."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


# ---- libraries, data sets, the machine

def _libraries(used: dict[str, list[str]]) -> tuple[dict[str, str], ...]:
    users = {"detectron2": used.get("cutler", ()), "open_clip": used.get("open_clip", ())}
    return tuple({"name": module, "version": _version(module, distribution), "serves": serves,
                  "needed_by": ", ".join(users.get(module, ())), "get": get}
                 for module, distribution, serves, get in LIBRARIES)


def _version(module: str, distribution: str) -> str:
    if importlib.util.find_spec(module) is None:
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed"  # under another distribution's name


def _data_set(root: str) -> list[dict[str, Any]]:
    """What FOLDER holds, or whether it holds NAME. ``InputError`` for an unknown NAME."""
    name, equals, folder = root.partition("=")
    if not equals or Path(root).expanduser().is_dir():
        name, folder = "", root
    elif name not in DATASETS:
        raise InputError(f"--data {root!r} names no data set; use FOLDER or NAME=FOLDER with a name of "
                         f"{', '.join(DATASETS)}.")
    rows, row = [], {"name": name, "folder": folder, "images": 0, "problem": ""}
    for candidate in [name] if name else DATASETS:
        try:
            images = len(load_dataset(candidate, folder=Path(folder).expanduser()))
            rows.append(row | {"name": candidate, "images": images})
        except InputError as error:
            if name:
                rows.append(row | {"problem": str(error)})
    none = f"The folder {folder} holds no data set whose validation split is whole; name it: --data NAME={folder}."
    return rows or [row | {"problem": none}]


def _machine(profile: Profile, library: Path | None) -> dict[str, Any]:
    """Processor, memory, GPUs and free disk; ``device`` is "" where the profile's is not here."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    root, hub = Library(library).root, hub_cache()
    return {
        "device": "" if _said(resolve_device, profile) else str(resolve_device(profile)),
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus], "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "torch": torch.__version__,
        "library": str(root), "library_free": _free(root), "hub_cache": str(hub), "hub_cache_free": _free(hub),
    }


def _free(folder: Path) -> int:
    """Free bytes of the disk that ``folder`` is on, or will be on."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


# ---- what a run will cost

def expected(profile: Profile, models: tuple[Model, ...]) -> dict[str, str]:
    """Sizes that follow from the profile, and the paper's times where it runs the paper's generator."""
    support, needed = profile.support, [m for m in models if m.needed]
    widths = {name: channels(profile, name, models) for name in profile.features.extractors}
    weights = f"{size_text(sum(m.size or 0 for m in needed))} for the models in use"
    if missing := [m for m in needed if not m.here]:
        unknown = sum(m.size is None for m in missing)
        weights += f", {size_text(sum(m.size or 0 for m in missing))} of them to fetch"
        weights += f" and {unknown} of unknown size" if unknown else ""
    table = {"weights on disk": weights,
             "support images on disk": f"at most {size_text(support.size * support.image_size**2 * 3)} a class"}
    if sizes := [f"{size_text(prototype_bytes(profile, width))} ({name})" for name, width in widths.items() if width]:
        table["prototypes on disk"] = f"{' + '.join(sizes)} a class, {prototype_rows(profile)} float32 vectors each"
    if published(profile.models.diffusion):
        if widths.get("sd"):
            held = size_text(support.size * (profile.features.sd_input_size // 8) ** 2 * widths["sd"] * 4)
            table["memory"] = f"{held} for the sd features of one class while they are clustered, beside the weights"
        seconds = 110 * support.size * support.steps / (32 * 30)
        table["time to build"] = (f"about {seconds:.0f} s a class with sd on a GPU of 37 TFLOP/s such as an A40 (the "
                                  "paper: 110 s for 32 images of 30 steps)")
        table["time to segment"] = "about 0.6 s an image on a 2080 Ti with sd and 21 classes (the paper)"
    return table


def channels(profile: Profile, extractor: str, models: tuple[Model, ...]) -> int | None:
    """Feature channels by the configuration of an extractor's model on disk, or as published; None if neither says."""
    names = [m for m in models if f"extractor {extractor}" in m.used_by]
    if len(names) != 1:
        return None
    model, known = names[0], published(names[0].identifier)
    if model.field == "diffusion":
        blocks = _config(model, "unet/config.json").get("block_out_channels") or (known.channels if known else ())
        return sum(_block(layer, list(blocks)) for layer in profile.features.sd_layers) if len(blocks) else None
    config = _config(model, "config.json")
    width = config.get("vision_config", config).get("hidden_size")
    return width or (known.channels[0] if known and known.channels else None)


def _block(layer: str, blocks: list[int]) -> int:
    """Channels of an attention layer of a UNet by its name, 0 for a name of no such form."""
    kind, number = re.match(r"(\w*)\.?(\d*)", layer).groups()
    ordered = {"down_blocks": blocks, "up_blocks": blocks[::-1], "mid_block": blocks[-1:]}.get(kind, [])
    return sum(ordered[int(number or 0) :][:1])


def _config(model: Model, name: str) -> dict[str, Any]:
    try:
        return json.loads((Path(model.where) / name).read_text(encoding="utf-8")) if model.here else {}
    except (OSError, ValueError):
        return {}  # the loader will say so; here only a figure is lost
