"""Where a model's weights are or can be had, and what tells one set of weights from another."""

import functools
import hashlib
from pathlib import Path

import huggingface_hub

from ovdiff_lib.errors import ModelNotAvailable

PACKAGE = "package:"
SHIPPED = Path(__file__).parent.parent / "mini" / "weights"
WEIGHT_FILES = (".pth", ".pt", ".pkl", ".bin", ".safetensors")
IDENTITY_SUFFIXES = (".json", ".txt", ".safetensors", ".bin")

HUB_SKIP = '--exclude "*.h5" --exclude "*.msgpack"'  # the same weights for other frameworks
HUB_OPTIONS = {
    # The repository also holds the whole model as single files, in other precisions and formats, ten times as much.
    "stable-diffusion-v1-5/stable-diffusion-v1-5": " ".join(f'--include "{name}"' for name in (
        "model_index.json", "scheduler/*", "tokenizer/*", "feature_extractor/*", "*/config.json",
        "*/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")),
    **dict.fromkeys(("facebook/dino-vitb8", "facebook/sam-vit-huge", "IDEA-Research/grounding-dino-tiny"),
                    HUB_SKIP + ' --exclude "*.bin"'),  # which hold safetensors, too
    "timm/vit_base_patch16_clip_224.openai": '--exclude "*.bin" --exclude "model.safetensors"'}  # the latter is timm's
"""Of ``hf download``, by hub id; of all others :data:`HUB_SKIP`."""


def resolve_model(identifier: str) -> Path | str:
    """Folder or weights file of ``package:NAME`` or of a path, or the hub id; ``ModelNotAvailable`` if missing."""
    if identifier.startswith(PACKAGE):
        folder = SHIPPED / identifier.removeprefix(PACKAGE)
        if not folder.is_dir():
            raise ModelNotAvailable(f"The model {identifier!r} is not in {folder}; reinstall ovdiff_lib with its "
                                    "weights, or train them with `make mini-world`.")
        return folder
    path = Path(identifier).expanduser()
    if path.is_dir() or path.is_file():
        return path.resolve()
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a path.
    if path.is_absolute() or path.suffix in WEIGHT_FILES or len(path.parts) > 2 or identifier[:1] in ("", ".", "~"):
        raise ModelNotAvailable(f"The model folder {identifier!r} does not exist; correct models.* in the profile, or "
                                "give a hub id.")
    return identifier


def hub_command(identifier: str) -> str:
    """The shell command that fetches the model of a hub id."""
    return f"hf download {identifier} {HUB_OPTIONS.get(identifier, HUB_SKIP)}".rstrip()


def model_identity(identifier: str) -> str:
    """What tells one set of weights from another: a hash of the folder's weight and config files, or hub id and
    revision. A file is read again only when its time or size has changed."""
    if not identifier:
        return "none"
    source = resolve_model(identifier)
    if isinstance(source, Path):
        return f"sha256:{_hash(source)[:16]}"
    for name in ("model_index.json", "config.json", "open_clip_config.json"):
        try:
            cached = huggingface_hub.try_to_load_from_cache(source, name)
        except ValueError as error:
            raise ModelNotAvailable(f"The model {identifier!r} is neither a folder nor a hub id "
                                    f"({str(error).splitlines()[0]}); correct models.* in the profile.") from None
        if isinstance(cached, str):
            return f"hub:{source}@{Path(cached).parent.name}"  # .../snapshots/<revision>/<file>
    return f"hub:{source}@not-cached"


def _hash(source: Path) -> str:
    if source.is_file():
        status = source.stat()
        return _file_hash(source, status.st_mtime_ns, status.st_size)
    digest = hashlib.sha256()
    for path in sorted(p for p in source.rglob("*") if p.suffix in IDENTITY_SUFFIXES and p.is_file()):
        digest.update(f"{path.relative_to(source).as_posix()}\0{_hash(path)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
