"""The product of a linear whose scales and shifts learn, and its trits too or not: lean and quick in training.

Left to autograd, the float weight, its trits in float and each group's scale repeated over its columns are all kept
from the forward pass to the backward pass, and each step between them is a pass over the memory of a whole weight. Here
only the codes are kept, from which the weight is made once for each pass, and no gradient is computed that nobody asked
for.

Codes are trits, in a byte each, which stay; or positions in units of scale, whose nearest trit counts and which learn
by the clipped straight-through estimator: the gradient of a trit passes where its position lies in -1..1 (Yin et al.,
arXiv 1903.05662).

    d/d scale_g = sum over the group of g * trit,  d/d shift_g = sum of g,  d/d position = g * scale inside -1..1

with g the gradient of the weight. Shapes: N tokens, O out features, I in features, G groups in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ternarize.tensor import expand_groups, sum_groups, times_scale

OUTERMOST = 1 + torch.finfo(torch.float32).eps  # hardtanh passes what lies strictly inside


def learnt_linear(x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group_size: int) -> Tensor:
    """x [..., I] by the weight scale * trits + shift; gradients for x, float codes, scale and shift.

    Args:
        codes: trits, int8 [O, I], or positions, float32 [O, I]; scale, shift: float32 [O, G].

    Returns:
        [..., O], in x's dtype, or in autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = _LearntLinear.apply(x.flatten(0, -2), codes, scale, shift, group_size)
    return out.unflatten(0, x.shape[:-1])


def nearest_trits(codes: Tensor) -> Tensor:
    """The trits of positions, in float32; of trits, themselves."""
    return codes.round().clamp_(-1, 1) if codes.is_floating_point() else codes


def _weight(codes: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight [O, I], rounded to `dtype`."""
    trits = nearest_trits(codes)
    if shift is None:  # a trit times a rounded scale is the rounded product
        return times_scale(trits.to(dtype), scale.to(dtype), group_size)
    return times_scale(trits, scale, group_size).add_(expand_groups(shift, codes.shape[1], group_size)).to(dtype)


class _LearntLinear(torch.autograd.Function):
    """x [N, I] -> [N, O]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group_size: int
    ) -> Tensor:
        ctx.save_for_backward(x, codes, scale, shift)
        ctx.group_size = group_size
        return x @ _weight(codes, scale, shift, group_size, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, codes, scale, shift = ctx.saved_tensors
        size, (for_input, for_codes, for_scale, for_shift, _) = ctx.group_size, ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 5
        if for_input:
            found[0] = gradient @ _weight(codes, scale, shift, size, gradient.dtype)
        if for_codes or for_scale or for_shift:
            of_weight = (gradient.t() @ x).float()  # [O, I]
            if for_shift:
                found[3] = sum_groups(of_weight, size)
            if for_scale:
                found[2] = sum_groups(of_weight * nearest_trits(codes), size)
            if for_codes:
                of_trits = times_scale(of_weight, scale, size)
                found[1] = torch.ops.aten.hardtanh_backward(of_trits, codes, -OUTERMOST, OUTERMOST)
        return tuple(found)
