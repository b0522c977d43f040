"""Ternary weights in the blocks of ggml, llama.cpp's tensor library: bytes straight from trits, nothing quantized anew.

A row is cut into blocks of `width` columns; a block holds the trits as codes t + 1 (Q4_0: t + 8) and what scales them:

    TQ1_0   256   48 + 4 bytes of codes in base 3, fp16 d              d t
    TQ2_0   256   64 bytes of codes, fp16 d                            d t
    Q2_0     64   fp16 d, 16 bytes of codes                            d t
    Q4_0     32   fp16 d, 16 bytes of codes                            d t
    Q4_1     32   fp16 d, fp16 m, 16 bytes of codes                    d (t + 1) + m
    Q2_K    256   16 bytes s + 16 n, one for 16 columns,               d s (t + 1) - e n,  s and n in 0..15
                  64 bytes of codes, fp16 d, fp16 e

A block, of Q2_K 16 columns of one, must lie in one group; `regroup` sees to that, with loss where it must. Scales are
fp16 in a ternarize folder too, and are copied. What Q4_1 and Q2_K add is rounded to fp16, by at most 2^-11 of it. The
scales that Q2_K has for 16 columns are multiples of one for 256: exact where those share a group, and seldom elsewhere.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.tensor import TernaryTensor, expand_groups, times_scale


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Args:
        name: ggml's.
        number: what a file calls it.
        file_type: what a file that is mostly of it calls itself.
        width: weights in a block.
        size: bytes of a block.
        shift: whether it can hold one.
        unit: weights that have a scale; the width where None.
    """

    name: str
    number: int
    file_type: int
    width: int
    size: int
    shift: bool = False
    unit: int | None = None

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns are whole blocks."""
        return columns % self.width == 0

    def holds(self, columns: int, group_size: int, shift: bool) -> bool:
        """Whether every weight of this layout is exact in this type."""
        one_group = group_size % self.width == 0 or group_size >= columns
        return self.fits(columns) and one_group and (self.shift or not shift)

    def bytes(self, rows: int, columns: int) -> int:
        """Of a weight of this shape."""
        return rows * columns // self.width * self.size


TQ1_0 = BlockType("TQ1_0", 34, 36, 256, 54)
TQ2_0 = BlockType("TQ2_0", 35, 37, 256, 66)
Q2_0 = BlockType("Q2_0", 42, 41, 64, 18)
Q4_0 = BlockType("Q4_0", 2, 2, 32, 18)
Q4_1 = BlockType("Q4_1", 3, 3, 32, 20, shift=True)
Q2_K = BlockType("Q2_K", 10, 10, 256, 84, shift=True, unit=16)
TYPES = (TQ1_0, TQ2_0, Q2_0, Q4_0, Q4_1, Q2_K)


def pack(tensor: TernaryTensor, kind: BlockType) -> Tensor:
    """The bytes of a weight, uint8 [O, I / width * size].

    Raises:
        ValueError: the rows are no whole blocks, or a block has several scales (a bug in the caller: see `regroup`).
    """
    codes = (tensor.trits.view(torch.uint8) + 1).unflatten(-1, (-1, kind.width))  # -1 is 255, + 1 is 0
    return _PACKERS[kind.name](tensor, codes).flatten(1)


def stored(tensor: TernaryTensor, kind: BlockType) -> Tensor:
    """The float32 weight [O, I] that a reader of `pack`'s bytes computes."""
    if kind is Q2_K:
        scale, sub_scale, least, sub_least = _fit_q2_k(tensor)
        scale = _spread(scale) * sub_scale
        shift: Tensor | None = scale - _spread(least) * sub_least
    elif kind is Q4_1:
        scale, least = _scale_and_least(tensor)
        shift = scale + least
    else:
        scale, shift = _spread_levels(tensor, kind.width)[0], None
    columns = tensor.shape[1]
    width = kind.unit or kind.width
    weight = times_scale(tensor.trits, scale, width)
    return weight if shift is None else weight + expand_groups(shift, columns, width)


def _spread_levels(tensor: TernaryTensor, width: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of every `width` columns, float32 [O, I / width]."""
    columns = tensor.shape[1]
    if columns % width or (tensor.group_size % width and tensor.group_size < columns):
        raise ValueError(f"runs of {width} columns do not lie in groups of {tensor.group_size}, {columns} in a row")
    group = torch.arange(0, columns, width) // tensor.group_size
    scale = tensor.scale.float()[:, group]
    return scale, torch.zeros_like(scale) if tensor.shift is None else tensor.shift.float()[:, group]


def _scale_and_least(tensor: TernaryTensor) -> tuple[Tensor, Tensor]:
    """Q4_1's d and m, float32 [O, I / 32], rounded as they are stored."""
    scale, shift = _spread_levels(tensor, Q4_1.width)
    return scale, (shift - scale).half().float()


# -- Q2_K ----------------------------------------------------------------------------------------------------------


def _fit_q2_k(tensor: TernaryTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and its multiples, e and its multiples: float32 [O, B], [O, I / 16], twice.

    A shift-less weight has the same d and s for what it subtracts, so that its zeros stay zero.
    """
    scale, shift = _spread_levels(tensor, 16)
    step, multiple = _multiples(scale)
    if tensor.shift is None:
        return step, multiple, step, multiple
    return step, multiple, *_multiples(_spread(step) * multiple - shift)


def _multiples(values: Tensor) -> tuple[Tensor, Tensor]:
    """One fp16 step for every 16 values [O, N], and multiples 0..15 of it that are nearest, as float32.

    The step is tried as each of the 15 parts of the largest value and made the best in least squares; one that gives
    every value is found so. Values of both signs cannot be had: the lesser sign becomes 0.
    """
    runs = values.unflatten(-1, (-1, 16))
    sign = torch.where(runs.sum(-1, keepdim=True) < 0, -1.0, 1.0)
    runs = (runs * sign).clamp(min=0)
    largest = runs.amax(-1, keepdim=True).clamp(min=2.0**-24)
    best_step = largest.half().float()
    best, best_error = torch.zeros_like(runs), torch.full_like(largest, torch.inf)
    for parts in range(1, 16):
        step = largest / parts
        multiple = (runs / step).round().clamp(0, 15)
        step = (runs * multiple).sum(-1, keepdim=True) / multiple.square().sum(-1, keepdim=True).clamp(min=1)
        step = torch.where(step > 0, step, largest).half().float()
        error = (runs - step * multiple).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step, best = torch.where(better, step, best_step), torch.where(better, multiple, best)
    return (best_step * sign).squeeze(-1), best.flatten(-2)


def _spread(per_block: Tensor) -> Tensor:
    """One value a block -> one a sub-block."""
    return per_block.repeat_interleave(16, dim=-1)


# -- bytes: codes uint8 [O, B, width] -> uint8 [O, B, size] ----------------------------------------------------------


def _half(values: Tensor) -> Tensor:
    """Floats [O, B] as fp16's bytes, [O, B, 2]."""
    return values.half().contiguous().view(torch.uint8).unflatten(-1, (-1, 2))


def _join(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., N, C] of so many bits, the N of a column in one byte, the first one lowest: [..., C]."""
    shifts = torch.arange(0, bits * codes.shape[-2], bits, dtype=torch.uint8)
    return (codes << shifts[:, None]).sum(-2, dtype=torch.int16).to(torch.uint8)


def _twos(codes: Tensor) -> Tensor:
    """256 codes of two bits as TQ2_0 and Q2_K have them: [O, B, 64]."""
    return _join(codes.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def _threes(codes: Tensor) -> Tensor:
    """256 codes in base 3 as TQ1_0 has them, [O, B, 52]: a byte is a fraction of 243, rounded up in 256ths."""
    parts = codes[..., :160].unflatten(-1, (5, 32)), codes[..., 160:240].unflatten(-1, (5, 16))
    tail = torch.nn.functional.pad(codes[..., 240:].unflatten(-1, (4, 4)), (0, 0, 0, 1))
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)
    digits = torch.cat([(part * powers[:, None]).sum(-2) for part in (*parts, tail)], -1)
    return ((digits * 256 + 242) // 243).to(torch.uint8)


def _pack_tq1_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_threes(codes), _half(_spread_levels(tensor, TQ1_0.width)[0])], -1)


def _pack_tq2_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_twos(codes), _half(_spread_levels(tensor, TQ2_0.width)[0])], -1)


def _pack_q2_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_half(_spread_levels(tensor, Q2_0.width)[0]), _join(codes.unflatten(-1, (16, 4)).mT, 2)], -1)


def _pack_q4_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_half(_spread_levels(tensor, Q4_0.width)[0]), _join((codes + 7).unflatten(-1, (2, 16)), 4)], -1)


def _pack_q4_1(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    scale, least = _scale_and_least(tensor)
    return torch.cat([_half(scale), _half(least), _join(codes.unflatten(-1, (2, 16)), 4)], -1)


def _pack_q2_k(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    scale, sub_scale, least, sub_least = _fit_q2_k(tensor)
    multiples = (sub_scale + 16 * sub_least).to(torch.uint8).unflatten(-1, (-1, 16))
    return torch.cat([multiples, _twos(codes), _half(scale), _half(least)], -1)


_PACKERS: dict[str, Callable[[TernaryTensor, Tensor], Tensor]] = {
    "TQ1_0": _pack_tq1_0,
    "TQ2_0": _pack_tq2_0,
    "Q2_0": _pack_q2_0,
    "Q4_0": _pack_q4_0,
    "Q4_1": _pack_q4_1,
    "Q2_K": _pack_q2_k,
}


# -- back ------------------------------------------------------------------------------------------------------------


def read_blocks(record: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Scales fp16 [O, B] and codes int8 [O, B, width], of which 0 is the weight 0, of a type with scales alone.

    Args:
        record: uint8 [O, bytes].
        kind: TQ1_0, TQ2_0, Q2_0 or Q4_0.
    """
    blocks = record.unflatten(-1, (-1, kind.size))
    first = kind in (Q2_0, Q4_0)
    half, packed = (blocks[..., :2], blocks[..., 2:]) if first else (blocks[..., -2:], blocks[..., :-2])
    return half.contiguous().view(torch.float16).squeeze(-1), _UNPACKERS[kind.name](packed).to(torch.int8)


def unpack(record: Tensor, kind: BlockType, name: str) -> TernaryTensor:
    """What `pack` was given, or what llama.cpp quantized: trits and fp16 scales as they are stored, of the largest
    groups that say the same.

    Args:
        record: uint8 [O, bytes].
        kind: TQ1_0, TQ2_0, Q2_0 or Q4_0.

    Raises:
        FormatError: a code that is no trit, or a scale that is not finite.
    """
    scale, trits = read_blocks(record, kind)
    if int(trits.abs().max()) > 1:
        raise FormatError(f"{name} is not ternary: in {kind.name} it has levels beside -1, 0 and 1 times its scale.")
    if not bool(torch.isfinite(scale).all()):
        raise FormatError(f"{name} has scales that are NaN or infinite: the file is damaged.")
    sign = scale.sign().to(torch.int8)  # a block of zeros has scale 0
    trits = (trits * sign[..., None]).flatten(1)
    scale = torch.where(scale == 0, torch.tensor(2.0**-14, dtype=torch.float16), scale.abs())
    width = kind.width
    while scale.shape[1] % 2 == 0 and torch.equal(scale[:, ::2], scale[:, 1::2]):
        scale, width = scale[:, ::2].contiguous(), 2 * width
    return TernaryTensor(trits, scale, None, width)


def _split(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `_join`: [..., C] -> [..., count, C]."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8)
    return (packed[..., None, :] >> shifts[:, None]) & (2**bits - 1)


def _unpack_tq1_0(packed: Tensor) -> Tensor:
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32)
    digits = (packed[..., None, :].int() * powers[:, None] % 256 * 3) // 256 - 1
    parts = digits[..., :32], digits[..., 32:48], digits[..., :4, 48:]
    return torch.cat([part.flatten(-2) for part in parts], -1)


def _unpack_tq2_0(packed: Tensor) -> Tensor:
    return _split(packed.unflatten(-1, (2, 32)), 2, 4).flatten(-3).int() - 1


def _unpack_q2_0(packed: Tensor) -> Tensor:
    return _split(packed, 2, 4).mT.flatten(-2).int() - 1


def _unpack_q4_0(packed: Tensor) -> Tensor:
    return _split(packed, 4, 2).flatten(-2).int() - 8


_UNPACKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "TQ1_0": _unpack_tq1_0,
    "TQ2_0": _unpack_tq2_0,
    "Q2_0": _unpack_q2_0,
    "Q4_0": _unpack_q4_0,
}
