"""Ternary weights in the blocks of ggml, llama.cpp's tensor library: bytes straight from trits, nothing quantized anew.

A row is cut into blocks of `width` columns; a block holds the trits as codes t + 1 (Q4_0: t + 8) and what scales them:

    TQ1_0   256   48 + 4 bytes of codes in base 3, fp16 d              d t
    TQ2_0   256   64 bytes of codes, fp16 d                            d t
    Q2_0     64   fp16 d, 16 bytes of codes                            d t
    Q4_0     32   fp16 d, 16 bytes of codes                            d t
    Q4_1     32   fp16 d, fp16 m, 16 bytes of codes                    d (t + 1) + m
    Q2_K    256   16 bytes s + 16 n, one for 16 columns,               d s (t + 1) - e n,  s and n in 0..15
                  64 bytes of codes, fp16 d, fp16 e

A block is exact where it lies in one group: scales are fp16 in a ternarize folder too, and are copied. What Q4_1 and Q2_K
add is rounded to fp16, an error of at most 2^-11 of the larger of scale and shift. A group that is finer than a block, or
a shift where the type has none, cannot be held: then a block gets the scale that is nearest in least squares.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.tensor import TernaryTensor, expand_groups

SUB = 16  # columns of a sub-block of Q2_K


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Args:
        name: ggml's.
        number: what a file calls it.
        width: weights in a block.
        size: bytes of a block.
        shift: whether it can hold one.
    """

    name: str
    number: int
    width: int
    size: int
    shift: bool = False

    def holds(self, columns: int, group_size: int, shift: bool) -> bool:
        """Whether a weight of this layout is exact in this type, whatever its values."""
        one_group = group_size % self.width == 0 or group_size >= columns
        return self.fits(columns) and one_group and (self.shift or not shift)

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns are whole blocks."""
        return columns % self.width == 0


TQ1_0 = BlockType("TQ1_0", 34, 256, 54)
TQ2_0 = BlockType("TQ2_0", 35, 256, 66)
Q2_0 = BlockType("Q2_0", 42, 64, 18)
Q4_0 = BlockType("Q4_0", 2, 32, 18)
Q4_1 = BlockType("Q4_1", 3, 32, 20, shift=True)
Q2_K = BlockType("Q2_K", 10, 256, 84, shift=True)
TYPES = (TQ1_0, TQ2_0, Q2_0, Q4_0, Q4_1, Q2_K)


def pack(tensor: TernaryTensor, kind: BlockType) -> Tensor:
    """The bytes of a weight, uint8 [O, I / width * size].

    Raises:
        ValueError: the rows are no whole blocks (a bug in the caller).
    """
    rows, columns = tensor.shape
    if not kind.fits(columns):
        raise ValueError(f"{kind.name} has blocks of {kind.width} weights, rows have {columns}")
    codes = (tensor.trits.view(torch.uint8) + 1).unflatten(-1, (-1, kind.width))  # -1 is 255, + 1 is 0
    return _PACKERS[kind.name](tensor, codes).flatten(1)


def stored(tensor: TernaryTensor, kind: BlockType) -> Tensor:
    """The float32 weight [O, I] that a reader of `pack`'s bytes computes."""
    if kind is Q2_K:
        scale, sub_scale, least, sub_least = _fit_q2_k(tensor)
        scale = _spread(scale) * sub_scale
        shift: Tensor | None = scale - _spread(least) * sub_least
        width = SUB
    else:
        scale, shift = block_levels(tensor, kind)
        width = kind.width
    columns = tensor.shape[1]
    weight = expand_groups(scale, columns, width) * tensor.trits
    return weight if shift is None else weight + expand_groups(shift, columns, width)


def block_levels(tensor: TernaryTensor, kind: BlockType) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of each block as `kind` stores them, float32 [O, I / width]; shift is None where it has none.

    What a block's one group says; where it has several, or a shift that `kind` lacks, least squares for its trits.
    """
    scale, shift = _levels(tensor, kind.width, kind.shift)
    scale = scale.half().float()
    if shift is None:
        return scale, None
    return scale, (shift - scale).half().float() + scale


def _levels(tensor: TernaryTensor, width: int, shifted: bool) -> tuple[Tensor, Tensor | None]:
    """As `block_levels`, for runs of `width` columns, before anything is rounded."""
    columns = tensor.shape[1]
    source = tensor.shift if tensor.shift is None or bool(tensor.shift.any()) else None
    if (tensor.group_size % width == 0 or tensor.group_size >= columns) and (shifted or source is None):
        group = torch.arange(0, columns, width) // tensor.group_size
        scale = tensor.scale.float()[:, group]
        shift = torch.zeros_like(scale) if tensor.shift is None else tensor.shift.float()[:, group]
        return scale, shift if shifted else None
    trits = tensor.trits.float().unflatten(-1, (-1, width))
    weight = tensor.dequantize().unflatten(-1, (-1, width))
    if not shifted:
        return _slope(trits, weight, expand_groups(tensor.scale.float(), columns, tensor.group_size)), None
    mean = weight.mean(-1, keepdim=True)
    middle = trits.mean(-1, keepdim=True)
    scale = _slope(trits - middle, weight - mean, expand_groups(tensor.scale.float(), columns, tensor.group_size))
    return scale, (mean - scale[..., None] * middle).squeeze(-1)


def _slope(trits: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The scale that takes `trits` nearest to `weight`; where all trits are alike, the mean of the groups' own."""
    power = trits.square().sum(-1)
    fallback = scale.unflatten(-1, (-1, trits.shape[-1])).mean(-1)
    best = (trits * weight).sum(-1) / power.clamp(min=1e-30)
    return torch.where((power > 1e-6) & (best > 0), best, fallback)


# -- Q2_K ----------------------------------------------------------------------------------------------------------


def _fit_q2_k(tensor: TernaryTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and its multiples, e and its multiples: float32 [O, B], [O, I / 16], twice.

    A shift-less weight has the same d and s for what it subtracts, so that its zeros stay zero.
    """
    scale, shift = _levels(tensor, SUB, shifted=True)
    assert shift is not None
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
    return torch.cat([_threes(codes), _half(block_levels(tensor, TQ1_0)[0])], -1)


def _pack_tq2_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_twos(codes), _half(block_levels(tensor, TQ2_0)[0])], -1)


def _pack_q2_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_half(block_levels(tensor, Q2_0)[0]), _join(codes.unflatten(-1, (16, 4)).mT, 2)], -1)


def _pack_q4_0(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    return torch.cat([_half(block_levels(tensor, Q4_0)[0]), _join((codes + 7).unflatten(-1, (2, 16)), 4)], -1)


def _pack_q4_1(tensor: TernaryTensor, codes: Tensor) -> Tensor:
    scale, shift = block_levels(tensor, Q4_1)
    assert shift is not None
    return torch.cat([_half(scale), _half(shift - scale), _join(codes.unflatten(-1, (2, 16)), 4)], -1)


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


def unpack(record: Tensor, kind: BlockType, name: str) -> TernaryTensor:
    """What `pack` was given, or what llama.cpp quantized: trits and fp16 scales as they are stored, of the largest
    groups that say the same.

    Args:
        record: uint8 [O, bytes].
        kind: TQ1_0, TQ2_0, Q2_0 or Q4_0.

    Raises:
        FormatError: a code that is no trit, or a scale that is not finite.
    """
    blocks = record.unflatten(-1, (-1, kind.size))
    first = kind in (Q2_0, Q4_0)
    half, packed = (blocks[..., :2], blocks[..., 2:]) if first else (blocks[..., -2:], blocks[..., :-2])
    scale = half.contiguous().view(torch.float16).squeeze(-1)
    trits = _UNPACKERS[kind.name](packed).to(torch.int8)
    if int(trits.abs().max()) > 1:
        raise FormatError(f"{name} has levels in {kind.name} that are not -1, 0 or 1 times its scale: it is not ternary.")
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
