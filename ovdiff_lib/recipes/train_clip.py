"""Train the mini CLIP (a real ``transformers.CLIPModel``) and its BPE tokenizer.

Its text tower is the mini Stable Diffusion's text encoder, too: the tokenizer is written in ``CLIPTokenizer`` format.
"""

import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel

from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_vae import crops

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
DROPPED = 0.5  # share of an image's patches that a training step leaves out


def build_tokenizer(captions: list[list[str]], nouns: list[str], folder: Path, vocab_size: int = 1500) -> CLIPTokenizer:
    """Train a byte-level BPE on captions and write it in ``CLIPTokenizer`` format.

    All 256 bytes are there with and without the end-of-word suffix, so that any text tokenises. The end token gets the
    LARGEST id: transformers pools text at ``argmax(id)`` with the legacy ``eos_token_id=2``, else at the end token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = CLIPTokenizer().backend_tokenizer  # CLIP's own normaliser and word pattern
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(alphabet) - 2, min_frequency=2, show_progress=False,
                                  end_of_word_suffix="</w>", initial_alphabet=alphabet)
    # Each distinct caption a few times at most: frequent templates must not crowd rare nouns out of the vocabulary.
    counts = Counter(c for alternatives in captions for c in alternatives)
    bpe.train_from_iterator([c for c, n in sorted(counts.items()) for _ in range(min(n, 4))] + nouns * 4, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(symbols), BOS, EOS])}
    for length in (32, 48, 64, 77):
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
        longest = sorted(nouns, key=lambda n: -len(tokenizer(n).input_ids))[:10]
        if len(tokenizer(" and ".join(longest)).input_ids) <= length:
            break
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def caption_ids(captions: list[list[str]], tokenizer: CLIPTokenizer) -> dict[str, list[int]]:
    """The token ids of every caption that occurs."""
    distinct = sorted({c for alternatives in captions for c in alternatives})
    return dict(zip(distinct, tokenizer(distinct, truncation=True).input_ids, strict=True))


def phrased(captions: list[list[str]], phrasing: int) -> tuple[list[str], Tensor]:
    """The distinct captions of a batch, sorted, and each image's number among them.

    One phrasing for the whole batch: "dog" must not be the negative of an image captioned "a good picture of a dog".
    """
    chosen = [alternatives[min(phrasing, len(alternatives) - 1)] for alternatives in captions]
    place = {caption: i for i, caption in enumerate(sorted(set(chosen)))}
    return list(place), training.put(torch.tensor([place[caption] for caption in chosen]))


def pad_ids(ids: list[list[int]], pad: int) -> Tensor:
    """Right-pad to the longest of the batch: attention is causal, the first end token pools; more only costs time."""
    return training.put(nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), batch_first=True, padding_value=pad))


def token_ids(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """What the configuration of a text tower says of its tokens; pooling reads it, and none is left at CLIP's 49407."""
    return {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}}


def drop_patches(model: CLIPModel) -> None:
    """While ``model`` trains, its image tower misses a random :data:`DROPPED` of the patches (Li et al., 2023)."""
    def drop(module: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        if not model.training:
            return tokens
        count, length, width = tokens.shape
        order = torch.rand(count, length - 1, device=tokens.device).argsort(1)
        kept = order[:, :round((1 - DROPPED) * (length - 1))] + 1
        kept = torch.cat([kept.new_zeros(count, 1), kept], dim=1)  # the class token stays
        return tokens.gather(1, kept[..., None].expand(-1, -1, width))

    model.vision_model.embeddings.register_forward_hook(drop)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, shift by up to a tenth of a side (reflected edges) and jitter light; floats (B, 3, S, S) in [0, 1]."""
    side = images.shape[-1]
    padded = F.pad(images, (side // 10,) * 4, mode="reflect")
    shifted = crops(padded.movedim(1, -1), side, generator).movedim(-1, 1)
    contrast, brightness = torch.rand(2, len(images), 1, 1, 1, generator=generator, device=images.device)
    mean = shifted.mean(dim=(1, 2, 3), keepdim=True)
    return ((shifted - mean) * (0.8 + 0.4 * contrast) + mean + 0.2 * brightness - 0.1).clamp(0, 1)


def contrastive_loss(image: Tensor, text: Tensor, group: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over distinct captions; images with one caption share their target.

    ``text`` holds each distinct caption once, ``group[i]`` is image i's: CLIP's loss over all pairs, with fewer texts.
    """
    logits = scale * image @ text.T
    counts = torch.bincount(group, minlength=len(text)).float()
    # Repeated captions count once per image in the softmax, as in the all-pairs form.
    to_text = F.cross_entropy(logits + counts.log(), group) + counts[group].log().mean()
    to_image = -logits.T.log_softmax(dim=-1)[group, torch.arange(len(image), device=image.device)].mean()
    return 0.5 * (to_text + to_image)


def embeddings(model: PreTrainedModel, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors f32 (B, D) of images and (P, D) of texts, by a CLIP or GroupViT."""
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(input_ids=tokens).pooler_output
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


@torch.no_grad()
def limit_scale(model: PreTrainedModel) -> None:
    """CLIP's upper limit of the logits' scale, 100."""
    model.logit_scale.clamp_(max=math.log(100))


def main(argv: list[str] | None = None) -> None:
    args = training.start(training.options(__doc__, steps=6000, batch=128, minutes=40, lr=1e-3), argv)
    images, captions = training.load_scenes(args.data)
    tokenizer = build_tokenizer(captions, json.loads((args.data / "nouns.json").read_text(encoding="utf-8")), args.out)
    print(f"vocabulary {len(tokenizer)}, length {tokenizer.model_max_length}", flush=True)
    ids = caption_ids(captions, tokenizer)
    text = token_ids(tokenizer) | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
                                   "num_attention_heads": 4, "projection_dim": 128, "hidden_act": "quick_gelu"}
    vision = {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 5,
              "image_size": images.shape[1], "patch_size": 8, "projection_dim": 128, "hidden_act": "quick_gelu"}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, logit_scale_init_value=math.log(14))
    model = training.placed(CLIPModel(config).train())
    drop_patches(model)
    run = training.Run(args, model, len(images), betas=(0.9, 0.98), warmup=200)

    def loss(draw: training.Draw) -> Tensor:
        texts, group = phrased([captions[i] for i in draw.index], draw.picker.randrange(4))
        scene = training.to_float(training.rows(images, draw.index))
        pixels = training.normalise(augment(scene, draw.generator), CLIP_MEAN, CLIP_STD)
        tokens = pad_ids([ids[text] for text in texts], tokenizer.pad_token_id)
        with training.mixed():
            image, text = embeddings(model, pixels, tokens)
        return contrastive_loss(image, text, group, model.logit_scale.exp())

    run.fit(loss, after=lambda: limit_scale(model))
    model.cpu().half().save_pretrained(args.out)  # all ten bits of its fractions


if __name__ == "__main__":
    main()
