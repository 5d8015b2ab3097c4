"""MAE as a feature extractor (Table 2): the keys of its last layer.

Two kinds of weights run through the same code: a folder or hub id of ``ViTMAEModel``, and a ``.pth`` file of the
original code (names of timm's ViT), which is how the checkpoint pre-trained at 448 pixels, "long_seq_mae", is published
(Hu et al., 2022).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.checkpoints import fill, read_checkpoint, renamed
from ovdiff_lib.networks.loading import complete, last_attention, load_network
from ovdiff_lib.profiles.schema import Features, Profile

if TYPE_CHECKING:
    from transformers import ViTMAEModel

NOT_ENCODER = ("decoder_", "mask_token")
"""How tensors begin that only pre-training needs."""

HEAD_WIDTH = {1280: 80}
"""Channels of an attention head by the model's width, where it is not 64 (ViT-H): the weights do not tell."""

NAMES = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm.": "layernorm.", "blocks.": "layers.",
    ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", ".attn.": ".attention.",
    ".attention.proj.": ".attention.o_proj.", ".q_bias": ".q_proj.bias", ".v_bias": ".v_proj.bias",
}
"""timm's names and those of transformers; the fused qkv is cut apart."""


class MaeExtractor(ViTExtractor):
    """Output of ``k_proj`` of the last layer of transformers' ``ViTMAEModel``, heads side by side, no patch hidden.

    The short side is ``features.mae_input_size``.
    """

    title = "MAE"

    def __init__(self, model: ViTMAEModel, settings: Features) -> None:
        """Raises ``ValueError`` if the model would hide patches."""
        config = model.config
        if config.mask_ratio != 0:
            raise ValueError(f"the model hides {config.mask_ratio} of its patches; load it with mask_ratio 0")
        super().__init__("mae", model, settings, settings.mae_input_size, config.patch_size, config.hidden_size)
        # The key projection reads the layer-normed stream (pre-norm), so its output needs no further care.
        self.source = last_attention(model).k_proj

    @classmethod
    def build(cls, profile: Profile) -> MaeExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_mae(profile), profile.features)

    def run(self, pixels: torch.Tensor) -> None:
        """Patches are sorted by their "noise" even if none is hidden: rising noise keeps them row by row."""
        count = pixels.shape[-2] // self.patch * (pixels.shape[-1] // self.patch)
        noise = torch.arange(count, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
        self.model(pixels, noise=noise, interpolate_pos_encoding=True)


def load_mae(profile: Profile) -> ViTMAEModel:
    """The encoder of ``models.mae``, mask ratio 0, eval mode. Raises ``ModelNotAvailable`` and ``ProfileError``."""
    return load_network(profile, "mae", _build)


def _build(source: Path | str, device: torch.device, dtype: torch.dtype, options: dict) -> ViTMAEModel:
    from transformers import ViTMAEModel

    if isinstance(source, Path) and source.is_file():
        return from_timm(read_checkpoint(source)).to(device, dtype)
    loaded = ViTMAEModel.from_pretrained(source, dtype=dtype, mask_ratio=0.0, output_loading_info=True, **options)
    return complete("MAE", loaded).to(device)


def from_timm(state: dict[str, torch.Tensor]) -> ViTMAEModel:
    """``ViTMAEModel`` f32 with the weights of a timm ViT: fused qkv, its bias whole, without the keys', or absent.

    The decoder is left out. Sizes are read from the tensors. ``ValueError`` for what is not such an encoder.
    """
    from transformers import ViTMAEConfig, ViTMAEModel

    state = {name: value.float() for name, value in state.items() if not name.startswith(NOT_ENCODER)}
    if not {"pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= state.keys():
        raise ValueError("it lacks the position embeddings, patch embeddings or blocks of a ViT")
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    positions, head = state["pos_embed"].shape[1], HEAD_WIDTH.get(width, 64)
    side = math.isqrt(positions - 1)
    if side**2 + 1 != positions or width % head:
        raise ValueError(f"its {positions} positions are not a square and a class token, or its width {width} is not a "
                         f"multiple of {head}")
    for name in [name for name in state if ".qkv." in name]:
        for part, third in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{part}_proj.")] = third.clone()
    for name in [name for name in state if name.endswith(".q_bias")]:  # beside it one of values, and of keys none
        state[name.replace(".q_bias", ".k_proj.bias")] = torch.zeros(width, device="cpu")
    config = ViTMAEConfig(
        hidden_size=width, num_attention_heads=width // head, image_size=side * patch, patch_size=patch,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0], layer_norm_eps=1e-6, mask_ratio=0.0,
        qkv_bias=any(name.endswith(".k_proj.bias") for name in state))
    with torch.device("meta"):
        model = ViTMAEModel(config)
    return fill("MAE", model, renamed(state, NAMES))
