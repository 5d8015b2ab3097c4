"""What a profile needs and what of it is here: models, libraries, data sets, the machine; how to get the rest; what a run will cost.

Nothing is loaded or downloaded. The figures of cost are the paper's (Sec. 4.2, App. C.5) and sizes that follow from the profile.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ovdiff_lib.checks import setting_problems
from ovdiff_lib.costs import expected, size_text
from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.inventory import BESIDES, Model, hub_cache, models_of
from ovdiff_lib.profiles import Profile
from ovdiff_lib.registry import Part


@dataclass(frozen=True)
class Library:
    """An optional library: its ``version`` or "" if it is not installed, and what of this profile needs it ("" if nothing does)."""

    name: str
    version: str
    serves: str
    needed_by: str
    get: str


@dataclass(frozen=True)
class Report:
    """All that :func:`examine` found. ``problems`` is one sentence for each thing that the profile needs and that is not here."""

    profile: str
    models: tuple[Model, ...]
    libraries: tuple[Library, ...]
    data: tuple[dict[str, Any], ...]
    machine: dict[str, Any]
    expected: dict[str, str]
    problems: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        table = asdict(self)
        for row, model in zip(table["models"], self.models, strict=True):
            row |= {"here": model.here, "needed": model.needed}
        return json.dumps({"ready": not self.problems, **table}, indent=1) + "\n"


def examine(profile: Profile, data: list[str] | None = None, library: Path | None = None) -> Report:
    """Look for everything that ``profile`` needs; ``data`` holds data set roots, FOLDER or NAME=FOLDER, ``library`` the library's folder.

    Raises ``ProfileError`` for a part that does not exist; whatever is merely absent is in the report.
    """
    used = uses(profile)
    models = models_of(profile, used)
    libraries = _libraries(profile, used)
    sets = tuple(row for root in data or [] for row in _data_set(root))
    machine, device_problem = _machine(profile, library)
    problems = [_sentence(m) for m in models if m.needed and not m.here]
    problems += [f"The library {lib.name} is needed by {lib.needed_by} and not installed: {lib.get}" for lib in libraries
                 if lib.needed_by and not lib.version]
    problems += [row["problem"] for row in sets if row["problem"]] + device_problem
    problems += setting_problems(profile)
    return Report(profile.name, models, libraries, sets, machine, expected(profile, models), tuple(problems))


def uses(profile: Profile) -> dict[str, list[str]]:
    """Field of ``profile.models`` -> the parts of this profile that declare to load it. Raises ``ProfileError`` for an unknown part."""
    from ovdiff_lib.features import EXTRACTORS, check_extractors
    from ovdiff_lib.masks import SEGMENTERS, check_segmenter

    check_extractors(profile)
    check_segmenter(profile)
    parts = {"support images": ["diffusion"]}
    parts |= {f"extractor {name}": _declared(EXTRACTORS[name], profile, "features") for name in profile.features.extractors}
    parts[f"segmenter {profile.masks.segmenter}"] = _declared(SEGMENTERS[profile.masks.segmenter], profile, "masks")
    if profile.filters.category:
        parts["category filter"] = ["clip"]
    table: dict[str, list[str]] = {}
    for part, names in parts.items():
        for name in dict.fromkeys(BESIDES.get(n, n) for n in names):
            table.setdefault(name, []).append(part)
    return table


def _declared(part: Part, profile: Profile, section: str) -> list[str]:
    """The fields of the models that a part declares; none are known of one that declares nothing."""
    models, _ = part.depends_on(profile, section)
    return [] if part.models is None else list(models)


STATES = {"wrong model": "is a wrong model", "wrong checksum": "has a wrong checksum"}
"""How a sentence says a state that is no adjective."""


def _sentence(model: Model) -> str:
    detail = f" ({model.detail})" if model.detail else ""
    remedy = model.remedy or (f"get it with: {model.get}" if model.get else f"set models.{model.field} to a model that is here")
    return (f"The model {model.identifier or model.field!r} is needed by {', '.join(model.used_by)} and "
            f"{STATES.get(model.state, model.state)}{detail}; {remedy}")


def _libraries(profile: Profile, used: dict[str, list[str]]) -> tuple[Library, ...]:
    """Optional libraries: module, distribution, what it serves, the part of this profile that needs it, how to get it."""
    crf = used.get("dino", []) and profile.masks.maskcut_refine == "crf" and profile.masks.segmenter == "maskcut"
    rows = (
        ("detectron2", "detectron2", "segmenter cutler", ", ".join(used.get("cutler", [])),
         "conda install -c conda-forge detectron2 (environment.yml has it; the Python package index does not)"),
        ("open_clip", "open_clip_torch", "extractors open-clip-*", ", ".join(used.get("open_clip", [])), "pip install open_clip_torch"),
        ("pydensecrf", "pydensecrf2", "masks.maskcut_refine crf", "masks.maskcut_refine" if crf else "", "pip install pydensecrf2"),
        ("accelerate", "accelerate", "less memory while weights load", "", "pip install accelerate"),
        ("ray", "ray", "more than one machine or GPU", "", 'pip install "ray[data]"'),
    )
    return tuple(Library(module, _version(module, name), serves, needed, get) for module, name, serves, needed, get in rows)


def _version(module: str, distribution: str) -> str:
    if importlib.util.find_spec(module) is None:
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed"  # under another distribution's name


def _data_set(root: str) -> list[dict[str, Any]]:
    """What FOLDER holds, or whether it holds NAME: rows of name, folder, images and problem. ``InputError`` for an unknown NAME."""
    from ovdiff_lib.evaluation import DATASETS, load_dataset

    name, equals, folder = root.partition("=")
    if not equals or Path(root).expanduser().is_dir():
        name, folder = "", root
    elif name not in DATASETS:
        raise InputError(f"--data {root!r} names no data set; use FOLDER or NAME=FOLDER with a name of {', '.join(DATASETS)}.")
    rows = []
    for candidate in [name] if name else DATASETS:
        try:
            images = len(load_dataset(candidate, folder=Path(folder).expanduser()))
            rows.append({"name": candidate, "folder": folder, "images": images, "problem": ""})
        except InputError as error:
            if name:
                rows.append({"name": name, "folder": folder, "images": 0, "problem": str(error)})
    return rows or [{"name": "", "folder": folder, "images": 0, "problem":
                     f"The folder {folder} holds no data set whose validation split is whole; name it: --data NAME={folder}."}]


def _machine(profile: Profile, library: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Processor, memory, GPUs and free disk; and a sentence if the profile's device is not here."""
    import torch

    from ovdiff_lib.library import Library as Store
    from ovdiff_lib.models import resolve_device

    try:
        device, problem = str(resolve_device(profile)), []
    except ProfileError as error:
        device, problem = "", [str(error)]
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    pages = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names)
    root = Store(library).root
    return {
        "device": device, "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus], "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if pages else None, "torch": torch.__version__,
        "library": str(root), "library_free": _free(root), "hub_cache": str(hub_cache()), "hub_cache_free": _free(hub_cache()),
    }, problem


def _free(folder: Path) -> int:
    """Free bytes of the disk that ``folder`` is on, or will be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def render(report: Report) -> str:
    """The report as tables of plain text."""
    machine = report.machine
    gpus = ", ".join(f"{gpu['name']} ({size_text(gpu['memory'])})" for gpu in machine["gpus"]) or "none"
    models = [("model", "named", "state", "size", "licence", "used by")]
    models += [(m.field, m.identifier, m.state, ("" if m.here else "~") * (m.size is not None) + size_text(m.size), m.licence,
                ", ".join(m.used_by) or "(not by this profile)") for m in report.models]
    libraries = [("library", "version", "serves", "needed by")]
    libraries += [(lib.name, lib.version or "not installed", lib.serves, lib.needed_by or "-") for lib in report.libraries]
    parts = [f"Profile {report.profile}", "", *_columns(models), "", *_columns(libraries), ""]
    if report.data:
        sets = [("data set", "folder", "images")]
        parts += [*_columns(sets + [(row["name"] or "?", row["folder"], str(row["images"] or "-")) for row in report.data]), ""]
    parts += _columns([
        ("device", f"{machine['device'] or 'not here'}; GPUs: {gpus}; {machine['cpus']} CPU cores; torch {machine['torch']}"),
        ("memory", size_text(machine["memory"])),
        ("library", f"{machine['library']} ({size_text(machine['library_free'])} free)"),
        ("hub cache", f"{machine['hub_cache']} ({size_text(machine['hub_cache_free'])} free)"),
        *((f"expected {what}", text) for what, text in report.expected.items())])
    found = [m for m in report.models if m.here and m.where]
    parts += ["", "Found:", *_columns([(f"  {m.field}", m.where + (f" ({m.detail})" if m.detail else "")) for m in found])] if found else []
    unused = [m for m in report.models if not m.needed and m.get]
    parts += ["", "Not needed by this profile, to be had with:", *_columns([(f"  {m.field}", m.get) for m in unused])] if unused else []
    if report.problems:
        parts += ["", "Missing:", *(f"  {problem}".replace("get it with: ", "get it with:\n    ") for problem in report.problems)]
    else:
        parts += ["", "Everything needed is here."]
    return "\n".join(parts)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
