"""What a profile needs and what of it is here: models, libraries, data sets, the machine; how to get the rest.

Nothing is downloaded, and nothing but tokenizers is loaded where no trial is asked for.
"""

import ast
import importlib.util
import math
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError, ModelNotAvailable, OVDiffError, ProfileError
from ovdiff_lib.features import EXTRACTORS
from ovdiff_lib.filters.category import CategoryFilter
from ovdiff_lib.keys import check_profile, for_words, made_from
from ovdiff_lib.library.store import Library
from ovdiff_lib.masks import SEGMENTERS
from ovdiff_lib.networks.identity import PACKAGE, hub_command, resolve_model
from ovdiff_lib.networks.loading import check_libraries, load_clip, load_diffusion, load_dino, load_mae, resolve_device
from ovdiff_lib.pipeline import OVDiff
from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.registry import NOT_MODELS, chosen_part
from ovdiff_lib.support.attribution import class_token_positions
from ovdiff_lib.support.sampler import sample_support
from ovdiff_lib.workbench.baselines import BASELINES
from ovdiff_lib.workbench.baselines.archive import load_archive
from ovdiff_lib.workbench.console import described, size_text
from ovdiff_lib.workbench.data.datasets import UNMEASURED, has_folder, load_dataset
from ovdiff_lib.workbench.reproduce import cells_of, parameters_of

HERE = ("package", "folder", "file", "hub cache")

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), index_col="model", keep_default_na=False)
"""By hub id, or by file name for what is no hub model: ``licence``, ``megabytes`` of what is fetched (four bytes a
parameter), ``url`` of a single file, ``constants`` of the network by attribute."""

FILES = pd.read_csv(Path(__file__).with_name("published_files.csv"), index_col="field")["files"]
"""By field of ``profile.models`` what a folder of it must hold: of each row one file."""


@dataclass(frozen=True)
class Check:
    """``what`` was looked at, what it is ``named`` in the profile, its ``state`` and ``where`` it is.

    State of a model: one of :data:`HERE`, or missing, incomplete. ``size`` in bytes on disk, or of the download if
    it is known; ``get`` the command that fetches what is not here, if any is known; ``problem`` a sentence if needed.
    """

    what: str
    named: str = ""
    state: str = ""
    where: str = ""
    size: int | None = None
    licence: str = ""
    used_by: tuple[str, ...] = ()
    get: str = ""
    problem: str = ""


@dataclass(frozen=True)
class ProfileReport:
    """All that :func:`inspect` looked at; ``print`` shows it."""

    profile: str
    checks: tuple[Check, ...]

    problems = property(lambda self: tuple(check.problem for check in self.checks if check.problem))
    """A sentence for each thing that is needed and not here."""

    def __str__(self) -> str:
        table = pd.DataFrame({c.what: {"named": c.named, "state": c.state, "licence": c.licence,
                                       "size": "" if c.size is None else size_text(c.size),
                                       "used by": ", ".join(c.used_by), "where": c.where} for c in self.checks}).T
        table = table.apply(lambda column: column.str.ljust(column.str.len().max()))
        unused = [f"  {c.what}: {c.get}" for c in self.checks if c.get and not c.used_by]
        missing = [f"  {problem}".replace("get it with: ", "get it with:\n    ") for problem in self.problems]
        return "\n".join([f"Profile {self.profile}", "", table.to_string(justify="left"), "",
                          *(["Not needed by this profile, to be had with:", *unused, ""] if unused else ()),
                          *(["Missing:", *missing] if missing else ["Everything needed is here."])])


def inspect(profile: Profile, data: list[str] | None = None, library: Path | None = None,
            notebooks: Iterable[Path] = (), tried: bool = False) -> ProfileReport:
    """Look for everything that ``profile`` needs, for the data sets ``data``, NAME:FOLDER, and for what ``notebooks``
    measure and on what; a segmenter that is not here they pass over. ``tried``: what is here takes its :func:`trials`.

    Raises ``ProfileError`` for a part that does not exist; whatever is merely absent is in the report.
    """
    named = _named(notebooks)
    used = uses(profile, named)
    checks = [*_models(profile, used), *_libraries(used), *map(_data, data or ()),
              *_machine(profile, library), *_settings(profile), *_measured(profile, named)]
    if named:
        weights = sum(c.size or 0 for c in checks if c.what.startswith("models.") and c.used_by)
        size = weights * getattr(torch, profile.models.dtype).itemsize // 4
        checks.append(Check("all weights in memory", profile.models.dtype, size=size))
    return ProfileReport(profile.name, (*checks, *(trials(profile, checks) if tried else ())))


def uses(profile: Profile, named: Collection[str] = ()) -> dict[str, list[str]]:
    """Field of ``profile.models`` -> parts, of the profile and ``named``, that load it; ``ProfileError`` for others."""
    segmenter, table = profile.masks.segmenter, {"diffusion": ["support images"]}
    others = [*profile.evaluation.extractors, *(name for name in EXTRACTORS if name in named)] if named else []
    parts = [(f"extractor {name}", chosen_part("features.extractors", name, EXTRACTORS), "features")
             for name in dict.fromkeys((*profile.features.extractors, *others))]
    parts += [(f"baseline {name}", part, "baselines") for name, part in BASELINES.items() if name in named]
    parts.append((f"segmenter {segmenter}", chosen_part("masks.segmenter", segmenter, SEGMENTERS), "masks"))
    for label, part, section in parts:
        models, _ = part.depends_on(profile, section)  # a declaration of what no profile has is an error
        for name in models if part.models is not None else ():  # of a part that declares nothing nothing is known
            table.setdefault(name, []).append(label)
    if profile.filters.category:
        table.setdefault("clip", []).append("category filter")
    return table


def _models(profile: Profile, used: dict[str, list[str]]) -> Iterator[Check]:
    """Every model that the profile names or a part needs; ``used`` says by field which parts load it."""
    for name, identifier in profile.to_dict()["models"].items():
        if name in NOT_MODELS or not (identifier or name in used):
            continue
        known, used_by = published(identifier), tuple(used.get(name, ()))
        licence, size = ("see its card", None) if known is None else (known.licence, 10**6 * known.megabytes)
        state, where, detail = _located(name, identifier)
        here, get = state in HERE, how_to_get(identifier) if identifier and state in ("missing", "incomplete") else ""
        if here:  # links are followed
            size = sum(p.stat().st_size for p in (Path(where), *Path(where).rglob("*")) if p.is_file())
        licence = "Apache-2.0, as this project" if state == "package" else licence
        remedy = f"get it with: {get}" if get else f"set models.{name} to a model that is here"
        problem = (f"The model {identifier or name!r} is needed by {', '.join(used_by)} and is {state} ({detail}); "
                   f"{remedy}")
        yield Check(f"models.{name}", identifier, state, where, size, licence, used_by, get,
                    problem if used_by and not (here or (profile.models.download and get.startswith("hf"))) else "")


def _located(name: str, identifier: str) -> tuple[str, str, str]:
    """(state, where, detail) of the model of a field by ``package:NAME``, path or hub id."""
    if not identifier:
        return "missing", "", "not set in the profile"
    try:
        source, shipped = resolve_model(identifier), identifier.startswith(PACKAGE)
        kind = "package" if shipped else "folder" if isinstance(source, Path) else "hub cache"
        source = source if isinstance(source, Path) else Path(snapshot_download(source, local_files_only=True))
    except ModelNotAvailable:
        return "missing", "", "no such file or folder"
    except (LocalEntryNotFoundError, ValueError):  # the second: of what can be no hub id
        return "missing", "", f"not in the hub cache {constants.HF_HUB_CACHE}"
    if source.is_file() or name == "cutler":
        wanted, here = ("file", source.is_file()) if name == "cutler" else ("folder", False)
        return ("file", str(source), "") if here else ("incomplete", str(source), f"a {wanted} of the model is wanted")
    rows = FILES[FILES.index == name].str.split()
    lacks = ", ".join(names[0] for names in rows if not any((source / one).is_file() for one in names))
    return "incomplete" if lacks else kind, str(source), f"lacks {lacks}"


def _libraries(used: dict[str, list[str]]) -> Iterator[Check]:
    """The library that CutLER needs, and whether the others have the versions that are known to work."""
    here, used_by = importlib.util.find_spec("detectron2") is not None, tuple(used.get("cutler", ()))
    get = "conda install -c conda-forge detectron2"  # the Python package index has none
    problem = f"The library detectron2 is needed by {', '.join(used_by)} and not installed; get it with: {get}"
    yield Check("library detectron2", state="installed" if here else "missing", used_by=used_by,
                get="" if here else get, problem=problem if used_by and not here else "")
    problem = _said(check_libraries)
    yield Check("library versions", state="wrong" if problem else "as declared", problem=problem)


def _named(notebooks: Iterable[Path]) -> set[str]:
    """The texts and attributes in the code of notebooks, which name the parts that they measure and the data sets."""
    named = set()
    for path in notebooks:
        code = "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell.get("cell_type") == "code")
        with suppress(InputError, SyntaxError):  # running it says more
            nodes = [*ast.walk(ast.parse(code))]
            named |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            named |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            named |= {"voc"} if "dataset" in parameters_of(path) else set()  # reproduce fills it in
    return named


def _measured(profile: Profile, named: Collection[str]) -> Iterator[Check]:
    """The data sets of ``evaluation`` that are ``named``, whether the text encoders read their words, and ReCo's
    archive. A column without background may go without a data set; the others need theirs."""
    words: dict[Category, None] = {}
    for field in (one for one in ("voc", "context", "object", "without_background") if one in named):
        sources = getattr(profile.evaluation, field)
        for column, source in sources.items() if isinstance(sources, dict) else {field: sources}.items():
            if column != field and not has_folder(source):
                yield Check(f"data {source}", f"evaluation.{field}", f"{column}: {UNMEASURED}")
                continue
            found = _data(source)
            problem = found.problem and f"{found.problem[:-1]} (evaluation.{field})."
            yield replace(found, named=f"evaluation.{field}", problem=problem)
            words |= {} if found.problem else dict.fromkeys(load_dataset(source).vocabulary)
    if words:
        problem = _said(check_words, profile, words)
        yield Check("class names", state="too long" if problem else f"{len(words)} fit", problem=problem)
    if "reco" in named:
        problem = _said(load_archive, profile.baselines.archive)
        yield Check("baselines.archive", profile.baselines.archive, "missing" if problem else "folder", problem=problem)


def check_words(profile: Profile, words: Iterable[Category]) -> None:
    """``InputError`` for a class longer than what the text encoders of drawings and filter read, of those here."""
    from transformers import CLIPTokenizer

    filters = {"clip": ("", profile.filters.category_prompt.replace("{names}", "{name}", 1))}
    read = {"diffusion": ("tokenizer", profile.support.prompt), **(filters if profile.filters.category else {})}
    for field, (below, template) in read.items():
        state, where, _ = _located(field, getattr(profile.models, field))
        if state in HERE:
            tokenizer = CLIPTokenizer.from_pretrained(Path(where, below))
            for one in words:
                class_token_positions(tokenizer, template, one.prompt)


def check_ready(ovdiff: OVDiff, vocabulary: Vocabulary, here: bool = True) -> None:
    """Before classes are drawn that the library of ``ovdiff`` lacks: ``InputError`` for one that is too long,
    ``ModelNotAvailable`` for what the profile needs and is not here, if it is ``here`` that they are drawn."""
    check_profile(ovdiff.profile)
    tables = [made_from(ovdiff.profile, name) for name in ovdiff.profile.features.extractors]
    drawn = [one for one in vocabulary if not one.pictures
             and not all(ovdiff.library.has("prototypes", for_words(table, one)[0]) for table in tables)]
    if drawn:
        check_words(ovdiff.profile, drawn)
        if problems := here and inspect(ovdiff.profile).problems:
            raise ModelNotAvailable(f"{problems[0].rstrip('.')} (`ovdiff doctor` names all that is missing).")


def _data(source: str) -> Check:
    """Whether a data set is there, whole."""
    try:
        found = load_dataset(source)
    except InputError as error:
        return Check(f"data {source}", state="missing", problem=str(error))
    return Check(f"data {found.name}", state=f"{len(found)} images", where=str(found.folder))


def _machine(profile: Profile, library: Path | None) -> Iterator[Check]:
    """The profile's device, GPUs, memory, and the free disk where the library and the hub's cache are or will be."""
    problem = _said(resolve_device, profile)
    device = "missing" if problem else str(resolve_device(profile))
    yield Check("device", profile.models.device, device, problem=problem)
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield Check(f"GPU {i}", gpu.name, size=gpu.total_memory)
    yield Check("memory", size=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    yield Check("processors", state=str(os.cpu_count()))
    for name, folder in (("library", Library(library).root), ("hub cache", Path(constants.HF_HUB_CACHE))):
        disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        yield Check(name, state="free", size=shutil.disk_usage(disk).free, where=str(folder))


def _settings(profile: Profile) -> Iterator[Check]:
    """Whether the settings go together."""
    with suppress(ModelNotAvailable):  # of which the models' own lines say more
        try:
            check_profile(profile)
        except ProfileError as error:
            yield Check("settings", profile.name, "wrong", problem=str(error))


def _said(check: Callable[..., Any], *arguments: Any) -> str:
    """The sentence of a check that raises, else ""."""
    try:
        check(*arguments)
    except OVDiffError as error:
        return str(error)
    return ""


# ---- one cheap step of every network whose weights are here: does it compute, and is it the published one?

LOADERS = {"diffusion": load_diffusion, "clip": lambda one: load_clip(one)[0], "dino": load_dino, "mae": load_mae}


def trials(profile: Profile, checks: Sequence[Check]) -> Iterator[Check]:
    """What comes of one step of each part whose models are all here, by the ``checks`` of them (one drawing, then
    features, masks and scores of noise), and the constants of published models. Whatever is raised is a result."""
    models = {check.what.removeprefix("models."): check for check in checks if check.what.startswith("models.")}
    one, words = profile.override({"support.steps": 1, "support.size": 1}), Vocabulary.of("cat, dog")
    side, segmenter = profile.support.image_size, profile.masks.segmenter
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    parts = {
        "support images": ((1, None, None), lambda: sample_support(
            load_diffusion(one), words.categories[0], one, progress=False).attribution),
        f"segmenter {segmenter}": ((None, side, side), lambda: SEGMENTERS[segmenter](one).propose(noise, "cat")),
        "category filter": ((2,), lambda: CategoryFilter.build(one)(noise, words)[1]),
        "baseline groupvit": ((2, side, side), lambda: BASELINES["groupvit"](one).scores(noise, words)[1:]),
        **{f"extractor {name}": ((1, None, None, None), lambda part=part: part(one)(noise[None], np.zeros(1, np.int64)))
           for name, part in EXTRACTORS.items()}}
    for label, (shape, step) in parts.items():
        states = [check.state in HERE for check in models.values() if label in check.used_by]
        if not states or not all(states):
            continue
        try:
            found = np.asarray(step())
            state = str(found.shape)
            fits = found.ndim == len(shape) and all(n in (found.shape[i], None) for i, n in enumerate(shape))
            lives = found.dtype == bool or (np.isfinite(found).all() and np.ptp(found) > 0)
            wrong = "not finite, or all the same" if fits else f"not of the shape {shape}"
            problem = "" if fits and lives else f"What the {label} gave, {found.shape}, is {wrong}."
        except Exception as error:
            state, problem = "failed", f"One step of the {label} failed: {described(error)}"
        yield Check(f"step of {label}", state=state, problem=problem)
    for field in (one for one in LOADERS if one in models and models[one].used_by and models[one].state in HERE):
        known = published(models[field].named)
        for path, _, value in (pair.partition("=") for pair in ("" if known is None else known.constants).split()):
            found = float(attrgetter(path)(LOADERS[field](one)))
            right = math.isclose(found, float(value), rel_tol=0.005)  # half precision
            wrong = "" if right else f"{path} of models.{field} is {found:g}, and {value} in the published model."
            yield Check(f"models.{field} {path}", state=f"{found:g}", problem=wrong)


def how_to_get(identifier: str) -> str:
    """The shell command that fetches a model, "" for a path of which nothing is known."""
    if identifier.startswith("package:"):
        return "make mini-world"
    known = published(identifier)
    if known is not None and known.url:
        return f"curl -L --create-dirs -o {shlex.quote(str(Path(identifier).expanduser()))} {known.url}"
    if Path(identifier).is_absolute() or identifier[:1] in (".", "~") or identifier.count("/") > 1:
        return ""
    return hub_command(identifier)


def published(source: str) -> pd.Series | None:
    """What is known of a hub id, or of a path by its file name."""
    return next((PUBLISHED.loc[name] for name in (source, Path(source).name) if name in PUBLISHED.index), None)
