"""Exact, reversible layouts of codes in bytes.

Trits, five to a byte along the row ("base3", 8/5 = 1.6 bits a trit):

    byte = d0 + 3*d1 + 9*d2 + 27*d3 + 81*d4,   d = trit + 1 in {0, 1, 2}      so a byte is 0..242

    row   t0 t1 t2 t3 t4 | t5 t6 t7 .  .           I = 8 columns
    bytes       b0       |       b1                ceil(I / 5) = 2; the two digits of padding are 1 (trit 0)

A byte above 242, or padding that is not 1, was not written by this packer and is refused.

Embeddings and heads, 8 bits per weight with one fp16 scale per group ("int8"), one record a row:

    row   H int8 codes | G fp16 scales, little endian          H + 2 G bytes, as uint8

Both layouts are narrower or wider than the float row that they replace, never as wide: software that does not
know them stops at the shape instead of reading codes as weights (see `format`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.tensor import expand_groups, group_count

TRITS_PER_BYTE = 5
LARGEST_BYTE = 3**TRITS_PER_BYTE - 1
_POWERS = (1, 3, 9, 27, 81)


def packed_columns(in_features: int) -> int:
    """Bytes of one packed row of `in_features` trits."""
    return -(-in_features // TRITS_PER_BYTE)


@cache
def trit_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The five trits of every byte, [256, 5] in `dtype`; the rows of the bytes above 242 are never read."""
    byte = torch.arange(256, device=device)
    digits = [torch.div(byte, power, rounding_mode="floor") % 3 - 1 for power in _POWERS]
    return torch.stack(digits, dim=1).to(dtype)


def pack_trits(trits: Tensor) -> Tensor:
    """int8 trits [..., I] in {-1, 0, 1} -> uint8 [..., ceil(I / 5)]."""
    in_features = trits.shape[-1]
    padding = packed_columns(in_features) * TRITS_PER_BYTE - in_features
    digits = torch.nn.functional.pad(trits, (0, padding)).to(torch.uint8) + 1  # -1 wraps to 255, + 1 is 0
    digits = digits.unflatten(-1, (-1, TRITS_PER_BYTE))
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=trits.device)
    return (digits * powers).sum(-1, dtype=torch.int16).to(torch.uint8)


def check_packed(packed: Tensor, in_features: int, name: str = "weight") -> None:
    """Refuse bytes that `pack_trits` cannot have written.

    Raises:
        FormatError: a byte above 242, or padding digits other than 1.
    """
    if packed.numel() == 0:
        return
    largest = int(packed.max())
    if largest > LARGEST_BYTE:
        raise FormatError(
            f"{name}: a packed byte is {largest}, but five trits fill 0..{LARGEST_BYTE}. "
            "The file is corrupted: download or convert it again."
        )
    used = in_features % TRITS_PER_BYTE
    if used:
        padding = trit_table(torch.int8, packed.device)[packed[..., -1].long()][..., used:]
        if bool(padding.any()):
            raise FormatError(
                f"{name}: the padding after column {in_features} is not zero trits. "
                "The file is corrupted, or was written for another width: download or convert it again."
            )


def unpack_trits(packed: Tensor, in_features: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """uint8 [O, ceil(I / 5)] -> trits [O, I] in `dtype`; the bytes must have passed `check_packed`."""
    table = trit_table(dtype, packed.device)
    return table.index_select(0, packed.int().flatten()).view(*packed.shape[:-1], -1)[..., :in_features]


def quantize_int8(weight: Tensor, group_size: int) -> Tensor:
    """Round a float matrix to int8 codes with one absmax scale per row and group.

    Args:
        weight: float [V, H].
        group_size: columns that share a scale; the last group may be short.

    Returns:
        uint8 [V, H + 2 G]: the codes, then the fp16 scales (see the module's drawing).
    """
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - columns))
    largest = padded.view(rows, groups, group_size).abs().amax(-1)
    scale = (largest / 127).clamp(min=torch.finfo(torch.float16).smallest_normal).half()
    codes = (weight.float() / expand_groups(scale.float(), columns, group_size)).round().clamp(-127, 127)
    return torch.cat([codes.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], dim=1)


def int8_row_bytes(columns: int, group_size: int) -> int:
    """Bytes of one int8 record of `columns` weights."""
    return columns + 2 * group_count(columns, group_size)


def dequantize_int8(packed: Tensor, columns: int, group_size: int) -> Tensor:
    """uint8 records [..., H + 2 G] -> float32 [..., H]."""
    codes = packed[..., :columns].contiguous().view(torch.int8)
    # A copy even of a single record: a view of two bytes as one fp16 must start at an even place.
    scale = packed[..., columns:].clone(memory_format=torch.contiguous_format).view(torch.float16)
    return codes * expand_groups(scale.float(), columns, group_size)
