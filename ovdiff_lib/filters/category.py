"""Category pre-filter (Sec. 3.4): CLIP decides which categories of the vocabulary an image shows at all.

Single names narrow the vocabulary to at most eta categories; then every non-empty subset of those becomes one prompt, "a and b and c",
and the prompt most like the image decides. Those are 2^eta - 1 prompts, but they share their beginnings and the text tower
is causal, so :class:`TextEncoder` runs each shared beginning once.
"""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ovdiff_lib.errors import InputError, ProfileError
from ovdiff_lib.images import CLIP_MEAN, CLIP_STD
from ovdiff_lib.profiles.profile import Filters, Profile
from ovdiff_lib.types import Category, Vocabulary

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


MAX_TOP = 16
"""Largest eta: 65,535 prompts an image."""

CACHED_TEXTS = 2**15
"""Text embeddings kept across images (67 MB at 512 channels)."""

ROWS = 64
"""Packed rows of tokens per forward pass of the text tower."""


def check_category(settings: Filters) -> None:
    """``ProfileError`` for values of ``filters.category_*`` that cannot be."""
    if not 1 <= settings.category_top <= MAX_TOP:
        raise ProfileError(f"filters.category_top is {settings.category_top}; set it to a number from 1 to {MAX_TOP}.")
    if settings.category_crop not in ("squash", "centre"):
        raise ProfileError(f"filters.category_crop is {settings.category_crop!r}; set it to 'squash' or 'centre'.")
    if "{names}" not in settings.category_prompt:
        raise ProfileError("filters.category_prompt has no '{names}'; put it where the class names go.")


class CategoryFilter:
    """Which categories of a vocabulary are in an image, by CLIP.

    ``clip`` and ``tokenizer`` are a transformers ``CLIPModel`` in eval mode and its tokenizer; ``profile.filters`` holds the settings.
    The result depends on the image, the vocabulary and the profile alone; text embeddings are cached across images.
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, profile: Profile) -> None:
        self.settings = profile.filters
        check_category(self.settings)
        self.clip = clip
        self.text = TextEncoder(clip, tokenizer)

    def __call__(self, image: np.ndarray, vocabulary: Vocabulary) -> tuple[tuple[int, ...], np.ndarray]:
        """Indices of the kept categories in vocabulary order (never empty), and the class probabilities f32 (C,).

        ``image`` is u8 RGB (H, W, 3). Categories whose probability exceeds 1/C stay, at most ``category_top`` of them; of the subsets
        of those, the one whose joined prompt is most like the image is kept. With ``category_keep_stuff`` the filter judges
        things alone (C counts things) and stuff is always kept, with probability 1.
        Raises ``InputError`` for a name that is too long for CLIP.
        """
        embedding = self.embed_image(image)
        judged = self._judged(vocabulary)
        probabilities = self._probabilities(embedding, vocabulary, judged)
        always = tuple(i for i in range(len(vocabulary)) if i not in judged)
        if not judged:
            return always, probabilities
        order = sorted(judged, key=lambda i: (-probabilities[i], i))
        # The slack is for rounding: equal probabilities are each exactly 1/C and one class alone has probability 1 = 1/C.
        bar = (1 - 1e-5) / len(judged)
        top = sorted(i for i in order[: self.settings.category_top] if probabilities[i] >= bar) or order[:1]
        subsets = [s for size in range(1, len(top) + 1) for s in itertools.combinations(top, size)]
        texts = [self._prompt([vocabulary.categories[i] for i in subset]) for subset in subsets]
        fitting = [n for n, fits in enumerate(self.text.fits(texts)) if fits]
        if len(fitting) < len(texts):
            warnings.warn(f"The category filter left out {len(texts) - len(fitting)} of {len(texts)} joined prompts that are longer than "
                          f"CLIP's {self.text.length} tokens; lower filters.category_top or shorten class names.", stacklevel=2)
        similarity = self.text([texts[n] for n in fitting]) @ embedding
        best = subsets[fitting[int(similarity.argmax())]]
        return tuple(sorted((*best, *always))), probabilities

    def scores(self, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Class probabilities f32 (C,) of an image u8 (H, W, 3): softmax of logit scale x cosine over the vocabulary."""
        return self._probabilities(self.embed_image(image), vocabulary, self._judged(vocabulary))

    @torch.inference_mode()
    def embed_image(self, image: np.ndarray) -> torch.Tensor:
        """L2-normalised CLIP embedding f32 (E,), on the CPU, of an image u8 (H, W, 3)."""
        side = self.clip.config.vision_config.image_size
        square = square_image(image, side, self.settings.category_crop)
        pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
        pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
        weight = self.clip.visual_projection.weight
        features = self.clip.get_image_features(pixel_values=pixels.to(weight.device, weight.dtype)).pooler_output
        return _finite(F.normalize(features.float(), dim=-1)[0].cpu())

    def _judged(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(vocabulary) if not (self.settings.category_keep_stuff and c.kind == "stuff"))

    def _probabilities(self, embedding: torch.Tensor, vocabulary: Vocabulary, judged: tuple[int, ...]) -> np.ndarray:
        texts = [self._prompt([category]) for category in vocabulary]
        for category, fits in zip(vocabulary, self.text.fits(texts), strict=True):
            if not fits:
                raise InputError(f"The class {category.name[:40]!r} makes a prompt longer than CLIP's {self.text.length} tokens; shorten "
                                 "it.")
        cosine = self.text([texts[i] for i in judged]).double() @ embedding.double()
        scale = self.settings.category_logit_scale
        scale = float(self.clip.logit_scale.detach().exp()) if scale is None else scale
        probabilities = np.ones(len(vocabulary), dtype=np.float32)
        probabilities[list(judged)] = torch.softmax(scale * cosine, 0).numpy()
        return probabilities

    def _prompt(self, categories: Sequence[Category]) -> str:
        return self.settings.category_prompt.replace("{names}", self.settings.category_joiner.join(c.prompt for c in categories))


class TextEncoder:
    """Normalised CLIP text embeddings, each distinct text computed once (least recently used ones are dropped).

    Each text attends to its own earlier tokens only and is read at its end token. So texts with a common beginning can share the
    computation of it: sorted texts form a tree of tokens, whose branches are laid side by side in one row of at most the model's length,
    with positions and an attention mask that show each token its ancestors. The result is that of encoding every text alone.
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, cached: int = CACHED_TEXTS) -> None:
        self.clip, self.tokenizer, self.cached = clip, tokenizer, cached
        self.length = min(clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._tokens: dict[str, tuple[int, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """f32 (n, E) on the CPU, unit length, for n texts that :meth:`fits` accepts."""
        if not texts:
            return torch.zeros(0, self.clip.text_projection.out_features)
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(zip(missing, self._encode(self._tokenise(missing)), strict=True))
        for text in texts:
            self._known.move_to_end(text)
        found = torch.stack([self._known[text] for text in texts])
        while len(self._known) > self.cached:
            self._known.popitem(last=False)
        return found

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text, with start and end token, is within the model's length."""
        return [len(tokens) <= self.length for tokens in self._tokenise(texts)]

    def _tokenise(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if len(self._tokens) > 2 * self.cached:
            self._tokens.clear()
        missing = [text for text in texts if text not in self._tokens]
        if missing:
            ids = self.tokenizer(missing, truncation=False, verbose=False)["input_ids"]
            self._tokens.update(zip(missing, map(tuple, ids), strict=True))
        return [self._tokens[text] for text in texts]

    @torch.inference_mode()
    def _encode(self, sequences: list[tuple[int, ...]]) -> list[torch.Tensor]:
        weight = self.clip.text_projection.weight
        rows, place = pack(sequences, self.length)
        hidden = []
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            width = max(len(tokens) for tokens, _, _ in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            positions = torch.zeros(len(part), width, dtype=torch.long)
            visible = torch.eye(width, dtype=torch.bool).repeat(len(part), 1, 1)  # padding sees itself, and nobody sees padding
            for n, (tokens, depth, ancestors) in enumerate(part):
                ids[n, : len(tokens)] = torch.tensor(tokens)
                positions[n, : len(tokens)] = torch.tensor(depth)
                visible[n, : len(tokens), : len(tokens)] = torch.from_numpy(ancestors)
            mask = torch.zeros(visible.shape, dtype=weight.dtype).masked_fill(~visible, torch.finfo(weight.dtype).min)
            output = self.clip.text_model(input_ids=ids.to(weight.device), position_ids=positions.to(weight.device),
                                          attention_mask=mask[:, None].to(weight.device))
            hidden += list(output.last_hidden_state)
        ends = torch.stack([hidden[row][column] for row, column in place])
        return list(_finite(F.normalize(self.clip.text_projection(ends).float(), dim=-1).cpu()))


def pack(sequences: Sequence[tuple[int, ...]], width: int) -> tuple[list[tuple[list[int], list[int], np.ndarray]], list[tuple[int, int]]]:
    """Token sequences as prefix trees in rows of at most ``width`` tokens.

    Returns the rows, each (tokens, positions, visible bool (n, n): token i sees token j), and for every sequence the (row, column) of
    its last token. Every sequence has 1 to ``width`` tokens.
    """
    rows: list[tuple[list[int], list[int], np.ndarray]] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(sequences)
    path: list[int] = []  # columns of the previous sequence's tokens
    previous: tuple[int, ...] = ()
    for number in sorted(range(len(sequences)), key=lambda n: sequences[n]):
        sequence = sequences[number]
        shared = 0
        while shared < min(len(previous), len(sequence)) and previous[shared] == sequence[shared]:
            shared += 1
        if not rows or len(rows[-1][0]) + len(sequence) - shared > width:
            rows.append(([], [], np.zeros((width, width), dtype=bool)))
            shared = 0
        tokens, depth, visible = rows[-1]
        path = path[:shared]
        for position in range(shared, len(sequence)):
            path.append(len(tokens))
            tokens.append(sequence[position])
            depth.append(position)
            visible[path[-1], path] = True
        place[number] = (len(rows) - 1, path[-1])
        previous = sequence
    return [(tokens, depth, visible[: len(tokens), : len(tokens)]) for tokens, depth, visible in rows], place


def square_image(image: np.ndarray, side: int, crop: str) -> np.ndarray:
    """An image u8 (H, W, 3) as CLIP's u8 (side, side, 3), bicubic: "squash" ignores the aspect ratio, "centre" cuts the longer side."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    if crop == "squash":
        return np.array(picture.resize((side, side), Image.Resampling.BICUBIC))
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    return np.array(picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short)))


def _finite(embedding: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(embedding).all():
        raise InputError("CLIP returned values that are not finite; check the weights of models.clip, or use dtype float32.")
    return embedding
