"""Attribution maps A_n (Sec. 3.2): cross-attention of the class tokens, summed over layers, heads and denoising steps.

``with record_attribution(...)`` replaces the attention processors of the UNet for as long as images are drawn; nothing
is computed twice and nothing is stored per step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ovdiff_lib.errors import InputError
from ovdiff_lib.networks.instruments import attention_grid, undisturbed

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def fill_template(template: str, name: str) -> str:
    """``template``, of which the profile's schema has seen that it holds ``{name}`` once, with it replaced."""
    return template.replace("{name}", name)


@undisturbed()
def class_token_positions(tokenizer: CLIPTokenizer, template: str, name: str) -> list[int]:
    """Positions in the text encoder's sequence (0 = start token) of the tokens that ``name`` occupies in ``template``.

    Found by the place of the name, so that a word of it which the template has as well does not count there. Raises
    ``InputError`` for a prompt longer than the text encoder reads.
    """
    prompt = fill_template(template, name)
    start = template.index("{name}")
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) > tokenizer.model_max_length:
        raise InputError(f"The prompt {prompt!r} has {len(spans)} tokens and the text encoder reads "
                         f"{tokenizer.model_max_length}; shorten the class name.")
    positions = [i for i, (first, last) in enumerate(spans) if first < start + len(name) and last > start]
    if not positions:
        raise InputError(f"The class name {name!r} has no token the text encoder knows; use letters or digits.")
    return positions


@contextlib.contextmanager
def record_attribution(unet: torch.nn.Module, token_positions: list[int], size: tuple[int, int],
                       mid_block: bool = False, guided: bool = True) -> Iterator[AttributionRecorder]:
    """Record the attention to ``token_positions`` of every UNet call inside the ``with`` block.

    ``size`` = (h, w) of the latents. Cross-attention of the mid block counts only with ``mid_block``: the attribution
    tool of the paper leaves it out. ``guided``: a batch is a negative and a conditional half, of which the latter is
    recorded. The former processors are put back when the block ends, also by an exception.
    """
    recorder = AttributionRecorder(token_positions, size, guided)
    blocks = ("down_blocks", "up_blocks", "mid_block") if mid_block else ("down_blocks", "up_blocks")
    with contextlib.ExitStack() as stack:
        for name, module in unet.named_modules():
            if name.startswith(blocks) and name.endswith(".attn2"):
                stack.callback(module.set_processor, module.processor)
                module.set_processor(functools.partial(recorder.attend, name))
        yield recorder


class AttributionRecorder:
    """Running sum of attention per layer; :meth:`maps` gives the attribution of what was recorded so far."""

    def __init__(self, token_positions: list[int], size: tuple[int, int], guided: bool) -> None:
        self.token_positions, self.size, self.guided = list(token_positions), size, guided
        self.sums: dict[str, torch.Tensor] = {}  # layer -> f32 (n, positions of that layer)

    def attend(self, layer: str, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
               **_: Any) -> torch.Tensor:
        """An attention processor of diffusers for the cross-attention of Stable Diffusion, (B, hw, C) attending to (B,
        tokens, E) to (B, hw, C), which adds softmax(scale q k^T) to the sums, its mean over heads and class tokens."""
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        key, value = heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        with torch.no_grad():
            half = slice(len(query) // 2 if self.guided else 0, None)
            # In float32 whatever the model's precision: half-precision probabilities lose the small ones over 30 steps.
            scores = (query[half].float() * attn.scale) @ key[half].float().transpose(-1, -2)
            attention = scores.softmax(dim=-1)[..., self.token_positions].mean(dim=(1, 3))
            self.sums[layer] = self.sums.get(layer, 0) + attention
        output = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))

    def maps(self) -> torch.Tensor:
        """Attribution f32 (n, h, w) of the conditional images on the CPU, >= 0: the sum over layers and steps.

        Heads and class tokens were averaged, which differs from a sum by a constant that Eq. 1 and Otsu thresholds do
        not see; each layer is then upsampled bicubically and its undershoot clamped (DAAM clamps before that mean).
        """
        total = 0
        for attention in self.sums.values():
            grid = attention.unflatten(1, attention_grid(attention.shape[1], self.size))[:, None]
            total = total + F.interpolate(grid, size=self.size, mode="bicubic", align_corners=False).clamp_min(0)
        return total[:, 0].cpu()
