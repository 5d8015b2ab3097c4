"""Train the mini CLIP (a real ``transformers.CLIPModel``) and its BPE tokenizer.

``python -m ovdiff_lib.recipes.train_clip --data DIR --out DIR --work DIR``

The text tower is the text encoder of the mini Stable Diffusion as well, so the
tokenizer is written in ``CLIPTokenizer`` format.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
)

from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.recipes import training

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEMPLATE = "a good picture of a {}"


def build_tokenizer(captions: list[list[str]], nouns: list[str], folder: Path, vocab_size: int = 1500) -> CLIPTokenizer:
    """Train a byte-level BPE on captions and write it in ``CLIPTokenizer`` format.

    All 256 byte symbols are present with and without the end-of-word suffix,
    so that any text tokenises.  The end token gets the LARGEST id: with the
    legacy ``eos_token_id=2`` transformers pools text at ``argmax(id)``, and
    with the true id at the first end token; here both are the same place.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    counts = Counter(c for alternatives in captions for c in alternatives)
    splitter = CLIPTokenizer().backend_tokenizer  # CLIP's own normaliser and word pattern
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(alphabet) - 2, min_frequency=2, end_of_word_suffix="</w>",
                                  initial_alphabet=alphabet, show_progress=False)
    # Each distinct caption a few times at most: frequent templates must not crowd rare nouns out of the vocabulary.
    lines = [c for c, n in sorted(counts.items()) for _ in range(min(n, 4))] + nouns * 4
    bpe.train_from_iterator(lines, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]

    vocab = [*alphabet, *(a + "</w>" for a in alphabet)]
    seen = set(vocab)
    for left, right in merges:
        if left + right not in seen:
            seen.add(left + right)
            vocab.append(left + right)
    vocab += [BOS, EOS]

    folder.mkdir(parents=True, exist_ok=True)
    for length in (32, 48, 64, 77):
        tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=merges, model_max_length=length)
        longest = sorted(nouns, key=lambda n: -len(tokenizer(n).input_ids))[:10]
        if len(tokenizer(" and ".join(longest)).input_ids) <= length:
            break
    save_tokenizer(tokenizer, folder)
    return CLIPTokenizer.from_pretrained(folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json and the two classic files, which older transformers and open_clip read."""
    tokenizer.save_pretrained(folder)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = dict(sorted(bpe["vocab"].items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = (" ".join(pair) + "\n" for pair in bpe["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8")


def build_clip(tokenizer: CLIPTokenizer, size: int, hidden: int = 160, layers: int = 5) -> CLIPModel:
    """A CLIPModel for images of ``size`` px with the token ids of ``tokenizer``."""
    # Both in the text section (which pooling reads) and nowhere left at CLIP's 49407.
    text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": tokenizer.model_max_length, "projection_dim": 128,
            "hidden_act": "quick_gelu", "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
              "num_attention_heads": hidden // 32, "image_size": size, "patch_size": 8, "projection_dim": 128,
              "hidden_act": "quick_gelu"}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, logit_scale_init_value=float(np.log(14)))
    return CLIPModel(config)


class QuickGELU(nn.Module):
    """CLIP's ``x * sigmoid(1.702 x)`` by the fused SiLU kernel, which has a fused backward too."""

    def forward(self, x: Tensor) -> Tensor:
        """Same values as ``quick_gelu``."""
        return F.silu(1.702 * x) / 1.702


def speed_up(model: CLIPModel) -> None:
    """Halve the CPU step time without changing the function.

    The flash attention kernel is slow backwards on CPUs at so few tokens, and the
    stock quick-GELU makes three passes over memory.
    """
    if training.DEVICE.type == "cpu":
        model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = QuickGELU()


def drop_patches(model: CLIPModel, share: float) -> None:
    """While ``model`` trains, its image tower sees all but ``share`` of an image's patches, others in every image
    (Li et al., 2023)."""
    def drop(module: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        if not model.training or not share:
            return tokens
        count, length, width = tokens.shape
        kept = torch.rand(count, length - 1, device=tokens.device).argsort(1)[:, :round((1 - share) * (length - 1))] + 1
        kept = torch.cat([kept.new_zeros(count, 1), kept], dim=1)  # the class token stays
        return tokens.gather(1, kept[..., None].expand(-1, -1, width))

    model.vision_model.embeddings.register_forward_hook(drop)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, shift by up to a tenth of a side (reflected edges) and jitter light; floats in [0, 1], on the images'
    device."""
    count, _, height, width = images.shape
    pad, device = height // 10, images.device
    flip = (torch.rand(count, generator=generator) < 0.5).to(device)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    rows = top[:, None, None] + torch.arange(height)[None, :, None]
    columns = left[:, None, None] + torch.arange(width)[None, None, :]
    shifted = padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    contrast = (0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)).to(device)
    brightness = (0.2 * torch.rand(count, 1, 1, 1, generator=generator) - 0.1).to(device)
    mean = shifted.mean(dim=(1, 2, 3), keepdim=True)
    return ((shifted - mean) * contrast + mean + brightness).clamp(0, 1)


def normalise(images: Tensor) -> Tensor:
    """Apply CLIP's mean and deviation."""
    mean, deviation = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / deviation


def pad_ids(ids: list[list[int]], pad: int) -> Tensor:
    """Right-pad to the longest of the batch.

    Attention is causal and pooling is at the first end token, so what follows
    it never reaches the pooled feature: padding further would only cost time.
    """
    length = max(map(len, ids))
    return torch.tensor([i + [pad] * (length - len(i)) for i in ids], device=training.DEVICE)


def contrastive_loss(image: Tensor, text: Tensor, group: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over distinct captions; images with one caption share their target.

    ``text`` holds each distinct caption once and ``group[i]`` is image i's.
    This equals CLIP's loss over all pairs with targets spread evenly over
    identical captions, but encodes each caption once.
    """
    logits = scale * image @ text.T
    counts = torch.bincount(group, minlength=len(text)).float()
    # Repeated captions count once per image in the softmax, as in the all-pairs form.
    to_text = F.cross_entropy(logits + counts.log(), group) + counts[group].log().mean()
    log_probability = logits.T.log_softmax(dim=-1)
    to_image = -log_probability[group, torch.arange(len(image), device=image.device)].mean()
    return 0.5 * (to_text + to_image)


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, labels: np.ndarray, nouns: list[str]) -> float:
    """Top-1 accuracy with the prompt 'a good picture of a ...'."""
    model.eval()
    prompts = pad_ids([tokenizer(TEMPLATE.format(n)).input_ids for n in nouns], tokenizer.pad_token_id)
    text = F.normalize(model.get_text_features(input_ids=prompts).pooler_output, dim=-1)
    correct = 0
    for start in range(0, len(images), 256):
        pixels = normalise(training.to_float(images[start:start + 256]))
        features = model.get_image_features(pixel_values=pixels).pooler_output
        correct += int(((features @ text.T).argmax(-1).cpu().numpy() == labels[start:start + 256]).sum())
    model.train()
    return correct / len(images)


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Write the model (half precision) and the image processor; the tokenizer is there already."""
    half = CLIPModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    size = model.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=list(CLIP_MEAN),
                       image_std=list(CLIP_STD)).save_pretrained(folder)


def save_text_encoder(clip: CLIPModel, path: Path) -> CLIPTextModel:
    """Write the text tower as the ``text_encoder`` of a StableDiffusionPipeline."""
    encoder = CLIPTextModel(clip.config.text_config)
    target = encoder.state_dict()
    source = clip.text_model.state_dict()
    # transformers 4 nests the tower as `text_model.`; transformers 5 does not.
    nested = any(k.startswith("text_model.") for k in target)
    state = {("text_model." + k if nested else k): v for k, v in source.items()}
    encoder.load_state_dict({k: v for k, v in state.items() if k in target})
    encoder.half().save_pretrained(path)
    return encoder


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.training_parser(__doc__, steps=6000, batch=128, minutes=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=160, help="image tower width")
    parser.add_argument("--layers", type=int, default=5, help="image tower layers")
    parser.add_argument("--drop", type=float, default=0.5, help="share of an image's patches that a training step leaves out")
    args = parser.parse_args(argv)
    training.seed_everything(args.seed, args.threads)
    data = training.load_data(args.data)
    nouns, captions = data["nouns"], data["captions"]
    tokenizer = build_tokenizer(captions, nouns, args.out)
    single = sum(len(tokenizer(n).input_ids) == 2 + len(n.split()) for n in nouns)
    print(f"vocabulary {len(tokenizer)}, length {tokenizer.model_max_length}, whole-word nouns {single}/{len(nouns)}", flush=True)
    distinct = sorted({c for alternatives in captions for c in alternatives})
    ids = dict(zip(distinct, tokenizer(distinct, truncation=True).input_ids, strict=True))

    model = build_clip(tokenizer, data["images"].shape[1], args.width, args.layers).to(training.DEVICE)
    drop_patches(model, args.drop)
    optimizer = torch.optim.AdamW(training.decayed(model), lr=args.lr, betas=(0.9, 0.98), fused=True)
    run = training.Run(args, model, optimizer, lambda p, s: training.warmup_cosine(p, s, warmup=200))
    speed_up(model)
    model.train()
    for step in run:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picker = random.Random(f"{args.seed} {step}")
        index = training.shuffled_indices(len(data["images"]), args.batch, args.seed, step)
        # One phrasing for the whole batch: "dog" must not be the negative of an image captioned "a good picture of a
        # dog".
        phrasing = picker.randrange(4)
        chosen = [captions[i][min(phrasing, len(captions[i]) - 1)] for i in index]
        unique = sorted(set(chosen))
        place = {c: i for i, c in enumerate(unique)}
        group = torch.tensor([place[c] for c in chosen], device=training.DEVICE)
        pixels = normalise(augment(training.to_float(data["images"][index]), generator))
        tokens = pad_ids([ids[c] for c in unique], tokenizer.pad_token_id)
        with training.mixed(args):
            image = model.get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(input_ids=tokens).pooler_output
        loss = contrastive_loss(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), group,
                                model.logit_scale.exp())
        run.update(loss)
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        metrics = {}
        if (step + 1) % 500 == 0:
            metrics["zero_shot"] = zero_shot(model, tokenizer, data["eval_images"], data["eval_labels"], nouns)
        run.record(loss.detach(), **metrics)
    top1 = zero_shot(model, tokenizer, data["eval_images"], data["eval_labels"], nouns)
    save_clip(model, args.out)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, zero-shot top-1 {top1:.4f}", flush=True)


if __name__ == "__main__":
    main()
