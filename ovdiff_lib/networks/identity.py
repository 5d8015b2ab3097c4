"""Where a model's weights are, and what tells one set of weights from another."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from ovdiff_lib.errors import ModelNotAvailable
from ovdiff_lib.networks.published import how_to_get

PACKAGE = "package:"
SHIPPED = Path(__file__).parent.parent / "mini" / "weights"
WEIGHT_FILES = (".pth", ".pt", ".pkl", ".bin", ".safetensors")
IDENTITY_SUFFIXES = (".json", ".txt", ".safetensors", ".bin")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # where a tag names no file
_file_hashes: dict[tuple[str, int, int], str] = {}


def resolve_model(identifier: str) -> Path | str:
    """The folder of ``package:NAME`` or of a path, a weights file, or the hub id itself. Raises ``ModelNotAvailable``
    if it is missing."""
    if identifier.startswith(PACKAGE):
        folder = SHIPPED / identifier.removeprefix(PACKAGE)
        if not folder.is_dir():
            raise ModelNotAvailable(f"The model {identifier!r} is not in {folder}; reinstall ovdiff_lib with its weights, or train them "
                                    "with `make mini-world`.")
        return folder
    folder = Path(identifier).expanduser()
    if folder.is_dir() or folder.is_file():
        return folder.resolve()
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a path.
    if not identifier or folder.is_absolute() or folder.suffix in WEIGHT_FILES or len(folder.parts) > 2 or identifier[0] in ".~":
        raise ModelNotAvailable(f"The model folder {identifier!r} does not exist; correct models.* in the profile, or give a hub id.")
    return identifier


def model_identity(identifier: str) -> str:
    """What tells one set of weights from another: a hash of the folder's weight and config files, or hub id and
    revision.

    Hashes are kept per (path, mtime, size), so asking again reads no file twice.
    """
    if not identifier:
        return "none"
    source = resolve_model(identifier)
    if isinstance(source, Path) and source.is_file():
        return f"sha256:{_file_hash(source)[:16]}"
    if isinstance(source, Path):
        digest = hashlib.sha256()
        for path in sorted(p for p in source.rglob("*") if p.suffix in IDENTITY_SUFFIXES and p.is_file()):
            digest.update(f"{path.relative_to(source).as_posix()}\0{_file_hash(path)}\n".encode())
        return f"sha256:{digest.hexdigest()[:16]}"
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json"):
        try:
            cached = try_to_load_from_cache(source, name)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ModelNotAvailable(f"The model {identifier!r} is neither a folder nor a hub id ({reason}); correct "
                                    "models.* in the profile.") from None
        if isinstance(cached, str):
            return f"hub:{source}@{Path(cached).parent.name}"  # .../snapshots/<revision>/<file>
    return f"hub:{source}@not-cached"


def open_clip_weights(architecture: str, weights: str) -> tuple[Path | None, str, str]:
    """open_clip's weights of a tag, or of a file that ``weights`` names: their file (None if it is not on this machine),
    their hub repository or path, and the command that fetches them ("" if none is known)."""
    import huggingface_hub
    from open_clip.pretrained import get_pretrained_cfg

    trained = get_pretrained_cfg(architecture, weights) if weights else {}
    repository, _, name = trained.get("hf_hub", "").rpartition("/")
    if repository:
        names = (Path(name).with_suffix(".safetensors").name, name) if name else OPEN_CLIP_FILES
        cached = [huggingface_hub.try_to_load_from_cache(repository, name) for name in names]
        return next((Path(path) for path in cached if isinstance(path, str)), None), repository, how_to_get(repository)
    path = Path("~/.cache/clip" if trained else weights, trained.get("url", "").rpartition("/")[2]).expanduser()
    get = f"curl -L --create-dirs -o {shlex.quote(str(path))} {trained['url']}" if trained else ""
    return path if path.is_file() else None, str(path), get


def _file_hash(path: Path) -> str:
    status = path.stat()
    key = (str(path), status.st_mtime_ns, status.st_size)
    if key not in _file_hashes:
        with path.open("rb") as file:
            _file_hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _file_hashes[key]
