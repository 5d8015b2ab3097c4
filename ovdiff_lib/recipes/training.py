"""Loop helpers shared by the mini-world trainers: budget, schedule, log, checkpoint, EMA.

Every trainer is a plain function around one :class:`Run`.  A run stops at a
number of steps or a number of minutes, whichever comes first, and the
learning rate follows the *fraction of the budget used*, so that it anneals to
its floor in both cases. It runs on a GPU where there is one. A call can be told to do a piece of
the budget only; the same call again goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where everything is trained."""

PAUSED = 75
"""Exit status of a trainer that stopped because its piece of time was used, not its budget."""


def training_parser(description: str, *, steps: int, batch: int, minutes: float) -> argparse.ArgumentParser:
    """The options that all trainers share."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with train_images.npy and friends")
    p.add_argument("--out", type=Path, required=True, help="folder that receives the finished model")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoint.pt and log.csv")
    p.add_argument("--steps", type=int, default=steps, help="stop after this many steps")
    p.add_argument("--minutes", type=float, default=minutes, help="stop after this much training time")
    p.add_argument("--piece", type=float, default=math.inf, help="minutes after which this call stops; call it again to go on")
    p.add_argument("--batch", type=int, default=batch)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--checkpoint-minutes", type=float, default=3.0, help="time between two checkpoints")
    p.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32 (CPUs without bf16 units)")
    return p


def mixed(args: argparse.Namespace) -> torch.autocast:
    """The context a forward pass runs in: bfloat16 unless ``--no-bf16`` says otherwise."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16)


def seed_everything(seed: int, threads: int = 1) -> None:
    """Seed torch and fix the thread count."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")


def warmup_cosine(progress: float, step: int, *, warmup: int, floor: float = 0.01) -> float:
    """Linear warm-up in steps, then a cosine over the rest of the budget."""
    ramp = min(1.0, (step + 1) / warmup)
    return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def warmup_hold_cosine(progress: float, step: int, *, warmup: int, hold: float = 0.6, floor: float = 0.02) -> float:
    """Linear warm-up, constant until ``hold`` of the budget, then a cosine to ``floor``."""
    ramp = min(1.0, (step + 1) / warmup)
    tail = min(1.0, max(0.0, (progress - hold) / (1 - hold)))
    return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * tail)))


class EMA:
    """Exponential moving average of a module's parameters and buffers.

    The decay warms up as min(decay, (1 + s) / (10 + s)), so that the average
    forgets the random initialisation quickly.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the current weights (one fused call for all tensors)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [v.detach() for v in module.state_dict().values()], 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Write the average into ``module``."""
        module.load_state_dict(self.shadow)


class Run:
    """One budgeted, logged, resumable training run."""

    def __init__(self, args: argparse.Namespace, module: nn.Module, optimizer: torch.optim.Optimizer,
                 schedule: Callable[[float, int], float], ema: EMA | None = None) -> None:
        self.args, self.module, self.optimizer, self.schedule, self.ema = args, module, optimizer, schedule, ema
        self.base_lr = [g["lr"] for g in optimizer.param_groups]
        self.step, self.elapsed, self.lr = 0, 0.0, 0.0
        self._loss_sum, self._loss_count = 0.0, 0
        self.on_checkpoint: Callable[[], None] | None = None
        args.work.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists():
            self._load()

    @property
    def checkpoint_path(self) -> Path:
        """Where the resumable state lives."""
        return self.args.work / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """Used fraction of the budget: of the steps or of the minutes, the larger."""
        return max(self.step / max(1, self.args.steps), self.elapsed / (60 * self.args.minutes))

    def _load(self) -> None:
        state = torch.load(self.checkpoint_path, map_location=DEVICE, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.shadow = state["ema"]
        self.step, self.elapsed = state["step"], state["elapsed"]
        torch.set_rng_state(state["rng"].cpu())
        self._trim_log()
        print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} min", flush=True)

    def _trim_log(self) -> None:
        """Drop rows from after the checkpoint: the resumed run writes those steps again."""
        path = self.args.work / "log.csv"
        if path.exists():
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [r for r in rows[1:] if int(r.split(",", 1)[0]) <= self.step]
            path.write_text("".join(rows[:1] + kept), encoding="utf-8")

    def save(self) -> None:
        """Write the checkpoint so that a killed process never leaves half of one."""
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "ema": None if self.ema is None else self.ema.shadow, "step": self.step, "elapsed": self.elapsed,
                 "rng": torch.get_rng_state()}
        temporary = self.checkpoint_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint_path)

    def __iter__(self) -> Iterator[int]:
        """Yield step numbers until the budget is used; time, checkpoint and show the bar."""
        last, saved, began = time.perf_counter(), self.elapsed, self.elapsed
        bar = tqdm(total=self.args.steps, initial=self.step, desc=self.args.work.name, mininterval=10, dynamic_ncols=True)
        while self.progress < 1:
            factor = self.schedule(self.progress, self.step)
            for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
                group["lr"] = base * factor
            self.lr = self.base_lr[0] * factor
            yield self.step
            self.step += 1
            now = time.perf_counter()
            self.elapsed, last = self.elapsed + now - last, now
            bar.update()
            if self.elapsed - saved > 60 * self.args.checkpoint_minutes:
                saved = self.elapsed
                self.save()
                if self.on_checkpoint is not None:
                    self.on_checkpoint()
            if self.progress < 1 and self.elapsed - began > 60 * self.args.piece:
                self.save()
                raise SystemExit(PAUSED)
        bar.close()
        if self._loss_count:
            self._write_row({})
        self.save()

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer down ``loss``, its gradient's norm cut to 1; the average follows."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module, self.step)

    def record(self, loss: Tensor, *, every: int = 100, **metrics: float) -> None:
        """Note a step's loss; every ``every`` steps, or with metrics, append a log row.

        The row holds the mean loss since the last row.  Metrics are rare and
        named, so they go into one JSON column and the header never changes.
        """
        self._loss_sum = self._loss_sum + loss  # read when a row is written: a GPU is not waited for at every step
        self._loss_count += 1
        if (self.step + 1) % every and not metrics:
            return
        self._write_row(metrics, ahead=1)

    def _write_row(self, metrics: dict[str, float], ahead: int = 0) -> None:
        """Append one row; ``ahead`` is 1 inside a step, which is counted only after it ends."""
        step = self.step + ahead
        mean = float(self._loss_sum) / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        path = self.args.work / "log.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(["step", "elapsed_s", "loss", "lr", "metrics"])
            writer.writerow([step, f"{self.elapsed:.1f}", f"{mean:.5f}", f"{self.lr:.3e}", json.dumps(metrics)])
        extra = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        print(f"step {step} {self.elapsed / 60:.1f} min loss {mean:.4f} lr {self.lr:.2e} {extra}", flush=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in place of an older one; a reader sees old or new, never half."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def load_data(folder: Path) -> dict:
    """The training set: memory-mapped images u8 (N, S, S, 3), captions, the evaluation split and the nouns."""
    return {
        "images": np.load(folder / "train_images.npy", mmap_mode="r"),
        "captions": json.loads((folder / "train_captions.json").read_text(encoding="utf-8")),
        "eval_images": np.load(folder / "eval_images.npy", mmap_mode="r"),
        "eval_labels": np.load(folder / "eval_labels.npy"),
        "nouns": json.loads((folder / "nouns.json").read_text(encoding="utf-8")),
    }


def decayed(module: nn.Module, weight_decay: float = 0.05, spare: tuple[str, ...] = ()) -> list[dict]:
    """Parameter groups for AdamW: matrices decay; vectors, and names that end like ``spare``, do not."""
    learned = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = {n for n, p in learned if p.ndim < 2 or n.endswith(spare)}
    return [{"params": [p for n, p in learned if n not in plain], "weight_decay": weight_decay},
            {"params": [p for n, p in learned if n in plain], "weight_decay": 0.0}]


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [0, 1], where training happens."""
    return torch.from_numpy(np.array(images)).to(DEVICE).movedim(-1, -3).float() / 255


def shuffled_indices(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices of batch number ``step``: epochs of permutations that depend on seed and epoch alone.

    Being a function of the step, the order survives a resume without any
    sampler state.
    """
    per_epoch = max(1, count // batch)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(count)  # 60,000: under a millisecond
    return np.sort(order[position * batch:(position + 1) * batch])


def round_weights(state: dict[str, Tensor], bits: int = 7) -> dict[str, Tensor]:
    """Float tensors with all but ``bits`` bits of their fraction rounded away: bfloat16's precision in any format.

    Half precision keeps ten; the three zeros let git and archives store a weight in about two thirds of the bytes.
    """
    def rounded(x: Tensor) -> Tensor:
        fraction, exponent = torch.frexp(x.float())
        return torch.ldexp(torch.round(fraction * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent).to(x.dtype)

    return {name: rounded(x) if x.is_floating_point() else x for name, x in state.items()}
