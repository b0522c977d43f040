"""Many tokens of one text through a model's blocks: natively, but for their attention, which is torch's.

Where AMX multiplies the linears in bfloat16, torch attends in bfloat16 too, at a hundredth of what rounded activations
cost in KL (recipes/README.md).

Shapes: T tokens, H hidden, N heads, D head size, R ropes, P positions that are attended to.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ternarize.decoder.plan import Plan


def read_prompt(plan: Plan, layers: Any, cache: DynamicCache, hidden: Tensor, ropes: Tensor) -> Tensor:
    """The residual stream behind the last block; keys and values are added to the cache.

    Args:
        layers: the blocks' modules, whose `self_attn` says how torch attends.
        hidden: [T, H] in the model's dtype, which is the cache's.
        ropes: float32 [T, R, 2, D].

    Returns:
        float32 [T, H].

    Raises:
        MemoryError: there is none for the activations.
    """
    decoder, dtype = plan.decoder, hidden.dtype
    attended = torch.bfloat16 if decoder.path.name == "amx" and not decoder.exact else dtype
    x, room = hidden.to(torch.float32, copy=True), decoder.room(len(hidden))
    windows = {block: window for window, blocks in plan.kinds for block in blocks}
    mask_of = functools.cache(window_mask)
    for i, layer in enumerate(layers[: decoder.shape.blocks]):
        entered = decoder.enter_attention(i, x, ropes, room)
        query, key, value = (part.to(dtype).transpose(0, 1)[None] for part in entered)
        key, value = cache.update(key, value, i)
        mask = mask_of(len(x), key.shape[2] - len(x), windows[i])
        query, key, value = (part.to(attended) for part in (query, key, value))
        attention = layer.self_attn
        mixed, _ = sdpa_attention_forward(attention, query, key, value, mask, scaling=attention.scaling)
        decoder.leave_attention(i, mixed[0].float().contiguous(), x, room)
    return x


def window_mask(tokens: int, behind: int, window: int) -> Tensor | None:
    """Which of `behind` + T positions the last T attend to, bool [1, 1, T, P]; None where it is all up to their own.

    Args:
        window: the last positions that are attended to; 0 is all.
    """
    if not behind and (not window or tokens <= window):
        return None
    own = torch.arange(behind, behind + tokens, device="cpu")[:, None]
    other = torch.arange(behind + tokens, device="cpu")
    seen = other <= own
    return (seen & (other > own - window) if window else seen)[None, None]
