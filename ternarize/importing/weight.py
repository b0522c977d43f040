"""One weight: its ternary form, if it has one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ternarize.tensor import TernaryTensor, expand_groups, group_count

LARGEST_GROUP = 1024  # beside the whole row
FEW_ROWS = 8  # that a group size is tried on first


def recognize(weight: Tensor) -> TernaryTensor | None:
    """The ternary form of a weight [O, I], in its own type; None where it has none.

    The largest groups that hold are taken, and a shift only where there is none without.
    """
    columns = weight.shape[1]
    for levels in (_symmetric, _moved):
        for size in (columns, *range(min(columns - 1, LARGEST_GROUP), 3, -1)):
            if all(_fits(part, size, levels) for part in (weight[:FEW_ROWS], weight)):
                return _form(weight, size, levels)
    return None


def _fits(weight: Tensor, size: int, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> bool:
    scale, shift = levels(_grouped(weight, size))
    columns = weight.shape[1]
    wide, moved = (expand_groups(level.half().float(), columns, size) for level in (scale, shift))
    trits = ((weight.float() - moved) / wide).round().clamp(-1, 1)
    return torch.equal((wide * trits + moved).to(weight.dtype), weight)


def _form(weight: Tensor, size: int, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> TernaryTensor:
    columns = weight.shape[1]
    scale, shift = (level.half() for level in levels(_grouped(weight, size)))
    wide, moved = (expand_groups(level.float(), columns, size) for level in (scale, shift))
    trits = ((weight.float() - moved) / wide).round().clamp(-1, 1).to(torch.int8)
    return TernaryTensor(trits, scale, shift if levels is _moved else None, size)


def _grouped(weight: Tensor, size: int) -> Tensor:
    """float32 [O, G, S]; a short last group is filled with its own last column."""
    padding = group_count(weight.shape[1], size) * size - weight.shape[1]
    wide = weight.float()
    return torch.cat([wide, wide[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, size))


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [O, G] where the levels are -s, 0, s: the largest is s. A group of zeros may have any scale."""
    scale = groups.abs().amax(-1)
    return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)


def _moved(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [O, G] with a shift: three levels are the two ends and the middle.

    Of two levels any two of three may be meant: the first pair whose scale and shift float16 holds is taken. One level
    is its shift, and what float16 leaves of it.
    """
    low, high = groups.aminmax(dim=-1)
    middle, span = (high + low) / 2, high - low
    three = ((groups > low[..., None]) & (groups < high[..., None])).any(-1)
    scale, shift = span / 2, middle
    for other in (low, high):
        better = ~three & ~(_in_half(scale) & _in_half(shift)) & _in_half(span) & _in_half(other)
        scale, shift = torch.where(better, span, scale), torch.where(better, other, shift)
    one = span == 0
    shift = torch.where(one, low.half().float(), shift)
    scale = torch.where(one, (low - shift).abs(), scale)
    return torch.where(scale > 0, scale, 1.0), shift


def _in_half(values: Tensor) -> Tensor:
    return values.half().float() == values


def with_shift(tensor: TernaryTensor, shift: bool) -> TernaryTensor:
    """The same weight with a shift of 0, where its folder has shifts."""
    if not shift or tensor.shift is not None:
        return tensor
    return TernaryTensor(tensor.trits, tensor.scale, torch.zeros_like(tensor.scale), tensor.group_size)
