"""Random-weight models of the real classes, small enough for tests: the layout of the mini world's, narrower.

``make_tiny_models(folder)`` writes ``folder/stable-diffusion`` (a StableDiffusionPipeline: 64 px, 16 x 16 latents, three cross-attention
down blocks, mid block, three cross-attention up blocks) and ``folder/clip`` (a CLIPModel: 64 px, patch 8) with one tokenizer, and
``folder/dino``, ``folder/mae`` and ``folder/open_clip`` (a ViTModel, a ViTMAEModel and a CLIP of open_clip, of the same sizes).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "good", "picture", "of", "and", "cat", "dog", "sofa", "boat", "water", "chest", "drawers")
TEXT_LENGTH = 32
SMALL = {"support.size": 3, "support.steps": 2, "support.batch_size": 4, "features.batch_size": 4, "matching.batch_size": 4,
         "prototypes.clusters": 4}
"""Profile fields that keep a whole run with the tiny models to seconds."""
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64, "patch_size": 8,
       "layer_norm_eps": 1e-6}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Pixels that have nothing to do with each other, u8 (*shape, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def tiny_overrides(models: Path) -> dict:
    """Overrides that turn the mini profile into one of the tiny models in ``models``."""
    return {"models.diffusion": str(models / "stable-diffusion"), "models.clip": str(models / "clip"), "models.dino": str(models / "dino"),
            "models.mae": str(models / "mae"), "models.open_clip": str(models / "open_clip"), "features.dino_input_size": 64,
            "features.mae_input_size": 64, "features.vit_scale": 1.0,
            "filters.stuff_threshold": 0.85, "matching.background_threshold": None, **SMALL}


def make_tiny_models(folder: Path, seed: int = 0) -> Path:
    """Write all models and return ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(folder / "clip")
        make_clip(tokenizer).save_pretrained(folder / "clip")
        make_pipeline(tokenizer).save_pretrained(folder / "stable-diffusion")
        make_dino().save_pretrained(folder / "dino")
        make_mae().save_pretrained(folder / "mae")
        make_open_clip(folder / "open_clip")
    return folder


def make_tokenizer(folder: Path):
    """A ``CLIPTokenizer`` folder: every byte, :data:`WORDS` as one token each, the end token with the largest id as in CLIP."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = [*alphabet, *(a + "</w>" for a in alphabet)], []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merge = ("".join(pieces[:i]), pieces[i])
            if merge not in merges:
                merges.append(merge)
                vocabulary.append("".join(merge))
    vocabulary += [BOS, EOS]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return tokenizer


def text_settings(tokenizer) -> dict:
    """The text tower's configuration, shared by CLIP and the pipeline."""
    return {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": TEXT_LENGTH, "projection_dim": 16, "hidden_act": "quick_gelu",
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def make_clip(tokenizer):
    """A random CLIPModel: 3 layers of 32 channels, 64 px, patch 8."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64,
              "patch_size": 8, "projection_dim": 16, "hidden_act": "quick_gelu"}
    return _spread(CLIPModel(CLIPConfig(text_config=text_settings(tokenizer), vision_config=vision, projection_dim=16)))


def make_dino():
    """A random ViTModel in DINO's layout: 3 layers of 32 channels, 64 px, patch 8."""
    from transformers import ViTConfig, ViTModel

    return _sharpen(ViTModel(ViTConfig(**VIT), add_pooling_layer=False))


def make_mae():
    """A random ViTMAEModel that hides three quarters of its patches as published ones do, of the same sizes."""
    from transformers import ViTMAEConfig, ViTMAEModel

    return _sharpen(ViTMAEModel(ViTMAEConfig(**VIT, mask_ratio=0.75)))


def make_open_clip(folder: Path, vision: dict | None = None) -> None:
    """A folder of a random CLIP in open_clip's format, its image tower of MAE's sizes or as ``vision`` says."""
    import open_clip
    from safetensors.torch import save_file

    image = {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision or image, "text_cfg": text}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}), encoding="utf-8")
    save_file(_sharpen(open_clip.CLIP(**config)).state_dict(), folder / "open_clip_model.safetensors")


def _spread(model):
    """CLIP initialises so small that every input looks alike; weights that matter make tests able to fail."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model.eval()


def _sharpen(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name or name.endswith("bias"):  # nearly zero at the start: a wrong order or a forgotten bias would not be seen
                parameter.normal_(std=0.5)
            elif parameter.ndim >= 2:
                parameter.mul_(4)
    return model.eval()


def make_unet(text_width: int = 32, **fields):
    """A random UNet: grids 16, 8, 4 with 16, 16, 32 channels and two heads; attention made sharp enough to differ between pixels."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=text_width, attention_head_dim=2, **fields)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                parameter.mul_(3)
    return unet.eval()


def make_pipeline(tokenizer):
    """A random StableDiffusionPipeline, with PNDM as Stable Diffusion v1.5 ships it."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
        mid_block_add_attention=False, scaling_factor=1.5)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                              skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    text_encoder = _spread(CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer))))
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder, tokenizer=tokenizer, unet=make_unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
