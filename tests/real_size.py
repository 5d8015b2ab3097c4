"""The published networks from their configurations, with random weights, and CLIP's vocabulary from open_clip.

``narrow=True`` keeps Stable Diffusion v1.5's layout (the same blocks, layers, heads and names) and makes it thin, for tests that run it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ovdiff_lib.workbench.cost.architectures import CLIP_B16, CLIP_L14_TEXT, SD_UNET, SD_VAE, VIT_B, clip_tokenizer

SD_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}
"""The published file. It names no timestep spacing, so another scheduler made from it has its own; one that diffusers wrote does."""
NARROW = {
    "unet": {"block_out_channels": (16, 32, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8},
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224}


def make_unet(narrow: bool = False):
    """The UNet of Stable Diffusion v1.5."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**SD_UNET | (NARROW["unet"] if narrow else {})).eval()


def make_vae(narrow: bool = False):
    """The autoencoder of Stable Diffusion v1.5."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**SD_VAE | (NARROW["vae"] if narrow else {})).eval()


def make_text_encoder(narrow: bool = False):
    """The text tower of CLIP ViT-L/14, which Stable Diffusion v1.5 uses."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**CLIP_L14_TEXT | (NARROW["text"] if narrow else {}))).eval()


def make_pipeline(narrow: bool = False):
    """A StableDiffusionPipeline as v1.5 is published: real vocabulary, PNDM, no safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with torch.device("cpu"):  # its table of noise levels is no weight
        scheduler = PNDMScheduler.from_config(SD_SCHEDULER)
    return StableDiffusionPipeline(
        vae=make_vae(narrow), text_encoder=make_text_encoder(narrow), tokenizer=clip_tokenizer(), unet=make_unet(narrow),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def make_clip():
    """CLIP ViT-B/16."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**CLIP_B16)).eval()


def make_dino():
    """DINO ViT-B/8."""
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**VIT_B, patch_size=8), add_pooling_layer=False).eval()


def make_mae():
    """MAE ViT-L/16, trained at 224 pixels."""
    from transformers import ViTMAEConfig, ViTMAEModel

    return ViTMAEModel(ViTMAEConfig(**VIT_L, patch_size=16)).eval()


def sharpen(network: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Matrices and kernels times ``factor``: fresh text towers and ViTs treat all inputs alike, so that no test could fail."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(factor)
    return network


def save_pipeline(pipe, folder: Path) -> Path:
    """Write the pipeline, its scheduler's file as it is published, and return ``folder``."""
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))
    return folder
