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

WIDTH = 96
"""Tokens of a packed row, or the length of a text where that is more. Each row begins with a text as a whole, so few long rows repeat
less than many short ones, but attention has more to hide."""

ROWS = 32
"""Packed rows per forward pass of the text tower."""


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
        always = tuple(sorted(set(range(len(vocabulary))).difference(judged)))
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
    computation of it: sorted texts form a tree of tokens, whose branches are laid side by side in one row, with positions and an
    attention mask that show each token its ancestors. The result is that of encoding every text alone.
    """

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, cached: int = CACHED_TEXTS) -> None:
        self.clip, self.tokenizer, self.cached = clip, tokenizer, cached
        self.length = min(clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        # One table rather than a tensor a text: thousands of small objects keep Python's garbage collector busy.
        self._table = torch.zeros(0, clip.text_projection.out_features)
        self._free: list[int] = []
        self._known: OrderedDict[str, int] = OrderedDict()  # text -> row of the table
        self._words: dict[str, tuple[int, ...]] = {}
        self._lengths: dict[str, int] = {}
        (self._start, *_, self._end), = tokenizer([""])["input_ids"]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """f32 (n, E) on the CPU, unit length, for n texts that :meth:`fits` accepts."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            found = self._encode([self._tokens(text) for text in missing])
            places = self._places(len(missing))
            self._table[places] = found
            self._known.update(zip(missing, places, strict=True))
        for text in texts:
            self._known.move_to_end(text)
        embeddings = self._table[[self._known[text] for text in texts]]
        while len(self._known) > self.cached:
            self._free.append(self._known.popitem(last=False)[1])
        return embeddings

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text, with start and end token, is within the model's length."""
        if len(self._lengths) > 2 * self.cached:
            self._lengths.clear()
        missing = [text for text in texts if text not in self._lengths]
        self._lengths.update((text, len(self._tokens(text))) for text in missing)
        return [self._lengths[text] <= self.length for text in texts]

    def _places(self, count: int) -> list[int]:
        """Rows of the table that no text has."""
        rows = len(self._table)
        if len(self._free) < count:
            grown = max(count - len(self._free), min(rows, self.cached))
            self._table = torch.cat([self._table, torch.zeros(grown, self._table.shape[1])])
            self._free += range(rows + grown - 1, rows - 1, -1)
        return [self._free.pop() for _ in range(count)]

    def _tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, from start to end token. CLIP's tokens never span a space, so each word is looked up alone, once."""
        words = text.split(" ")
        for word in words:
            if word not in self._words:
                if len(self._words) > 2 * self.cached:
                    self._words.clear()
                    return self._tokens(text)
                self._words[word] = tuple(self.tokenizer([word], truncation=False, verbose=False)["input_ids"][0][1:-1])
        return (self._start, *itertools.chain.from_iterable(self._words[word] for word in words), self._end)

    @torch.inference_mode()
    def _encode(self, sequences: list[tuple[int, ...]]) -> torch.Tensor:
        text, weight = self.clip.text_model, self.clip.text_projection.weight
        rows, place = pack(sequences, max(WIDTH, self.length))
        ends = torch.empty(len(sequences), weight.shape[1], dtype=weight.dtype, device=weight.device)
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            width = max(len(tokens) for tokens, _, _ in part)
            ids, positions = (np.zeros((len(part), width), np.int64) for _ in range(2))
            last = np.tile(np.arange(width), (len(part), 1))  # padding sees itself, and nobody sees padding
            for n, row in enumerate(part):
                for array, values in zip((ids, positions, last), row, strict=True):
                    array[n, : len(values)] = values
            # Below the embedding, not by `text`: that one refuses rows longer than a text may be.
            ids, positions, last = (torch.from_numpy(array).to(weight.device) for array in (ids, positions, last))
            hidden = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(positions)
            column = torch.arange(width, device=weight.device)
            hidden_from = (column[:, None] < column) | (column[:, None] > last[:, None])
            mask = torch.zeros(hidden_from.shape, dtype=weight.dtype, device=weight.device)
            mask.masked_fill_(hidden_from, torch.finfo(weight.dtype).min)
            hidden = text.encoder(inputs_embeds=hidden, attention_mask=mask[:, None]).last_hidden_state
            here = np.flatnonzero((place[:, 0] >= start) & (place[:, 0] < start + len(part)))
            row, end = torch.from_numpy(place[here] - (start, 0)).to(weight.device).T
            ends[torch.from_numpy(here).to(weight.device)] = hidden[row, end]
        return _finite(F.normalize(self.clip.text_projection(text.final_layer_norm(ends)).float(), dim=-1).cpu())


Row = tuple[list[int], list[int], list[int]]


def pack(sequences: Sequence[tuple[int, ...]], width: int) -> tuple[list[Row], np.ndarray]:
    """Token sequences as prefix trees in rows of at most ``width`` tokens.

    Returns the rows, each (tokens, positions, last): a token's descendants are those behind it up to column ``last``, so token i sees
    token j if j <= i <= last[j]. And for every sequence the row and column of its last token, i64 (n, 2). Every sequence has 1 to
    ``width`` tokens.
    """
    rows: list[Row] = []
    place = np.zeros((len(sequences), 2), np.int64)
    path: list[int] = []  # columns of the previous sequence's tokens
    previous: tuple[int, ...] = ()
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[number]
        shared = 0
        for one, other in zip(previous, sequence, strict=False):
            if one != other:
                break
            shared += 1
        new = len(sequence) - shared
        if not rows or len(rows[-1][0]) + new > width:
            rows.append(([], [], []))
            path, shared, new = [], 0, len(sequence)
        tokens, positions, last = rows[-1]
        column = len(tokens)
        tokens += sequence[shared:]
        positions += range(shared, len(sequence))
        last += range(column, column + new)
        path[shared:] = range(column, column + new)
        for ancestor in path:
            last[ancestor] = len(tokens) - 1
        place[number] = len(rows) - 1, path[-1]
        previous = sequence
    return rows, place


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
