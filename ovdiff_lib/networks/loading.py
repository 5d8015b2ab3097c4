"""The frozen networks, each loaded once.

A model is named by a folder, a hub id, or ``package:NAME`` (weights that ship in ``ovdiff_lib/mini/weights/NAME``).
Whatever the model libraries raise while loading becomes :class:`~ovdiff_lib.errors.ModelNotAvailable` here and nowhere
else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import pickle
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.networks.instruments import undisturbed
from ovdiff_lib.networks.published import MODEL_TYPES, how_to_get

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer, ViTMAEModel, ViTModel

    from ovdiff_lib.profiles.schema import Profile

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LIBRARIES = {"diffusers": "diffusers", "transformers": "transformers", "open_clip": "open_clip_torch", "torchvision": "torchvision",
             "timm": "timm"}
"""Module -> distribution of the libraries whose networks are loaded, and read at layers whose names they do not promise
to keep."""

_loaded: dict[tuple, Any] = {}


def load_diffusion(profile: Profile) -> StableDiffusionPipeline:
    """The Stable Diffusion pipeline of ``profile.models.diffusion``: eval mode, on the device, no safety checker, no
    progress bar.

    The scheduler is DPM-Solver++ of order 2 (App. C.5) over the noise schedule the pipeline was trained with. The same
    object is returned for the same folder, device and dtype. Raises ``ModelNotAvailable`` and ``ProfileError``.
    """
    return _cached("diffusion", _build_diffusion, profile.models.diffusion, profile)


def load_clip(profile: Profile) -> tuple[CLIPModel, CLIPTokenizer]:
    """CLIP and its tokenizer of ``profile.models.clip``, eval mode, on the device; cached like
    :func:`load_diffusion`."""
    return _cached("clip", _build_clip, profile.models.clip, profile)


def load_dino(profile: Profile) -> ViTModel:
    """The ViT of ``profile.models.dino``, which an extractor and MaskCut share; cached like :func:`load_diffusion`."""
    return load_network(profile, "dino", _build_dino)


def load_network(profile: Profile, name: str, build: Callable[[Path | str, torch.device, torch.dtype, dict], Any], *,
                 source: str = "", variant: str = "") -> Any:
    """What ``build(source, device, dtype, options)`` makes of ``profile.models.<name>``; cached like
    :func:`load_diffusion`.

    ``build`` gets a folder, a file or a hub id, and keyword arguments for ``from_pretrained``. Give ``source`` where
    the weights are not under the field's own identifier, and ``variant`` where the same weights make different
    networks. Raises ``ProfileError`` if the field is empty and ``ModelNotAvailable`` for whatever the libraries raise,
    and for a model of another architecture than the field's.
    """
    identifier = getattr(profile.models, name)
    if not identifier:
        raise ProfileError(f"models.{name} is not set in the profile {profile.name!r}; set it to a folder or a hub id of that model.")
    return _cached(name, build, source or identifier, profile, variant)


def last_attention(model: ViTModel | ViTMAEModel) -> torch.nn.Module:
    """Attention of the last layer of a ViT of transformers, with the projections ``q_proj``, ``k_proj`` and ``v_proj``.

    It reads the layer-normed stream (pre-norm). The library does not promise these names: ``ModelNotAvailable`` where
    it has others.
    """
    try:
        attention = model.layers[-1].attention
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.get_submodule(name)
    except AttributeError as error:
        raise ModelNotAvailable(f"The layers of {type(model).__name__} have other names than this package knows ({error}: "
                                f"{_place(error)}); install another version of it within that range.") from error
    return attention


def check_libraries() -> None:
    """``ModelNotAvailable`` if one of :data:`LIBRARIES` is outside the range that this package declares in
    pyproject.toml.

    Asked before anything is loaded: another version fails later, somewhere inside a network, or gives other features.
    """
    for distribution in LIBRARIES.values():
        installed, supported = _versions(distribution)
        if installed and not SpecifierSet(supported).contains(installed, prereleases=True):
            raise ModelNotAvailable(f"{distribution} {installed} is installed, and ovdiff_lib works with {distribution}{supported}; get "
                                    f"such a version with `pip install \"{distribution}{supported}\"`.")


def resolve_device(profile: Profile) -> torch.device:
    """``profile.models.device`` as a device that exists here; "auto" is the GPU if there is one. Raises
    ``ProfileError``."""
    name = profile.models.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ProfileError(f"models.device is {name!r}; use 'auto', 'cpu', 'cuda' or 'cuda:0'.") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ProfileError(f"models.device is {name!r} but this machine has {torch.cuda.device_count()} usable GPUs; use 'auto' or 'cpu'.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # a kind of device that this torch or this machine lacks
        raise ProfileError(f"models.device is {name!r}, which is not usable on this machine; use 'auto' or 'cpu'.") from None
    return device


def resolve_dtype(profile: Profile) -> torch.dtype:
    """``profile.models.dtype`` as a torch dtype."""
    return DTYPES[profile.models.dtype]


def wrong_type(folder: Path, wanted: str) -> str:
    """What is wrong with the ``model_type`` in the config.json of a folder, "" if it is ``wanted``; a folder without
    one is not judged."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged, of which the loaders say more
        return ""
    found = found.get("model_type") if isinstance(found, dict) else None
    return "" if found == wanted else f"its config.json names the model_type {found!r}, and {wanted!r} is wanted"


def _check_type(name: str, source: Path | str, options: dict) -> None:
    """``ValueError`` if ``source`` holds another architecture than ``profile.models.<name>`` is for; the hub may be
    asked for it."""
    if name not in MODEL_TYPES or (isinstance(source, Path) and source.is_file()):
        return
    if not isinstance(source, Path):
        from transformers.utils import cached_file

        source = Path(cached_file(source, "config.json", **options)).parent
    if wrong := wrong_type(source, MODEL_TYPES[name]):
        raise ValueError(wrong)


@undisturbed()
def _cached(name: str, build: Any, identifier: str, profile: Profile, variant: str = "") -> Any:
    source, device, dtype = resolve_model(identifier), resolve_device(profile), resolve_dtype(profile)
    key = (name, variant, str(source), str(device), dtype)
    if key not in _loaded:
        check_libraries()
        options = {"local_files_only": not profile.models.download}
        quiet = contextlib.nullcontext() if profile.models.download else _from_disk_alone()
        # Some networks are made with random weights first, for which the caller's random numbers are not used up.
        with torch.random.fork_rng(devices=()), _loading(identifier, source, profile.models.download), quiet:
            _check_type(name, source, options)
            _loaded[key] = build(source, device, dtype, options)
    return _loaded[key]


def _build_diffusion(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> StableDiffusionPipeline:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    # One by one rather than by the pipeline, which does not report weights that are missing and left random.
    networks = {}
    options = options | {"low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None}  # else diffusers warns, at length
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        networks[name] = complete(name, kind.from_pretrained(
            source, subfolder=name, dtype=dtype, output_loading_info=True, **options))
    pipe = StableDiffusionPipeline.from_pretrained(
        source, dtype=dtype, safety_checker=None, requires_safety_checker=False, **networks, **options)
    # The spacing is named because a folder that diffusers saved again keeps its PNDM scheduler's "leading", which moves every step.
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _build_clip(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> tuple[CLIPModel, CLIPTokenizer]:
    from transformers import CLIPModel, CLIPTokenizer

    model = complete("CLIP", CLIPModel.from_pretrained(source, dtype=dtype, output_loading_info=True, **options))
    return model.to(device), CLIPTokenizer.from_pretrained(source, **options)


def _build_dino(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> ViTModel:
    from transformers import ViTModel

    loaded = ViTModel.from_pretrained(source, dtype=dtype, add_pooling_layer=False, output_loading_info=True, **options)
    return complete("DINO", loaded).to(device)


def complete(name: str, loaded: tuple[torch.nn.Module, dict]) -> torch.nn.Module:
    """The loaded network in eval mode; ``ValueError`` if some of its weights were missing in the file or are not
    finite."""
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the {name} weights lack {len(missing)} tensors, {missing[0]} first")
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise ValueError(f"the {name} weights hold values that are not finite, in {key} first")
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _loading(identifier: str, source: Path | str, download: bool) -> Iterator[None]:
    """The one place where errors of the model libraries become a sentence for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError,
            TypeError, AttributeError, KeyError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # of which torch says at length how to have it run
            first_line = "its weights are a pickle that is damaged or holds more than tensors, and it was not run"
        reason = textwrap.shorten(first_line, 160, placeholder=" ...").rstrip(".: ")
        if isinstance(source, Path):
            looked = f"from the {'file' if source.is_file() else 'folder'} {source}"
            remedy = "put a complete copy of the model there or name another in the profile"
        elif download:
            looked, remedy = "from the hub", "check the id and the network, or give a folder that holds the model"
        else:
            looked = "from the hub cache on this machine"
            remedy = f"fetch it with `{how_to_get(str(source))}`, set models.download to true, or give a folder that holds the model"
        if isinstance(error, (TypeError, AttributeError, KeyError, ImportError)):  # what libraries that do not fit each other raise
            reason = f"{reason}: {_place(error)}"
            remedy = "`pip check` tells whether the installed libraries fit each other; if they do, " + remedy
        raise ModelNotAvailable(f"The model {identifier!r} could not be loaded {looked} ({reason}); {remedy}.") from error


def _place(error: BaseException) -> str:
    """Where an error comes from, as far as a user can tell it to somebody: its type, module and line, and the model
    library."""
    frames = [(frame.f_globals["__name__"], line) for frame, line in traceback.walk_tb(error.__traceback__)]
    module, line = frames[-1]
    # What lacks an attribute, or cannot be imported, is of a library that need not have been running.
    lacking = getattr(error, "obj", None)
    owners = [name for name, _ in frames] + [getattr(lacking, "__module__", None) or getattr(lacking, "__name__", "")]
    owners += [error.name or ""] if isinstance(error, ImportError) else []
    text = f"{type(error).__name__} in {module}, line {line}"
    for owner in reversed(owners):
        if distribution := LIBRARIES.get(owner.split(".")[0]):
            installed, supported = _versions(distribution)
            return f"{text}, with {distribution} {installed or 'not installed'}{f' of {supported}' if supported else ''}"
    return text


@functools.cache
def _versions(distribution: str) -> tuple[str, str]:
    """The installed version ("" if there is none) and the range, ">=1,<2", that this package's own metadata name ("" if
    they do not)."""
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("ovdiff-lib") or []]
    except importlib.metadata.PackageNotFoundError:  # run from its sources, without an installation
        requirements = []
    wanted = canonicalize_name(distribution)
    supported = next((r.specifier for r in requirements if canonicalize_name(r.name) == wanted), SpecifierSet())
    return installed, ",".join(sorted(map(str, supported), reverse=True))  # the lower bound first


@contextlib.contextmanager
def _from_disk_alone() -> Iterator[None]:
    """Loading without the hub, and without the libraries' bars over tensors, which are gone in a second."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    # Told to use local files only, the hub's library still fetches a list of programs that it may be called by, for its own statistics.
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # an argument that diffusers still gives
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        for library in shown:
            library.enable_progress_bar()
