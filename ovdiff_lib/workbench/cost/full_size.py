"""Networks of the published sizes with random weights: what they compute takes as long as with the published ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ovdiff_lib.workbench.cost.architectures import CLIP_B16, CLIP_L14_TEXT, SD_UNET, SD_VAE

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer


BOS, EOS = "<|startoftext|>", "<|endoftext|>"

SHARPER = 4.0
"""Matrices times this: a fresh CLIP takes all texts for nearly alike, so that a wrong embedding could not be told from a right one."""


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with its 49,408 tokens, from the file that open_clip ships; reads 77 tokens."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    special = {source.sot_token_id: BOS, source.eot_token_id: EOS}
    vocabulary = {special.get(number, token): number for token, number in source.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks), model_max_length=77)


def stable_diffusion(device: torch.device) -> StableDiffusionPipeline:
    """Stable Diffusion v1.5 in float32, 4.3 GB, with the sampler of :func:`~ovdiff_lib.networks.loading.load_diffusion`."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = {"unet": UNet2DConditionModel(**SD_UNET), "vae": AutoencoderKL(**SD_VAE),
                    "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L14_TEXT))}
    for network in networks.values():
        network.eval().requires_grad_(False)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, algorithm_type="dpmsolver++", solver_order=2)
    pipe = StableDiffusionPipeline(**networks, tokenizer=clip_tokenizer(), scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def clip_text(device: torch.device) -> tuple[CLIPModel, CLIPTokenizer]:
    """A ``CLIPModel`` with the text tower of ViT-B/16 (512 wide, 12 layers, 8 heads); its image tower, which is not run, has one layer."""
    from transformers import CLIPConfig, CLIPModel

    settings = {**CLIP_B16, "vision_config": {**CLIP_B16["vision_config"], "num_hidden_layers": 1}}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(**settings)).eval().requires_grad_(False)
        for parameter in clip.text_model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(SHARPER)
    return clip.to(device), clip_tokenizer()
