"""MAE as a feature extractor (Table 2): the keys of its last layer.

Two kinds of weights run through the same code: a folder or hub id of ``ViTMAEModel``, and a ``.pth`` file of the
original code (names of timm's ViT), which is how the checkpoint pre-trained at 448 pixels, "long_seq_mae", is published
(Hu et al., 2022).
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.loading import complete, last_attention, load_network

if TYPE_CHECKING:
    from transformers import ViTMAEModel

    from ovdiff_lib.profiles.schema import Features, Profile

NOT_ENCODER = ("decoder_", "mask_token")
"""How tensors begin that only pre-training needs."""

HEAD_WIDTH = {1280: 80}
"""Channels of an attention head by the width of the model, where it is not 64: the weights do not tell. 1280 is
ViT-H."""


class MaeExtractor(ViTExtractor):
    """Output of ``k_proj`` of the last layer, heads side by side, no patch hidden; the short side is
    ``features.mae_input_size``."""

    title = "MAE"

    def __init__(self, model: ViTMAEModel, settings: Features) -> None:
        """Raises ``ValueError`` if the model would hide patches."""
        if model.config.mask_ratio != 0:
            raise ValueError(f"the model hides a share of {model.config.mask_ratio} of the patches; load it with mask_ratio 0")
        super().__init__("mae", model, settings, "mae_input_size", model.config.patch_size, model.config.hidden_size)
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = last_attention(model).k_proj

    @classmethod
    def build(cls, profile: Profile) -> MaeExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_mae(profile), profile.features)

    def run(self, pixels: torch.Tensor) -> None:
        """Through the encoder. Patches are sorted by their "noise" even if none is hidden: rising noise keeps them row
        by row."""
        count = pixels.shape[-2] // self.patch * (pixels.shape[-1] // self.patch)
        noise = torch.arange(count, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
        self.model(pixels, noise=noise, interpolate_pos_encoding=True)


def load_mae(profile: Profile) -> ViTMAEModel:
    """The encoder of ``profile.models.mae`` with mask ratio 0, eval mode, on the device. Raises ``ModelNotAvailable``,
    ``ProfileError``."""
    return load_network(profile, "mae", _build)


def _build(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> ViTMAEModel:
    from transformers import ViTMAEModel

    if isinstance(source, Path) and source.is_file():
        return complete("MAE", (from_timm(read_checkpoint(source)), {"missing_keys": []})).to(device, dtype)
    loaded = ViTMAEModel.from_pretrained(source, dtype=dtype, mask_ratio=0.0, output_loading_info=True, **options)
    return complete("MAE", loaded).to(device)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of the original code, under "model" or bare. ``ValueError`` if it holds something else.

    Only tensors and plain containers are unpickled, and the training options that the original code stores beside the
    weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, EOFError, KeyError, OSError, RuntimeError) as error:  # torch has no one error for damaged files
        raise ValueError("it is damaged, or not a checkpoint of tensors alone") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it holds no table of tensors, neither at its top nor under 'model'")
    return state


def from_timm(state: dict[str, torch.Tensor]) -> ViTMAEModel:
    """``ViTMAEModel`` f32 of any size with the weights of a timm ViT: fused qkv, its bias whole, without the keys'
    part, or absent.

    The decoder is left out. Sizes are read from the tensors. ``ValueError`` for what is not such an encoder.
    """
    from transformers import ViTMAEConfig, ViTMAEModel

    state = {name: value.float() for name, value in state.items() if not name.startswith(NOT_ENCODER)}
    if not {"pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= state.keys():
        raise ValueError("it lacks the position embeddings, patch embeddings or blocks of a ViT")
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    side, head = math.isqrt(state["pos_embed"].shape[1] - 1), HEAD_WIDTH.get(width, 64)
    if side**2 + 1 != state["pos_embed"].shape[1] or width % head:
        raise ValueError(f"its {state['pos_embed'].shape[1]} positions are not a square and a class token, or its width {width} is not "
                         f"a multiple of {head}")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    config = ViTMAEConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // head, image_size=side * patch, patch_size=patch,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0], layer_norm_eps=1e-6, mask_ratio=0.0,
        qkv_bias=any(name.endswith(("attn.qkv.bias", "attn.q_bias")) for name in state))
    with torch.device("meta"):
        model = ViTMAEModel(config)
    wanted, given = model.state_dict().keys(), {new: value for name, value in state.items() for new, value in _renamed(name, value)}
    for name in [name for name in given if name.endswith("q_proj.bias")]:  # beside the separate biases of queries and values: none
        given.setdefault(name.replace("q_proj", "k_proj"), torch.zeros(width, dtype=torch.float32, device="cpu"))
    for names, wrong in ((wanted - given.keys(), "lacks"), (given.keys() - wanted, "holds, beyond those of a ViT,")):
        if names:
            raise ValueError(f"it {wrong} {len(names)} tensors, {min(names)} first")
    model.load_state_dict(given, assign=True)
    return model


NAMES = (
    (r"cls_token", r"embeddings.cls_token"), (r"pos_embed", r"embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"), (r"norm\.(\w+)", r"layernorm.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"layers.\1.layernorm_before.\2"), (r"blocks\.(\d+)\.norm2\.(\w+)", r"layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"layers.\1.attention.o_proj.\2"), (r"blocks\.(\d+)\.mlp\.(fc\d\.\w+)", r"layers.\1.mlp.\2"),
    (r"blocks\.(\d+)\.attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
)
"""timm's names and those of transformers; the fused qkv is cut apart in :func:`_renamed`."""


def _renamed(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if fused := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
        thirds = zip("qkv", value.chunk(3), strict=True)
        return [(f"layers.{fused[1]}.attention.{part}_proj.{fused[2]}", third.clone()) for part, third in thirds]
    for pattern, new in NAMES:
        if match := re.fullmatch(pattern, name):
            return [(match.expand(new), value)]
    return [(name, value)]
