"""Networks of the published sizes with random weights: the weights are not needed to time them, nor to test."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# The classes' own defaults are the published sizes, but for these.
SD_UNET = {"sample_size": 64, "cross_attention_dim": 768}
SD_VAE = {"sample_size": 512, "layers_per_block": 2, "block_out_channels": (128, 256, 512, 512),
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CLIP_L14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768,
                 "eos_token_id": 2}
"""The text tower that Stable Diffusion v1.5 reads its prompts with."""

CLIP_B16 = {"text_config": {"eos_token_id": 2}, "vision_config": {"patch_size": 16}}


def stable_diffusion(**thinner: dict[str, Any]) -> StableDiffusionPipeline:
    """Stable Diffusion v1.5 with random weights, 4.3 GB in float32, and the sampler of ``load_diffusion``. ``thinner``:
    fields of a network's configuration to replace (``unet={"block_out_channels": (16, 32, 64, 64)}``)."""
    unet, vae, text = (thinner.get(part, {}) for part in ("unet", "vae", "text_encoder"))
    with torch.device("cpu"):  # its table of noise levels is no weight
        scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                steps_offset=1, algorithm_type="dpmsolver++", solver_order=2)
    pipe = StableDiffusionPipeline(
        AutoencoderKL(**SD_VAE | vae).eval(), CLIPTextModel(CLIPTextConfig(**CLIP_L14_TEXT | text)).eval(),
        clip_tokenizer(), UNet2DConditionModel(**SD_UNET | unet).eval(), scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with its 49,408 tokens, from the file that open_clip ships; reads 77 tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    source = SimpleTokenizer()
    special = {source.sot_token_id: "<|startoftext|>", source.eot_token_id: "<|endoftext|>"}
    vocabulary = {special.get(number, token): number for token, number in source.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks), model_max_length=77)


def random_clip_text() -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP with the text tower of ViT-B/16 and random weights; its image tower, which is not run, has one layer."""
    clip = CLIPModel(CLIPConfig(**CLIP_B16 | {"vision_config": {"num_hidden_layers": 1}})).eval()
    sharpen(clip.text_model, 4)
    return clip, clip_tokenizer()


def sharpen(network: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Matrices and kernels times ``factor``, in place: to fresh text towers and ViTs all inputs are nearly alike."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(factor)
    return network
