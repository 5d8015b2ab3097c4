"""Train the mini Stable Diffusion UNet and write a ``StableDiffusionPipeline`` folder.

Latents and text states never change, so both are computed once into WORK. The one trick that shapes the attention is
``--ending-dropout`` (PILOTS.md names others). ``--init`` goes on from the UNet of a finished pipeline.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ovdiff_lib.errors import InputError
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_vae import to_signed

NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

PHRASINGS = (0.40, 0.40, 0.05, 0.15)
"""How often each of a scene's captions is used: with its context, the paper's template, bare, and short."""

EMPTY = 0.1  # share of empty captions, for guidance
GAMMA = 5.0  # signal-to-noise ratio above which errors weigh less
AVERAGE = 0.999  # decay of the averaged weights, which are kept


@torch.no_grad()
def encode(encoder: Callable[[int, int], Tensor], name: str, shape: tuple[int, ...], args: argparse.Namespace,
           batch: int = 64) -> np.ndarray:
    """``encoder(start, stop)`` of all rows, float16 of ``shape``, kept in the work folder."""
    def some(rows: range) -> list[np.ndarray]:
        return [encoder(start, min(start + batch, rows.stop)).half().cpu().numpy() for start in rows[::batch]]

    return np.concatenate(training.in_chunks(args, name, shape, 100 * batch, some))


def batches(args: argparse.Namespace, latents: np.ndarray, states: np.ndarray, ends: np.ndarray,
            captions: list[list[str]], place: dict[str, int], predicts: str) -> Callable[[training.Draw], tuple]:
    """What makes a step's batch: noisy latents, timesteps, text states, what is to be predicted, and loss weights.

    Of latents (N, C, h, w) and their captions, text states (P, L, D) with the place of each caption's end token (P,),
    and the row of a caption among the states; ``predicts`` is "v_prediction" or "epsilon".
    """
    # In memory: reading rows scattered over a file is slower than the training step.
    # From the end token on every state repeats the whole caption (the text tower is causal, and padding is end
    # tokens), so a UNet may read the noun there and leave the noun's own token to the background. Many captions get
    # the endings of the empty prompt instead: the word itself is then the one place that names the object.
    latents, states, ends = (torch.from_numpy(array).to(training.DEVICE)
                             for array in (latents, states[:, :args.text_length], ends))
    cumulative = DDPMScheduler(**NOISE).alphas_cumprod.to(training.DEVICE)
    # Nearly clean latents weigh less (min-SNR). The error of v against that of epsilon moves weight to the noisier
    # half, where it is decided what is drawn and where; textures are learned soon enough.
    epsilon, snr = predicts == "epsilon", cumulative / (1 - cumulative)
    weight = (GAMMA / snr).clamp(max=1) if epsilon else ((1 + GAMMA) / (1 + snr)).clamp(max=1)

    def batch(draw: training.Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        picker, on = draw.picker, {"generator": draw.generator, "device": draw.generator.device}
        clean, count = training.rows(latents, draw.index).float(), len(draw.index)
        names = ["" if picker.random() < EMPTY else picker.choices(captions[i], PHRASINGS)[0] for i in draw.index]
        chosen = training.put(torch.tensor([place[name] for name in names]))
        ending = torch.arange(states.shape[1], device=on["device"]) >= ends[chosen][:, None]
        emptied = ending & (torch.rand(count, 1, **on) < args.ending_dropout)
        text = torch.where(emptied[..., None], states[place[""]], states[chosen]).float()
        # One timestep per stratum of the 1,000 lowers the variance of the loss; the shuffle frees it from their order.
        strata = (torch.arange(count, device=on["device"]) + torch.rand(count, **on)) * (len(weight) / count)
        t = strata.long().clamp(max=len(weight) - 1)[torch.randperm(count, **on)]
        noise = torch.randn(clean.shape, **on)
        signal, amount = (share[t].sqrt().view(-1, 1, 1, 1) for share in (cumulative, 1 - cumulative))
        target = noise if epsilon else signal * noise - amount * clean
        return signal * clean + amount * noise, t, text, target, weight[t]

    return batch


def main(argv: list[str] | None = None) -> None:
    parser = training.options(__doc__, steps=40_000, batch=32, minutes=120, lr=1e-3)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained AutoencoderKL")
    parser.add_argument("--clip", type=Path, required=True, help="folder of the trained CLIPModel and tokenizer")
    parser.add_argument("--init", type=Path, help="folder of a pipeline to go on from: its UNet, and what it predicts")
    parser.add_argument("--channels", type=int, nargs=3, default=(64, 128, 192))
    parser.add_argument("--text-length", type=int, default=24, help="tokens of a prompt, with start, end and padding")
    parser.add_argument("--ending-dropout", type=float, default=0.8, help="share of captions whose end says nothing")
    args = training.start(parser, argv)
    images, captions = training.load_scenes(args.data)
    vae = AutoencoderKL.from_pretrained(args.vae).float().eval().to(training.DEVICE)
    clip = CLIPModel.from_pretrained(args.clip).float().eval()
    text_encoder = CLIPTextModel(clip.config.text_config).eval().to(training.DEVICE)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    distinct = ["", *sorted({c for alternatives in captions for c in alternatives} - {""})]
    ends = np.array([len(ids) - 1 for ids in tokenizer(distinct, truncation=True).input_ids])
    if ends.max() >= args.text_length:
        raise InputError(f"--text-length {args.text_length} cuts captions of {ends.max() + 1} tokens: raise it.")

    def latents(start: int, stop: int) -> Tensor:  # scenes are mirrored at random when drawn, so no mirroring here
        with training.mixed():
            mean = vae.encode(to_signed(images[start:stop])).latent_dist.mode()
        return mean.float() * vae.config.scaling_factor

    def states(start: int, stop: int) -> Tensor:  # padded to full length without a mask: ``encode_prompt``'s own recipe
        ids = tokenizer(distinct[start:stop], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return text_encoder(ids.to(training.DEVICE)).last_hidden_state

    side = images.shape[1] // 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (len(images), vae.config.latent_channels, side, side)
    state_shape = (len(distinct), tokenizer.model_max_length, text_encoder.config.hidden_size)
    if args.init:
        predicts = DDPMScheduler.from_pretrained(args.init, subfolder="scheduler").config.prediction_type
        unet = UNet2DConditionModel.from_pretrained(args.init, subfolder="unet").float()
    else:
        # Three blocks down, one in the middle, three up: first, mid, up and last layers mean what they mean in SD.
        predicts, (down, up) = "v_prediction", ((f"CrossAttn{way}Block2D",) * 3 for way in ("Down", "Up"))
        unet = UNet2DConditionModel(sample_size=side, in_channels=latent_shape[1], out_channels=latent_shape[1],
                                    down_block_types=down, up_block_types=up, block_out_channels=tuple(args.channels),
                                    layers_per_block=1, attention_head_dim=4, norm_num_groups=16,
                                    cross_attention_dim=state_shape[2])
    batch = batches(args, encode(latents, "latents", latent_shape, args), encode(states, "states", state_shape, args),
                    ends, captions, {caption: i for i, caption in enumerate(distinct)}, predicts)
    tokenizer = CLIPTokenizer.from_pretrained(args.clip, model_max_length=args.text_length)  # the pipeline pads to this
    vae, text_encoder = vae.cpu().half(), text_encoder.cpu().half()  # from here on only written
    unet = unet.to(training.DEVICE)
    run = training.Run(args, unet, len(images), list(unet.parameters()), betas=(0.9, 0.99), decay=AVERAGE, warmup=200,
                       hold=0.6, floor=0.02)
    if training.DEVICE.type == "cpu":  # up to 256 positions the fused kernel is several times slower backwards there
        unet.set_attn_processor(AttnProcessor())

    def objective(noisy: Tensor, t: Tensor, text: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        predicted = unet(noisy, t, text, return_dict=False)[0].float()
        return ((predicted - target).square().mean(dim=(1, 2, 3)) * weight).mean()

    torch._dynamo.config.suppress_errors = True  # where nothing can be compiled, training is slower, not over
    compiled = torch.compile(objective)

    def loss(draw: training.Draw) -> Tensor:
        made = batch(draw)
        with training.mixed():
            return compiled(*made)

    def export(folder: Path) -> None:
        scheduler = diffusers.DPMSolverMultistepScheduler(**NOISE, solver_order=2, algorithm_type="dpmsolver++",
                                                          steps_offset=1, prediction_type=predicts)
        StableDiffusionPipeline(vae, text_encoder, tokenizer, training.halved(run.average), scheduler, None, None,
                                requires_safety_checker=False).save_pretrained(folder)
        for path in folder.rglob("config.json"):  # where on this machine a part came from is nobody's business
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    run.fit(loss, export=export)


if __name__ == "__main__":
    main()
