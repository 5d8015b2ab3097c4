"""Train the mini Stable Diffusion UNet and write a ``StableDiffusionPipeline`` folder.

``python -m ovdiff_lib.recipes.train_unet --data DIR --vae DIR --clip DIR --out DIR --work DIR``

Latents and text states never change, so both are computed once into WORK.
To train longer, call it again with the same WORK and a larger ``--minutes``. To go on from finished weights, give ``--init`` and a new
WORK; ``--only transformers`` then leaves all other layers but the first and last as they are, byte for byte.
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

from ovdiff_lib.recipes.train_clip import save_text_encoder, save_tokenizer
from ovdiff_lib.recipes.train_vae import to_signed
from ovdiff_lib.recipes.training import (
    EMA,
    Run,
    load_data,
    repeat_rare,
    replace_folder,
    round_weights,
    seed_everything,
    shuffled_indices,
    training_parser,
    warmup_hold_cosine,
)

NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

PHRASINGS = (0.45, 0.30, 0.05, 0.20)
"""How often each of a scene's captions is used: with its context, the paper's template, bare, and with its context in few words."""


def build_unet(channels: tuple[int, ...] = (64, 128, 192), text_width: int = 128) -> UNet2DConditionModel:
    """Three cross-attention blocks down, one in the middle, three up, so that first, mid, up and last layers mean what they mean in SD."""
    levels = len(channels)
    return UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4,
                                down_block_types=("CrossAttnDownBlock2D",) * levels,
                                mid_block_type="UNetMidBlock2DCrossAttn",
                                up_block_types=("CrossAttnUpBlock2D",) * levels, block_out_channels=channels,
                                layers_per_block=1, attention_head_dim=4, norm_num_groups=16,
                                cross_attention_dim=text_width, use_linear_projection=False)


@torch.no_grad()
def encode_images(images: np.ndarray, vae: AutoencoderKL, path: Path, bf16: bool, batch: int = 64) -> np.ndarray:
    """Scaled latent means of every image, float16 (N, 4, 16, 16) on disk.

    Scenes are mirrored at random when drawn, so no mirroring here.
    """
    if not path.exists():
        temporary = path.with_suffix(".tmp.npy")
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(len(images), 4, 16, 16))
        for start in tqdm(range(0, len(images), batch), desc="latents", mininterval=10):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                latents = vae.encode(to_signed(images[start:start + batch])).latent_dist.mode().float()
            out[start:start + batch] = (latents * vae.config.scaling_factor).half().numpy()
        out.flush()
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def encode_captions(captions: list[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel, path: Path, batch: int = 256) -> np.ndarray:
    """Last hidden states, padded to full length without a mask: ``encode_prompt``'s own recipe."""
    shape = (len(captions), tokenizer.model_max_length, encoder.config.hidden_size)
    if not path.exists():
        out = np.zeros(shape, dtype=np.float16)
        for start in tqdm(range(0, len(captions), batch), desc="text states", mininterval=10):
            ids = tokenizer(captions[start:start + batch], padding="max_length", truncation=True, return_tensors="pt").input_ids
            out[start:start + batch] = encoder(ids).last_hidden_state.half().numpy()
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, out)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def write_pipeline(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                   folder: Path) -> None:
    """Write the half-precision pipeline beside ``folder`` first, then move it into place."""
    scheduler = DPMSolverMultistepScheduler(**NOISE, solver_order=2, algorithm_type="dpmsolver++", steps_offset=1)
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
    replace_folder(temporary, folder)


class FrugalAttention:
    """diffusers' plain ``AttnProcessor``, which also notes how much cross-attention went to anything but the start token.

    The start token is the same for every caption, so attending to it says nothing. The training loss charges a little for the rest: words
    are then read where they help to predict the noise, a noun on its object, and not all over the picture.
    """

    def __init__(self) -> None:
        self.spent = None  # scalar, share of attention on words, of the last call

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
                 temb: Tensor | None = None) -> Tensor:
        """(B, hw, C), attending to itself or to (B, tokens, E)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)))
        probabilities = attn.get_attention_scores(query, key)
        if encoder_hidden_states is not None:
            self.spent = 1 - probabilities[..., 0].float().mean()
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(probabilities @ value)))


class Batches:
    """Training batches as a function of the step, so that a resumed run sees the same ones."""

    def __init__(self, args: argparse.Namespace, latents: np.ndarray, states: np.ndarray, ends: np.ndarray, captions: list[list[str]],
                 place: dict[str, int], order: np.ndarray) -> None:
        # In memory: reading rows scattered over a memory map is slower than the training step.
        self.latents, self.states = torch.from_numpy(np.array(latents)), torch.from_numpy(np.array(states[:, :args.text_length]))
        # Position of each caption's end token. From there on every state repeats the whole caption (the text tower is causal, and
        # padding is end tokens), so a UNet may read the noun there and leave the noun's own token to the background. Most captions
        # get the endings of the empty prompt instead: the word itself is then the one place that names the object.
        self.ends, self.ending_dropout = torch.from_numpy(ends), args.ending_dropout
        self.captions, self.place, self.batch, self.seed, self.dropout = captions, place, args.batch, args.seed, args.dropout
        self.order = order  # scenes of an epoch; one that shows a rare noun is there more than once
        cumulative = DDPMScheduler(**NOISE).alphas_cumprod
        self.signal, self.noise = cumulative.sqrt(), (1 - cumulative).sqrt()
        snr = cumulative / (1 - cumulative)
        # Min-SNR-gamma in its epsilon form: nearly clean latents, where epsilon is all but unpredictable, weigh less.
        self.weight = snr.clamp(max=args.gamma) / snr

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, text states, the noise and the loss weights of ``step``."""
        picker = random.Random(f"{self.seed} {step}")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        index = self.order[shuffled_indices(len(self.order), self.batch, self.seed, step)]
        count = len(index)
        clean = self.latents[torch.from_numpy(index)].float()
        alternatives = [self.captions[i] for i in index]
        names = ["" if picker.random() < self.dropout else picker.choices(c, PHRASINGS[:len(c)])[0] for c in alternatives]
        chosen = torch.tensor([self.place[n] for n in names])
        text = self.states[chosen].float()
        ending = torch.arange(text.shape[1]) >= self.ends[chosen][:, None]
        emptied = ending & (torch.rand(count, 1, generator=generator) < self.ending_dropout)
        text = torch.where(emptied[..., None], self.states[self.place[""]].float(), text)
        # One timestep per stratum of the 1,000 lowers the variance of the loss; the shuffle frees it from the image order.
        strata = (torch.arange(count) + torch.rand(count, generator=generator)) * (len(self.weight) / count)
        t = strata.long().clamp(max=len(self.weight) - 1)[torch.randperm(count, generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = self.signal[t].view(-1, 1, 1, 1) * clean + self.noise[t].view(-1, 1, 1, 1) * noise
        return noisy, t, text, noise, self.weight[t]


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training_parser(__doc__, steps=40_000, batch=32, minutes=120)
    parser.set_defaults(threads=2)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained AutoencoderKL")
    parser.add_argument("--clip", type=Path, required=True, help="folder of the trained CLIPModel and tokenizer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--channels", type=int, nargs=3, default=(64, 128, 192))
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions, for guidance")
    parser.add_argument("--text-length", type=int, default=24, help="tokens of a prompt, start, end and padding counted")
    parser.add_argument("--ending-dropout", type=float, default=0.8, help="share of captions whose end and padding say nothing")
    parser.add_argument("--attention-price", type=float, default=0.01, help="loss for each unit of cross-attention on words")
    parser.add_argument("--gamma", type=float, default=5.0, help="min-SNR-gamma")
    parser.add_argument("--init", type=Path, help="folder of a trained UNet to go on from")
    parser.add_argument("--only", choices=("all", "transformers"), default="all", help="which weights are trained")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(argv)
    seed_everything(args.seed, args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data = load_data(args.data)
    captions = data["captions"]

    vae = AutoencoderKL.from_pretrained(args.vae).float().eval()
    clip = CLIPModel.from_pretrained(args.clip).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    save_text_encoder(clip, args.work / "text_encoder")
    text_encoder = CLIPTextModel.from_pretrained(args.work / "text_encoder").float().eval()
    distinct = ["", *sorted({c for alternatives in captions for c in alternatives} - {""})]
    latents = encode_images(data["images"], vae, args.work / "latents.npy", args.bf16)
    states = encode_captions(distinct, tokenizer, text_encoder, args.work / "states.npy")
    if len(latents) != len(captions) or len(states) != len(distinct):
        raise SystemExit(f"{args.work} holds latents or text states of other data: delete *.npy there")
    ends = np.array([len(ids) - 1 for ids in tokenizer(distinct, truncation=True).input_ids])
    if ends.max() >= args.text_length:
        raise SystemExit(f"--text-length {args.text_length} cuts captions of {ends.max() + 1} tokens: raise it")
    batches = Batches(args, latents, states, ends, captions, {c: i for i, c in enumerate(distinct)},
                      repeat_rare(captions, data["nouns"]))
    tokenizer = CLIPTokenizer.from_pretrained(args.clip, model_max_length=args.text_length)  # the pipeline pads to this
    vae, text_encoder = vae.half(), text_encoder.half()  # from here on only written

    if args.init:
        unet = UNet2DConditionModel.from_pretrained(args.init).float()
        unet.requires_grad_(args.only == "all")
        for part in (m for n, m in unet.named_modules() if n.endswith("attentions") or n in ("conv_in", "conv_out")):
            part.requires_grad_(True)
    else:
        unet = build_unet(tuple(args.channels), text_encoder.config.hidden_size)
    smooth = build_unet(tuple(args.channels), text_encoder.config.hidden_size).eval()  # receives the averaged weights
    # Plain attention: at 256 positions and fewer the fused CPU kernel is several times slower backwards.
    readers = []
    for name, module in unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            module.set_processor(FrugalAttention() if name.endswith(".attn2") else AttnProcessor())
            readers += [module.processor] if name.endswith(".attn2") else []
    learned = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMA(unet, 0.999)
    run = Run(args, unet, optimizer, lambda p, s: warmup_hold_cosine(p, s, warmup=200), ema)

    trained = {name for name, p in unet.named_parameters() if p.requires_grad}

    def export(folder: Path) -> None:
        ema.copy_to(smooth)
        smooth.load_state_dict(round_weights({n: x for n, x in smooth.state_dict().items() if n in trained}), strict=False)
        write_pipeline(smooth, vae, text_encoder, tokenizer, folder)

    run.on_checkpoint = lambda: export(args.work / "pipeline")

    def objective(noisy: Tensor, t: Tensor, text: Tensor, noise: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        predicted = unet(noisy, t, text, return_dict=False)[0].float()
        error = ((predicted - noise).square().mean(dim=(1, 2, 3)) * weight).mean()
        return error, torch.stack([reader.spent for reader in readers]).mean()

    compiled = torch.compile(objective) if args.compile else objective
    (args.work / "settings.json").write_text(json.dumps(vars(args), default=str, indent=1), encoding="utf-8")
    for step in run:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            error, spent = compiled(*batches(step))
        loss = error + args.attention_price * spent
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.update(unet, step)
        run.record(error.detach(), **({"attention_on_words": float(spent)} if (step + 1) % 100 == 0 else {}))
    export(args.out)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, batch {args.batch}", flush=True)


if __name__ == "__main__":
    main()
