"""Train the mini MAE (the encoder of a real ``transformers.ViTMAEForPreTraining``) by masked reconstruction.

Three quarters of a crop's patches are hidden, and a small decoder must fill the gaps (He et al., 2022).
"""

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_dino import PATCH, crop

SCALE = (0.25, 1.0)  # share of the scene's area that a crop shows


def main(argv: list[str] | None = None) -> None:
    args = training.start(training.options(__doc__, steps=12000, batch=128, minutes=35, lr=1e-3), argv)
    images = training.load_array(args.data / "train_images.npy")
    size = images.shape[1]
    config = ViTMAEConfig(
        hidden_size=160, num_hidden_layers=6, num_attention_heads=5, intermediate_size=640, image_size=size,
        patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=True,
        decoder_hidden_size=96, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        decoder_intermediate_size=384)
    model = training.placed(ViTMAEForPreTraining(config).train())
    run = training.Run(args, model, len(images), betas=(0.9, 0.95), warmup=300)

    def loss(draw: training.Draw) -> Tensor:
        scene = training.to_float(training.rows(images, draw.index))
        pixels = training.normalise(crop(scene, size, SCALE, draw.generator), IMAGENET_MEAN, IMAGENET_STD)
        noise = torch.rand(len(pixels), (size // PATCH) ** 2, generator=draw.generator, device=pixels.device)
        with training.mixed():
            return model(pixels, noise=noise).loss

    run.fit(loss, export=lambda folder: training.halved(model.vit).save_pretrained(folder))


if __name__ == "__main__":
    main()
