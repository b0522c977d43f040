"""Learning inside a window: the start is the fit, gradients are those of the formula, and nothing gets worse.

Shapes: O out features, I in features, G groups in a row, B windows, T tokens, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import tuning
from ternarize.calibration import BlockCall, Walk
from ternarize.recipe import Calibration, Recipe, Tuning
from ternarize.runtime import TernaryLinear
from ternarize.solver import fit
from ternarize.tuning import (
    SHARPEST,
    TrainableTernary,
    channel_sizes,
    huber_loss,
    make_ternary,
    make_trainable,
    schedule,
    sharpness,
    sized_off,
)

RECIPE = Recipe(group_size=8, feedback=False, curvature=False, refit=False, sweeps=0, correction=0.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ternary_of(weight: Tensor, bias: Tensor | None = None, **changes: Any) -> TernaryLinear:
    return TernaryLinear.from_tensor(fit(weight, None, replace(RECIPE, **changes)), bias)


def window_loss(student: Tensor, teacher: Tensor, off: float) -> Tensor:
    return tuning.window_loss(student, teacher, channel_sizes(teacher), off)


def weight_of(trainable: TrainableTernary) -> Tensor:
    """The weight [O, I] that it multiplies with."""
    columns = torch.eye(trainable.in_features)
    bias = 0 if trainable.bias is None else trainable.bias
    return (trainable(columns) - bias).t()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("grid", ["dlt", "symmetric"])
@pytest.mark.parametrize("codes", ["latent", "low-rank", "frozen"])
@pytest.mark.parametrize("known", [True, False])
def test_it_starts_as_the_linear_that_it_is_made_from(bits: int, grid: str, codes: str, known: bool) -> None:
    weight, bias = random(12, 20), random(12, seed=1)
    linear = ternary_of(weight, bias, scale_bits=bits, shift_bits=bits, grid=grid)
    settings = Tuning(codes=codes, thresholds=True)  # type: ignore[arg-type]
    trainable = TrainableTernary(linear, weight if known else None, settings)
    torch.testing.assert_close(weight_of(trainable), linear.dequantize())
    back = trainable.to_ternary()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), linear.state_dict().values(), strict=True))
    x = random(3, 20, seed=2)
    torch.testing.assert_close(trainable(x), linear(x))


def test_gradients_are_those_of_the_formula() -> None:
    """d/d scale_g = sum of g * trit, d/d shift_g = sum of g, d/d latent = g * scale inside -1..1, chained."""
    linear = ternary_of(random(6, 16), scale_bits=16, shift_bits=16)
    trainable = TrainableTernary(linear, random(6, 16), Tuning())
    with torch.no_grad():
        trainable.latent[0, 0] = 1.3
    upstream = random(6, 16, seed=7)
    (weight_of(trainable) * upstream).sum().backward()
    trits = trainable.position().round().clamp(-1, 1).detach()
    scale = trainable.scale_0
    grouped = upstream.view(6, 2, 8)
    by_scale = (grouped * trits.view(6, 2, 8)).sum(-1) * scale / 2  # d(2 sigmoid)/dx = 1/2 at 0
    torch.testing.assert_close(trainable.scale_factor.grad, by_scale)
    torch.testing.assert_close(trainable.shift_factor.grad, grouped.sum(-1) * scale / 4)
    expected = (grouped * scale[..., None]).view(6, 16).clone()
    expected[0, 0] = 0
    torch.testing.assert_close(trainable.latent.grad, expected)


@pytest.mark.parametrize("grid", ["dlt", "symmetric"])
@pytest.mark.parametrize("columns", [16, 20])
def test_trits_that_stay_are_kept_in_a_byte_and_teach_scales_and_shifts_the_same(grid: str, columns: int) -> None:
    linear = ternary_of(random(6, columns), random(6, seed=3), grid=grid)
    moving, steady = (TrainableTernary(linear, None, Tuning(codes=codes)) for codes in ("latent", "frozen"))  # type: ignore[arg-type]
    x, upstream = random(1, 3, columns, seed=1), random(1, 3, 6, seed=2)
    kept: list[int] = []
    inputs = {}
    for module in (moving, steady):
        inputs[module] = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
            kept.clear()
            (module(inputs[module]) * upstream).sum().backward()
    torch.testing.assert_close(steady(x), moving(x))
    torch.testing.assert_close(inputs[steady].grad, inputs[moving].grad)
    for name in ("scale_factor", "shift_factor"):
        torch.testing.assert_close(getattr(steady, name).grad, getattr(moving, name).grad)
    assert steady.latent.dtype == torch.int8
    assert max(kept) < 4 * 6 * columns  # no float of the weight's size


def test_scale_and_shift_cannot_leave_their_bounds() -> None:
    trainable = TrainableTernary(ternary_of(random(4, 16), scale_bits=16, shift_bits=16), None, Tuning())
    start_shift = trainable.shift_0
    for extreme in (-1e3, 1e3):
        with torch.no_grad():
            trainable.scale_factor.fill_(extreme)
            trainable.shift_factor.fill_(extreme)
        scale, shift = trainable.stored_levels()
        assert shift is not None
        assert bool((scale >= 0).all())
        assert bool((scale <= 2.01 * trainable.scale_0).all())
        assert bool(((shift - start_shift).abs() <= 0.51 * trainable.scale_0).all())
        assert bool((trainable.to_ternary().read_levels()[0] > 0).all())


def test_low_rank_movers_begin_alike_in_every_process() -> None:
    settings = Tuning(epochs=1, codes="low-rank", rank=4)
    linear = ternary_of(random(6, 10), group_size=5)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(TrainableTernary(linear, None, settings).down)
    assert torch.equal(*made)


def test_soft_codes_become_hard() -> None:
    assert [sharpness(p, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, SHARPEST / 2, math.inf, math.inf]
    assert sharpness(0.0, 0.0) == math.inf
    trainable = TrainableTernary(ternary_of(random(4, 16)), None, Tuning())
    hard = weight_of(trainable)
    trainable.sharpness = SHARPEST
    torch.testing.assert_close(weight_of(trainable), hard, atol=1e-5, rtol=0)
    trainable.sharpness = 1.0
    assert not torch.allclose(weight_of(trainable), hard, atol=1e-2)


def test_the_schedule_rises_and_falls_to_nothing() -> None:
    values = [schedule(p / 100) for p in range(101)]
    peak = values.index(max(values))
    assert 0 < values[0] < 0.1
    assert 2 <= peak <= 8
    assert values[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("cell", [0.0, 0.3])
def test_positions_start_inside_their_cells(cell: float) -> None:
    weight = random(12, 20)
    linear = ternary_of(weight)
    away = TrainableTernary(linear, weight, Tuning(cell=cell)).latent.detach() - linear.to_tensor().trits
    assert float(away.abs().max()) == pytest.approx(cell)


def test_a_token_counts_by_the_size_of_its_activations() -> None:
    """Between units of its own, where a sink is one token of many, and absolute ones, where it is all that counts."""
    teacher = torch.ones(1, 5, 8)
    teacher[0, 0] *= 100

    def loss_of(token: int) -> float:
        student = teacher.clone()
        student[0, token] *= 1.01
        return float(huber_loss(student, teacher))

    assert loss_of(1) == pytest.approx(0.5 * 0.01**2 / 5, rel=1e-3)
    assert loss_of(0) == pytest.approx(100 * loss_of(1), rel=1e-3)


def test_a_channel_counts_by_the_square_root_of_its_size() -> None:
    """One channel of a model may hold nearly all the energy of every token, and the next norm make it one of many."""
    teacher = torch.ones(2, 5, 8)
    teacher[..., 3] *= 100
    teacher[..., 4] = 0  # idle

    def loss_of(channel: int, by: float) -> float:
        student = teacher.clone()
        student[..., channel] += by
        return float(window_loss(student, teacher, 0.0))

    assert loss_of(3, 1.0) == pytest.approx(100 * loss_of(2, 0.01), rel=1e-3)  # the same share of either
    assert loss_of(4, 0.01) == pytest.approx(100 * loss_of(2, 0.01), rel=1e-3)  # as at a hundredth of the others


def test_off_is_one_minus_the_cosine() -> None:
    teacher = random(1, 4, 8)

    def off(student: Tensor) -> float:
        return float(window_loss(student, teacher, 1.0) - window_loss(student, teacher, 0.0))

    assert off(1.1 * teacher) == pytest.approx(0, abs=1e-5)
    assert off(-teacher) == pytest.approx(2)
    assert off(torch.zeros_like(teacher)) == pytest.approx(1)


def test_no_channel_is_all_that_off_sees() -> None:
    """What is off by one in another channel counts for as much beside a huge channel as beside one ten times it."""
    teacher = torch.ones(1, 50, 64)

    def off_beside(largest: float) -> float:
        teacher[..., 3] = largest
        student = teacher.clone()
        student[..., 5] = -1
        return float(window_loss(student, teacher, 1.0) - window_loss(student, teacher, 0.0))

    assert off_beside(10) == pytest.approx(2 / 163, rel=1e-3)
    assert off_beside(1000) == pytest.approx(off_beside(10), rel=1e-3)


def test_a_sink_that_turns_counts_by_its_size_and_one_that_shrinks_for_nothing() -> None:
    teacher = torch.ones(1, 50, 8)
    teacher[0, 0] *= 100

    def off_of(token: int, change: Tensor) -> float:
        student = teacher.clone()
        student[0, token] *= change
        return float(sized_off(student, teacher))

    turned = torch.tensor([1.0, 1, 1, 1, 1, 1, -1, -1])
    assert off_of(0, turned) == pytest.approx(100 * off_of(1, turned), rel=1e-4)
    assert off_of(1, turned) == pytest.approx(0.5 / 149, rel=1e-4)
    assert off_of(0, torch.full((8,), 0.2)) == pytest.approx(0, abs=1e-6)
    assert float(sized_off(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))) == 0  # padding, say


# -- a window ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of one linear."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.up.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(hidden)


def window(count: int, settings: Tuning) -> tuple[list[nn.Module], list[Tensor], list[Tensor], Walk, Recipe]:
    """Ternary blocks with their inputs, and the float blocks' outputs as targets."""
    blocks: list[nn.Module] = [Block(random(16, 16, seed=i)) for i in range(count)]
    common = random(3, 16, seed=40)  # correlated channels: with independent ones the nearest codes are the best ones
    entrance = [random(8, 32, 3, seed=50 + i) @ common + 0.2 * random(8, 32, 16, seed=70 + i) for i in range(8)]
    call = BlockCall((), {}, tuple_output=False)
    walk = Walk(entrance, [[call] * count] * len(entrance))
    targets = []
    for hidden in entrance:
        for block in blocks:
            hidden = block(hidden)
        targets.append(hidden)
    for number, block in enumerate(blocks):
        weight = block.up.weight.data  # type: ignore[union-attr]
        block.up = ternary_of(weight)  # type: ignore[assignment, arg-type]
        make_trainable(block, {f"b{number}.up": weight}, f"b{number}", settings)  # type: ignore[dict-item]
    return blocks, entrance, targets, walk, Recipe(calibration=Calibration(held_out=0.25), tune=settings)


@pytest.mark.parametrize("codes", ["latent", "low-rank", "frozen"])
@pytest.mark.parametrize(("count", "off"), [(1, 0.0), (2, 0.3)])
def test_tuning_lowers_the_held_out_loss(codes: str, count: int, off: float) -> None:
    settings = Tuning(epochs=20, codes=codes, rank=4, off=off, rate=1e-2, level_rate=1e-2)  # type: ignore[arg-type]
    blocks, entrance, targets, walk, recipe = window(count, settings)
    outcome = tuning.tune(blocks, 0, entrance, targets, walk, recipe)
    assert outcome.kept
    assert outcome.after < 0.95 * outcome.before
    assert outcome.steps == 20 * 6
    for block in blocks:
        make_ternary(block)
    loss = 0.0
    for batch in (6, 7):
        hidden = entrance[batch]
        for block in blocks:
            hidden = block(hidden)
        loss += float(window_loss(hidden, targets[batch], off)) / 2
    assert loss == pytest.approx(outcome.after, rel=0.05)  # what is stored is what was measured


def test_a_window_that_lost_is_put_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Tuning(epochs=2, rate=5.0, level_rate=5.0)
    blocks, entrance, targets, walk, recipe = window(1, settings)
    before = [p.detach().clone() for p in blocks[0].parameters()]
    outcome = tuning.tune(blocks, 0, entrance, targets, walk, recipe)
    assert not outcome.kept
    assert outcome.after >= outcome.before
    assert all(torch.equal(a, b) for a, b in zip(before, blocks[0].parameters(), strict=True))


def test_steps_that_are_not_a_number_are_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, entrance, targets, walk, recipe = window(1, Tuning(epochs=1))
    before = [p.detach().clone() for p in blocks[0].parameters()]
    targets[0] = targets[0] * math.nan
    assert not tuning.tune(blocks, 0, entrance, targets, walk, recipe).kept
    assert all(torch.equal(a, b) for a, b in zip(before, blocks[0].parameters(), strict=True))
