"""Train the mini GroupViT (a real ``transformers.GroupViTModel``) on the captions of the mini world; no mask is read.

``python -m ovdiff_lib.recipes.train_groupvit --data DIR --out DIR --work DIR --clip DIR``

The two losses of Xu et al. (2022, Sec. 3.3): images against captions, and images against a prompt for each thing their
caption names. The tokenizer is the mini CLIP's. Nouns of held-out scenes are read only to log an accuracy.
"""

from __future__ import annotations

import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTokenizer, GroupViTConfig, GroupViTModel

from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.recipes import training
from ovdiff_lib.recipes.train_clip import TEMPLATE, augment, contrastive_loss, pad_ids
from ovdiff_lib.recipes.train_dino import normalise

TEMPLATES = ("a picture of a {}", TEMPLATE, "{}", "a {}")
"""How the captions speak of a thing; number i belongs to the i-th alternative of a scene's captions."""

SHARP = ("assign.q_proj.weight", "assign.k_proj.weight")
"""Weights that decide which group a patch goes to. They start large and do not decay: training adds Gumbel noise to
their product, and where that is fainter than the noise, groups take patches at random, which a pooled image
embedding does not mind but segmentation does."""

SHARP_STD = 0.25
SMALLEST = 0.7  # side of the smallest part of a scene that is shown enlarged, so that the smaller windows of segmentation are known
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def build_groupvit(tokenizer: CLIPTokenizer, width: int = 64, depths: tuple[int, ...] = (3, 1), groups: tuple[int, ...] = (8, 4),
                   size: int = 64, patch: int = 8) -> GroupViTModel:
    """A GroupViTModel with the token ids of ``tokenizer``; a stage has ``depths`` blocks and then forms ``groups``
    groups."""
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": tokenizer.model_max_length, "hidden_act": "gelu", "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": sum(depths), "depths": list(depths),
              "num_group_tokens": [*groups], "num_output_groups": [*groups], "num_attention_heads": width // 16,
              "image_size": size, "patch_size": patch, "assign_mlp_ratio": [0.5, 2]}
    # The class's 0.02 suits 384 channels, not 64.
    model = GroupViTModel(GroupViTConfig(text_config=text, vision_config=vision, projection_dim=64, projection_intermediate_dim=128,
                                         logit_scale_init_value=math.log(14), initializer_range=0.06))
    with torch.no_grad():  # the class starts group tokens at zero, where all are alike, and position embeddings too
        for name, parameter in model.named_parameters():
            if name.endswith("group_token"):
                parameter.normal_()
            elif name == "vision_model.embeddings.position_embeddings":
                parameter.normal_(std=0.02)
            elif name.endswith(SHARP):
                parameter.normal_(std=SHARP_STD)
    return model


def named_things(caption: str) -> list[str]:
    """What a caption "a flat picture of a X and a Y with A and B" names, in alphabetical order, from its words
    alone."""
    things = re.sub(r"^a (\w+ )?picture of ", "", caption).replace(" with ", " and ").split(" and ")
    return sorted({thing.removeprefix("a ").removeprefix("small ") for thing in things})


def multi_label_loss(image: Tensor, text: Tensor, named: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit embeddings (B, D) of images and (P, D) of prompts, f32 ``named`` (B, P) being 1 where
    image b shows p.

    An image's target is spread evenly over what it shows, a prompt's over the images that show it. Prompts that no
    image of the batch shows are wrong answers only.
    """
    logits = scale * image @ text.T
    to_text = -(named / named.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    shown = named.sum(0) > 0
    to_image = -((named / named.sum(0).clamp(min=1)).T * logits.T.log_softmax(1)).sum(1)[shown].mean()
    return 0.5 * (to_text + to_image)


def zoom(images: Tensor, size: int, picker: random.Random) -> Tensor:
    """A random square of :data:`SMALLEST` or more of the side of images (B, 3, H, H), the same for all, at ``size``
    pixels."""
    side = picker.randint(round(SMALLEST * images.shape[-1]), images.shape[-1])
    top, left = (picker.randint(0, images.shape[-1] - side) for _ in range(2))
    part = images[..., top:top + side, left:left + side]
    return F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)


@torch.no_grad()
def zero_shot(model: GroupViTModel, tokenizer: CLIPTokenizer, images: np.ndarray, labels: np.ndarray, nouns: list[str]) -> float:
    """Top-1 accuracy of whole images with the prompt 'a good picture of a ...'."""
    model.eval()
    prompts = pad_ids([tokenizer(TEMPLATE.format(n)).input_ids for n in nouns], tokenizer.pad_token_id)
    text = F.normalize(model.get_text_features(input_ids=prompts).pooler_output, dim=-1)
    size = model.config.vision_config.image_size
    correct = 0
    for start in range(0, len(images), 256):
        pixels = F.interpolate(training.to_float(images[start:start + 256]), size=(size, size), mode="bilinear", antialias=True)
        features = model.get_image_features(pixel_values=normalise(pixels)).pooler_output
        correct += int(((features @ text.T).argmax(-1).cpu().numpy() == labels[start:start + 256]).sum())
    model.train()
    return correct / len(images)


def save(model: GroupViTModel, clip: Path, folder: Path) -> None:
    """Write the model in half precision with rounded fractions, its image processor, and the files of ``clip``'s
    tokenizer as they are."""
    half = GroupViTModel(model.config)
    half.load_state_dict(training.round_weights(model.state_dict()))
    half.half().save_pretrained(folder)
    size = model.config.vision_config.image_size
    CLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False, image_mean=list(IMAGENET_MEAN),
                       image_std=list(IMAGENET_STD)).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(clip / name, folder / name)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = training.training_parser(__doc__, steps=10_000, batch=64, minutes=38)
    parser.add_argument("--clip", type=Path, required=True, help="folder of the mini CLIP, for its tokenizer")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=64, help="image tower width")
    args = parser.parse_args(argv)
    training.seed_everything(args.seed, args.threads)
    data = training.load_data(args.data)
    nouns, captions = data["nouns"], data["captions"]
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    distinct = sorted({c for alternatives in captions for c in alternatives})
    ids = dict(zip(distinct, tokenizer(distinct, truncation=True).input_ids, strict=True))
    things = [named_things(alternatives[0]) for alternatives in captions]
    known = sorted({thing for row in things for thing in row})
    column = {thing: i for i, thing in enumerate(known)}
    prompts = [[tokenizer(template.format(thing)).input_ids for thing in known] for template in TEMPLATES]

    size = data["images"].shape[1]
    model = build_groupvit(tokenizer, args.width, size=size).to(training.DEVICE)
    optimizer = torch.optim.AdamW(training.decayed(model, spare=SHARP), lr=args.lr, betas=(0.9, 0.98), fused=True)
    run = training.Run(args, model, optimizer, lambda p, s: training.warmup_cosine(p, s, warmup=200))
    model.train()
    for step in run:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picker = random.Random(f"{args.seed} {step}")
        index = training.shuffled_indices(len(data["images"]), args.batch, args.seed, step)
        phrasing = picker.randrange(len(TEMPLATES))  # one for the whole batch, as in train_clip
        chosen = [captions[i][min(phrasing, len(captions[i]) - 1)] for i in index]
        unique = sorted(set(chosen))
        place = {c: i for i, c in enumerate(unique)}
        group = torch.tensor([place[c] for c in chosen], device=training.DEVICE)
        named = torch.zeros(len(index), len(known))
        for row, i in enumerate(index):
            named[row, [column[thing] for thing in things[i]]] = 1
        named = named.to(training.DEVICE)
        pixels = normalise(zoom(augment(training.to_float(data["images"][index]), generator), size, picker))
        tokens = pad_ids([ids[c] for c in unique] + prompts[phrasing], tokenizer.pad_token_id)
        with training.mixed(args):
            image = model.get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(input_ids=tokens).pooler_output
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        scale = model.logit_scale.exp()
        loss = contrastive_loss(image, text[:len(unique)], group, scale) + multi_label_loss(image, text[len(unique):], named, scale)
        run.update(loss)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        metrics = {}
        if (step + 1) % 500 == 0:
            metrics["zero_shot"] = zero_shot(model, tokenizer, data["eval_images"], data["eval_labels"], nouns)
        run.record(loss.detach(), **metrics)
    save(model, args.clip, args.out)
    top1 = zero_shot(model, tokenizer, data["eval_images"], data["eval_labels"], nouns)
    print(f"done: {run.step} steps, {run.elapsed / 60:.1f} min, zero-shot top-1 {top1:.4f}", flush=True)


if __name__ == "__main__":
    main()
