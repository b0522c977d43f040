"""Exact, reversible layouts of codes in bytes.

Trits, five to a byte along the row ("base3", 8/5 = 1.6 bits a trit):

    byte = d0 + 3*d1 + 9*d2 + 27*d3 + 81*d4,   d = trit + 1 in {0, 1, 2}      so a byte is 0..242

    row   t0 t1 t2 t3 t4 | t5 t6 t7 .  .           I = 8 columns
    bytes       b0       |       b1                ceil(I / 5) = 2; the two digits of padding are 1 (trit 0)

A byte above 242, or padding that is not 1, was not written by this packer and is refused.

Scales and shifts in 8 or 4 bits ("levels"), one record a row, limits that a whole weight shares beside them:

    row     1 byte r | nibbles: G scale codes c, then G shift codes d       1 + ceil(G (scale_bits + shift_bits) / 8)
    limits  float32 [4]: lo, hi, span, reach

    scale = 2^(lo + (hi - lo) r / 255) * 2^(-span c / (2^scale_bits - 1))            c = 0 is the row's largest
    shift = scale * reach * (d - z) / (z - 1),   z = 2^(shift_bits - 1)              d in 1 .. 2 z - 1, d = z is none

The values are computed in float64 and rounded to fp16, so every machine reads the same ones. A code of 8 bits is two
nibbles, low one first; a byte holds its first nibble low; an odd last nibble is followed by 0.

Embeddings and heads ("tables") in 8 or 6 bits, with one fp16 scale per group, one record a row:

    int8  H int8 codes | G fp16 scales, little endian               H + 2 G bytes, as uint8
    int6  48 bytes for each 64 columns | G fp16 scales              3 H / 4 + 2 G bytes; H and S are multiples of 64

    of 64 codes of 6 bits, each + 32:   byte i < 32 holds the lower 4 bits of columns i (low nibble) and 32 + i,
                                        byte 32 + i the upper 2 bits of columns i, 16 + i, 32 + i, 48 + i

All these layouts are narrower or wider than the float row that they replace, never as wide: software that does not
know them stops at the shape instead of reading codes as weights (see `format`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ternarize.errors import FormatError, TernarizeError
from ternarize.tensor import SMALLEST_SCALE, Levels, expand_groups, group_count, times_scale

TRITS_PER_BYTE = 5
TABLE_FLOATS = 2**22  # of a table that are rounded at a time, in several float32 copies
RUN = 64  # columns of a table in 6 bits that are packed together
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)
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


def encode_levels(
    scale: Tensor, shift: Tensor | None, scale_bits: int, shift_bits: int, limits: Tensor | None = None
) -> Levels:
    """Round scales and shifts to codes (see the module's drawing).

    Args:
        scale: float [O, G], positive, in weight units; shift: float [O, G] or None.
        scale_bits, shift_bits: 4 or 8.
        limits: float32 [4] to code within; chosen from the values where None.
    """
    limits = choose_limits(scale, shift) if limits is None else limits
    row, code, shift_code = _level_codes(scale, shift, scale_bits, shift_bits, limits)
    nibbles = [_to_nibbles(code, scale_bits)]
    if shift_code is not None:
        nibbles.append(_to_nibbles(shift_code, shift_bits))
    record = torch.cat([row.to(torch.uint8), _join_nibbles(torch.cat(nibbles, -1))], -1)
    return Levels(record, limits, scale_bits, 0 if shift is None else shift_bits)


def decode_levels(levels: Levels, groups: int) -> tuple[Tensor, Tensor | None]:
    """Scale and shift, fp16 [O, G]; shift is None where the grid has none."""
    nibbles = _split_nibbles(levels.record[:, 1:])
    middle = groups * levels.scale_bits // 4
    code = _from_nibbles(nibbles[:, :middle], levels.scale_bits)
    shift_code = None
    if levels.shift_bits:
        shift_code = _from_nibbles(nibbles[:, middle : middle + groups * levels.shift_bits // 4], levels.shift_bits)
    return _coded_levels(levels.record[:, :1], code, shift_code, levels.scale_bits, levels.shift_bits, levels.limits)


def outermost_levels(levels: Levels) -> tuple[Tensor, Tensor | None]:
    """The largest and smallest scale that each row could hold, and its largest shifts beside them, fp16 [O, 2].

    What all its groups hold lies between, whatever their codes are.
    """
    lo, hi, span, reach = levels.limits.double().tolist()
    top = _row_top(levels.record[:, :1], lo, hi)
    ends = torch.cat([top, top - span], -1).exp2()
    if not levels.shift_bits:
        return _storable(ends), None
    middle = 2 ** (levels.shift_bits - 1)
    return _storable(ends), (ends * reach * middle / (middle - 1)).half()


@dataclass(frozen=True)
class CodedScales:
    """Scales of 4 bits, for a product that looks them up: scale = factors[row] * steps[code], before it is fp16.

    Args:
        codes: uint8 [O, ceil(G / 2)], low nibble first.
        factors: float32 [O].
        steps: fp16 [16].
    """

    codes: Tensor
    factors: Tensor
    steps: Tensor


def split_scales(levels: Levels) -> CodedScales | None:
    """The parts of coded scales, whose product is within 2^-11 of what `decode_levels` gives.

    None of other bits than 4, where there are shifts, and where some could be as small as `decode_levels` makes none.
    """
    lo, hi, span, _ = levels.limits.double().tolist()
    if levels.scale_bits != 4 or levels.shift_bits or lo - span < math.log2(SMALLEST_SCALE):
        return None
    steps = torch.exp2(-span * torch.arange(16, dtype=torch.float64) / 15).half()
    return CodedScales(levels.record[:, 1:].contiguous(), _row_top(levels.record[:, 0], lo, hi).exp2().float(), steps)


def round_levels(
    scale: Tensor, shift: Tensor | None, scale_bits: int, shift_bits: int, limits: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What the codes of `encode_levels` give back, float32 [O, G] each."""
    codes = _level_codes(scale, shift, scale_bits, shift_bits, limits)
    stored, stored_shift = _coded_levels(*codes, scale_bits, shift_bits, limits)
    return stored.float(), None if stored_shift is None else stored_shift.float()


def _level_codes(
    scale: Tensor, shift: Tensor | None, scale_bits: int, shift_bits: int, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of the rows' tops [O, 1], of scales and of shifts [O, G], whole numbers in float64."""
    lo, hi, span, reach = limits.double().tolist()
    octaves = scale.double().log2()
    row = ((octaves.amax(-1, keepdim=True) - lo) * (255 / max(hi - lo, 1e-9))).round().clamp(0, 255)
    top = _row_top(row, lo, hi)
    largest = 2**scale_bits - 1
    code = ((top - octaves) * (largest / span)).round().clamp(0, largest).nan_to_num()  # a step that went wrong
    if shift is None:
        return row, code, None
    middle = 2 ** (shift_bits - 1)
    stored = torch.exp2(top - span * code / largest)
    position = (shift.double() / stored * ((middle - 1) / reach)).round()
    return row, code, position.clamp(1 - middle, middle - 1) + middle


def _coded_levels(
    row: Tensor, code: Tensor, shift_code: Tensor | None, scale_bits: int, shift_bits: int, limits: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scale and shift, fp16 [O, G], of codes as `_level_codes` gives them, in any type."""
    lo, hi, span, reach = limits.double().tolist()
    top = _row_top(row, lo, hi)
    steps = torch.arange(2**scale_bits, dtype=torch.float64, device=code.device)
    table = torch.exp2(top - span * steps / (len(steps) - 1))  # [O, 2^bits]: a row's scales are among these
    code = code.long()
    scale = _storable(table).gather(1, code)
    if shift_code is None:
        return scale, None
    middle = 2 ** (shift_bits - 1)
    return scale, (table.gather(1, code) * reach * (shift_code - middle) / (middle - 1)).half()


def _row_top(row: Tensor, lo: float, hi: float) -> Tensor:
    """Binary logarithm of the largest scale of rows with these codes, float64."""
    return lo + (hi - lo) * row.double() / 255


def _storable(scale: Tensor) -> Tensor:
    """Scales in fp16, none of them 0."""
    return scale.clamp(min=SMALLEST_SCALE).half()


def level_row_bytes(groups: int, scale_bits: int, shift_bits: int) -> int:
    """Bytes of one record of coded levels; shift_bits is 0 for a grid without shift."""
    return 1 + -(-groups * (scale_bits + shift_bits) // 8)


def choose_limits(scale: Tensor, shift: Tensor | None) -> Tensor:
    """Limits, float32 [4], that hold all but the outermost half percent of the groups [O, G].

    A group whose scale lies further below its row's top is stored with the lowest that there is; its trits then
    become 0, which costs little because its weights are small beside the row's.
    """
    octaves = scale.double().log2()
    top = octaves.amax(-1)
    span = _quantile(top[:, None] - octaves, 0.995)
    reach = 0.0 if shift is None else float(_quantile((shift.double() / scale.double()).abs(), 0.995))
    values = [float(top.min()), float(top.max()), max(float(span), 0.25), max(reach, 1e-3)]
    return torch.tensor(values, dtype=torch.float32, device=scale.device)


def check_table(columns: int, group_size: int, bits: int, name: str) -> None:
    """Refuse a table that `bits` has no record for.

    Raises:
        TernarizeError: 6 bits and other columns than whole runs of 64.
    """
    if bits == 6 and (columns % RUN or (group_size % RUN and group_size < columns)):
        raise TernarizeError(
            f"{name} has {columns} columns in groups of {group_size}; int6 takes columns and groups that are multiples "
            f"of {RUN}. Choose int8 for it."
        )


def quantize_table(weight: Tensor, group_size: int, bits: int = 8) -> Tensor:
    """Round a float matrix to codes of 8 or 6 bits with one scale per row and group.

    With 8 bits the scale is the group's largest weight over 127; with 6 the one of `SHRINKS` times the largest over 31
    that leaves the least squared error.

    Args:
        weight: float [V, H].
        group_size: columns that share a scale; the last group may be short.
        bits: 8, or 6 where `check_table` allows it.

    Returns:
        uint8 [V, `table_row_bytes`]: the codes, then the fp16 scales (see the module's drawing).
    """
    rows = max(1, TABLE_FLOATS // max(1, weight.shape[1]))
    return torch.cat([_quantize_rows(part.float(), group_size, bits) for part in weight.split(rows)])


def _quantize_rows(weight: Tensor, group_size: int, bits: int) -> Tensor:
    rows, columns = weight.shape
    groups, most = group_count(columns, group_size), 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - columns)).view(rows, groups, group_size)
    largest = padded.abs().amax(-1) / most
    scale = _storable(largest)
    if bits == 6:
        least = torch.full_like(largest, torch.inf)
        for shrink in SHRINKS:
            tried = _storable(largest * shrink)
            wide = tried.float()[..., None]
            error = ((padded / wide).round().clamp(-most, most) * wide - padded).square().sum(-1)
            scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    codes = (weight / expand_groups(scale.float(), columns, group_size)).round().clamp(-most, most).to(torch.int8)
    stored = codes.view(torch.uint8) if bits == 8 else _pack_six(codes)
    return torch.cat([stored, scale.view(torch.uint8)], dim=1)


def _pack_six(codes: Tensor) -> Tensor:
    """Codes int8 [..., H] -> uint8 [..., 3 H / 4]."""
    runs = (codes + 32).view(torch.uint8).unflatten(-1, (-1, RUN))
    low, high = runs & 15, runs >> 4
    lows = low[..., : RUN // 2] | low[..., RUN // 2 :] << 4
    first, second, third, fourth = high.unflatten(-1, (4, -1)).unbind(-2)
    return torch.cat([lows, first | second << 2 | third << 4 | fourth << 6], -1).flatten(-2)


def _unpack_six(packed: Tensor) -> Tensor:
    """uint8 [..., 3 H / 4] -> codes int8 [..., H]."""
    lows, highs = packed.unflatten(-1, (-1, 3 * RUN // 4)).split([RUN // 2, RUN // 4], -1)
    low = torch.cat([lows & 15, lows >> 4], -1)
    high = torch.cat([highs >> by & 3 for by in (0, 2, 4, 6)], -1)
    return ((low | high << 4).view(torch.int8) - 32).flatten(-2)


def _quantile(values: Tensor, share: float) -> Tensor:
    """A quantile of any number of values (torch.quantile stops at 2^24)."""
    flat = values.flatten()
    return flat.kthvalue(max(1, round(share * flat.numel()))).values


def _to_nibbles(codes: Tensor, bits: int) -> Tensor:
    """Codes [O, G] -> nibbles [O, G bits / 4], low one first."""
    codes = codes.to(torch.int16)
    return codes if bits == 4 else torch.stack([codes % 16, codes // 16], -1).flatten(-2)


def _from_nibbles(nibbles: Tensor, bits: int) -> Tensor:
    """Nibbles [O, G bits / 4], low one first -> codes, int64 [O, G]."""
    nibbles = nibbles.long()
    return nibbles if bits == 4 else nibbles[:, 0::2] + 16 * nibbles[:, 1::2]


def _join_nibbles(nibbles: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return (padded[:, 0::2] + 16 * padded[:, 1::2]).to(torch.uint8)


def _split_nibbles(record: Tensor) -> Tensor:
    return torch.stack([record & 15, record >> 4], -1).flatten(-2)


def table_row_bytes(columns: int, group_size: int, bits: int = 8) -> int:
    """Bytes of one record of `columns` weights."""
    return columns * bits // 8 + 2 * group_count(columns, group_size)


def split_table(packed: Tensor, columns: int, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Records, uint8 [..., R] -> codes int8 [..., H] and scales fp16 [..., G]."""
    stored = packed[..., : columns * bits // 8].contiguous()
    codes = stored.view(torch.int8) if bits == 8 else _unpack_six(stored)
    # A copy even of a single record: a view of two bytes as one fp16 must start at an even place.
    scale = packed[..., columns * bits // 8 :].clone(memory_format=torch.contiguous_format)
    return codes, scale.view(torch.float16)


def dequantize_table(packed: Tensor, columns: int, group_size: int, bits: int = 8) -> Tensor:
    """Records, uint8 [..., R] -> float32 [..., H]."""
    codes, scale = split_table(packed, columns, bits)
    return times_scale(codes, scale.float(), group_size)
