"""CLIP of the open_clip library as a feature extractor (Table 2): the keys or the tokens of one of its layers.

The same network as in :mod:`~ovdiff_lib.features.clip`, run by the other library. Given a folder of transformers'
CLIPModel, its weights are converted, and both libraries give the same features at any input size.
"""

from __future__ import annotations

import difflib
import functools
import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features.clip import NORMALISATIONS, clip_layer
from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.checkpoints import fill, renamed
from ovdiff_lib.networks.identity import open_clip_weights, resolve_model
from ovdiff_lib.networks.loading import check_libraries, complete, load_network
from ovdiff_lib.profiles.schema import Features, Profile

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
    from transformers import CLIPModel

NAMES = {
    "vision_model.": "", "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "encoder.layers.": "transformer.resblocks.", ".layer_norm": ".ln_",
    ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", ".self_attn.": ".attn.",
}
"""The names of transformers and those of open_clip; queries, keys and values are fused."""


class OpenClipExtractor(ViTExtractor):
    """``kind``, layer, short side and pixel statistics as :class:`~ovdiff_lib.features.clip.ClipExtractor` has them."""

    title = "CLIP of open_clip"

    def __init__(self, visual: VisionTransformer, settings: Features, kind: str) -> None:
        """Raises ``ProfileError`` for a layer the model does not have."""
        patch, channels = visual.patch_size[0], visual.conv1.out_channels
        super().__init__(f"open-clip-{kind}", visual, settings, settings.clip_input_size, patch, channels)
        layer = clip_layer(visual.transformer.resblocks, settings)
        self.kind, self.attention = kind, layer.attn
        # Attention is one fused operation and no module puts the keys out: they are projected again from its input.
        self.source = {"keys": layer.ln_1, "tokens": layer}[kind]
        self.mean, self.std = NORMALISATIONS[settings.clip_normalisation]

    @classmethod
    def build(cls, profile: Profile, kind: str) -> OpenClipExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_open_clip(profile), profile.features, kind)

    def run(self, pixels: torch.Tensor) -> None:
        """The tower's position embeddings have the length of one input size: those of this size take their place."""
        grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        positions = resize_positions(self.model.positional_embedding, grid)
        torch.func.functional_call(self.model, {"positional_embedding": positions}, (pixels,))

    def features_of(self, output: torch.Tensor) -> torch.Tensor:
        """Keys: rows D to 2 D of the fused projection, heads side by side."""
        if self.kind == "tokens":
            return output
        weight, bias = self.attention.in_proj_weight.chunk(3)[1], self.attention.in_proj_bias.chunk(3)[1]
        return F.linear(output, weight, bias)


def resize_positions(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1 + side^2, D), class token first, for a grid of patches (h, w): (1 + hw, D).

    Bicubic without antialiasing, as transformers does it; open_clip itself, when weights are loaded, antialiases.
    """
    side = math.isqrt(len(positions) - 1)
    if (side, side) == tuple(grid):
        return positions
    patches = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], patches[0].flatten(1).T])


def load_open_clip(profile: Profile) -> VisionTransformer:
    """The image tower of ``models.open_clip``, eval mode, on the device.

    An architecture of open_clip takes the weights of ``models.open_clip_pretrained``, a tag or a file. With a tag, the
    activation is that the weights were trained with, QuickGELU or GELU; with a file, it is that of the named
    architecture ("...-quickgelu" has QuickGELU). Raises ``ModelNotAvailable`` and ``ProfileError``.
    """
    name, weights = profile.models.open_clip, profile.models.open_clip_pretrained
    if not name or isinstance(resolve_model(name), Path):  # the first is refused there
        return load_network(profile, "open_clip", _convert)
    check_libraries()
    trained = _check_names(name, weights)
    file = _weights_file(name, weights, trained, profile.models.download) if trained else weights
    quick = bool(trained.get("quick_gelu"))
    build = functools.partial(_create, name, quick)
    return load_network(profile, "open_clip", build, source=file, variant=f"{name} {quick}")


def _convert(source: Path, device: torch.device, dtype: torch.dtype, options: dict) -> VisionTransformer:
    from transformers import CLIPModel

    loaded = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    return from_transformers(complete("CLIP", loaded)).to(device, dtype)


def _create(architecture: str, quick_gelu: bool, source: Path, device: torch.device, dtype: torch.dtype,
            _options: dict) -> VisionTransformer:
    import open_clip

    try:
        # Some of open_clip's failures only log and leave random weights, hence require_pretrained; a wrong activation
        # only warns.
        model = open_clip.create_model(architecture, pretrained=str(source), force_quick_gelu=quick_gelu,
                                       require_pretrained=True, pretrained_text=False)
    except (pickle.UnpicklingError, EOFError, KeyError, StopIteration) as error:
        raise ValueError("it is damaged, or not a checkpoint of open_clip") from error
    return complete("open_clip", (model.visual, {"missing_keys": []})).to(device, dtype)


def _check_names(architecture: str, weights: str) -> dict:
    """What open_clip knows of the weights' tag, {} for a file. ``ProfileError`` for a wrong name."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    vision = (open_clip.get_model_config(architecture) or {}).get("vision_cfg", {})
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision or vision.get("attentional_pool"):
        known = [name for name in open_clip.list_models() if name.startswith("ViT")]
        near = " or ".join(difflib.get_close_matches(architecture, known, 3)) or "ViT-B-16-quickgelu"
        raise ProfileError(f"models.open_clip is {architecture!r}, neither a folder nor an architecture of open_clip "
                           f"whose image tower is a plain ViT; did you mean {near}?")
    trained = get_pretrained_cfg(architecture, weights) if weights else {}
    if not trained and not (weights and Path(weights).expanduser().is_file()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none are known"
        raise ProfileError(f"models.open_clip_pretrained is {weights!r}; for {architecture} give a weights file or a "
                           f"tag ({tags}).")
    return trained


def _weights_file(architecture: str, tag: str, trained: dict, download: bool) -> str:
    """A tag's weights on this machine, or from the hub. ``ModelNotAvailable`` if they cannot be had."""
    import open_clip

    file, _, get = open_clip_weights(architecture, tag)
    if file is not None:
        return str(file)
    remedy = f"fetch it with `{get}`, or set models.download to true"
    if download:
        try:
            return open_clip.download_pretrained(trained)
        except OSError as error:
            remedy = f"the download failed ({str(error).splitlines()[0][:160]}); check the network"
    raise ModelNotAvailable(f"The weights {tag!r} of open_clip's {architecture} are not on this machine; {remedy}.")


def from_transformers(model: CLIPModel) -> VisionTransformer:
    """open_clip's image tower of the same sizes and weights, f32. ``ValueError`` if it lacks the activation."""
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

    config, state = model.config.vision_config, model.state_dict()
    activations = {"quick_gelu": QuickGELU, "gelu": torch.nn.GELU}
    if config.hidden_act not in activations:
        raise ValueError(f"its activation is {config.hidden_act}; open_clip has {' and '.join(activations)}")
    visual = VisionTransformer(
        image_size=config.image_size, patch_size=config.patch_size, width=config.hidden_size,
        layers=config.num_hidden_layers, heads=config.num_attention_heads, output_dim=model.config.projection_dim,
        mlp_ratio=config.intermediate_size / config.hidden_size, act_layer=activations[config.hidden_act],
        norm_layer=functools.partial(LayerNorm, eps=config.layer_norm_eps))
    given = renamed({name: value for name, value in state.items() if name.startswith("vision_model.")}, NAMES)
    for query in [name for name in given if ".q_proj." in name]:
        fused = torch.cat([given.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
        given[query.replace(".q_proj.", ".in_proj_")] = fused
    return fill("CLIP", visual, given | {"proj": state["visual_projection.weight"].T})
