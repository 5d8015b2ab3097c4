"""What the trainers of the mini world share: options, data, and the budgeted, logged, resumable loop.

A trainer is called as ``python -m ovdiff_lib.recipes.train_vae --data DIR --out DIR --work DIR``, on a GPU where there
is one. It stops at a number of steps or of minutes, whichever comes first, and the learning rate follows the *fraction
of the budget used*. The same call again, after an interrupt or kill, goes on from the last checkpoint.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ovdiff_lib.files import written_whole

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where everything is trained
FAST_BF16 = DEVICE.type == "cuda" or (torch.backends.mkldnn.is_available()
                                      and torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether bfloat16 is worth while: CPUs that lack its instructions take thirty times as long as in float32."""

CHECKPOINT = 60.0  # seconds between two checkpoints


def options(description: str, *, steps: int, batch: int, minutes: float, lr: float) -> argparse.ArgumentParser:
    """The options that all trainers share, with a trainer's own defaults."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with train_images.npy and friends")
    p.add_argument("--out", type=Path, required=True, help="folder that receives the finished model")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoint.pt and log.jsonl")
    p.add_argument("--steps", type=int, default=steps, help="stop after this many steps")
    p.add_argument("--minutes", type=float, default=minutes, help="stop after this much training time")
    for name, default in (("--batch", batch), ("--lr", lr), ("--seed", 0)):
        p.add_argument(name, type=type(default), default=default)
    return p


def start(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, seed torch and make the work folder."""
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # what is trained side by side has a core each
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # a trainer's shapes are few
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def mixed() -> torch.autocast:
    """The context a forward pass runs in: bfloat16 where it is fast."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=FAST_BF16)


def in_chunks(args: argparse.Namespace, name: str, shape: tuple[int, ...], size: int,
              make: Callable[[range], Iterable[np.ndarray]]) -> list[np.ndarray]:
    """The arrays that ``make`` has for all ``shape[0]`` items, asked for ``size`` of them at a time. Each chunk is a
    file of the work folder, so that a call that was stopped goes on where it was."""
    folder, found = args.work / "_".join([name, *map(str, shape)]), []
    for start in tqdm(range(0, shape[0], size), desc=name, mininterval=10):
        path = folder / f"{start:08d}.npz"
        if not path.exists():
            arrays = list(make(range(start, min(start + size, shape[0]))))
            with written_whole(path) as file:
                np.savez(file, *arrays)
        with np.load(path) as file:
            found += file.values()
    return found


def load_array(path: Path) -> Tensor:
    """An array on disk as a tensor: memory-mapped, or whole in a GPU's memory (100,000 scenes are 5 GB)."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(DEVICE)


def load_scenes(folder: Path) -> tuple[Tensor, list[list[str]]]:
    """The training set of :mod:`ovdiff_lib.recipes.build`: images u8 (N, S, S, 3) and the four captions of each."""
    captions = json.loads((folder / "train_captions.json").read_text(encoding="utf-8"))
    return load_array(folder / "train_images.npy"), captions


def put(x: Tensor) -> Tensor:
    """To where training happens, without waiting for what a GPU still computes, as a plain ``.to`` does."""
    return x.to(DEVICE, non_blocking=True)


def rows(array: Tensor, index: np.ndarray) -> Tensor:
    """``array[index]``, where the array is."""
    return array[put(torch.from_numpy(index))]


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [0, 1]."""
    return images.movedim(-1, -3).float() / 255


def normalise(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Images (B, 3, H, W) less the mean, over the deviation, of their channels."""
    shift, scale = (put(torch.tensor(values)[:, None, None]) for values in (mean, deviation))
    return (images - shift) / scale


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """f32 in [low, high), where the generator is."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def looked_at(images: Tensor, side: int, scale: Tensor, centre: Tensor, padding: str = "zeros") -> Tensor:
    """Parts (B, C, side, side) of images (B, C, H, W): p = (x, y) in [-1, 1] shows p * scale + centre, both (B, 2)."""
    theta = torch.cat([torch.diag_embed(scale), centre[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [*images.shape[:2], side, side], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode=padding)


@dataclass(frozen=True)
class Draw:
    """What is random in a step, by seed and step alone: its batch's items, sorted, and generators for the rest."""

    step: int
    index: np.ndarray
    generator: torch.Generator
    picker: random.Random


def draw(args: argparse.Namespace, count: int, step: int) -> Draw:
    """The draw of a step among ``count`` items: epochs of permutations."""
    epoch, position = divmod(step, max(1, count // args.batch))
    order = np.random.default_rng([args.seed, epoch]).permutation(count)  # 60,000: under a millisecond
    index = np.sort(order[position * args.batch:(position + 1) * args.batch])
    generator = torch.Generator(DEVICE).manual_seed(args.seed * 1_000_003 + step)
    return Draw(step, index, generator, random.Random(f"{args.seed} {step}"))


def placed(model: nn.Module) -> nn.Module:
    """The model (of transformers) where training happens; on a CPU the fused attention is slow at so few tokens."""
    if DEVICE.type == "cpu":
        model.set_attn_implementation("eager")
    return model.to(DEVICE)


def decayed(module: nn.Module, weight_decay: float = 0.05, spare: tuple[str, ...] = ()) -> list[dict]:
    """Parameter groups for AdamW: matrices decay; vectors, and names that end like ``spare``, do not."""
    learned = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = {n for n, p in learned if p.ndim < 2 or n.endswith(spare)}
    return [{"params": [p for n, p in learned if n not in plain], "weight_decay": weight_decay},
            {"params": [p for n, p in learned if n in plain], "weight_decay": 0.0}]


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    """Move the parameters of ``slow`` towards those of ``fast``, in one fused call."""
    torch._foreach_lerp_(list(slow.parameters()), [p.detach() for p in fast.parameters()], 1 - decay)


def halved(model: nn.Module) -> nn.Module:
    """A copy in half precision, its weights rounded to bfloat16's seven bits of fraction: it packs a third smaller."""
    return copy.deepcopy(model).cpu().bfloat16().half()


def rate(progress: float, step: int, *, warmup: int, hold: float = 0.0, floor: float = 0.01) -> float:
    """Share of the learning rate: warm-up in steps, constant until ``hold`` of the budget, a cosine to ``floor``."""
    tail = min(1.0, max(0.0, (progress - hold) / (1 - hold)))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * tail)))


class Run:
    """One budgeted, logged, resumable training run of ``module`` on ``count`` items by AdamW. With a ``decay``,
    ``average`` is a copy whose weights are a moving average; the decay warms up as min(decay, (1 + s) / (10 + s))."""

    def __init__(self, args: argparse.Namespace, module: nn.Module, count: int, groups: list | None = None, *,
                 betas: tuple[float, float] = (0.9, 0.999), decay: float | None = None, **schedule: float) -> None:
        self.args, self.module, self.count, self.decay, self.schedule = args, module, count, decay, schedule
        self.optimizer = torch.optim.AdamW(groups or decayed(module), lr=args.lr, betas=betas, fused=True)
        self.average = copy.deepcopy(module).eval().requires_grad_(False) if decay else None
        self.step, self.elapsed = 0, 0.0
        self.checkpoint, self.log = args.work / "checkpoint.pt", args.work / "log.jsonl"
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=DEVICE, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        torch.set_rng_state(state["rng"].cpu())
        if self.log.exists():  # steps after the checkpoint are made, and written, again
            rows = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            self.log.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.step), encoding="utf-8")
        print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} min", flush=True)

    @property
    def progress(self) -> float:
        """Used fraction of the budget: of the steps or of the minutes, the larger."""
        return max(self.step / max(1, self.args.steps), self.elapsed / (60 * self.args.minutes))

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "average": self.average and self.average.state_dict(), "elapsed": self.elapsed,
                 "rng": torch.get_rng_state()}
        with written_whole(self.checkpoint) as file:
            torch.save(state, file)

    def fit(self, loss: Callable[[Draw], Tensor], *, after: Callable[[], None] | None = None,
            export: Callable[[Path], None] | None = None, row: int = 100) -> None:
        """Train on ``loss(draw)`` until the budget is used, the gradient's norm cut to 1; ``after()`` follows each
        step. The mean loss is logged each ``row`` steps and at the end; ``export(folder)`` writes the model."""
        args, total, count, saved, last = self.args, 0.0, 0, self.elapsed, time.perf_counter()
        while self.progress < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr * rate(self.progress, self.step, **self.schedule)
            value = loss(draw(args, self.count, self.step))
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.grad is not None], 1.0)
            self.optimizer.step()
            if self.average is not None:
                follow(self.average, self.module, min(self.decay, (1 + self.step) / (10 + self.step)))
            if after:
                after()
            total, count = total + value.detach(), count + 1  # read when a row is written: a GPU is not waited for
            self.step, now = self.step + 1, time.perf_counter()
            self.elapsed, last = self.elapsed + now - last, now
            if self.step % row == 0 or self.progress >= 1:
                written = json.dumps({"step": self.step, "elapsed_s": round(self.elapsed, 1),
                                      "loss": round(float(total) / count, 5), "lr": group["lr"]})
                with self.log.open("a", encoding="utf-8") as file:
                    print(written, file=file)
                print(written, flush=True)
                total, count = 0.0, 0
            if self.elapsed - saved > CHECKPOINT:
                saved = self.elapsed
                self.save()
                if export:
                    export(args.work / "model")
        self.save()
        if export:
            export(args.out)
        print(f"done: {self.step} steps of {args.batch}, {self.elapsed / 60:.1f} min", flush=True)
