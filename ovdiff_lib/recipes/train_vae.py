"""Train the mini autoencoder (a real ``diffusers.AutoencoderKL``): one latent for 8x8 pixels (4x4 with three
``--channels``).

``python -m ovdiff_lib.recipes.train_vae --data DIR --out DIR --work DIR``

No adversary and no perceptual network: at this size L1 plus the L1 of image gradients keeps edges, and a very small KL
keeps the latents near unit scale without costing detail. Without attention it can learn from crops, of more scenes in
the same time, and take any size. In half of the steps the latents are shrunk and must give the shrunken image (EQ-VAE,
Kouzelis et al., 2025): latents that behave like small pictures are easier to learn for a UNet.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ovdiff_lib.recipes import training


def build_vae(channels: tuple[int, ...] = (32, 64, 128, 128), latent_channels: int = 4, size: int = 128) -> AutoencoderKL:
    """A convolutional autoencoder; every level after the first halves the sides."""
    levels = len(channels)
    return AutoencoderKL(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * levels,
                         up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=channels, layers_per_block=1,
                         latent_channels=latent_channels, norm_num_groups=8, sample_size=size,
                         mid_block_add_attention=False)


def to_signed(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return 2 * training.to_float(images) - 1


def crops(images: np.ndarray, size: int, generator: torch.Generator) -> np.ndarray:
    """A random square of ``size`` px of each image u8 (B, H, W, 3), mirrored half the time."""
    top, left = (torch.randint(0, side - size + 1, (len(images),), generator=generator).tolist() for side in images.shape[1:3])
    turn = torch.randint(0, 2, (len(images),), generator=generator).tolist()
    parts = [image[y:y + size, x:x + size] for image, y, x in zip(images, top, left, strict=True)]
    return np.stack([part[:, ::-1] if mirrored else part for part, mirrored in zip(parts, turn, strict=True)])


def reconstruction_loss(output: Tensor, target: Tensor, chroma: float = 4.0) -> Tensor:
    """L1, half the L1 of horizontal and vertical differences, and squared error, of images (B, 3, H, W) in [-1, 1].

    The differences keep outlines; the squared error is what PSNR measures. Pixels weigh 1 + ``chroma`` x the distance
    of their colour from grey: most of the world is pale, and without it the four latents drop what little of it is
    purple or pink (umbrellas came back grey, pigs orange) at no cost in PSNR.
    """
    weight = 1 + chroma * (target - target.mean(dim=1, keepdim=True)).abs().amax(dim=1, keepdim=True)
    weight = weight / weight.mean()
    error = output - target
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    tint = error - error.mean(dim=1, keepdim=True)
    return ((error.abs() + error.square() + tint.abs()) * weight).mean() + 0.5 * gradient


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> float:
    """Mean PSNR in dB of the reconstruction from the latent's mean, as SD uses it."""
    values = []
    for start in range(0, len(images), batch):
        target = to_signed(images[start:start + batch])
        output = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((output - target) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
        values.append(-10 * error.log10().cpu())
    return float(torch.cat(values).mean())


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> float:
    """1 / standard deviation of the latents: what SD calls ``scaling_factor``."""
    latents = [vae.encode(to_signed(images[s:s + batch])).latent_dist.mode() for s in range(0, len(images), batch)]
    return float(1 / torch.cat(latents).std())


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.training_parser(__doc__, steps=6000, batch=32, minutes=30)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=(32, 64, 128, 128))
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--crop", type=int, default=64, help="side of the crops it learns from, in pixels")
    parser.add_argument("--equivariance", type=float, default=0.5, help="share of the steps with shrunken latents")
    parser.add_argument("--kl", type=float, default=2e-4, help="weight of the KL per latent value")
    args = parser.parse_args(argv)
    training.seed_everything(args.seed, args.threads)
    data = training.load_data(args.data)
    images, held_out = data["images"], data["eval_images"][:256]
    vae, smooth = (build_vae(tuple(args.channels), args.latent_channels, images.shape[1]).to(training.DEVICE) for _ in range(2))
    smooth.eval()  # receives the averaged weights
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = training.EMA(vae, 0.998)
    run = training.Run(args, vae, optimizer, lambda p, s: training.warmup_cosine(p, s, warmup=100), ema)
    for step in run:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = training.shuffled_indices(len(images), args.batch, args.seed, step)
        target = to_signed(crops(images[index], args.crop, generator))
        with training.mixed(args):
            posterior = vae.encode(target).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(training.DEVICE)
            latents = mean + (0.5 * log_variance).exp() * noise
            if float(torch.rand(1, generator=generator)) < args.equivariance:
                factor = (0.5, 0.75)[step % 2]
                latents, target = (F.interpolate(x, scale_factor=factor, mode="bilinear", antialias=True) for x in (latents, target))
            output = vae.decode(latents).sample.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(output, target) + args.kl * kl
        run.update(loss)
        metrics = {}
        if (step + 1) % 300 == 0:
            ema.copy_to(smooth)
            metrics["psnr"] = psnr(smooth, held_out)
        run.record(loss.detach(), **metrics)
    ema.copy_to(smooth)
    final = psnr(smooth, held_out)
    spread = np.linspace(0, len(images) - 1, min(2000, len(images))).astype(int)
    scale = latent_scale(smooth, images[spread])
    smooth.register_to_config(scaling_factor=scale)
    smooth.load_state_dict(training.round_weights(smooth.state_dict()))
    smooth.half().save_pretrained(args.out)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, PSNR {final:.2f} dB, scaling_factor {scale:.4f}", flush=True)


if __name__ == "__main__":
    main()
