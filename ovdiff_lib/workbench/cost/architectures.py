"""Networks of the published sizes without their weights: shapes alone to count operations, random weights to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ViTModel

    from ovdiff_lib.profiles.schema import Profile

SD_UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "cross_attention_dim": 768, "norm_num_groups": 32,
    "attention_head_dim": 8,  # in files of this age the number of heads
}
SD_VAE = {  # the scaling factor is not in the published file: it is the class's own default
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512, "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TEXT = {"num_hidden_layers": 12, "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0,
         "eos_token_id": 2, "pad_token_id": 1}
CLIP_L14_TEXT = {**_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                 "projection_dim": 768, "hidden_act": "quick_gelu"}
"""The text tower that Stable Diffusion v1.5 reads its prompts with."""

VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224}
CLIP_B16 = {
    "text_config": {**_TEXT, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "vision_config": {**VIT_B, "patch_size": 16}, "projection_dim": 512,
}


class Networks(NamedTuple):
    """The networks of one profile on the meta device, where they have layers and sizes but no values: Stable
    Diffusion's three, the CLIP of extractor and category filter, DINO."""

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
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    with torch.device("meta"):
        dino = ViTModel(ViTConfig(**VIT_B, patch_size=8), add_pooling_layer=False)
        return Networks(*_diffusion(), CLIPModel(CLIPConfig(**CLIP_B16)).eval(), dino.eval())


def networks_of(profile: Profile) -> Networks:
    """Shapes of the networks that ``profile`` names, which are loaded to read them. Raises ``ModelNotAvailable``."""
    from ovdiff_lib.networks.loading import load_clip, load_diffusion, load_dino

    pipe, dino, clip = load_diffusion(profile), load_dino(profile), load_clip(profile)[0]
    with torch.device("meta"):
        made = [type(network).from_config(network.config) for network in (pipe.unet, pipe.vae)]
        made += [type(network)(network.config) for network in (pipe.text_encoder, clip)]
        made.append(type(dino)(dino.config, add_pooling_layer=False))
    return Networks(*(network.eval() for network in made))


def _diffusion() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    made = UNet2DConditionModel(**SD_UNET), AutoencoderKL(**SD_VAE), CLIPTextModel(CLIPTextConfig(**CLIP_L14_TEXT))
    return tuple(network.eval().requires_grad_(False) for network in made)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with its 49,408 tokens, from the file that open_clip ships; reads 77 tokens."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    special = {source.sot_token_id: "<|startoftext|>", source.eot_token_id: "<|endoftext|>"}
    vocabulary = {special.get(number, token): number for token, number in source.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks), model_max_length=77)


def random_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion v1.5 with random weights in float32, 4.3 GB, and the sampler of ``load_diffusion``."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae, text_encoder = _diffusion()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                            steps_offset=1, algorithm_type="dpmsolver++", solver_order=2)
    pipe = StableDiffusionPipeline(vae, text_encoder, clip_tokenizer(), unet, scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_clip_text(device: torch.device) -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP with the text tower of ViT-B/16 and random weights; its image tower, which is not run, has one layer."""
    from transformers import CLIPConfig, CLIPModel

    settings = {**CLIP_B16, "vision_config": {**CLIP_B16["vision_config"], "num_hidden_layers": 1}}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(**settings)).eval().requires_grad_(False)
        for parameter in clip.text_model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)  # a fresh CLIP takes all texts for nearly alike: a wrong embedding could not be told
    return clip.to(device), clip_tokenizer()
