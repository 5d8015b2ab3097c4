"""Train the mini autoencoder (a real ``diffusers.AutoencoderKL``): one latent for 8x8 pixels.

No adversary and no perceptual network: at this size L1 plus the L1 of image gradients keeps edges, and a very small KL
keeps the latents near unit scale without costing detail. Without attention it can learn from crops and take any size.
In half of the steps shrunken latents must give the shrunken image, easier for a UNet (EQ-VAE, Kouzelis et al., 2025).
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ovdiff_lib.recipes import training

EQUIVARIANCE = 0.5  # share of the steps with shrunken latents
CROP = 64  # pixels; side of what it learns from
KL = 2e-4  # weight of the KL per latent value
CHROMA = 4.0  # weight of a colour's distance from grey


def to_signed(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return 2 * training.to_float(images) - 1


def crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random square of ``size`` px of each image (B, H, W, 3), mirrored half the time."""
    count, places = len(images), torch.arange(size, device=images.device)

    def draw(most: int) -> Tensor:
        return torch.randint(0, most + 1, (count, 1), generator=generator, device=images.device)

    top, left, turn = draw(images.shape[1] - size), draw(images.shape[2] - size), draw(1)
    rows, columns = top + places, left + torch.where(turn == 1, places.flip(0), places)
    return images[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1, half the L1 of horizontal and vertical differences, and squared error, of images (B, 3, H, W) in [-1, 1].

    The differences keep outlines; the squared error is what PSNR measures. Pixels weigh 1 + :data:`CHROMA` x the
    distance of their colour from grey: without it the latents drop what little is purple or pink at no cost in PSNR.
    """
    weight = 1 + CHROMA * (target - target.mean(dim=1, keepdim=True)).abs().amax(dim=1, keepdim=True)
    weight = weight / weight.mean()
    error = output - target
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    tint = error - error.mean(dim=1, keepdim=True)
    return ((error.abs() + error.square() + tint.abs()) * weight).mean() + 0.5 * gradient


def main(argv: list[str] | None = None) -> None:
    parser = training.options(__doc__, steps=6000, batch=32, minutes=30, lr=1.5e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=(32, 64, 128, 128), help="one a level")
    parser.add_argument("--latent-channels", type=int, default=4)
    args = training.start(parser, argv)
    images, levels = training.load_array(args.data / "train_images.npy"), len(args.channels)
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=tuple(args.channels),
                        norm_num_groups=8, latent_channels=args.latent_channels, sample_size=images.shape[1],
                        mid_block_add_attention=False).to(training.DEVICE)
    run = training.Run(args, vae, len(images), list(vae.parameters()), betas=(0.9, 0.99), decay=0.998, warmup=100)

    def loss(draw: training.Draw) -> Tensor:
        target = to_signed(crops(training.rows(images, draw.index), CROP, draw.generator))
        with training.mixed():
            posterior = vae.encode(target).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=draw.generator, device=mean.device)
            latents = mean + (0.5 * log_variance).exp() * noise
            if draw.picker.random() < EQUIVARIANCE:
                shrink = {"scale_factor": (0.5, 0.75)[draw.step % 2], "mode": "bilinear", "antialias": True}
                latents, target = (F.interpolate(x, **shrink) for x in (latents, target))
            output = vae.decode(latents).sample.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(output, target) + KL * kl

    run.fit(loss)
    some = images[::1 + len(images) // 2000]  # 2,000 at most
    with torch.no_grad():
        latents = torch.cat([run.average.encode(to_signed(part)).latent_dist.mode() for part in some.split(64)])
    run.average.register_to_config(scaling_factor=float(1 / latents.std()))
    training.halved(run.average).save_pretrained(args.out)


if __name__ == "__main__":
    main()
