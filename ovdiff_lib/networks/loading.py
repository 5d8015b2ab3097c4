"""The frozen networks, each loaded once.

A model is named by a folder, a hub id, or ``package:NAME`` (weights that ship in ``ovdiff_lib/mini/weights/NAME``).
Whatever the model libraries raise while loading becomes :class:`~ovdiff_lib.errors.ModelNotAvailable` here alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import pickle
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.networks.identity import hub_command, resolve_model
from ovdiff_lib.networks.instruments import out_of_memory, undisturbed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer, ViTMAEModel, ViTModel

    from ovdiff_lib.profiles.schema import Profile

LIBRARIES = ("diffusers", "transformers", "open-clip-torch", "torchvision")
"""Distributions whose networks are read at layers whose names they do not promise to keep."""

MISFITS = (TypeError, AttributeError, KeyError, ImportError)
"""What libraries raise that do not fit each other."""

_loaded: dict[tuple, Any] = {}


def load_diffusion(profile: Profile) -> StableDiffusionPipeline:
    """The Stable Diffusion pipeline of ``models.diffusion``, without safety checker and progress bar. Its scheduler is
    DPM-Solver++ of order 2 (App. C.5) over the noise schedule it was trained with."""
    def build(source, device, dtype, options):
        from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel

        # Without accelerate diffusers warns, at length, unless it is told so.
        options = options | {"dtype": dtype, "low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None}
        networks, kinds = {}, {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        # One by one rather than by the pipeline, which does not report weights that are missing and left random.
        for part, kind in kinds.items():
            network, info = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **options)
            networks[part] = complete(network, info["missing_keys"])
        pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None, requires_safety_checker=False,
                                                       **networks, **options)
        # The spacing is named: a folder that diffusers saved again keeps its PNDM scheduler's "leading".
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace")
        pipe.set_progress_bar_config(disable=True)
        if device.type != "cpu":  # an image at a time: at 512 pixels each takes 0.8 GB while it is decoded
            pipe.vae.enable_slicing()
        return pipe.to(device)

    return load_network(profile, "diffusion", build)


def load_clip(profile: Profile) -> tuple[CLIPModel, CLIPTokenizer]:
    """CLIP and its tokenizer of ``models.clip``."""
    return load_transformers(profile, "clip", "CLIPModel", "CLIPTokenizer")


def load_dino(profile: Profile) -> ViTModel:
    """The ViT of ``models.dino``, which an extractor and MaskCut share."""
    return load_transformers(profile, "dino", "ViTModel", add_pooling_layer=False)


def load_mae(profile: Profile) -> ViTMAEModel:
    """The encoder of ``models.mae``, which hides no patch."""
    return load_transformers(profile, "mae", "ViTMAEModel", mask_ratio=0.0)


def load_transformers(profile: Profile, name: str, network: str, reader: str = "", **fields: Any) -> Any:
    """Transformers' ``network`` with the weights of ``models.<name>``; with its tokenizer or processor, if named."""
    def build(source, device, dtype, options):
        import transformers

        kind = getattr(transformers, network)
        if isinstance(source, Path) and source.is_file():
            raise ValueError("it is a single file, and only folders in the format of transformers are read")
        # Weights of another architecture often load, in part or in whole, and give features of something else.
        wanted = kind.config_class.model_type
        found = kind.config_class.get_config_dict(source, **options)[0].get("model_type")
        if found != wanted:
            raise ValueError(f"its config.json names the model_type {found!r}, and {wanted!r} is wanted")
        given = {"dtype": dtype, "output_loading_info": True, **options, **fields}
        model, info = kind.from_pretrained(source, **given)
        model = complete(model, info["missing_keys"]).to(device)
        return (model, getattr(transformers, reader).from_pretrained(source, **options)) if reader else model

    return load_network(profile, name, build)


@undisturbed()
def load_network(profile: Profile, name: str,
                 build: Callable[[Path | str, torch.device, torch.dtype, dict], Any]) -> Any:
    """What ``build(source, device, dtype, options)`` makes of ``profile.models.<name>``: the same object for the same
    weights, device and dtype, in eval mode, on the device.

    ``build`` gets a folder, a file or a hub id, and keyword arguments for ``from_pretrained``. Raises ``ProfileError``
    if the field is empty and ``ModelNotAvailable`` for whatever ``build`` and the libraries raise.
    """
    identifier = getattr(profile.models, name)
    if not identifier:
        raise ProfileError(f"models.{name} is not set in the profile {profile.name!r}; set it to a folder or a hub id "
                           "of that model.")
    found, device, dtype = resolve_model(identifier), resolve_device(profile), getattr(torch, profile.models.dtype)
    key = (name, str(found), str(device), dtype)
    if key not in _loaded:
        check_libraries()
        download = profile.models.download
        quiet = contextlib.nullcontext() if download else _from_disk_alone()
        # Some networks are made with random weights first, for which the caller's random numbers are not used up.
        with torch.random.fork_rng(devices=()), _loading(identifier, found, download), quiet:
            _loaded[key] = build(found, device, dtype, {"local_files_only": not download})
    return _loaded[key]


def last_projection(model: ViTModel | ViTMAEModel, name: str) -> torch.nn.Module:
    """``q_proj``, ``k_proj`` or ``v_proj`` of the last layer of a ViT of transformers, which reads the layer-normed
    stream (pre-norm). The library does not promise its names: ``ModelNotAvailable`` where it has others."""
    try:
        return model.layers[-1].attention.get_submodule(name)
    except AttributeError as error:
        raise ModelNotAvailable(f"The layers of {type(model).__name__} have other names than this package knows "
                                f"({error}: {_place(error)}); install another version of it.") from error


def check_libraries() -> None:
    """``ModelNotAvailable`` if one of :data:`LIBRARIES` is outside the range that pyproject.toml declares: another
    version fails later, somewhere inside a network, or gives other features."""
    for name, supported in _supported().items():
        if (installed := _version(name)) and not supported.contains(installed, prereleases=True):
            raise ModelNotAvailable(f"{name} {installed} is installed, and ovdiff_lib works with {name}{supported}; "
                                    f"get such a version with `pip install \"{name}{supported}\"`.")


def resolve_device(profile: Profile) -> torch.device:
    """``models.device`` as a device that is here ("auto": a GPU if there is one); ``ProfileError`` if it is not."""
    name = profile.models.device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, ImportError):  # no device, or one that this torch or machine lacks
        raise ProfileError(f"models.device is {name!r}, which is not usable on this machine, where "
                           f"{torch.cuda.device_count()} CUDA GPUs are; use auto, cpu, cuda, cuda:0 or mps.") from None
    return device


def complete(model: torch.nn.Module, missing: Iterable[str] = ()) -> torch.nn.Module:
    """The loaded network in eval mode; ``ValueError`` if weights were ``missing`` in the file or are not finite."""
    if missing := sorted(missing):
        raise ValueError(f"the weights of {type(model).__name__} lack {len(missing)} tensors, {missing[0]} first")
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise ValueError(f"the weights of {type(model).__name__} hold values that are not finite, in {key} first")
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _loading(identifier: str, source: Path | str, download: bool) -> Iterator[None]:
    """The one place where errors of the model libraries become a sentence for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, *MISFITS) as error:
        if out_of_memory(error):  # nothing is wrong with the model
            raise
        said = str(error).strip().replace(":\n\t", ": ")  # as torch says which weights do not fit
        first_line = (said.splitlines() or [type(error).__name__])[0]
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
            remedy = f"fetch it with `{hub_command(source)}`, set models.download to true, or give a folder with it"
        if isinstance(error, MISFITS):
            reason = f"{reason}: {_place(error)}"
            remedy = "`pip check` tells whether the installed libraries fit each other; if they do, " + remedy
        text = f"The model {identifier!r} could not be loaded {looked} ({reason}); {remedy}."
        raise ModelNotAvailable(text) from error


def _place(error: BaseException) -> str:
    """Where an error comes from, as far as a user can tell it to somebody: type, module, line and the libraries."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    versions = ", ".join(f"{name} {_version(name) or 'not installed'} (range {supported})"
                         for name, supported in _supported().items())
    return f"{type(error).__name__} in {frame.f_globals['__name__']}, line {line}, with {versions}"


def _supported() -> dict[str, SpecifierSet]:
    """The range of each of :data:`LIBRARIES`; none where the package runs from its sources, without an installation."""
    declared = importlib.metadata.requires("ovdiff-lib") if _version("ovdiff-lib") else None
    required = map(Requirement, declared or ())
    return {name: one.specifier for one in required if (name := canonicalize_name(one.name)) in LIBRARIES}


def _version(distribution: str) -> str:
    """The installed version, "" if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def _from_disk_alone() -> Iterator[None]:
    """Loading without the hub, and without the libraries' bars over tensors, which are gone in a second."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as stack:
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        # Told to use local files only, the hub's library still fetches a list of programs that it may be called by.
        stack.callback(setattr, constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
        constants.HF_HUB_OFFLINE = True
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # which diffusers still gives
        yield
