"""Train the mini DINO (a real ``transformers.ViTModel``) by self-distillation with multi-crop; no label is seen.

``python -m ovdiff_lib.recipes.train_dino --data DIR --out DIR --work DIR``

The images are pairs of frames: one object met in two places (``frames.npy``), as a video that follows it would show it. With crops of one
scene instead, the surroundings that they share are the easier thing to agree on, and the mini world's few of them leave the object out of
the features: the nearest-neighbour accuracy stayed at 21 % for 1,100 steps, and MaskCut's proposals were no better than with mean colours.

A student sees small and large crops and must predict what a slowly moving average of itself, the teacher, says of the large ones (Caron et
al., 2021). The teacher is what is kept. Its answers are spread evenly over the prototypes by Sinkhorn's algorithm, as in DINOv2: with small
batches a running centre let them stay all but uniform. Labels of held-out scenes are read only to log a nearest-neighbour accuracy.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.recipes.training import Run, load_data, round_weights, seed_everything, shuffled_indices, training_parser, warmup_cosine

GLOBAL, LOCAL = 64, 32  # pixels of a crop
GLOBAL_SCALE, LOCAL_SCALE = (0.3, 1.0), (0.08, 0.3)  # share of the scene's area that a crop shows
PATCH = 8
STUDENT_TEMPERATURE = 0.1


def build_vit(hidden: int = 128, layers: int = 5) -> ViTModel:
    """A ViT for 64 px images and 8 px patches, in DINO's layout: no pooling layer, keys with bias."""
    return ViTModel(ViTConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32, intermediate_size=4 * hidden,
                              image_size=GLOBAL, patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6), add_pooling_layer=False)


class Head(nn.Module):
    """DINO's projection head: three layers, an L2-normalised bottleneck, and unit-length prototypes: (B, D) to logits (B, K)."""

    def __init__(self, width: int, hidden: int = 256, bottleneck: int = 64, prototypes: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's rows are normalised on the fly, DINO's weight norm with its scale fixed to 1."""
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.last.weight, dim=-1).T


def crop(images: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A random resized crop of each image f32 (B, 3, H, W), mirrored half the time: f32 (B, 3, size, size)."""
    count = len(images)
    draw = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)  # noqa: E731
    side, stretch = draw(*scale).sqrt(), draw(math.log(3 / 4), math.log(4 / 3)).exp().sqrt()
    height, width = (side / stretch).clamp(max=1), (side * stretch).clamp(max=1)
    flip = (torch.rand(count, generator=generator) < 0.5) * 2.0 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2], theta[:, 1, 2] = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
    return F.grid_sample(images, F.affine_grid(theta, (count, 3, size, size), align_corners=False), align_corners=False,
                         padding_mode="reflection")


def jitter(images: Tensor, generator: torch.Generator, blur: float) -> Tensor:
    """Brightness, contrast, saturation and hue of most images, grey some, blur some; f32 (B, 3, H, W) in [0, 1]."""
    count = len(images)
    draw = lambda low, high: (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)  # noqa: E731
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


def normalise(images: Tensor) -> Tensor:
    """[0, 1] to ImageNet's normalisation."""
    return (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


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


@torch.no_grad()
def nearest_neighbour(model: ViTModel, images: np.ndarray, labels: np.ndarray, neighbours: int = 10) -> float:
    """Leave-one-out k-nearest-neighbour accuracy of the class token (cosine, votes weighted by similarity)."""
    tokens = []
    for start in range(0, len(images), 256):
        pixels = torch.from_numpy(np.array(images[start:start + 256])).permute(0, 3, 1, 2).float() / 255
        tokens.append(F.normalize(model(normalise(pixels)).last_hidden_state[:, 0], dim=-1))
    features = torch.cat(tokens)
    similarity = (features @ features.T).fill_diagonal_(-1)
    value, index = similarity.topk(neighbours)
    truth = torch.from_numpy(np.asarray(labels)).long()
    votes = torch.zeros(len(truth), int(truth.max()) + 1).scatter_add_(1, truth[index], (value / 0.07).exp())
    return float((votes.argmax(-1) == truth).float().mean())


class SelfDistillation(nn.Module):
    """Student and teacher with their heads."""

    def __init__(self, backbone: ViTModel) -> None:
        super().__init__()
        backbone.set_attn_implementation("eager")  # the fused kernel is slow backwards on CPUs at 65 tokens
        self.student, self.student_head = backbone, Head(backbone.config.hidden_size)
        self.teacher, self.teacher_head = copy.deepcopy(self.student).eval(), copy.deepcopy(self.student_head)
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)

    def forward(self, large: Tensor, small: Tensor, views: int, temperature: float) -> Tensor:
        """Loss of two large crops a pair, (2 B, 3, 64, 64), and several small ones, (views B, 3, 32, 32)."""
        with torch.no_grad():
            logits = self.teacher_head(self.teacher(large).last_hidden_state[:, 0]).float()
            targets = sinkhorn(logits / temperature).chunk(2)
        tokens = torch.cat([self.student(large).last_hidden_state[:, 0],
                            self.student(small, interpolate_pos_encoding=True).last_hidden_state[:, 0]])
        return distillation_loss(list(self.student_head(tokens).float().chunk(2 + views)), list(targets))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the teacher a little towards the student."""
        for teacher, student in ((self.teacher, self.student), (self.teacher_head, self.student_head)):
            torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


def save(teacher: ViTModel, folder: Path) -> None:
    """Half precision with rounded fractions, and the image processor that normalises as in training."""
    half = ViTModel(teacher.config, add_pooling_layer=False)
    half.load_state_dict(round_weights(teacher.state_dict()))
    half.half().save_pretrained(folder)
    ViTImageProcessor(size={"height": GLOBAL, "width": GLOBAL}, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
                      ).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training_parser(__doc__, steps=8000, batch=64, minutes=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--small-crops", type=int, default=4)
    parser.add_argument("--momentum", type=float, default=0.99, help="of the teacher at the start; rises to 1")
    args = parser.parse_args(argv)
    seed_everything(args.seed, args.threads)
    data = load_data(args.data)
    pairs = np.load(args.data / "frames.npy", mmap_mode="r")
    model = SelfDistillation(build_vit(args.width, args.layers))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in learned if p.ndim >= 2], "weight_decay": 0.05},
                                   {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)
    run = Run(args, model, optimizer, lambda p, s: warmup_cosine(p, s, warmup=200))
    run.on_checkpoint = lambda: save(model.teacher, args.work / "model")
    model.student.train()
    for step in run:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = shuffled_indices(len(pairs), args.batch, args.seed, step)
        frames = torch.from_numpy(pairs[index]).permute(1, 0, 4, 2, 3).float() / 255  # (2, B, 3, 64, 64)
        large = torch.cat([normalise(jitter(crop(frame, GLOBAL, GLOBAL_SCALE, generator), generator, blur))
                           for frame, blur in zip(frames, (0.8, 0.1), strict=True)])
        small = torch.cat([normalise(jitter(crop(frames[i % 2], LOCAL, LOCAL_SCALE, generator), generator, 0.4))
                           for i in range(args.small_crops)])
        temperature = 0.04 + 0.02 * min(1.0, run.progress / 0.2)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(large, small, args.small_crops, temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        model.follow(1 - (1 - args.momentum) * 0.5 * (1 + math.cos(math.pi * min(1.0, run.progress))))
        metrics = {}
        if (step + 1) % 250 == 0:
            metrics["nearest_neighbour"] = nearest_neighbour(model.teacher, data["eval_images"], data["eval_labels"])
        run.record(loss.detach(), **metrics)
    save(model.teacher, args.out)
    accuracy = nearest_neighbour(model.teacher, data["eval_images"], data["eval_labels"])
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, nearest-neighbour top-1 {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main()
