"""Spend a byte budget where it pays: which linears hurt, and what group size each of them gets.

    damage of linear i   KL(teacher || teacher with linear i alone ternary), nats a token, on a few windows
    at group size g      damage at the recipe's group size * E_i(g) / E_i(group size),  E_i the grid's weight error

Small perturbations change KL in proportion to their square, so damages add and scale with the error, to first order.
A greedy walk over the lower convex hull of each linear's (bytes, damage) choices then is the best use of any budget
that it stops at (Everett 1963, generalized Lagrange multipliers).

Shapes: O out features, I in features, B windows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.architecture import linear_weight
from ternarize.calibration import autocast
from ternarize.errors import TernarizeError
from ternarize.evaluate import HELD_OUT_SEED, load_any
from ternarize.lesson import divergence
from ternarize.plan import RANK_LENGTH, RANK_WINDOWS, ternary_bytes
from ternarize.progress import Progress
from ternarize.recipe import DATA_FREE, Recipe
from ternarize.runtime import TernaryLinear
from ternarize.solver import fit, relative_error
from ternarize.swap import has_module
from ternarize.text import calibration_windows

FACTORS = (0.25, 0.5, 1, 2, 4)  # group sizes that are tried, as multiples of the recipe's
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Choice:
    """One way to store a linear: `group_size`, its stored `bytes`, and its `damage`, nats a token."""

    group_size: int
    bytes: int
    damage: float


@torch.no_grad()
def rank(
    teacher: PreTrainedModel,
    names: list[str],
    ternary: Callable[[str, Tensor], Tensor],
    ids: Tensor,
    progress: Progress,
) -> dict[str, float]:
    """Damage that each linear does on its own.

    Args:
        teacher: the float model; its weights are put back.
        names: linears.
        ternary: (name, float weight [O, I]) -> the weight [O, I] that takes its place.
        ids: int64 [B, T].

    Returns:
        {name: KL, nats a token}

    Raises:
        TernarizeError: the teacher has no such linear.
    """
    if missing := [name for name in names if not has_module(teacher, name)]:
        raise TernarizeError(
            f"{type(teacher).__name__} has no linear {missing[0]}: experts that are fused cannot be ranked one by one. "
            "Leave out what ranks them: budget, --target-size or inspect --teacher."
        )
    device = next(teacher.parameters()).device
    ids = ids.to(device)

    def logits() -> Tensor:
        with autocast(device):
            return teacher(input_ids=ids, use_cache=False).logits[:, :-1]

    expected = logits()
    damages = {}
    with progress.bar("ranking", total=len(names), unit="linear") as bar:
        for name in names:
            module: nn.Module = teacher.get_submodule(name)
            weight = linear_weight(module)
            kept = weight.clone()
            weight.copy_(ternary(name, kept.float()))
            damages[name] = max(float(divergence(expected, logits())), 0.0)
            weight.copy_(kept)
            bar.update(1)
    return damages


def predicted(damage: float, error: float, usual: float) -> float:
    """Damage at another relative squared error than the usual one, at which it was measured, in nats a token.

    Where there is no error to go by, as with a weight that is ternary already, an error of 1 counts as a nat: more than
    most linears do that are lost altogether.
    """
    return damage * error / usual if usual else error


def spend(
    teacher: PreTrainedModel, shapes: dict[str, tuple[int, int]], recipe: Recipe, ids: Tensor, progress: Progress
) -> dict[str, int]:
    """A group size for every linear, so that all of them together stay within the recipe's budget.

    Args:
        shapes: {name: (O, I)} of the linears that will be ternary.
        recipe: its `budget` is in bits per ternary weight; its `group_size` is where the choices lie around.
        ids: int64 [B, T], windows that damage is measured on.

    Returns:
        {name: group size}

    Raises:
        TernarizeError: not even the coarsest groups fit the budget.
    """
    assert recipe.budget is not None
    free = replace(recipe, **DATA_FREE, scale_bits=16, shift_bits=16)

    def nearest(name: str, weight: Tensor) -> Tensor:
        return fit(weight, None, free).dequantize()

    damages = rank(teacher, list(shapes), nearest, ids, progress)
    weights = sum(o * i for o, i in shapes.values())
    choices = {}
    for name, shape in shapes.items():
        weight = linear_weight(teacher.get_submodule(name)).float()
        own = [
            (size, relative_error(weight, fit(weight, None, replace(free, group_size=size)).dequantize(), None))
            for size in group_sizes(recipe, shape[1])
        ]
        base = min(recipe.group_size or shape[1], shape[1])
        usual = next(error for size, error in own if size == base)
        stored = {size: ternary_bytes(*shape, replace(recipe, group_size=size)) for size, _ in own}
        choices[name] = [Choice(size, stored[size], predicted(damages[name], error, usual)) for size, error in own]
    return {name: choice.group_size for name, choice in allocate(choices, int(recipe.budget * weights / 8)).items()}


def rank_folder(folder: Path, source: Path, texts: list[str], progress: Progress) -> dict[str, float]:
    """Damage that each linear of a ternarize folder does to its source on its own, on held-out text.

    Args:
        source: the folder of the float checkpoint.
        texts: sources as in `text`.

    Returns:
        {name: KL, nats a token}

    Raises:
        TernarizeError: a folder or text that cannot be read, or a linear that the source lacks (a fused expert).
    """
    student = load_any(folder, "cpu", torch.float32)
    modules = {name: m for name, m in student.named_modules() if isinstance(m, TernaryLinear)}
    teacher = load_any(source, "cpu", torch.float32).requires_grad_(False)
    ids = calibration_windows(tuple(texts), source, RANK_WINDOWS, RANK_LENGTH, HELD_OUT_SEED, progress)
    return rank(teacher, list(modules), lambda name, _: modules[name].dequantize(), ids, progress)


def group_sizes(recipe: Recipe, in_features: int) -> list[int]:
    """Group sizes to choose from for rows of `in_features` columns, the recipe's among them."""
    base = min(recipe.group_size or in_features, in_features)
    sizes = {min(max(int(base * factor), min(SMALLEST_GROUP, base)), in_features) for factor in FACTORS}
    return sorted(sizes)


def allocate(choices: dict[str, list[Choice]], limit: int) -> dict[str, Choice]:
    """One choice per linear, with the least total damage that fits `limit` bytes, up to one step of the hull.

    Raises:
        TernarizeError: the cheapest choices together are larger than the limit.
    """
    hulls = {name: _hull(own) for name, own in choices.items()}
    chosen = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].bytes for hull in hulls.values())
    if spent > limit:
        raise TernarizeError(
            f"the coarsest groups that are tried take {spent} bytes, but the budget allows {limit}. "
            "Raise budget, or raise group_size or lower scale_bits and shift_bits in the recipe."
        )
    steps = sorted(
        ((before.damage - after.damage) / (after.bytes - before.bytes), name, place, after.bytes - before.bytes)
        for name, hull in hulls.items()
        for place, (before, after) in enumerate(itertools.pairwise(hull))
    )
    for _, name, place, cost in reversed(steps):  # steepest first; a hull's own steps come in order
        if chosen[name] == place and spent + cost <= limit:
            chosen[name] = place + 1
            spent += cost
    return {name: hulls[name][place] for name, place in chosen.items()}


def _hull(choices: list[Choice]) -> list[Choice]:
    """The lower convex hull of (bytes, damage), from the cheapest choice to the least damage."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.damage)):
        if hull and choice.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """Damage saved per byte from a to b."""
    return (a.damage - b.damage) / (b.bytes - a.bytes)
