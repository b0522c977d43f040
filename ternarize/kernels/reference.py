"""Plain torch: correct on every device, and never holds more than a slice of the float weight.

Shapes: B any leading sizes, I in features, O out features, G groups in a row, S group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ternarize.packing import dequantize_table, unpack_trits
from ternarize.tensor import expand_groups, times_scale

SLICE_WEIGHTS = 1 << 22  # float weights alive at a time (16 MiB in float32)


def ternary_weight(packed: Tensor, scale: Tensor, shift: Tensor | None, in_features: int, group_size: int) -> Tensor:
    """`scale * trits + shift` from packed trits, float32 [O, I]."""
    weight = times_scale(unpack_trits(packed, in_features, torch.float32), scale.float(), group_size)
    if shift is not None:
        weight += expand_groups(shift.float(), in_features, group_size)
    return weight


def ternary_linear(
    x: Tensor,  # float [B, I]
    packed: Tensor,  # uint8 [O, ceil(I / 5)]
    scale: Tensor,  # fp16 [O, G]
    shift: Tensor | None,  # fp16 [O, G]
    bias: Tensor | None,  # float [O]
    group_size: int,
) -> Tensor:
    """x W' + bias with W = scale * trits + shift, weights rounded to x's dtype; [B, O]."""
    in_features = x.shape[-1]

    def rows(start: int, stop: int) -> Tensor:
        part = None if shift is None else shift[start:stop]
        return ternary_weight(packed[start:stop], scale[start:stop], part, in_features, group_size)

    return _sliced(x, packed.shape[0], rows, bias)


def table_linear(
    x: Tensor,  # float [B, H]
    packed: Tensor,  # uint8 [V, R]
    bias: Tensor | None,  # float [V]
    group_size: int,
    bits: int,
) -> Tensor:
    """x W' + bias with W from a table's records, weights rounded to x's dtype; [B, V]."""
    columns = x.shape[-1]
    return _sliced(x, packed.shape[0], lambda a, b: dequantize_table(packed[a:b], columns, group_size, bits), bias)


def _sliced(x: Tensor, out_features: int, rows, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
    step = max(1, SLICE_WEIGHTS // max(1, x.shape[-1]))
    parts = [
        torch.nn.functional.linear(x, rows(start, min(start + step, out_features)).to(x.dtype))
        for start in range(0, out_features, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias is None else out + bias.to(out.dtype)
