"""CLIP embeddings of many texts that begin alike, as the joined prompts of the category filter do (Sec. 3.4).

Each text attends to its own earlier tokens only and is read at its end token. So texts with a common beginning can
share the computation of it: sorted texts form a tree of tokens, whose branches are laid side by side in one row, with
positions and an attention mask that show each token its ancestors. The result is that of encoding every text alone.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import undisturbed

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


CACHED_TEXTS = 2**15
"""Text embeddings kept across images (67 MB at 512 channels)."""

WIDTH = 96
"""Tokens of a packed row, or the length of a text where that is more. Each row begins with a text as a whole, so few
long rows repeat less than many short ones, but attention has more to hide."""

ROWS = 32
"""Packed rows per forward pass of the text tower."""

Row = tuple[list[int], list[int], list[int]]
"""Tokens, their positions, and the column of each token's last descendant."""


class TextEncoder:
    """Normalised CLIP text embeddings, each distinct text computed once (least recently used ones are dropped)."""

    @undisturbed()
    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, cached: int = CACHED_TEXTS) -> None:
        self.clip, self.tokenizer, self.cached = clip, tokenizer, cached
        self.length = min(clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        # One table rather than a tensor a text: thousands of small objects keep Python's garbage collector busy.
        self._table = torch.zeros(0, clip.text_projection.out_features, dtype=torch.float32, device="cpu")
        self._free: list[int] = []
        self._known: OrderedDict[str, int] = OrderedDict()  # text -> row of the table
        self._words: dict[str, tuple[int, ...]] = {}
        self._lengths: dict[str, int] = {}
        self._ids: dict[str, tuple[int, ...]] = {}  # of texts whose length was asked for and which are not encoded yet
        (self._start, *_, self._end), = tokenizer([""])["input_ids"]

    @undisturbed()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """f32 (n, E) on the CPU, unit length, for n texts that :meth:`fits` accepts."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            found = self._encode([self._ids.get(text) or self._tokens(text) for text in missing])
            self._ids.clear()
            places = self._places(len(missing))
            self._table[places] = found
            self._known.update(zip(missing, places, strict=True))
        for text in texts:
            self._known.move_to_end(text)
        embeddings = self._table[[self._known[text] for text in texts]]
        while len(self._known) > self.cached:
            self._free.append(self._known.popitem(last=False)[1])
        return embeddings

    @undisturbed()
    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text, with start and end token, is within the model's length."""
        if len(self._lengths) > 2 * self.cached:
            self._lengths.clear()
        missing = [text for text in texts if text not in self._lengths]
        self._ids = {text: self._tokens(text) for text in missing}
        self._lengths.update((text, len(ids)) for text, ids in self._ids.items())
        return [self._lengths[text] <= self.length for text in texts]

    def _places(self, count: int) -> list[int]:
        """Rows of the table that no text has."""
        rows = len(self._table)
        if len(self._free) < count:
            grown = max(count - len(self._free), min(rows, self.cached))
            self._table = torch.cat([self._table, self._table.new_zeros(grown, self._table.shape[1])])
            self._free += range(rows + grown - 1, rows - 1, -1)
        return [self._free.pop() for _ in range(count)]

    def _tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, from start to end token. CLIP's tokens never span a space, so each word is looked up
        alone, once."""
        words = text.split(" ")
        for word in words:
            if word not in self._words:
                if len(self._words) > 2 * self.cached:
                    self._words.clear()
                    return self._tokens(text)
                self._words[word] = tuple(self.tokenizer([word], truncation=False, verbose=False)["input_ids"][0][1:-1])
        ids = (self._start, *itertools.chain.from_iterable(self._words[word] for word in words), self._end)
        return ids[: ids.index(self._end) + 1]  # where a text spells the end token out, CLIP reads it there

    def _encode(self, sequences: list[tuple[int, ...]]) -> torch.Tensor:
        rows, place = pack(sequences, max(WIDTH, self.length))
        return check_finite(F.normalize(encode(self.clip, rows, place).float(), dim=-1).cpu())


def check_finite(embedding: torch.Tensor) -> torch.Tensor:
    """The embedding; ``InputError`` if it holds a value that is not finite."""
    if not torch.isfinite(embedding).all():
        raise InputError("CLIP returned values that are not finite; check the weights of models.clip, or use dtype float32.")
    return embedding


def pack(sequences: Sequence[tuple[int, ...]], width: int) -> tuple[list[Row], np.ndarray]:
    """Token sequences as prefix trees in rows of at most ``width`` tokens.

    Returns the rows, each (tokens, positions, last): a token's descendants are those behind it up to column ``last``,
    so token i sees token j if j <= i <= last[j]. And for every sequence the row and column of its last token, i64 (n,
    2). Every sequence has 1 to ``width`` tokens.
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


def encode(clip: CLIPModel, rows: Sequence[Row], place: np.ndarray) -> torch.Tensor:
    """Projected embeddings (n, E), on the model's device and in its dtype, of the texts that end at ``place`` i64 (n,
    2) in packed rows."""
    text, weight = clip.text_model, clip.text_projection.weight
    ends = torch.empty(len(place), weight.shape[1], dtype=weight.dtype, device=weight.device)
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        here = np.flatnonzero((place[:, 0] >= start) & (place[:, 0] < start + len(part)))
        ends[torch.from_numpy(here).to(weight.device)] = _hidden_ends(text, part, place[here] - (start, 0))
    return clip.text_projection(text.final_layer_norm(ends))


def _hidden_ends(text: torch.nn.Module, rows: Sequence[Row], place: np.ndarray) -> torch.Tensor:
    """What the last layer of the text tower puts out at ``place`` i64 (n, 2) in the rows: (n, D)."""
    weight, width = text.embeddings.token_embedding.weight, max(len(tokens) for tokens, _, _ in rows)
    ids, positions = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    last = np.tile(np.arange(width), (len(rows), 1))  # padding sees itself, and nobody sees padding
    for n, row in enumerate(rows):
        for array, values in zip((ids, positions, last), row, strict=True):
            array[n, : len(values)] = values
    ids, positions, last = (torch.from_numpy(array).to(weight.device) for array in (ids, positions, last))
    # Below the embedding, not by `text`: that one refuses rows longer than a text may be.
    hidden = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(positions)
    column = torch.arange(width, dtype=torch.long, device=weight.device)
    unseen = (column[:, None] < column) | (column[:, None] > last[:, None])
    mask = torch.zeros(unseen.shape, dtype=weight.dtype, device=weight.device).masked_fill_(unseen, torch.finfo(weight.dtype).min)[:, None]
    *layers, top = text.encoder.layers
    for layer in layers:
        hidden = layer(hidden, mask)
    # Of the last layer the end tokens alone are read, so only they ask: as many columns a row as the fullest has ends.
    counts = np.bincount(place[:, 0], minlength=len(rows))
    order = np.argsort(place[:, 0], kind="stable")
    slot = np.empty(len(place), np.int64)
    slot[order] = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    asking = np.zeros((len(rows), counts.max()), np.int64)
    asking[place[:, 0], slot] = place[:, 1]
    asking, slot, row = (torch.from_numpy(array).to(weight.device) for array in (asking, slot, place[:, 0]))
    return _layer_at(top, hidden, mask, asking)[row, slot]


def _layer_at(layer: torch.nn.Module, hidden: torch.Tensor, mask: torch.Tensor, asking: torch.Tensor) -> torch.Tensor:
    """A layer of CLIP's text tower on hidden states (B, W, D) under a mask (B, 1, W, W), at the columns ``asking`` i64
    (B, m) alone: (B, m, D)."""
    attention, every = layer.self_attn, torch.arange(len(hidden), dtype=torch.long, device=hidden.device)[:, None]
    normed = layer.layer_norm1(hidden)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(heads(attention.q_proj(normed[every, asking])), heads(attention.k_proj(normed)),
                                           heads(attention.v_proj(normed)), mask[:, 0][every, asking][:, None], scale=attention.scale)
    hidden = hidden[every, asking] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))
