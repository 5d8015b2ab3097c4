"""Checkpoint files that no ``from_pretrained`` reads, and weights into a network: what is wrong is one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ovdiff_lib.networks.loading import complete


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The table of weights in a file of ``torch.save``, under "model" or bare. ``ValueError`` if it holds no such.

    Only tensors, arrays and plain containers are unpickled, and the training options that MAE's files hold, so that
    nothing is run that a pickle may ask for.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_globals()]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch has no one error for damaged files: a wrong byte may lead anywhere
        raise ValueError("it is damaged, or not a checkpoint of tensors alone") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    kinds = (torch.Tensor, np.ndarray, np.generic)
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, kinds) for value in weights.values()):
        raise ValueError("it holds no table of tensors, neither at its top nor under 'model'")
    return {name: torch.as_tensor(value, device="cpu") for name, value in weights.items()}


def fill(name: str, model: torch.nn.Module, weights: dict[str, torch.Tensor], exact: bool = True) -> torch.nn.Module:
    """``model`` with these weights, in eval mode. ``ValueError`` names one that is missing, of another shape, not
    finite or, with ``exact``, too much."""
    own = model.state_dict()
    if beyond := sorted(weights.keys() - own.keys()) if exact else []:
        raise ValueError(f"the {name} weights hold {len(beyond)} tensors too many, {beyond[0]} first")
    for key in own.keys() & weights.keys():
        found, wanted = list(weights[key].shape), list(own[key].shape)
        if found != wanted:
            raise ValueError(f"{key} of the {name} weights is of shape {found}, not {wanted}")
    model.load_state_dict(weights, strict=False, assign=any(value.is_meta for value in own.values()))
    # Counters of batches are statistics of training that nothing reads.
    lacking = [key for key in own.keys() - weights.keys() if not key.endswith("num_batches_tracked")]
    return complete(name, (model, {"missing_keys": lacking}))


def renamed(weights: dict[str, torch.Tensor], table: dict[str, str]) -> dict[str, torch.Tensor]:
    """The weights under names in which each key of ``table`` is replaced by its value, one after the other."""
    for old, new in table.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights


def _numpy_globals() -> list:
    """What unpickling plain arrays takes: detectron2 writes some checkpoints with arrays instead of tensors."""
    known: list = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?"))]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2's name, and that in published files
        known += [(getattr(np._core.multiarray, name), f"{module}.{name}") for name in ("_reconstruct", "scalar")]
    return known
