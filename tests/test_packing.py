"""The bit layouts: golden bytes that a person can check by hand, round trips over odd shapes, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.errors import FormatError, TernarizeError
from ternarize.packing import (
    check_packed,
    check_table,
    decode_levels,
    dequantize_table,
    encode_levels,
    level_row_bytes,
    outermost_levels,
    pack_trits,
    packed_columns,
    quantize_table,
    table_row_bytes,
    trit_table,
    unpack_trits,
)
from ternarize.tensor import SMALLEST_SCALE, Levels

# Trits of a row -> its bytes, by byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4 with d = trit + 1.
GOLDEN: list[tuple[list[int], list[int]]] = [
    ([-1, -1, -1, -1, -1], [0]),
    ([0, 0, 0, 0, 0], [121]),
    ([1, 1, 1, 1, 1], [242]),
    ([1, 0, -1, 0, 1], [2 + 3 + 0 + 27 + 162]),
    ([1, -1, -1, -1, -1], [2]),  # the first trit is the least significant digit
    ([-1, -1, -1, -1, 1], [162]),
    ([1, 0, -1, 0, 1, -1, 1, -1], [194, 0 + 6 + 0 + 27 + 81]),  # two digits of padding, each 1
    ([-1], [0 + 3 + 9 + 27 + 81]),
    ([0], [121]),
    ([1], [122]),
    ([1, 1, 1, 1], [2 + 6 + 18 + 54 + 81]),
    ([-1, 0, 1, 1, 0, 0], [0 + 3 + 18 + 54 + 81, 121]),
]


def trits_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize(("trits", "expected"), GOLDEN)
def test_short_rows_have_these_bytes(trits: list[int], expected: list[int]) -> None:
    row = torch.tensor([trits], dtype=torch.int8)
    packed = pack_trits(row)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [expected]
    assert unpack_trits(torch.tensor([expected], dtype=torch.uint8), len(trits)).tolist() == [trits]


def test_rows_are_packed_one_by_one() -> None:
    packed = pack_trits(torch.tensor([[1, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1]], dtype=torch.int8))
    assert packed.tolist() == [[242, 122], [0, 120]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 37), st.integers(0, 1000))
def test_packing_is_reversible_for_any_width(rows: int, columns: int, seed: int) -> None:
    trits = trits_of((rows, columns), seed)
    packed = pack_trits(trits)
    assert packed.shape == (rows, packed_columns(columns))
    check_packed(packed, columns)
    assert torch.equal(unpack_trits(packed, columns), trits)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(1, 13), st.integers(0, 1000))
def test_packing_is_reversible_for_any_number_of_leading_dimensions(
    leading: list[int], columns: int, seed: int
) -> None:
    trits = trits_of((*leading, columns), seed)
    assert torch.equal(unpack_trits(pack_trits(trits), columns), trits)


@given(st.lists(st.integers(0, 242), min_size=1, max_size=9))
def test_every_valid_byte_survives_unpacking_and_packing(values: list[int]) -> None:
    packed = torch.tensor([values], dtype=torch.uint8)
    assert pack_trits(unpack_trits(packed, 5 * len(values))).tolist() == [values]


def test_a_transposed_matrix_packs_by_its_logical_rows() -> None:
    trits = trits_of((11, 7), 0)
    assert torch.equal(pack_trits(trits.t()), pack_trits(trits.t().contiguous()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_unpacking_gives_the_dtype_asked_for(dtype: torch.dtype) -> None:
    trits = trits_of((3, 12), 1)
    unpacked = unpack_trits(pack_trits(trits), 12, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked.to(torch.int8), trits)


@pytest.mark.parametrize(("in_features", "expected"), [(1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (576, 116)])
def test_five_trits_share_a_byte(in_features: int, expected: int) -> None:
    assert packed_columns(in_features) == expected


def test_the_table_gives_every_byte_its_five_digits() -> None:
    table = trit_table(torch.int8, torch.device("cpu"))
    for byte in range(243):
        digits = [byte // 3**k % 3 - 1 for k in range(5)]
        assert table[byte].tolist() == digits


@pytest.mark.parametrize("byte", range(243, 256))
def test_bytes_above_242_are_refused(byte: int) -> None:
    with pytest.raises(FormatError, match=rf"proj\.weight: a packed byte is {byte}, but five trits fill 0\.\.242"):
        check_packed(torch.tensor([[0, byte], [121, 121]], dtype=torch.uint8), 10, "proj.weight")


@pytest.mark.parametrize("padding", [(0, 1), (-1, 0), (1, 0), (1, 1)])
def test_padding_other_than_zero_trits_is_refused(padding: tuple[int, int]) -> None:
    bad = pack_trits(torch.tensor([[1, 0, -1, 0, 0], [1, 0, -1, *padding]], dtype=torch.int8))
    with pytest.raises(FormatError, match=r"proj\.weight: the padding after column 3 is not zero trits"):
        check_packed(bad, 3, "proj.weight")


def test_only_the_last_byte_has_padding() -> None:
    packed = pack_trits(torch.tensor([[1, 1, 1, 1, 1, -1, -1, 0, 0, 0]], dtype=torch.int8))
    check_packed(packed, 7)
    check_packed(packed, 10)
    with pytest.raises(FormatError, match="padding after column 6"):
        check_packed(packed, 6)


def test_an_empty_tensor_has_nothing_to_refuse() -> None:
    check_packed(torch.empty(0, 3, dtype=torch.uint8), 15)


# -- int8 records --------------------------------------------------------------------------------------------------


def test_an_int8_record_has_these_bytes() -> None:
    # Groups of 2: the largest of the first is 127, so its scale is 1 = fp16 0x3C00; of the last 254, scale 2 = 0x4000.
    weight = torch.tensor([[127.0, -3.0, 254.0], [-127.0, 0.4, -254.0]])
    packed = quantize_table(weight, 2)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [
        [127, 253, 127, 0x00, 0x3C, 0x00, 0x40],
        [129, 0, 129, 0x00, 0x3C, 0x00, 0x40],
    ]
    assert dequantize_table(packed, 3, 2).tolist() == [[127.0, -3.0, 254.0], [-127.0, 0.0, -254.0]]


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"), [(64, 64, 66), (65, 64, 69), (5, 2, 11), (3, 8, 5), (576, 64, 594)]
)
def test_an_int8_record_holds_codes_and_a_scale_per_group(columns: int, group_size: int, expected: int) -> None:
    assert table_row_bytes(columns, group_size) == expected
    assert quantize_table(torch.randn(2, columns), group_size).shape == (2, expected)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4), st.integers(1, 33), st.integers(1, 40), st.floats(-3, 4), st.integers(0, 1000)
)  # the weights' size ranges from 1e-3 to 1e4
def test_int8_is_off_by_at_most_half_a_step_of_its_group(
    rows: int, columns: int, group_size: int, exponent: float, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    restored = dequantize_table(quantize_table(weight, group_size), columns, group_size)
    assert restored.shape == weight.shape
    assert restored.dtype == torch.float32
    for start in range(0, columns, group_size):
        group, back = weight[:, start : start + group_size], restored[:, start : start + group_size]
        step = (group.abs().amax(1, keepdim=True) / 127).clamp(min=2**-14)
        # The stored scale is rounded to fp16, so the real step may be 2^-11 longer than the ideal one.
        assert bool(((group - back).abs() <= step * (0.5 + 2**-11)).all())


def test_a_short_last_int8_group_is_the_group_alone() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    weight[:, 8:] *= 100
    whole = dequantize_table(quantize_table(weight, 4), 10, 4)
    alone = dequantize_table(quantize_table(weight[:, 8:].contiguous(), 2), 2, 2)
    assert torch.equal(whole[:, 8:], alone)


def test_zeros_and_the_tiniest_weights_stay_finite_in_int8() -> None:
    weight = torch.tensor([[0.0, 0.0, 1e-30, -1e-30]])
    assert dequantize_table(quantize_table(weight, 2), 4, 2).tolist() == [[0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_int8_records_do_not_depend_on_the_dtype_of_the_source(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(quantize_table(weight, 4), quantize_table(weight.float(), 4))


@pytest.mark.parametrize("columns", [5, 6])
@pytest.mark.parametrize("pick", [[[1]], [[1, 3]], [1], [2, 0, 2]], ids=str)
def test_int8_records_can_be_looked_up_like_an_embedding(columns: int, pick: list[int]) -> None:
    packed = quantize_table(torch.randn(4, columns, generator=torch.Generator().manual_seed(0)), 2)
    whole = dequantize_table(packed, columns, 2)
    assert torch.equal(dequantize_table(packed[torch.tensor(pick)], columns, 2), whole[torch.tensor(pick)])


# -- int6 records --------------------------------------------------------------------------------------------------


def test_an_int6_record_has_these_bytes() -> None:
    """Codes by hand: byte i < 32 has the lower halves of columns i and 32 + i, byte 32 + i four upper pairs."""
    codes = [31, -31, 0, *[5] * 29, -16, *[7] * 31]
    packed = quantize_table(torch.tensor([codes], dtype=torch.float32), 64, 6)
    biased = [code + 32 for code in codes]
    lows = [biased[i] % 16 + 16 * (biased[32 + i] % 16) for i in range(32)]
    highs = [sum((biased[16 * f + i] // 16) << 2 * f for f in range(4)) for i in range(16)]
    assert packed.tolist() == [[*lows, *highs, 0x00, 0x3C]]
    assert (packed[0, 0].item(), packed[0, 32].item()) == (15, 3 + 4 * 2 + 16 * 1 + 64 * 2)
    assert dequantize_table(packed, 64, 64, 6).tolist() == [codes]


@settings(deadline=None, max_examples=40)
@example(1, 3, 64, -3.0, 139)  # its largest weight over 31 is no normal number of fp16, as scales are
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([64, 128, 320]), st.floats(-3, 4), st.integers(0, 1000))
def test_int6_is_no_worse_than_the_largest_weight_over_31(
    rows: int, runs: int, group_size: int, exponent: float, seed: int
) -> None:
    columns = 64 * runs
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    packed = quantize_table(weight, group_size, 6)
    assert packed.shape[1] == table_row_bytes(columns, group_size, 6) < columns
    restored = dequantize_table(packed, columns, group_size, 6)
    for start in range(0, columns, group_size):
        group, back = weight[:, start : start + group_size], restored[:, start : start + group_size]
        step = (group.abs().amax(1, keepdim=True) / 31).clamp(min=SMALLEST_SCALE).half().float()
        nearest = (group / step).round().clamp(-31, 31) * step
        assert bool(((group - back).square().sum(1) <= (group - nearest).square().sum(1) * (1 + 1e-5)).all())


@pytest.mark.parametrize(("columns", "group_size"), [(50, 64), (96, 96), (128, 32), (128, 96)])
def test_int6_wants_whole_runs_of_64(columns: int, group_size: int) -> None:
    with pytest.raises(TernarizeError, match=r"lm_head has .* multiples of 64\. Choose int8"):
        check_table(columns, group_size, 6, "lm_head")
    check_table(columns, group_size, 8, "lm_head")
    check_table(192, 192, 6, "lm_head")  # one group a row


# -- levels ------------------------------------------------------------------------------------------------------------


def test_a_record_of_levels_has_these_bytes() -> None:
    limits = torch.tensor([-4.0, 0.0, 3.0, 0.7])  # rows' tops from 2^-4 to 2^0, 3 octaves down, shifts to 0.7 scales
    scale = torch.tensor([[1.0, 0.5, 0.125], [2**-4, 2**-4.6, 2**-7]])
    shift = torch.tensor([[0.0, 0.35, -0.0875], [2**-4 * 0.1, 0.0, -(2**-7) * 0.7]])
    levels = encode_levels(scale, shift, 4, 4, limits)
    # row 0: top 255; scale codes 0, 5, 15; shift codes 8, 15, 1.  row 1: top 0; 0, 3, 15; 9, 8, 1
    assert levels.record.tolist() == [[255, 0x50, 0x8F, 0x1F], [0, 0x30, 0x9F, 0x18]]
    eight = encode_levels(scale, shift, 8, 8, limits)
    assert eight.record[0].tolist() == [255, 0, 85, 255, 128, 255, 1]
    assert encode_levels(scale, None, 4, 4, limits).record.tolist() == [[255, 0x50, 0x0F], [0, 0x30, 0x0F]]


@pytest.mark.parametrize(("scale_bits", "shift_bits"), [(4, 4), (8, 8), (4, 8), (8, 4), (4, 0), (8, 0)])
@pytest.mark.parametrize("groups", [1, 2, 9])
def test_levels_come_back_within_half_a_step(scale_bits: int, shift_bits: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    scale = torch.exp2(torch.rand(40, groups, generator=generator) * 3 - 6)
    shift = scale * (torch.rand(40, groups, generator=generator) - 0.5) if shift_bits else None
    limits = torch.tensor([-6.0, -3.0, 3.0, 0.5])
    levels = encode_levels(scale, shift, scale_bits, shift_bits, limits)
    assert levels.record.shape == (40, level_row_bytes(groups, scale_bits, shift_bits))
    assert levels.record.dtype == torch.uint8
    read_scale, read_shift = decode_levels(levels, groups)
    row_step, step = 3 / 255, 3 / (2**scale_bits - 1)
    assert float((read_scale.double() / scale).log2().abs().max()) <= row_step / 2 + step / 2 + 2e-3
    if shift is None:
        assert read_shift is None
    else:
        assert read_shift is not None
        half = 0.5 / (2 ** (shift_bits - 1) - 1) / 2
        inside = (shift / read_scale).abs() <= 0.5  # the rounded scale may be too small to reach it
        off = ((read_shift.double() - shift) / read_scale.double()).abs()[inside]
        assert float(off.max()) <= half + 2e-3


@pytest.mark.parametrize("shift_bits", [0, 4, 8])
@pytest.mark.parametrize("scale_bits", [4, 8])
def test_levels_lie_between_the_outermost_ones_whatever_the_codes(scale_bits: int, shift_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, limits = 64, torch.tensor([-9.0, -2.0, 3.0, 0.75])
    record = torch.randint(256, (40, level_row_bytes(groups, scale_bits, shift_bits)), generator=generator)
    levels = Levels(record.to(torch.uint8), limits, scale_bits, shift_bits)
    (scale, shift), (ends, reach) = decode_levels(levels, groups), outermost_levels(levels)
    assert ((ends[:, 1:] <= scale) & (scale <= ends[:, :1])).all()
    assert (shift is None) == (reach is None)
    if shift is not None and reach is not None:
        assert (shift.abs() <= reach[:, :1]).all()


def test_chosen_limits_hold_nearly_all_groups_and_an_outlier_costs_the_others_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(100, 10, generator=generator) - 4)
    scale[0, 0] *= 1e-3
    read, _ = decode_levels(encode_levels(scale, None, 4, 4), 10)
    error = (read.double() / scale).log2().abs()
    assert float(error[0, 0]) > 5
    error[0, 0] = 0
    assert float(error.max()) < 0.1


def test_levels_of_the_smallest_scales_stay_positive_and_finite() -> None:
    scale = torch.full((3, 2), float(torch.finfo(torch.float16).smallest_normal))
    read, shift = decode_levels(encode_levels(scale, torch.zeros(3, 2), 4, 4), 2)
    assert bool((read > 0).all())
    assert shift is not None
    assert not shift.any()
