"""CLIP embeddings of many texts that begin alike, as the joined prompts of the category filter do (Sec. 3.4).

Each text attends to its own earlier tokens only and is read at its end token. So texts with a common beginning can
share the computation of it: sorted texts form a tree of tokens, whose branches are laid side by side in one row, with
positions and an attention mask that show each token its ancestors. The result is that of encoding every text alone.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import batches, undisturbed

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

CACHED_TEXTS = 2**15
"""Text embeddings kept across images (67 MB at 512 channels)."""

WIDTH = 96
"""Tokens of a packed row, or the length of a text where that is more. Each row begins with a text as a whole, so few
long rows repeat less than many short ones, but attention has more to hide."""

ROWS = 32
"""Packed rows per forward pass of the text tower."""

Row = tuple[list[int], list[int], list[int], list[int]]
"""Tokens, their positions, the column of each token's last descendant; and the columns at which texts end."""


class TextEncoder:
    """Normalised CLIP text embeddings, each distinct text computed once as long as ``cached`` hold them all."""

    @undisturbed()
    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, cached: int = CACHED_TEXTS) -> None:
        self.clip, self.tokenizer, self.cached = clip, tokenizer, cached
        self.length = min(clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        # One table rather than a tensor a text: thousands of small objects keep Python's garbage collector busy.
        self._table = torch.empty(cached, clip.text_projection.out_features, dtype=torch.float32, device="cpu")
        self._known: dict[str, int] = {}  # text -> row of the table
        self._tokens, self._word = (functools.lru_cache(cached)(of) for of in (self._tokens_of, self._tokens_of_word))
        (self._start, *_, self._end), = tokenizer([""])["input_ids"]

    @undisturbed()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """f32 (n, E) on the CPU, unit length, for n texts that :meth:`fits` accepts."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > len(self._table):  # full: it begins again with the texts of this call
            self._known, new = {}, list(dict.fromkeys(texts))
            self._table = self._table.new_empty(max(self.cached, len(new)), self._table.shape[1])
        if new:
            rows, order = pack([self._tokens(text) for text in new], max(WIDTH, self.length))
            tower, start = self.clip.text_model, len(self._known)
            ends = torch.cat([_ends(tower, rows[first:last]) for first, last in batches(len(rows), ROWS)])
            found = self.clip.text_projection(tower.final_layer_norm(ends))
            places = torch.tensor(order, dtype=torch.long, device=found.device).argsort()
            self._table[start : start + len(new)] = unit(found[places])
            self._known.update(zip(new, itertools.count(start)))
        return self._table[[self._known[text] for text in texts]]

    @undisturbed()
    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text, with start and end token, is within the model's length."""
        return [len(self._tokens(text)) <= self.length for text in texts]

    def _tokens_of(self, text: str) -> tuple[int, ...]:
        """Token ids from start to end token. CLIP's tokens never span a space, so each word is looked up alone."""
        ids = (self._start, *itertools.chain.from_iterable(map(self._word, text.split(" "))), self._end)
        return ids[: ids.index(self._end) + 1]  # where a text spells the end token out, CLIP reads it there

    def _tokens_of_word(self, word: str) -> tuple[int, ...]:
        return tuple(self.tokenizer([word], truncation=False, verbose=False)["input_ids"][0][1:-1])


def unit(embeddings: torch.Tensor) -> torch.Tensor:
    """CLIP's embeddings, L2-normalised, f32 on the CPU; ``InputError`` if a value of them is not finite."""
    found = F.normalize(embeddings.float(), dim=-1).cpu()
    if not torch.isfinite(found).all():
        raise InputError("CLIP returned values that are not finite; check the weights of models.clip, or use float32.")
    return found


def pack(sequences: Sequence[tuple[int, ...]], width: int) -> tuple[list[Row], list[int]]:
    """Token sequences (1 to ``width`` tokens) as prefix trees in rows of at most ``width`` tokens, and the order in
    which they end there. A token's descendants stand behind it, up to its last: i sees j if j <= i <= last[j]."""
    rows: list[Row] = []
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    path: list[int] = []  # columns of the previous sequence's tokens
    previous: tuple[int, ...] = ()
    for sequence in sorted(sequences):
        shared = sum(itertools.takewhile(bool, map(operator.eq, previous, sequence)))  # tokens at the beginning
        if not rows or len(rows[-1][0]) + len(sequence) - shared > width:
            rows.append(([], [], [], []))
            path, shared = [], 0
        tokens, positions, last, ends = rows[-1]
        path[shared:] = range(len(tokens), len(tokens) + len(sequence) - shared)
        tokens += sequence[shared:]
        positions += range(shared, len(sequence))
        last += path[shared:]
        for ancestor in path:
            last[ancestor] = len(tokens) - 1
        ends.append(path[-1])
        previous = sequence
    return rows, order


def _ends(text: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """What the last layer of the text tower puts out where texts end, row by row: (n, D)."""
    weight, counts = text.embeddings.token_embedding.weight, [len(ends) for *_, ends in rows]

    def padded(lists: Sequence[list[int]], value: int = 0) -> torch.Tensor:
        return pad_sequence([torch.tensor(one, dtype=torch.long, device=weight.device) for one in lists], True, value)

    tokens, positions, last, ends = zip(*rows, strict=True)
    # Below the embedding, not by `text`: that one refuses rows longer than a text may be.
    hidden = text.embeddings.token_embedding(padded(tokens)) + text.embeddings.position_embedding(padded(positions))
    last, ends = padded(last, hidden.shape[1]), padded(ends)  # padding sees padding, and nobody sees it
    column = torch.arange(hidden.shape[1], dtype=torch.long, device=weight.device)
    unseen = (column[:, None] < column) | (column[:, None] > last[:, None])
    mask = torch.zeros(unseen.shape, dtype=weight.dtype, device=weight.device)
    mask = mask.masked_fill_(unseen, torch.finfo(weight.dtype).min)[:, None]
    *layers, top = text.encoder.layers
    for layer in layers:
        hidden = layer(hidden, mask)
    # Of the last layer the end tokens alone are read, so only they ask.
    found = _layer_at(top, hidden, mask, ends)
    return torch.cat([row[:count] for row, count in zip(found, counts, strict=True)])


def _layer_at(layer: torch.nn.Module, hidden: torch.Tensor, mask: torch.Tensor, asking: torch.Tensor) -> torch.Tensor:
    """A layer of CLIP's text tower on (B, W, D), mask (B, 1, W, W), at columns ``asking`` i64 (B, m): (B, m, D)."""
    attention, every = layer.self_attn, torch.arange(len(hidden), dtype=torch.long, device=hidden.device)[:, None]
    normed = layer.layer_norm1(hidden)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    query, key, value = attention.q_proj(normed[every, asking]), attention.k_proj(normed), attention.v_proj(normed)
    mixed = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), mask[:, 0][every, asking][:, None],
                                           scale=attention.scale)
    hidden = hidden[every, asking] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))
