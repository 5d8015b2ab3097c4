"""Train the mini DINO (a real ``transformers.ViTModel``) by self-distillation with multi-crop; no label is seen.

The images are pairs of frames: one object met in two places (``frames.npy``), as a video that follows it would show it.
With crops of one scene the surroundings that they share are easier to agree on than the object.

A student sees small and large crops and must predict what a slowly moving average of itself, the teacher, says of the
large ones (Caron et al., 2021). The teacher is what is kept. As in DINOv2 (Oquab et al., 2023) its answers are spread
evenly over the prototypes by Sinkhorn's algorithm, some patches of a large crop are hidden from the student, which must
say what the teacher says of each (iBOT), and the class tokens of a batch are pushed apart (KoLeo).
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.recipes import training

LARGE, SMALL = 3 / 4, 3 / 8  # side of a crop as a share of the scene's side
LARGE_SCALE, SMALL_SCALE = (0.3, 1.0), (0.08, 0.3)  # share of the scene's area that a crop shows
PATCH = 8  # pixels
HIDDEN = 0.4  # share of the patches of a large crop that the student does not see, in half of the crops
STUDENT_TEMPERATURE = 0.1
SMALL_CROPS = 4  # a pair of frames
MOMENTUM = 0.99  # of the teacher at the start; rises to 1
KOLEO = 0.1  # weight of the loss that spreads class tokens


class Head(nn.Module):
    """DINO's head: three layers, an L2-normalised bottleneck, 256 unit-length prototypes: (B, D) to logits (B, 256)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
        self.last = nn.Linear(64, 256, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's rows are normalised on the fly, DINO's weight norm with its scale fixed to 1."""
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.last.weight, dim=-1).T


def crop(images: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A random resized crop of each image f32 (B, 3, H, W), mirrored half the time: f32 (B, 3, size, size)."""
    count = len(images)
    side = training.uniform(generator, *scale, count).sqrt()
    stretch = training.uniform(generator, math.log(3 / 4), math.log(4 / 3), count).exp().sqrt()
    height, width = (side / stretch).clamp(max=1), (side * stretch).clamp(max=1)
    flip = (training.uniform(generator, 0, 1, count) < 0.5) * 2.0 - 1
    x, y = (training.uniform(generator, -1, 1, count) * (1 - length) for length in (width, height))
    scale, centre = torch.stack([width * flip, height], dim=1), torch.stack([x, y], dim=1)
    return training.looked_at(images, size, scale, centre, padding="reflection")


def jitter(images: Tensor, generator: torch.Generator, blur: float) -> Tensor:
    """Brightness, contrast, saturation and hue of most images, grey some, blur some; f32 (B, 3, H, W) in [0, 1]."""
    def draw(low: float, high: float) -> Tensor:
        return training.uniform(generator, low, high, len(images), 1, 1, 1)

    changed = images * draw(0.7, 1.3)
    mean = changed.mean((1, 2, 3), keepdim=True)
    changed = (changed - mean) * draw(0.7, 1.3) + mean
    grey = changed.mean(1, keepdim=True)
    angle = draw(-0.35, 0.35)
    chroma = (changed - grey) * draw(0.7, 1.3)
    # Rotation of the colour about the grey axis, Rodrigues' formula with the axis (1, 1, 1) / sqrt(3).
    turned = chroma * angle.cos() + (chroma.roll(1, 1) - chroma.roll(-1, 1)) / math.sqrt(3) * angle.sin()
    changed = torch.where(draw(0, 1) < 0.8, grey + turned, images)
    changed = torch.where(draw(0, 1) < 0.1, changed.mean(1, keepdim=True), changed)
    soft = F.avg_pool2d(F.pad(changed, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return torch.where(draw(0, 1) < blur, soft, changed).clamp(0, 1)


def hide(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Which patches the student does not see, bool (count, side * side): a random rectangle of about :data:`HIDDEN`
    of the patches in half of the crops, and one patch in the others, so that no batch is without."""
    draw = training.uniform(generator, 0, 1, 4, count)
    places, many = (torch.arange(n, device=draw.device) for n in (side, count))
    area, ratio = HIDDEN * (0.5 + draw[1]) * side * side, 0.5 + 1.5 * draw[0]
    area, ratio = (torch.where(many % 2 == 1, x, 1.0) for x in (area, ratio))
    height = (area * ratio).sqrt().round().clamp(1, side)
    width = (area / height).round().clamp(1, side)

    def covered(length: Tensor, draw: Tensor) -> Tensor:
        first = (draw * (side - length + 1)).floor()[:, None]
        return (places >= first) & (places < first + length[:, None])

    return (covered(height, draw[2])[:, :, None] & covered(width, draw[3])[:, None]).flatten(1)


def distillation_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean cross-entropy of every student view (logits) with the teacher's probabilities for the other large views."""
    logs = [(s / STUDENT_TEMPERATURE).log_softmax(-1) for s in student]
    terms = [-(t * log).sum(-1).mean() for i, t in enumerate(teacher) for j, log in enumerate(logs) if i != j]
    return torch.stack(terms).mean()


def sinkhorn(scores: Tensor, rounds: int = 3) -> Tensor:
    """Probabilities (B, K) close to softmax(scores) whose prototypes are used equally often; each row sums to 1."""
    table = (scores - scores.max()).exp()
    for _ in range(rounds):
        table = table / table.sum(0, keepdim=True).clamp_min(1e-12)
        table = table / table.sum(1, keepdim=True).clamp_min(1e-12)
    return table


def spread(tokens: Tensor) -> Tensor:
    """KoLeo: minus the mean logarithm of the distance to the nearest other, of class tokens (B, D) as unit vectors."""
    unit = F.normalize(tokens.float(), dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    return -(unit - unit[nearest]).norm(dim=1).clamp_min(1e-4).log().mean()


class SelfDistillation(nn.Module):
    """Student and teacher with their heads, one for class tokens and one for patches."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # DINO's layout: no pooling layer, keys with bias.
        vit = ViTModel(ViTConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
                                 image_size=size, patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6),
                       add_pooling_layer=False, use_mask_token=True)
        self.student = nn.ModuleDict({"vit": training.placed(vit), "head": Head(128), "patch_head": Head(128)})
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)

    def forward(self, large: Tensor, small: Tensor, temperature: float, hidden: Tensor) -> tuple[Tensor, ...]:
        """The losses of two large crops a pair, (2 B, 3, L, L), and four small ones, (4 B, 3, S, S): of class tokens,
        of the patches ``hidden`` bool (2 B, patches) of the large crops, and KoLeo."""
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            seen = teacher["vit"](large, interpolate_pos_encoding=True).last_hidden_state
            targets = sinkhorn(teacher["head"](seen[:, 0]).float() / temperature).chunk(2)
            patch_targets = sinkhorn(teacher["patch_head"](seen[:, 1:][hidden]).float() / temperature)
        tokens = student["vit"](large, bool_masked_pos=hidden, interpolate_pos_encoding=True).last_hidden_state
        others = student["vit"](small, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        logits = student["head"](torch.cat([tokens[:, 0], others])).float()
        patches = (student["patch_head"](tokens[:, 1:][hidden]).float() / STUDENT_TEMPERATURE).log_softmax(-1)
        koleo = torch.stack([spread(part) for part in tokens[:, 0].chunk(2)]).mean()
        return (distillation_loss(list(logits.chunk(2 + SMALL_CROPS)), list(targets)),
                -(patch_targets * patches).sum(-1).mean(), koleo)


def main(argv: list[str] | None = None) -> None:
    args = training.start(training.options(__doc__, steps=8000, batch=64, minutes=60, lr=1e-3), argv)
    pairs = training.load_array(args.data / "frames.npy")
    large_side, small_side = (int(share * pairs.shape[2]) // PATCH * PATCH for share in (LARGE, SMALL))
    model = SelfDistillation(pairs.shape[2]).to(training.DEVICE)
    model.student.train()
    run = training.Run(args, model, len(pairs), betas=(0.9, 0.95), warmup=200)

    def loss(draw: training.Draw) -> Tensor:
        frames = training.to_float(training.rows(pairs, draw.index)).transpose(0, 1)  # (2, B, 3, H, W)

        def view(frame: Tensor, side: int, scale: tuple[float, float], blur: float) -> Tensor:
            seen = jitter(crop(frame, side, scale, draw.generator), draw.generator, blur)
            return training.normalise(seen, IMAGENET_MEAN, IMAGENET_STD)

        large = torch.cat([view(frame, large_side, LARGE_SCALE, blur)
                           for frame, blur in zip(frames, (0.8, 0.1), strict=True)])
        small = torch.cat([view(frames[i % 2], small_side, SMALL_SCALE, 0.4) for i in range(SMALL_CROPS)])
        hidden = hide(len(large), large_side // PATCH, draw.generator)
        temperature = 0.04 + 0.02 * min(1.0, run.progress / 0.2)
        with training.mixed():
            classes, patches, koleo = model(large, small, temperature, hidden)
        return classes + patches + KOLEO * koleo

    def follow() -> None:
        momentum = 1 - (1 - MOMENTUM) * 0.5 * (1 + math.cos(math.pi * min(1.0, run.progress)))
        training.follow(model.teacher, model.student, momentum)

    def save(folder: Path) -> None:
        kept = training.halved(model.teacher["vit"])
        kept.embeddings.mask_token = None
        kept.save_pretrained(folder)

    run.fit(loss, after=follow, export=save)


if __name__ == "__main__":
    main()
