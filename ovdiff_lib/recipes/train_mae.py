"""Train the mini MAE (the encoder of a real ``transformers.ViTMAEForPreTraining``) by masked reconstruction; no label
is seen.

Three quarters of a crop's patches are hidden; the encoder sees the rest and a small decoder must fill the gaps (He et
al., 2022). Only the encoder is kept. Labels of held-out scenes are read only to log a nearest-neighbour accuracy.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_dino import PATCH, crop, nearest_neighbour, save_vit

SCALE = (0.25, 1.0)  # share of the scene's area that a crop shows


def build_mae(size: int, hidden: int, layers: int, decoder: int = 96) -> ViTMAEForPreTraining:
    """A masked autoencoder for images of ``size`` px and 8 px patches that predicts each hidden patch's normalised
    pixels."""
    return ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32, intermediate_size=4 * hidden,
        image_size=size, patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=True,
        decoder_hidden_size=decoder, decoder_num_hidden_layers=2, decoder_num_attention_heads=decoder // 32,
        decoder_intermediate_size=4 * decoder))


def encoder(model: ViTMAEForPreTraining, mask_ratio: float) -> ViTMAEModel:
    """A copy of the model's encoder, in eval mode, that hides this share of the patches."""
    config = copy.deepcopy(model.config)
    config.mask_ratio = mask_ratio
    twin = ViTMAEModel(config).eval().to(model.device)
    twin.load_state_dict(model.vit.state_dict())
    return twin


def accuracy(model: ViTMAEForPreTraining, scenes: training.Scenes) -> float:
    """Leave-one-out nearest-neighbour accuracy of the mean of all patch tokens: nothing hidden, patches in raster
    order."""
    whole = encoder(model, mask_ratio=0.0)

    def mean_token(pixels: Tensor) -> Tensor:
        raster = torch.arange((model.config.image_size // PATCH) ** 2, device=pixels.device).float()
        return whole(pixels, noise=raster.expand(len(pixels), -1)).last_hidden_state[:, 1:].mean(1)

    return nearest_neighbour(mean_token, scenes)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.options(__doc__, steps=12000, batch=128, minutes=35, lr=1e-3)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    args = training.start(parser, argv)
    scenes = training.Scenes(args.data)
    images, size = scenes.images, scenes.images.shape[1]
    model = training.placed(build_mae(size, args.width, args.layers).train())
    run = training.Run(args, model, len(images), betas=(0.9, 0.95), warmup=300)

    def loss(draw: training.Draw) -> Tensor:
        scene = training.to_float(training.rows(images, draw.index))
        pixels = training.normalise(crop(scene, size, SCALE, draw.generator), IMAGENET_MEAN, IMAGENET_STD)
        noise = torch.rand(len(pixels), (size // PATCH) ** 2, generator=draw.generator, device=pixels.device)
        with training.mixed(args):
            return model(pixels, noise=noise).loss

    run.fit(loss, measure=lambda: {"nearest_neighbour": accuracy(model, scenes)}, every=1000,
            export=lambda: save_vit(encoder(model, 0.75), args.work / "model"))
    save_vit(encoder(model, 0.75), args.out)


if __name__ == "__main__":
    main()
