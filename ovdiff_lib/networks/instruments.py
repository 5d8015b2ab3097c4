"""How a network is run: undisturbed by others, in batches, with the outputs of its layers kept."""

import contextlib
import math
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import OVDiffError

_lock = threading.RLock()

PRECISION = ((torch.backends.cuda.matmul, "ieee"), (torch.backends.cudnn.conv, "tf32"),
             (torch.backends.mkldnn.matmul, "ieee"), (torch.backends.mkldnn.conv, "ieee"))
"""How float32 is computed, as PyTorch ships it."""


@contextlib.contextmanager
def undisturbed(batch: str = "") -> Iterator[None]:
    """One thread at a time, with PyTorch as it comes: results depend on no other thread and on nothing the caller set.

    Whoever loads or runs a network does it in here (as a block or a decorator), because networks are shared by all
    objects of a process, and their hooks, schedulers and tokenizers change while they run. Inside there are no
    gradients, inference mode or autocast; defaults are float32, computed as such, and the CPU. Afterwards all is as
    before. May be nested; never ``yield`` from inside. Whether algorithms are deterministic stays the caller's choice.
    ``OVDiffError`` for a device that runs out of memory; it names the profile field ``batch``, if any, to be lowered.
    """
    with _lock, contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # its tensors could not be changed later, outside of it
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # the context costs time at every call into PyTorch
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        for backend, shipped in PRECISION:
            if (found := backend.fp32_precision) != shipped:
                stack.callback(setattr, backend, "fp32_precision", found)
                backend.fp32_precision = shipped
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, OVDiffError) or not out_of_memory(error):
                raise
            said = textwrap.shorten(str(error), 100, placeholder=" ...").rstrip(". ")
            lower = f"lower {batch}, or " if batch else ""
            raise OVDiffError(f"The device ran out of memory ({said}); {lower}use a device with more.") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether it says so: CUDA has a type for it, its libraries, Apple's GPUs and the CPU have words."""
    said = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
    return bool(said) or isinstance(error, torch.OutOfMemoryError)


def batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive batches of ``count`` items, ``size`` items each, the last perhaps fewer."""
    return ((start, min(count, start + size)) for start in range(0, count, size))


def normalised(images: np.ndarray, like: torch.Tensor, statistics: tuple[Sequence[float], Sequence[float]],
               size: tuple[int, int] | None = None) -> torch.Tensor:
    """Images u8 (n, H, W, 3) as pixels (n, 3, H, W), or resized (n, 3, *size): RGB in [0, 1] less the mean, over the
    deviation, on the device and in the dtype of ``like``."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(like.device, torch.float32) / 255
    if size is not None and pixels.shape[-2:] != tuple(size):
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in statistics)
    return ((pixels - mean) / deviation).to(like.dtype)


def gathered(extract: Callable[[Sequence[np.ndarray], np.ndarray], torch.Tensor], images: Sequence[np.ndarray],
             seeds: np.ndarray, shape: tuple[int, int, int], size: int, title: str) -> torch.Tensor:
    """Features f32 (n, *shape) that ``extract(images, seeds)`` makes of images u8 (H, W, 3) and a seed each, at most
    ``size`` at a time: those of one batch stay on the device, where matching needs them; of several each goes to its
    place on the CPU, where a support set has room once. ``OVDiffError`` of network ``title`` unless all are finite."""
    wrong = [i for i in images if i.ndim != 3 or i.shape[-1] != 3 or i.dtype != np.uint8]
    if wrong or len(images) != len(seeds):
        found = f"{wrong[0].dtype} {wrong[0].shape}" if wrong else f"{len(images)} images"
        raise ValueError(f"expected u8 (H, W, 3) images and as many seeds, got {found} and {len(seeds)} seeds")
    if 0 < len(images) <= size:
        features = extract(images, seeds).float().contiguous()
    else:
        features = torch.empty(len(images), *shape, dtype=torch.float32, device="cpu")
        for start, stop in batches(len(images), size):
            features[start:stop] = extract(images[start:stop], seeds[start:stop])
    # NaN and infinity show in the sum; looking at each value, many times as long, is left to sums that overflow.
    if not (features.sum().isfinite() or features.isfinite().all()):
        raise OVDiffError(f"{title} gave features that are not finite; use models.dtype float32 or check its weights.")
    return features


def attention_grid(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a layer with ``tokens`` positions in a UNet whose latents are ``latent`` = (h, w): each
    down-sampling is a stride-2 convolution, which rounds up."""
    h, w = latent
    while h * w > tokens and (h, w) != (1, 1):
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    if h * w != tokens:
        raise ValueError(f"{tokens} attention positions do not come from halving latents of {latent[0]} x {latent[1]}")
    return h, w


class _Enough(Exception):
    """Ends a forward pass whose remaining layers nobody reads."""


@contextlib.contextmanager
def captured(modules: dict[str, torch.nn.Module], stop: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """What each module put out last inside the ``with`` block, by name. With ``stop`` the block ends as soon as all of
    them have put something out: layers behind the last are not run."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        outputs[name] = output
        if stop and len(outputs) == len(modules):
            raise _Enough

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
            stack.callback(handle.remove)
        stack.enter_context(contextlib.suppress(_Enough))
        yield outputs
