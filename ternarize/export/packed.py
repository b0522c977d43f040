"""Codes of a few bits in words of 32, the first code in the lowest bits: what every format but ours does."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [..., N] in 0 .. 2^bits - 1 -> int32 [..., ceil(N bits / 32)]; padding is 0. bits divides 32."""
    held = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % held)).unflatten(-1, (-1, held))
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64)
    for place in range(held):
        words |= padded[..., place].long() << (bits * place)
    return words.to(torch.int32)  # the upper half wraps to negative numbers: the same bits


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> codes int16 [..., W * 32 / bits]."""
    places = torch.arange(0, 32, bits, device=words.device)
    return ((words.long()[..., None] >> places) & (2**bits - 1)).flatten(-2).to(torch.int16)
