"""Networks as shapes: the published ones from their configurations, and a profile's own, on PyTorch's meta device.

There a network has layers and sizes but no values, so that one of a billion parameters is made in a second and its operations can be
counted without its weights. Nothing here can draw or segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, ViTModel

    from ovdiff_lib.profiles.schema import Profile


SD_UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32,
}
"""``attention_head_dim`` is, in files of this age, the number of heads."""

SD_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}

CLIP_L14_TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu", "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 1,
}
"""The text tower that Stable Diffusion v1.5 reads its prompts with."""

CLIP_B16 = {
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49408,
                    "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                      "image_size": 224, "patch_size": 16},
    "projection_dim": 512,
}

DINO_B8 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
           "patch_size": 8}


@dataclass(frozen=True)
class Networks:
    """The networks of one profile on the meta device: Stable Diffusion's three, the CLIP of extractor and category filter, DINO."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    clip: CLIPModel
    dino: ViTModel

    @property
    def vae_factor(self) -> int:
        """Pixels along a side of one latent: every block of the VAE but the last halves the grid."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def published_networks() -> Networks:
    """Stable Diffusion v1.5, CLIP ViT-B/16 and DINO ViT-B/8, which the paper's main table uses (Sec. 4.1, App. C.2)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

    with torch.device("meta"):
        return Networks(UNet2DConditionModel(**SD_UNET).eval(), AutoencoderKL(**SD_VAE).eval(),
                        CLIPTextModel(CLIPTextConfig(**CLIP_L14_TEXT)).eval(), CLIPModel(CLIPConfig(**CLIP_B16)).eval(),
                        ViTModel(ViTConfig(**DINO_B8), add_pooling_layer=False).eval())


def networks_of(profile: Profile) -> Networks:
    """The shapes of the networks that ``profile`` names; they are loaded for their configurations. Raises ``ModelNotAvailable``."""
    from ovdiff_lib.networks.loading import load_clip, load_diffusion, load_dino

    pipe, dino = load_diffusion(profile), load_dino(profile)
    clip = load_clip(profile)[0]
    with torch.device("meta"):
        return Networks(*(type(network).from_config(network.config).eval() for network in (pipe.unet, pipe.vae)),
                        *(type(network)(network.config).eval() for network in (pipe.text_encoder, clip)),
                        type(dino)(dino.config, add_pooling_layer=False).eval())
