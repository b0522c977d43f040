"""A linear whose trits stay as they are while its scales and shifts learn: as lean in training as it is on disk.

Left to autograd, the float weight, its trits in float and each group's scale repeated over its columns are all kept
from the forward pass to the backward pass: 12 bytes a weight and more. Here it is the trits alone, in a byte each, and
the weight is made from them once for each pass.

Shapes: N tokens, O out features, I in features, G groups in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ternarize.tensor import expand_groups, sum_groups


def steady_linear(x: Tensor, trits: Tensor, scale: Tensor, shift: Tensor | None, group_size: int) -> Tensor:
    """x [..., I] by the weight scale * trits + shift; gradients for x, scale and shift.

    Args:
        trits: int8 [O, I]; scale, shift: float32 [O, G].

    Returns:
        [..., O], in x's dtype, or in autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = _SteadyLinear.apply(x.flatten(0, -2), trits, scale, shift, group_size)
    return out.unflatten(0, x.shape[:-1])


def _weight(trits: Tensor, scale: Tensor, shift: Tensor | None, group_size: int) -> Tensor:
    """The float32 weight [O, I]."""
    columns = trits.shape[1]
    weight = expand_groups(scale, columns, group_size).mul_(trits)
    return weight if shift is None else weight.add_(expand_groups(shift, columns, group_size))


class _SteadyLinear(torch.autograd.Function):
    """x [N, I] -> [N, O]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, trits: Tensor, scale: Tensor, shift: Tensor | None, group_size: int
    ) -> Tensor:
        ctx.save_for_backward(x, trits, scale, shift)
        ctx.group_size = group_size
        return x @ _weight(trits, scale, shift, group_size).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, trits, scale, shift = ctx.saved_tensors
        for_x = for_scale = for_shift = None
        if ctx.needs_input_grad[0]:
            for_x = gradient @ _weight(trits, scale, shift, ctx.group_size).to(gradient.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            for_weight = (gradient.t() @ x).float()  # [O, I]
            if ctx.needs_input_grad[3]:
                for_shift = sum_groups(for_weight, ctx.group_size)
            if ctx.needs_input_grad[2]:
                for_scale = sum_groups(for_weight.mul_(trits), ctx.group_size)
        return for_x, None, for_scale, for_shift, None
