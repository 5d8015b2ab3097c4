"""Train the mini Stable Diffusion UNet and write a ``StableDiffusionPipeline`` folder.

``python -m ovdiff_lib.recipes.train_unet --data DIR --vae DIR --clip DIR --out DIR --work DIR``

Latents and text states never change, so both are computed once into WORK. Nothing in the loss shapes the attention: a
price on attending to words, tried before, starved them while the model learned to draw. The one trick is
``--ending-dropout``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ovdiff_lib.errors import InputError
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_clip import save_text_encoder, save_tokenizer
from ovdiff_lib.recipes.train_vae import to_signed

NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

PHRASINGS = (0.40, 0.40, 0.05, 0.15)
"""How often each of a scene's captions is used: with its context, the paper's template, bare, and short."""


def build_unet(channels: tuple[int, ...], text_width: int, latent_channels: int, size: int) -> UNet2DConditionModel:
    """Three cross-attention blocks down, one in the middle, three up, so that first, mid, up and last layers mean
    what they mean in SD."""
    levels = len(channels)
    return UNet2DConditionModel(sample_size=size, in_channels=latent_channels, out_channels=latent_channels,
                                down_block_types=("CrossAttnDownBlock2D",) * levels,
                                mid_block_type="UNetMidBlock2DCrossAttn",
                                up_block_types=("CrossAttnUpBlock2D",) * levels, block_out_channels=channels,
                                layers_per_block=1, attention_head_dim=4, norm_num_groups=16,
                                cross_attention_dim=text_width, use_linear_projection=False)


@torch.no_grad()
def encode_images(images: np.ndarray, vae: AutoencoderKL, path: Path, args: argparse.Namespace, batch: int = 64) -> np.ndarray:
    """Scaled latent means of every image, float16 (N, C, h, w) on disk.

    Scenes are mirrored at random when drawn, so no mirroring here. A call that was stopped goes on where it was.
    """
    side = images.shape[1] // 2 ** (len(vae.config.block_out_channels) - 1)
    shape, part, done = (len(images), vae.config.latent_channels, side, side), path.with_suffix(".part.npy"), path.with_suffix(".count")
    if not path.exists():
        first = int(done.read_text()) if done.exists() else 0
        out = np.lib.format.open_memmap(part, mode="r+" if first else "w+", dtype=np.float16, shape=shape)
        for start in tqdm(range(first, len(images), batch), desc="latents", mininterval=10):
            with training.mixed(args):
                latents = vae.encode(to_signed(images[start:start + batch])).latent_dist.mode().float()
            out[start:start + batch] = (latents * vae.config.scaling_factor).half().cpu().numpy()
            if start // batch % 100 == 99:
                out.flush()
                done.write_text(str(start + batch))
        out.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def encode_captions(captions: list[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel, path: Path, batch: int = 256) -> np.ndarray:
    """Last hidden states, padded to full length without a mask: ``encode_prompt``'s own recipe."""
    shape = (len(captions), tokenizer.model_max_length, encoder.config.hidden_size)
    if not path.exists():
        out = np.zeros(shape, dtype=np.float16)
        for start in tqdm(range(0, len(captions), batch), desc="text states", mininterval=10):
            ids = tokenizer(captions[start:start + batch], padding="max_length", truncation=True, return_tensors="pt").input_ids
            out[start:start + batch] = encoder(ids.to(training.DEVICE)).last_hidden_state.half().cpu().numpy()
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, out)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def write_pipeline(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                   folder: Path) -> None:
    """Write the half-precision pipeline beside ``folder`` first, then move it into place."""
    scheduler = DPMSolverMultistepScheduler(**NOISE, solver_order=2, algorithm_type="dpmsolver++", steps_offset=1,
                                            prediction_type="v_prediction")
    half = UNet2DConditionModel.from_config(unet.config)
    half.load_state_dict(unet.state_dict())
    pipeline = StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=half.half(),
                                       scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(temporary)
    for path in temporary.rglob("config.json"):  # where on this machine a part came from is nobody's business
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({k: v for k, v in config.items() if k != "_name_or_path"}, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, temporary / "tokenizer")
    training.replace_folder(temporary, folder)


class Batches:
    """Training batches as a function of the step, so that a resumed run sees the same ones."""

    def __init__(self, args: argparse.Namespace, latents: np.ndarray, states: np.ndarray, ends: np.ndarray, captions: list[list[str]],
                 place: dict[str, int]) -> None:
        # In memory: reading rows scattered over a memory map is slower than the training step.
        self.latents = torch.from_numpy(np.array(latents)).to(training.DEVICE)
        self.states = torch.from_numpy(np.array(states[:, :args.text_length])).to(training.DEVICE)
        # Position of each caption's end token. From there on every state repeats the whole caption (the text tower is
        # causal, and padding is end tokens), so a UNet may read the noun there and leave the noun's own token to the
        # background. Many captions get the endings of the empty prompt instead: the word itself is then the one place
        # that names the object.
        self.ends, self.ending_dropout = torch.from_numpy(ends), args.ending_dropout
        self.captions, self.place, self.batch, self.seed, self.dropout = captions, place, args.batch, args.seed, args.dropout
        cumulative = DDPMScheduler(**NOISE).alphas_cumprod
        self.signal, self.noise = cumulative.sqrt(), (1 - cumulative).sqrt()
        # The error of v, but nearly clean latents weigh less. Against the error of epsilon this moves weight to the
        # noisier half, where it is decided what is drawn and where; textures are learned soon enough.
        self.weight = ((1 + args.gamma) * (1 - cumulative)).clamp(max=1)  # 1 - cumulative is 1 / (1 + SNR)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, text states, v (what is to be predicted) and the loss weights of ``step``."""
        picker = random.Random(f"{self.seed} {step}")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        index = training.shuffled_indices(len(self.latents), self.batch, self.seed, step)
        count = len(index)
        clean = self.latents[torch.from_numpy(index).to(training.DEVICE)].float()
        names = ["" if picker.random() < self.dropout else picker.choices(self.captions[i], PHRASINGS)[0] for i in index]
        chosen = torch.tensor([self.place[n] for n in names])
        ending = torch.arange(self.states.shape[1]) >= self.ends[chosen][:, None]
        emptied = (ending & (torch.rand(count, 1, generator=generator) < self.ending_dropout)).to(training.DEVICE)
        text = torch.where(emptied[..., None], self.states[self.place[""]], self.states[chosen.to(training.DEVICE)]).float()
        # One timestep per stratum of the 1,000 lowers the variance of the loss; the shuffle frees it from the image
        # order.
        strata = (torch.arange(count) + torch.rand(count, generator=generator)) * (len(self.weight) / count)
        t = strata.long().clamp(max=len(self.weight) - 1)[torch.randperm(count, generator=generator)]
        noise = torch.randn(clean.shape, generator=generator).to(training.DEVICE)
        signal, amount, weight = (table[t].to(training.DEVICE) for table in (self.signal, self.noise, self.weight))
        signal, amount = signal.view(-1, 1, 1, 1), amount.view(-1, 1, 1, 1)
        return signal * clean + amount * noise, t.to(training.DEVICE), text, signal * noise - amount * clean, weight


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.training_parser(__doc__, steps=40_000, batch=32, minutes=120)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained AutoencoderKL")
    parser.add_argument("--clip", type=Path, required=True, help="folder of the trained CLIPModel and tokenizer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--channels", type=int, nargs=3, default=(64, 128, 192))
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions, for guidance")
    parser.add_argument("--text-length", type=int, default=24, help="tokens of a prompt, start, end and padding counted")
    parser.add_argument("--ending-dropout", type=float, default=0.8, help="share of captions whose end and padding say nothing")
    parser.add_argument("--gamma", type=float, default=5.0, help="signal-to-noise ratio from which on errors weigh less")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights, which are what is kept")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(argv)
    training.seed_everything(args.seed, args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data = training.load_data(args.data)
    captions = data["captions"]

    vae = AutoencoderKL.from_pretrained(args.vae).float().eval().to(training.DEVICE)
    clip = CLIPModel.from_pretrained(args.clip).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    save_text_encoder(clip, args.work / "text_encoder")
    text_encoder = CLIPTextModel.from_pretrained(args.work / "text_encoder").float().eval().to(training.DEVICE)
    distinct = ["", *sorted({c for alternatives in captions for c in alternatives} - {""})]
    ends = np.array([len(ids) - 1 for ids in tokenizer(distinct, truncation=True).input_ids])
    if ends.max() >= args.text_length:
        raise InputError(f"--text-length {args.text_length} cuts captions of {ends.max() + 1} tokens: raise it.")
    latents = encode_images(data["images"], vae, args.work / "latents.npy", args)
    states = encode_captions(distinct, tokenizer, text_encoder, args.work / "states.npy")
    if len(latents) != len(captions) or len(states) != len(distinct):
        raise InputError(f"{args.work} holds latents or text states of other data: delete *.npy there.")
    batches = Batches(args, latents, states, ends, captions, {c: i for i, c in enumerate(distinct)})
    tokenizer = CLIPTokenizer.from_pretrained(args.clip, model_max_length=args.text_length)  # the pipeline pads to this
    vae, text_encoder = vae.cpu().half(), text_encoder.cpu().half()  # from here on only written

    shape = tuple(args.channels), text_encoder.config.hidden_size, *latents.shape[1:3]
    unet, smooth = (build_unet(*shape).to(training.DEVICE) for _ in range(2))
    smooth.eval()  # receives the averaged weights
    if training.DEVICE.type == "cpu":  # at 256 positions and fewer the fused kernel is several times slower backwards there
        unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = training.EMA(unet, args.average)
    run = training.Run(args, unet, optimizer, lambda p, s: training.warmup_hold_cosine(p, s, warmup=200), ema)

    def export(folder: Path) -> None:
        ema.copy_to(smooth)
        smooth.load_state_dict(training.round_weights(smooth.state_dict()))
        write_pipeline(smooth, vae, text_encoder, tokenizer, folder)

    run.on_checkpoint = lambda: export(args.work / "pipeline")

    def objective(noisy: Tensor, t: Tensor, text: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        predicted = unet(noisy, t, text, return_dict=False)[0].float()
        return ((predicted - target).square().mean(dim=(1, 2, 3)) * weight).mean()

    compiled = torch.compile(objective) if args.compile else objective
    (args.work / "settings.json").write_text(json.dumps(vars(args), default=str, indent=1), encoding="utf-8")
    for step in run:
        with training.mixed(args):
            loss = compiled(*batches(step))
        run.update(loss)
        run.record(loss.detach())
    export(args.out)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, batch {args.batch}", flush=True)


if __name__ == "__main__":
    main()
