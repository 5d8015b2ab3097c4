"""Which models of a profile are on this machine: in the package, in a folder, or in the hub cache. Nothing is loaded or downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path

from ovdiff_lib.errors import ModelNotAvailable
from ovdiff_lib.profiles import Profile
from ovdiff_lib.published import FILES, MODEL_TYPES, OPEN_CLIP_FILES, how_to_get, lacking, published
from ovdiff_lib.registry import NOT_MODELS

HERE = ("package", "folder", "file", "hub cache")
BESIDES = {"open_clip_pretrained": "open_clip", "cutler_sha256": "cutler"}
"""Fields of ``profile.models`` that belong to the model of another."""


@dataclass(frozen=True)
class Model:
    """One model of the profile. ``state``: package, folder, file, hub cache; or missing, incomplete, unreadable, wrong model (of another
    architecture), wrong checksum, not verified (a checkpoint without a checksum in the profile).

    ``size`` in bytes is that on disk, or that of the download (None if not known); ``get`` a command, "" if it is here or none is known;
    ``remedy`` what else helps, if getting the model does not.
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
    remedy: str = ""

    @property
    def here(self) -> bool:
        return self.state in HERE

    @property
    def needed(self) -> bool:
        return bool(self.used_by)


def models_of(profile: Profile, used: dict[str, list[str]]) -> tuple[Model, ...]:
    """Every model that the profile names or a part needs; ``used`` says by field which parts load it."""
    table = profile.to_dict()["models"]
    fields = [name for name, value in table.items() if name not in NOT_MODELS and name not in BESIDES and (value or name in used)]
    return tuple(_model(profile, name, tuple(used.get(name, ()))) for name in fields)


def hub_cache() -> Path:
    """The folder of the hub's cache: ``HF_HUB_CACHE``, else ``hub`` in ``HF_HOME``, else in the user's cache folder."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _model(profile: Profile, name: str, used_by: tuple[str, ...]) -> Model:
    identifier = getattr(profile.models, name)
    if name == "open_clip" and identifier and not identifier.startswith("package:") and not Path(identifier).expanduser().is_dir():
        return _open_clip(profile, used_by)
    state, where, detail = _locate(identifier, FILES.get(name, ()), MODEL_TYPES.get(name, ""))
    if state in HERE and Path(where).is_file() != (name == "cutler") and not (name == "mae" and Path(where).is_file()):
        state, detail = "incomplete", "a folder of the model is wanted" if Path(where).is_file() else "a checkpoint file is wanted"
    if state == "file" and name == "cutler":
        state, detail = _checksum(Path(where), profile.models.cutler_sha256)
    licence = "Apache-2.0, as this project" if state == "package" else _licence(identifier)
    if state == "wrong model":
        return Model(name, identifier, state, where, _size(Path(where)), licence, used_by, "", detail)
    if state == "not verified":
        remedy = f"if that is the file you trust, add --set models.cutler_sha256={detail} or write it into the profile"
        detail = f"models.cutler_sha256 is not set; the file's SHA-256 is {detail}"
        return Model(name, identifier, state, where, _size(Path(where)), licence, used_by, "", detail, remedy)
    return _row(name, identifier, (state, where, detail), licence, used_by, identifier)


def _row(name: str, shown: str, found: tuple[str, str, str], licence: str, used_by: tuple[str, ...], source: str) -> Model:
    """``source`` is what the weights are fetched by."""
    state, where, detail = found
    if state in HERE:
        return Model(name, shown, state, where, _size(Path(where)), licence, used_by, "", detail)
    known = published(source)
    return Model(name, shown, state, where, known.size if known else None, licence, used_by, how_to_get(source) if source else "", detail)


def _licence(source: str) -> str:
    known = published(source)
    return known.licence if known else "see its card" if source else ""


def _locate(identifier: str, wanted: tuple[tuple[str, ...], ...], model_type: str = "") -> tuple[str, str, str]:
    """(state, where, detail) of a model named by ``package:NAME``, a path or a hub id; ``model_type`` as in :data:`MODEL_TYPES`."""
    from ovdiff_lib.models import PACKAGE, resolve_model, wrong_type

    if not identifier:
        return "missing", "", "not set in the profile"
    try:
        source = resolve_model(identifier)
    except ModelNotAvailable:
        return "missing", "", "reinstall ovdiff_lib with its weights" if identifier.startswith(PACKAGE) else "no such file or folder"
    if isinstance(source, Path) and source.is_file():
        return "file", str(source), ""
    kind = "package" if identifier.startswith(PACKAGE) else "folder"
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


def _open_clip(profile: Profile, used_by: tuple[str, ...]) -> Model:
    """An architecture of open_clip: its weights are a file, or a tag of which open_clip knows the repository or the address."""
    architecture, weights = profile.models.open_clip, profile.models.open_clip_pretrained
    shown = f"{architecture} / {weights}"
    if importlib.util.find_spec("open_clip") is None:
        return Model("open_clip", shown, "missing", "", None, "", used_by, "", "the library open_clip is not installed")
    from open_clip.pretrained import get_pretrained_cfg

    trained = get_pretrained_cfg(architecture, weights) if weights else {}
    repository, _, file = trained.get("hf_hub", "").rpartition("/")
    if repository:
        found = _locate(repository, ((file, str(Path(file).with_suffix(".safetensors"))),) if file else OPEN_CLIP_FILES)
        return _row("open_clip", shown, found, _licence(repository), used_by, repository)
    path = Path("~/.cache/clip").expanduser() / Path(trained["url"]).name if trained else Path(weights).expanduser()
    state = "file" if weights and path.is_file() else "missing"
    get = f"curl -L --create-dirs -o {shlex.quote(str(path))} {trained['url']}" if trained and state == "missing" else ""
    detail = "" if trained or state == "file" else "neither a file nor a tag that open_clip has for this architecture"
    return Model("open_clip", shown, state, str(path) if state == "file" else "", _size(path) if state == "file" else None, "see its card",
                 used_by, get, detail)


def _checksum(path: Path, wanted: str) -> tuple[str, str]:
    """(state, detail) of a checkpoint file by the profile's SHA-256; of one that is not verified, the detail is its own."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return "unreadable", f"it cannot be read ({error.strerror})"
    if wanted and found != wanted.strip().lower():
        return "wrong checksum", f"its SHA-256 is {found}, models.cutler_sha256 says {wanted}"
    if not wanted:
        return "not verified", found
    return "file", ""


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder (links followed)."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
