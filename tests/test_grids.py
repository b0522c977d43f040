"""Grids against a slow reference written from the papers, group by group, and the properties that a fit must have.

The reference is PT2-LLM's iterative ternary fitting (arXiv 2510.03267, section 3.2) in float64 Python, each sum with a
weight c per column: alternate the closed-form scale and shift for given trits with the nearest trits for given levels.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize import grids
from ternarize.grids import GRIDS, Grid, fit_grid, nearest
from ternarize.tensor import expand_groups

FITTED: tuple[Grid, ...] = ("dlt", "symmetric")


def random_weight(out_features: int, in_features: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and a mean per row, and an importance per column, both float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    weight = weight * weight.abs().sqrt() + 0.3 * torch.randn(out_features, 1, generator=generator, dtype=torch.float64)
    importance = torch.randn(in_features, generator=generator, dtype=torch.float64).mul(spread).exp()
    return weight, importance


def rounded(weight: Tensor, scale: Tensor, shift: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Nearest trits and the levels they stand for, [O, I]."""
    scale, shift = (expand_groups(value, weight.shape[1], group_size) for value in (scale, shift))
    trits = nearest(weight, scale, shift)
    return trits, scale * trits + shift


def group_errors(weight: Tensor, importance: Tensor, group_size: int, grid: Grid) -> Tensor:
    """The weighted squared error of each group, [O, G]."""
    _, levels = rounded(weight, *fit_grid(weight, importance, group_size, grid), group_size)
    squared = importance * (weight - levels) ** 2
    return torch.stack([part.sum(1) for part in squared.split(group_size, dim=1)], dim=1)


def nearest_trit(value: float, scale: float, shift: float) -> int:
    return min((-1, 0, 1), key=lambda trit: abs(value - (scale * trit + shift)))


def reference_fit(w: list[float], c: list[float], grid: Grid) -> tuple[float, float]:
    """Scale and shift of one group: PT2-LLM's equations, every sum written out."""
    if grid == "absmean":
        return sum(abs(value) for value in w) / len(w), 0.0
    m = sum(c)
    w1 = sum(ci * wi for ci, wi in zip(c, w, strict=True))
    shift = w1 / m if grid == "dlt" else 0.0
    threshold = 0.75 / m * sum(ci * abs(wi - shift) for ci, wi in zip(c, w, strict=True))
    trits = [0 if abs(wi - shift) <= threshold else (1 if wi > shift else -1) for wi in w]
    scale = 0.0
    for _ in range(20):
        tw = sum(ci * ti * wi for ci, ti, wi in zip(c, trits, w, strict=True))
        tt = sum(ci * ti * ti for ci, ti in zip(c, trits, strict=True))
        t = sum(ci * ti for ci, ti in zip(c, trits, strict=True))
        if grid == "dlt":
            scale = (m * tw - t * w1) / (m * tt - t * t)
            shift = (tt * w1 - t * tw) / (m * tt - t * t)
        else:
            scale = tw / tt
        renewed = [nearest_trit(wi, scale, shift) for wi in w]
        if renewed == trits:
            break
        trits = renewed
    return scale, shift


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("in_features", "group_size"), [(48, 16), (40, 16), (33, 11), (24, 24)])
@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_the_papers(grid: Grid, in_features: int, group_size: int, seed: int) -> None:
    weight, importance = random_weight(4, in_features, seed)
    scale, shift = fit_grid(weight, importance, group_size, grid)
    for o in range(4):
        for g, start in enumerate(range(0, in_features, group_size)):
            columns = slice(start, start + group_size)
            expected = reference_fit(weight[o, columns].tolist(), importance[columns].tolist(), grid)
            assert (float(scale[o, g]), float(shift[o, g])) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.floats(-5, 5), st.floats(0.01, 3), st.floats(-2, 2))
def test_the_nearest_trit_is_the_one_of_the_nearest_level(value: float, scale: float, shift: float) -> None:
    tensor = torch.tensor(value, dtype=torch.float64)
    trit = float(nearest(tensor, torch.tensor(scale, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64)))
    assert trit in (-1, 0, 1)
    distances = {t: abs(value - (scale * t + shift)) for t in (-1, 0, 1)}
    assert distances[int(trit)] <= min(distances.values()) + 1e-12
    assert float(tensor) == value  # the rounding inside is in place, on a copy


@pytest.mark.parametrize("grid", GRIDS)
def test_a_fit_has_one_positive_scale_and_one_shift_per_group(grid: Grid) -> None:
    weight, importance = random_weight(5, 37)
    scale, shift = fit_grid(weight, importance, 8, grid)
    assert scale.shape == shift.shape == (5, 5)
    assert bool((scale > 0).all())
    assert bool(shift.any()) == (grid == "dlt")


@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_more_freedom_means_less_error(group_size: int, seed: int, spread: float) -> None:
    """Over a matrix; within one group either search may end in the worse of two local minima."""
    weight, importance = random_weight(64, 128, seed, spread)
    errors = {grid: float(group_errors(weight, importance, group_size, grid).sum()) for grid in GRIDS}
    assert errors["dlt"] < errors["symmetric"] < errors["absmean"]


@pytest.mark.parametrize("grid", FITTED)
def test_every_iteration_lowers_the_error_of_each_group_or_leaves_it(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = random_weight(32, 96)
    errors = []
    for iterations in range(1, 21):
        monkeypatch.setattr(grids, "ITERATIONS", iterations)
        errors.append(group_errors(weight, importance, 32, grid))
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert float(errors[-1].sum()) < 0.99 * float(errors[0].sum())


@pytest.mark.parametrize("grid", FITTED)
def test_no_other_scale_and_shift_serve_the_same_trits_better(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "ITERATIONS", 200)  # enough to end at a fixed point
    weight, importance = random_weight(6, 30)
    scale, shift = fit_grid(weight, importance, 30, grid)
    trits, _ = rounded(weight, scale, shift, 30)
    for o in range(6):
        columns = [trits[o], torch.ones_like(trits[o])] if grid == "dlt" else [trits[o]]
        root = importance.sqrt()[:, None]
        best = torch.linalg.lstsq(root * torch.stack(columns, dim=1), root * weight[o, :, None]).solution[:, 0]
        found = torch.stack([scale[o, 0], shift[o, 0]])[: len(best)]
        torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_a_scaled_weight_has_a_scaled_fit(grid: Grid, factor: float, seed: int) -> None:
    weight, importance = random_weight(3, 24, seed)
    scale, shift = fit_grid(weight, importance, 12, grid)
    scaled = fit_grid(factor * weight, importance, 12, grid)
    torch.testing.assert_close(scaled, (factor * scale, factor * shift), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_power_of_two_scales_the_fit_exactly_in_float32(grid: Grid) -> None:
    weight, importance = (value.float() for value in random_weight(8, 64))
    scale, shift = fit_grid(weight, importance, 16, grid)
    scaled = fit_grid(1024 * weight, importance, 16, grid)
    assert torch.equal(scaled[0], 1024 * scale)
    assert torch.equal(scaled[1], 1024 * shift)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_negated_weight_has_the_same_scale_and_the_negated_shift(grid: Grid) -> None:
    weight, importance = random_weight(6, 40)
    scale, shift = fit_grid(weight, importance, 16, grid)
    torch.testing.assert_close(fit_grid(-weight, importance, 16, grid), (scale, -shift))


@settings(deadline=None, max_examples=30)
@given(st.floats(-10, 10), st.integers(0, 1000))
def test_a_constant_added_to_the_weight_moves_only_the_shift_of_dlt(constant: float, seed: int) -> None:
    weight, importance = random_weight(3, 24, seed)
    scale, shift = fit_grid(weight, importance, 12, "dlt")
    moved = fit_grid(weight + constant, importance, 12, "dlt")
    torch.testing.assert_close(moved, (scale, shift + constant), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_three_levels_are_found_exactly(grid: Grid) -> None:
    trits = torch.tensor([[1.0, 0, -1, 0, 1, -1], [0, 0, 1, -1, -1, 1]], dtype=torch.float64)
    shift = 0.25 if grid == "dlt" else 0.0
    weight = 2 * trits + shift
    if grid == "absmean":  # BitNet's scale is the mean of |w|, whatever the levels: 4 of 6 are 2
        assert fit_grid(weight, torch.ones(6), 6, grid)[0].flatten().tolist() == pytest.approx([8 / 6, 8 / 6])
        return
    found, levels = rounded(weight, *fit_grid(weight, torch.ones(6), 6, grid), 6)
    assert torch.equal(found, trits)
    torch.testing.assert_close(levels, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", FITTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.37, -0.37, 1e-3, 12345.678])
@pytest.mark.parametrize("group_size", [1, 3, 7, 64])
def test_a_constant_group_is_met_exactly(grid: Grid, dtype: torch.dtype, value: float, group_size: int) -> None:
    weight = torch.full((2, group_size), value, dtype=dtype)
    importance = torch.rand(group_size, generator=torch.Generator().manual_seed(0)) + 0.1
    scale, shift = fit_grid(weight, importance, group_size, grid)
    assert bool((scale > 0).all())
    torch.testing.assert_close(rounded(weight, scale, shift, group_size)[1], weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_all_zero_group_stays_zero_beside_one_that_is_not(grid: Grid, dtype: torch.dtype) -> None:
    weight = torch.cat([torch.zeros(2, 8), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))], dim=1)
    scale, shift = fit_grid(weight.to(dtype), torch.ones(16), 8, grid)
    assert bool((scale > 0).all())
    assert not bool(rounded(weight.to(dtype), scale, shift, 8)[1][:, :8].any())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("in_features", [17, 20, 31, 8])
def test_a_group_is_fitted_as_if_it_stood_alone(grid: Grid, in_features: int) -> None:
    weight, importance = random_weight(5, in_features)
    scale, shift = fit_grid(weight, importance, 16, grid)
    for g, start in enumerate(range(0, in_features, 16)):
        columns = slice(start, min(start + 16, in_features))  # the last group may be short
        size = columns.stop - start
        alone = fit_grid(weight[:, columns], importance[columns], size, grid)
        torch.testing.assert_close((scale[:, g : g + 1], shift[:, g : g + 1]), alone, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("grid", FITTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_without_importance_have_no_say(grid: Grid, dtype: torch.dtype) -> None:
    weight, importance = (value.to(dtype) for value in random_weight(6, 24))
    silent = torch.tensor([1, 4, 5, 20])
    importance[silent] = 0
    rest = torch.tensor([i for i in range(24) if i not in silent])
    scale, shift = fit_grid(weight, importance, 24, grid)
    loud = weight.clone()
    loud[:, silent] = 50
    assert torch.equal(fit_grid(loud, importance, 24, grid)[0], scale)
    alone = fit_grid(weight[:, rest], importance[rest], len(rest), grid)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close((scale, shift), alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_group_without_any_importance_stays_finite_and_harms_no_other(grid: Grid) -> None:
    weight, importance = random_weight(4, 32)
    importance[:16] = 0
    scale, shift = fit_grid(weight, importance, 16, grid)
    assert bool(torch.isfinite(scale).all() and torch.isfinite(shift).all() and (scale > 0).all())
    alone = fit_grid(weight[:, 16:], importance[16:], 16, grid)
    torch.testing.assert_close((scale[:, 1:], shift[:, 1:]), alone)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e6, 1e12])
def test_only_the_ratios_of_the_importance_count(grid: Grid, factor: float) -> None:
    weight, importance = (value.float() for value in random_weight(4, 32))
    expected = fit_grid(weight, importance, 16, grid)
    torch.testing.assert_close(fit_grid(weight, importance * factor, 16, grid), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_weight_and_the_importance_are_left_alone(grid: Grid) -> None:
    weight, importance = random_weight(4, 32)
    before = weight.clone(), importance.clone()
    fit_grid(weight, importance, 8, grid)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])
