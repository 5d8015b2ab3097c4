"""Scenarios of the category filter's text (Sec. 3.4): joined prompts that share their beginnings against prompts encoded one by one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ovdiff_lib.networks.clip_text import TextEncoder
from ovdiff_lib.networks.loading import load_clip
from ovdiff_lib.workbench.cost.plain import padded_texts
from ovdiff_lib.workbench.cost.ratio import AT_LEAST, Bound, Check, Ratio, alternate
from ovdiff_lib.workbench.cost.scene import Scene, difference

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


NAMES = ("cat", "dog", "boat", "car", "bus", "chair", "horse", "sheep", "train", "bird")
"""One token each for CLIP; all 1,023 subsets of ten make the prompts of an image that shows many things."""

SAME_SCORES = 1e-4


def profile_texts(scene: Scene) -> list[Ratio]:
    """With the profile's own CLIP."""
    return compare(scene, *load_clip(scene.profile), "filter texts, profile's CLIP", None)


def published_texts(scene: Scene) -> list[Ratio]:
    """With a text tower of ViT-B/16's size, random weights."""
    from ovdiff_lib.workbench.cost.full_size import clip_text

    return compare(scene, *clip_text(scene.device), "filter texts, ViT-B/16", Bound(10, AT_LEAST), budget=45)


def prompts(scene: Scene) -> list[str]:
    """The joined prompts of :data:`NAMES` as the profile words them."""
    settings = scene.profile.filters
    subsets = [s for size in range(1, len(NAMES) + 1) for s in itertools.combinations(NAMES, size)]
    return [settings.category_prompt.replace("{names}", settings.category_joiner.join(subset)) for subset in subsets]


def compare(scene: Scene, clip: CLIPModel, tokenizer: CLIPTokenizer, name: str, bound: Bound | None,
            budget: float = float("inf")) -> list[Ratio]:
    """The first image of a vocabulary, and a second one that calls for the same prompts. What is too long for ``clip`` is left out, as the
    filter does it."""
    texts = prompts(scene)
    texts = [text for text, fits in zip(texts, TextEncoder(clip, tokenizer).fits(texts), strict=True) if fits]
    first = alternate(lambda _: TextEncoder(clip, tokenizer)(texts), lambda _: padded_texts(clip, tokenizer, texts), scene.repeats,
                      device=scene.device, budget=budget,
                      warm_up=(lambda: TextEncoder(clip, tokenizer)(texts[:64]), lambda: padded_texts(clip, tokenizer, texts[:64])))
    length = clip.config.text_config.max_position_embeddings
    # Cosines with any image differ by no more than the embeddings do, which have unit length.
    off = float((first.our_result - first.their_result).norm(dim=1).max())
    same = Check("largest difference of a score", off, SAME_SCORES)
    spread = difference(first.their_result.amax(0), first.their_result.amin(0))
    known = TextEncoder(clip, tokenizer)
    known(texts)
    second = alternate(lambda _: known(texts), lambda _: TextEncoder(clip, tokenizer)(texts), scene.repeats, device=scene.device,
                       budget=budget)
    measures = f"embeddings of {len(texts):,} joined prompts of {len(NAMES)} names"
    return [
        Ratio(name, measures, f"CLIPModel.get_text_features of each prompt, padded to {length} tokens, 64 at a time", first.ours,
              first.theirs, bound, (same,),
              note=f"embeddings differ among prompts by up to {spread:.2g}" + ("" if bound else "; no bound for this CLIP")),
        Ratio(f"{name}, second image", f"{measures}, all known from an image before",
              "the same prompts encoded anew, shared beginnings once", second.ours, second.theirs)]
