"""CLIP of the open_clip library as a feature extractor (Table 2): the keys or the tokens of one of its layers.

The same network as in :mod:`~ovdiff_lib.features.clip`, run by the other library. Given a folder of transformers'
CLIPModel, its weights are converted, and both libraries give the same features at any input size.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ovdiff_lib.errors import ModelNotAvailable, ProfileError
from ovdiff_lib.features.clip import clip_layer, clip_statistics
from ovdiff_lib.features.vit import ViTExtractor
from ovdiff_lib.networks.identity import resolve_model
from ovdiff_lib.networks.loading import check_libraries, complete, load_network

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
    from transformers import CLIPModel

    from ovdiff_lib.profiles.schema import Features, Profile

DEFAULT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Files open_clip looks for in a hub repository that a tag names without a file."""


class OpenClipExtractor(ViTExtractor):
    """``kind`` "keys": the key third of the fused projection of layer ``features.clip_layer``; "tokens": output of that
    whole layer.

    The short side is ``features.clip_input_size``, the pixel statistics those of ``features.clip_normalisation``.
    """

    title = "CLIP of open_clip"

    def __init__(self, visual: VisionTransformer, settings: Features, kind: str) -> None:
        """Raises ``ProfileError`` for a layer the model does not have."""
        super().__init__(f"open-clip-{kind}", visual, settings, "clip_input_size", visual.patch_size[0], visual.conv1.out_channels)
        layer = clip_layer(visual.transformer.resblocks, settings)
        self.kind, self.attention = kind, layer.attn
        # Attention runs as one fused operation, so no module puts the keys out: they are projected again from what it is given.
        self.source = {"keys": layer.ln_1, "tokens": layer}[kind]
        self.mean, self.std = clip_statistics(settings)

    @classmethod
    def build(cls, profile: Profile, kind: str) -> OpenClipExtractor:
        """The extractor of a profile. Raises ``ModelNotAvailable`` and ``ProfileError``."""
        return cls(load_open_clip(profile), profile.features, kind)

    def run(self, pixels: torch.Tensor) -> None:
        """Through the image tower, whose position embeddings have the length of one input size: those of this size take
        their place."""
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

    Bicubic without antialiasing, as transformers does it, so that both libraries agree; open_clip itself, which resizes
    only when weights are loaded, uses antialiasing.
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
    if not name:
        raise ProfileError(f"models.open_clip is not set in the profile {profile.name!r}; set it to an architecture, for example "
                           "ViT-B-16-quickgelu with models.open_clip_pretrained openai, or to a folder of transformers' CLIPModel.")
    if isinstance(resolve_model(name), Path):
        return load_network(profile, "open_clip", _convert)
    check_libraries()
    trained = _check_names(name, weights)
    file = _weights_file(name, weights, trained, profile.models.download) if trained else weights
    build = functools.partial(_create, architecture=name, quick_gelu=bool(trained.get("quick_gelu")))
    return load_network(profile, "open_clip", build, source=str(file), variant=f"{name} {trained.get('quick_gelu')}")


def _convert(source: Path, device: torch.device, dtype: torch.dtype, options: dict) -> VisionTransformer:
    from transformers import CLIPModel

    model = complete("CLIP", CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options))
    return from_transformers(model).eval().requires_grad_(False).to(device, dtype)


def _create(source: Path, device: torch.device, dtype: torch.dtype, _options: dict, *, architecture: str,
            quick_gelu: bool) -> VisionTransformer:
    import open_clip

    try:
        # Some of open_clip's failures only log and leave random weights, hence require_pretrained; a wrong activation only warns.
        model = open_clip.create_model(architecture, pretrained=str(source), force_quick_gelu=quick_gelu, require_pretrained=True,
                                       pretrained_text=False)
    except (pickle.UnpicklingError, EOFError, KeyError, StopIteration) as error:
        raise ValueError("it is damaged, or not a checkpoint of open_clip") from error
    return complete("open_clip", (model.visual, {"missing_keys": []})).to(device, dtype)


def _check_names(architecture: str, weights: str) -> dict:
    """What open_clip knows of the weights' tag, {} for a file. ``ProfileError`` for a wrong name or a tower that is no
    plain ViT."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    known = open_clip.list_models()
    if architecture not in known:
        near = " or ".join(difflib.get_close_matches(architecture, known, 3)) or "for example ViT-B-16-quickgelu"
        raise ProfileError(f"models.open_clip is {architecture!r}, neither a folder nor an architecture of open_clip; did you mean {near}?")
    vision = open_clip.get_model_config(architecture)["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision or vision.get("attentional_pool"):
        raise ProfileError(f"models.open_clip is {architecture!r}, whose image tower is not a plain ViT; name one that is, for example "
                           "ViT-B-16-quickgelu.")
    trained = get_pretrained_cfg(architecture, weights) if weights else {}
    if not trained and not (weights and Path(weights).expanduser().is_file()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none are known"
        raise ProfileError(f"models.open_clip_pretrained is {weights!r}; for {architecture} give a weights file or a tag ({tags}).")
    return trained


def _weights_file(architecture: str, tag: str, trained: dict, download: bool) -> str:
    """Path of a tag's weights in the caches that open_clip downloads to, or from there. ``ModelNotAvailable`` if they
    cannot be had."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    repository, name = os.path.split(trained.get("hf_hub", ""))
    if repository:
        names = [Path(name).with_suffix(".safetensors").name, name] if name else DEFAULT_NAMES
        found = [try_to_load_from_cache(repository, name) for name in names]
        remedy = f"fetch it with `hf download {repository}`"
    else:
        found = [str(Path("~/.cache/clip").expanduser() / os.path.basename(trained["url"]))]
        remedy = f"fetch {trained['url']} and name the file in models.open_clip_pretrained"
    for path in found:
        if isinstance(path, str) and os.path.isfile(path):
            return path
    if download:
        try:
            return open_clip.download_pretrained(trained)
        except (OSError, RuntimeError, ValueError) as error:
            remedy = f"the download failed ({str(error).splitlines()[0][:160]}); check the network, or {remedy}"
    raise ModelNotAvailable(f"The weights {tag!r} of open_clip's {architecture} are not on this machine; {remedy}"
                            f"{'' if download else ', or set models.download to true'}.")


def from_transformers(model: CLIPModel) -> VisionTransformer:
    """open_clip's image tower of the same sizes with the same weights, f32. ``ValueError`` for an activation open_clip
    does not have."""
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

    config, state = model.config.vision_config, model.state_dict()
    activations = {"quick_gelu": QuickGELU, "gelu": torch.nn.GELU}
    if config.hidden_act not in activations:
        raise ValueError(f"its activation is {config.hidden_act}; open_clip has {' and '.join(activations)}")
    visual = VisionTransformer(
        image_size=config.image_size, patch_size=config.patch_size, width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, mlp_ratio=config.intermediate_size / config.hidden_size, output_dim=model.config.projection_dim,
        act_layer=activations[config.hidden_act], norm_layer=functools.partial(LayerNorm, eps=config.layer_norm_eps))
    tower = {name.removeprefix("vision_model."): value for name, value in state.items() if name.startswith("vision_model.")}
    given = {"class_embedding": tower["embeddings.class_embedding"], "conv1.weight": tower["embeddings.patch_embedding.weight"],
             "positional_embedding": tower["embeddings.position_embedding.weight"], "proj": state["visual_projection.weight"].T}
    pairs = [("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")]
    for i in range(config.num_hidden_layers):
        block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        pairs += [(f"{block}.ln_1", f"{layer}.layer_norm1"), (f"{block}.ln_2", f"{layer}.layer_norm2"),
                  (f"{block}.mlp.c_fc", f"{layer}.mlp.fc1"), (f"{block}.mlp.c_proj", f"{layer}.mlp.fc2"),
                  (f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj")]
        for part in ("weight", "bias"):
            given[f"{block}.attn.in_proj_{part}"] = torch.cat([tower[f"{layer}.self_attn.{x}_proj.{part}"] for x in "qkv"])
    given |= {f"{new}.{part}": tower[f"{old}.{part}"] for new, old in pairs for part in ("weight", "bias")}
    visual.load_state_dict(given)
    return visual
