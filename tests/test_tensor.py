"""One ternary weight: the formula against a double loop, short last groups, and every broken invariant refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.tensor import TernaryTensor, expand_groups, group_count


def make(out_features: int, in_features: int, group_size: int, seed: int = 0, shift: bool = True) -> TernaryTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    return TernaryTensor(
        torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8),
        (torch.rand(out_features, groups, generator=generator) + 0.1).half(),
        torch.randn(out_features, groups, generator=generator).half() if shift else None,
        group_size,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 23), st.integers(1, 25), st.booleans(), st.integers(0, 1000))
def test_the_float_weight_is_scale_times_trit_plus_shift(
    out_features: int, in_features: int, group_size: int, shift: bool, seed: int
) -> None:
    tensor = make(out_features, in_features, group_size, seed, shift)
    weight = tensor.dequantize()
    assert weight.dtype == torch.float32
    assert weight.shape == tensor.shape == (out_features, in_features)
    for o in range(out_features):
        for i in range(in_features):
            g = i // group_size
            added = 0.0 if tensor.shift is None else float(tensor.shift[o, g])
            expected = float(tensor.scale[o, g]) * int(tensor.trits[o, i]) + added
            assert float(weight[o, i]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_last_group_may_be_short() -> None:
    tensor = TernaryTensor(
        torch.tensor([[1, -1, 0, 1, -1]], dtype=torch.int8),
        torch.tensor([[2.0, 4.0]]),
        torch.tensor([[0.5, -1.0]]),
        group_size=3,
    )
    assert tensor.dequantize().tolist() == [[2.5, -1.5, 0.5, 3.0, -5.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_formula_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    tensor = make(5, 21, 4)
    assert torch.equal(tensor.dequantize(dtype), tensor.dequantize().to(dtype))


def test_dequantizing_leaves_the_parts_alone() -> None:
    tensor = make(3, 8, 4)
    before = [part.clone() for part in (tensor.trits, tensor.scale, tensor.shift) if part is not None]
    tensor.dequantize()
    assert all(torch.equal(a, b) for a, b in zip(before, (tensor.trits, tensor.scale, tensor.shift), strict=True))


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"), [(1, 1, 1), (5, 3, 2), (6, 3, 2), (7, 3, 3), (3, 64, 1)]
)
def test_groups_are_counted_with_the_short_one(in_features: int, group_size: int, expected: int) -> None:
    assert group_count(in_features, group_size) == expected


def test_a_groups_value_is_spread_over_its_columns() -> None:
    assert expand_groups(torch.tensor([[1, 2, 3], [4, 5, 6]]), 5, 2).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]


def test_zero_share_counts_the_zero_trits() -> None:
    trits = torch.tensor([[0, 1, -1, 0], [0, 0, 0, 1]], dtype=torch.int8)
    assert TernaryTensor(trits, torch.ones(2, 1), None, 4).zero_share == pytest.approx(5 / 8)


def test_a_ternary_tensor_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(2, 4, 2).group_size = 4  # type: ignore[misc]


GOOD: dict[str, object] = {
    "trits": torch.tensor([[1, 0, -1], [0, 1, 1]], dtype=torch.int8),
    "scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "shift": torch.zeros(2, 2),
    "group_size": 2,
}


def with_value(value: float) -> Tensor:
    return torch.tensor([[1.0, 2.0], [value, 4.0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trits": torch.zeros(2, 3)}, r"trits are int8 \[O, I\], not torch\.float32 \[2, 3\]"),
        ({"trits": torch.zeros(2, 3, dtype=torch.int16)}, r"not torch\.int16"),
        ({"trits": torch.zeros(3, dtype=torch.int8)}, r"trits are int8 \[O, I\], not torch\.int8 \[3\]"),
        ({"trits": torch.zeros(1, 2, 3, dtype=torch.int8)}, r"not torch\.int8 \[1, 2, 3\]"),
        ({"trits": torch.tensor([[2, 0, 0], [0, 0, 0]], dtype=torch.int8)}, r"trits lie in -1\.\.1, found 2"),
        ({"trits": torch.tensor([[0, -3, 0], [0, 0, 0]], dtype=torch.int8)}, r"trits lie in -1\.\.1, found -?3"),
        # the magnitude of -128 does not fit in int8
        ({"trits": torch.tensor([[0, -128, 0], [0, 0, 0]], dtype=torch.int8)}, r"trits lie in -1\.\.1, found -?128"),
        ({"scale": torch.ones(2, 3)}, r"scale is \[O, G\] = \[2, 2\], not \[2, 3\]"),
        ({"scale": torch.ones(2)}, r"scale is \[O, G\] = \[2, 2\], not \[2\]"),
        ({"shift": torch.zeros(1, 2)}, r"shift is \[O, G\] = \[2, 2\], not \[1, 2\]"),
        ({"group_size": 3}, r"scale is \[O, G\] = \[2, 1\], not \[2, 2\]"),
        ({"scale": with_value(float("nan"))}, "scale has a NaN or infinite value"),
        ({"scale": with_value(float("inf"))}, "scale has a NaN or infinite value"),
        ({"shift": with_value(float("nan"))}, "shift has a NaN or infinite value"),
        ({"shift": with_value(-float("inf"))}, "shift has a NaN or infinite value"),
        ({"scale": with_value(0.0)}, r"scale is positive, found 0\.0"),
        ({"scale": with_value(-0.5)}, r"scale is positive, found -0\.5"),
    ],
    ids=lambda part: part if isinstance(part, str) else ", ".join(part),
)
def test_a_broken_invariant_is_refused_with_its_value(changes: dict[str, object], message: str) -> None:
    TernaryTensor(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        TernaryTensor(**(GOOD | changes))  # type: ignore[arg-type]


def test_a_shift_may_be_absent_or_of_any_sign() -> None:
    for shift in (None, torch.tensor([[-1.0, 0.0], [1.0, -2.0]])):
        TernaryTensor(**(GOOD | {"shift": shift}))  # type: ignore[arg-type]
