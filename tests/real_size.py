"""The published networks from their configurations, with random weights.

``narrow=True`` keeps Stable Diffusion v1.5's layout (the same blocks, layers, heads and names) and makes it thin, for tests that run it.
"""

import json

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

from ovdiff_lib.workbench.cost.architectures import CLIP_B16, CLIP_L14_TEXT, SD_UNET, SD_VAE, VIT_B, clip_tokenizer

SD_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None}
"""The published file. It names no timestep spacing, so another scheduler made from it has its own; one that diffusers wrote does."""

NARROW = {
    "unet": {"block_out_channels": (16, 32, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8},
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}}

VIT_L16 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224,
           "patch_size": 16}

MAKE = {
    "unet": lambda **thin: UNet2DConditionModel(**SD_UNET | thin).eval(),
    "vae": lambda **thin: AutoencoderKL(**SD_VAE | thin).eval(),
    "text_encoder": lambda **thin: CLIPTextModel(CLIPTextConfig(**CLIP_L14_TEXT | thin)).eval(),  # of CLIP ViT-L/14
    "clip": lambda: CLIPModel(CLIPConfig(**CLIP_B16)).eval(),
    "dino": lambda: ViTModel(ViTConfig(**VIT_B, patch_size=8), add_pooling_layer=False).eval(),
    "mae": lambda: ViTMAEModel(ViTMAEConfig(**VIT_L16)).eval()}
"""Stable Diffusion v1.5's three networks, CLIP ViT-B/16, DINO ViT-B/8, MAE ViT-L/16."""


def make_pipeline(narrow: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion v1.5 as it is published: real vocabulary, PNDM, no safety checker."""
    with torch.device("cpu"):  # its table of noise levels is no weight
        scheduler = PNDMScheduler.from_config(SD_SCHEDULER)
    networks = {name: MAKE[name](**(thin if narrow else {})) for name, thin in NARROW.items()}
    return StableDiffusionPipeline(**networks, tokenizer=clip_tokenizer(), scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)


def sharpen(network: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Matrices and kernels times ``factor``: fresh text towers and ViTs treat all inputs alike, so that no test could fail."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(factor)
    return network


def save_pipeline(pipe, folder) -> None:
    """Write the pipeline with its scheduler's file as it is published."""
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))
