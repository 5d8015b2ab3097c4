"""Train the mini GroupViT (a real ``transformers.GroupViTModel``) on the captions of the mini world; no mask is read.

The two losses of Xu et al. (2022, Sec. 3.3): images against captions, and against a prompt for each thing named there.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import resized_crop
from transformers import CLIPTokenizer, GroupViTConfig, GroupViTModel

from ovdiff_lib.images import IMAGENET_MEAN, IMAGENET_STD
from ovdiff_lib.recipes import train_clip, training

TEMPLATES = ("a picture of a {}", "a good picture of a {}", "{}", "a {}")
"""How the captions speak of a thing; number i belongs to the i-th alternative of a scene's captions."""

SHARP = ("assign.q_proj.weight", "assign.k_proj.weight")
"""Weights that decide which group a patch goes to. They start large and do not decay: where their product is fainter
than the Gumbel noise that training adds, groups take patches at random, which only segmentation minds."""

SHARP_STD = 0.25
SMALLEST = 0.7  # side of the smallest part of a scene that is shown enlarged, as windows of segmentation show it


def build_groupvit(tokenizer: CLIPTokenizer, size: int = 64) -> GroupViTModel:
    """For images of ``size`` px and ``tokenizer``'s ids: three blocks, eight groups, one block, four groups."""
    text = train_clip.token_ids(tokenizer) | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
                                              "num_attention_heads": 2, "hidden_act": "gelu"}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "depths": [3, 1],
              "num_group_tokens": [8, 4], "num_output_groups": [8, 4], "num_attention_heads": 4,
              "image_size": size, "patch_size": 8, "assign_mlp_ratio": [0.5, 2]}
    model = GroupViTModel(GroupViTConfig(
        text_config=text, vision_config=vision, projection_dim=64, projection_intermediate_dim=128,
        logit_scale_init_value=math.log(14), initializer_range=0.06))  # the class's 0.02 suits 384 channels, not 64
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
    """What a caption "a flat picture of a X and a Y with A and B" names, in alphabetical order."""
    things = re.sub(r"^a (\w+ )?picture of ", "", caption).replace(" with ", " and ").split(" and ")
    return sorted({thing.removeprefix("a ").removeprefix("small ") for thing in things})


def multi_label_loss(image: Tensor, text: Tensor, named: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit embeddings (B, D) of images and (P, D) of prompts, f32 ``named`` (B, P) being 1 where
    image b shows p. Targets are spread evenly; prompts that no image of the batch shows are wrong answers only."""
    logits = scale * image @ text.T
    to_text = -(named / named.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    shown = named.sum(0) > 0
    to_image = -((named / named.sum(0).clamp(min=1)).T * logits.T.log_softmax(1)).sum(1)[shown].mean()
    return 0.5 * (to_text + to_image)


def main(argv: list[str] | None = None) -> None:
    parser = training.options(__doc__, steps=10_000, batch=64, minutes=38, lr=1.5e-3)
    parser.add_argument("--clip", type=Path, required=True, help="folder of the mini CLIP, for its tokenizer")
    args = training.start(parser, argv)
    images, captions = training.load_scenes(args.data)
    size = images.shape[1]
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    ids = train_clip.caption_ids(captions, tokenizer)
    things = [named_things(alternatives[0]) for alternatives in captions]
    column = sorted({thing for row in things for thing in row})
    prompts = [[tokenizer(template.format(thing)).input_ids for thing in column] for template in TEMPLATES]
    shown = torch.tensor([[float(thing in row) for thing in column] for row in things], device=training.DEVICE)
    model = build_groupvit(tokenizer, size).to(training.DEVICE).train()
    run = training.Run(args, model, len(images), training.decayed(model, spare=SHARP), betas=(0.9, 0.98), warmup=200)

    def loss(draw: training.Draw) -> Tensor:
        phrasing = draw.picker.randrange(len(TEMPLATES))
        texts, group = train_clip.phrased([captions[i] for i in draw.index], phrasing)
        scene = train_clip.augment(training.to_float(training.rows(images, draw.index)), draw.generator)
        side = draw.picker.randint(round(SMALLEST * size), size)
        top, left = (draw.picker.randint(0, size - side) for _ in range(2))  # of one square for all
        part = resized_crop(scene, top, left, side, side, [size, size])
        pixels = training.normalise(part, IMAGENET_MEAN, IMAGENET_STD)
        tokens = train_clip.pad_ids([ids[text] for text in texts] + prompts[phrasing], tokenizer.pad_token_id)
        with training.mixed():
            image, text = train_clip.embeddings(model, pixels, tokens)
        scale, count = model.logit_scale.exp(), len(texts)
        return (train_clip.contrastive_loss(image, text[:count], group, scale)
                + multi_label_loss(image, text[count:], training.rows(shown, draw.index), scale))

    run.fit(loss, after=lambda: train_clip.limit_scale(model))
    training.halved(model).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
