"""One ternary weight: trits, scale and shift, and the one formula that joins them.

    weight = scale * trits + shift          trits in {-1, 0, +1}; scale > 0; per row and group of input columns

Shapes: O out features, I in features, S group size, G groups in a row = ceil(I / S); the last group may be short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal


def group_count(in_features: int, group_size: int) -> int:
    """G, the number of groups in a row of `in_features` columns; the last one may be short."""
    return -(-in_features // group_size)


def expand_groups(per_group: Tensor, in_features: int, group_size: int) -> Tensor:
    """Repeat one value per group, [..., G], over the columns of its group, [..., I]."""
    return per_group.repeat_interleave(group_size, dim=-1)[..., :in_features]


def times_scale(values: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """values [..., I] times the scale of their group, [..., G], in their common type; the last group may be short."""
    columns = values.shape[-1]
    if columns % group_size:
        return values * expand_groups(scale, columns, group_size)
    return (values.unflatten(-1, (-1, group_size)) * scale[..., None]).flatten(-2)  # the scales are not written out


def sum_groups(values: Tensor, group_size: int) -> Tensor:
    """Sum over the columns of each group, [..., I] -> [..., G]; the last group may be short."""
    short = -values.shape[-1] % group_size
    return nn.functional.pad(values, (0, short)).unflatten(-1, (-1, group_size)).sum(-1)


@dataclass(frozen=True)
class Levels:
    """Coded scales and shifts of one weight, in 8 or 4 bits; `packing` draws the layout and does the coding.

    Args:
        record: uint8 [O, R], one record a row.
        limits: float32 [4], shared by the whole weight.
        scale_bits, shift_bits: 4 or 8; shift_bits is 0 for a grid without shift.
    """

    record: Tensor
    limits: Tensor
    scale_bits: int
    shift_bits: int


@dataclass(frozen=True)
class TernaryTensor:
    """A weight in ternary form.

    Args:
        trits: int8 [O, I], the codes in {-1, 0, +1}.
        scale: float [O, G], positive, in weight units.
        shift: float [O, G] in weight units, added after scaling; None where the grid has none.
        group_size: S, consecutive input columns that share one scale and shift.
        levels: the codes whose values scale and shift are, where they are stored in fewer than 16 bits.

    Raises:
        ValueError: a shape, dtype or value breaks the formula's rules (a bug in the caller, not bad user input).
    """

    trits: Tensor
    scale: Tensor
    shift: Tensor | None
    group_size: int
    levels: Levels | None = None

    def __post_init__(self) -> None:
        if self.trits.dtype != torch.int8 or self.trits.ndim != 2:
            raise ValueError(f"trits are int8 [O, I], not {self.trits.dtype} {list(self.trits.shape)}")
        if self.group_size < 1:
            raise ValueError(f"group_size is at least 1, not {self.group_size}")
        largest = int(self.trits.short().abs().max()) if self.trits.numel() else 0  # |-128| is no int8
        if largest > 1:
            raise ValueError(f"trits lie in -1..1, found {largest} in magnitude")
        expected = (self.trits.shape[0], group_count(self.trits.shape[1], self.group_size))
        named: list[tuple[str, Tensor | None]] = [("scale", self.scale), ("shift", self.shift)]
        for name, value in named:
            if value is None:  # a grid without shift
                continue
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} is [O, G] = {list(expected)}, not {list(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} has a NaN or infinite value")
        if not bool((self.scale > 0).all()):
            raise ValueError(f"scale is positive, found {float(self.scale.min())}")

    def rows(self, start: int, stop: int) -> TernaryTensor:
        """Some of the rows, as a weight of their own."""
        part = slice(start, stop)
        return TernaryTensor(
            self.trits[part],
            self.scale[part],
            None if self.shift is None else self.shift[part],
            self.group_size,
            None
            if self.levels is None
            else replace(self.levels, record=self.levels.record[part], limits=self.levels.limits.clone()),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.trits.shape[0], self.trits.shape[1]

    @property
    def zero_share(self) -> float:
        """Share of the trits that are 0, no unit."""
        return float((self.trits == 0).float().mean())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight, [O, I]: `scale * trits + shift`, computed in float32 and then rounded to `dtype`."""
        in_features = self.trits.shape[1]
        weight = times_scale(self.trits, self.scale.float(), self.group_size)
        if self.shift is not None:
            weight += expand_groups(self.shift.float(), in_features, self.group_size)
        return weight.to(dtype)
