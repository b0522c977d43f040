"""torch's own product with 4-bit weights, for linears on a CPU where the native library is missing.

Codes are trits + 8, and the operator's scale and zero are our scale and shift, so the levels are exact up to bfloat16,
in which it computes: in float32 it is slower by a factor of 16. It holds 4.5 bits a weight in groups of 64.

Shapes: B any leading sizes, I in features, O out features, G groups in a row, S group size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ternarize.packing import unpack_trits

GROUP_SIZES = (32, 64, 128, 256)
ROWS = 16  # the operator takes multiples of it
MOST_TOKENS = 32  # beyond, unpacking the weight once for all of them is faster
MIDDLE = 8  # the code that stands for 0


class BuiltinTernary:
    """A ternary weight laid out for `torch._weight_int4pack_mm_for_cpu`.

    Args:
        trits: uint8 [O, ceil(I / 5)], as in the file; O and S as `fits` says.
        levels: scale and shift, fp16 [O, G] each; shift is None where the grid has none.
        bias: float [O] or None.
        in_features, group_size: I and S.
    """

    path = None

    def __init__(
        self,
        trits: Tensor,
        levels: tuple[Tensor, Tensor | None],
        bias: Tensor | None,
        in_features: int,
        group_size: int,
    ) -> None:
        scale, shift = levels
        self.group_size, self.bias = group_size, None if bias is None else bias.detach()
        codes = torch.cat([unpack_trits(rows, in_features).add_(MIDDLE).int() for rows in trits.split(ROWS * 64)])
        self.packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        both = torch.stack([scale, torch.zeros_like(scale) if shift is None else shift], -1)  # [O, G, 2]
        self.levels = both.transpose(0, 1).bfloat16().contiguous()

    @staticmethod
    def fits(rows: int, columns: int, group_size: int) -> bool:
        """Whether the operator takes a weight of this shape, [O, I] in groups of S."""
        return rows % ROWS == 0 and group_size in GROUP_SIZES and columns % group_size == 0

    def takes(self, x: Tensor, exact: bool) -> bool:
        """Whether the product with x [B, I] belongs here: rounded activations, and few tokens."""
        return not exact and x.numel() <= MOST_TOKENS * x.shape[-1]

    def linear(self, x: Tensor, exact: bool = False) -> Tensor:
        """x [B, I], rounded to bfloat16, -> [B, O] in x's dtype."""
        out = torch._weight_int4pack_mm_for_cpu(
            x.reshape(-1, x.shape[-1]).bfloat16(), self.packed, self.group_size, self.levels
        )
        out = out.view(*x.shape[:-1], -1).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Copies and pickles hold None instead: it is made again from the file's tensors."""
        return type(None), ()
