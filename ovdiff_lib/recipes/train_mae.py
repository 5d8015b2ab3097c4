"""Train the mini MAE (the encoder of a real ``transformers.ViTMAEForPreTraining``) by masked reconstruction; no label
is seen.

``python -m ovdiff_lib.recipes.train_mae --data DIR --out DIR --work DIR``

Three quarters of a crop's patches are hidden; the encoder sees the rest and a small decoder must fill the gaps (He et
al., 2022). Only the encoder is kept. Labels of held-out scenes are read only to log a nearest-neighbour accuracy.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_dino import IMAGENET_MEAN, IMAGENET_STD, crop, nearest_neighbour, normalise

PATCH = 8  # pixels
SCALE = (0.25, 1.0)  # share of the scene's area that a crop shows


def build_mae(size: int, hidden: int = 160, layers: int = 6, decoder: int = 96) -> ViTMAEForPreTraining:
    """A masked autoencoder for images of ``size`` px and 8 px patches that predicts each hidden patch's normalised
    pixels."""
    return ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32, intermediate_size=4 * hidden, image_size=size,
        patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=True, decoder_hidden_size=decoder,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=decoder // 32, decoder_intermediate_size=4 * decoder))


def encoder(model: ViTMAEForPreTraining, mask_ratio: float) -> ViTMAEModel:
    """A copy of the model's encoder, in eval mode, that hides this share of the patches."""
    config = copy.deepcopy(model.config)
    config.mask_ratio = mask_ratio
    twin = ViTMAEModel(config).eval().to(model.device)
    twin.load_state_dict(model.vit.state_dict())
    return twin


def accuracy(model: ViTMAEForPreTraining, data: dict) -> float:
    """Leave-one-out nearest-neighbour accuracy of the mean of all patch tokens: nothing hidden, patches in raster
    order."""
    whole = encoder(model, mask_ratio=0.0)

    def mean_token(pixels: Tensor) -> SimpleNamespace:
        raster = torch.arange((model.config.image_size // PATCH) ** 2, device=pixels.device).float().expand(len(pixels), -1)
        return SimpleNamespace(last_hidden_state=whole(pixels, noise=raster).last_hidden_state[:, 1:].mean(1, keepdim=True))

    return nearest_neighbour(mean_token, data["eval_images"], data["eval_labels"])


def save(model: ViTMAEForPreTraining, folder: Path) -> None:
    """The encoder in half precision with rounded fractions, and the image processor that normalises as in training."""
    half, size = encoder(model, model.config.mask_ratio).cpu(), model.config.image_size
    half.load_state_dict(training.round_weights(half.state_dict()))
    half.half().save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
                      ).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.training_parser(__doc__, steps=12000, batch=128, minutes=35)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args(argv)
    training.seed_everything(args.seed, args.threads)
    data = training.load_data(args.data)
    size = data["images"].shape[1]
    model = build_mae(size, args.width, args.layers).train().to(training.DEVICE)
    if training.DEVICE.type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel is slow backwards at this few tokens there
    optimizer = torch.optim.AdamW(training.decayed(model), lr=args.lr, betas=(0.9, 0.95), fused=True)
    run = training.Run(args, model, optimizer, lambda p, s: training.warmup_cosine(p, s, warmup=300))
    run.on_checkpoint = lambda: save(model, args.work / "model")
    for step in run:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = training.shuffled_indices(len(data["images"]), args.batch, args.seed, step)
        pixels = normalise(crop(training.to_float(data["images"][index]), size, SCALE, generator))
        noise = torch.rand(len(pixels), (size // PATCH) ** 2, generator=generator).to(training.DEVICE)
        with training.mixed(args):
            loss = model(pixels, noise=noise).loss
        run.update(loss)
        metrics = {}
        if (step + 1) % 1000 == 0:
            metrics["nearest_neighbour"] = accuracy(model, data)
        run.record(loss.detach(), **metrics)
    save(model, args.out)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, nearest-neighbour top-1 {accuracy(model, data):.4f}", flush=True)


if __name__ == "__main__":
    main()
