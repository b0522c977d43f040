"""One window of blocks: capture, fit, pack, tune, advance.

A window is one block, or the few that the recipe lets learn together. Everything here works on blocks that are in
memory and on the hidden states at their entrance; files are `conversion`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.architecture import choose_linears, linear_shape, linear_weight, replace_module
from ternarize.calibration import Walk, capture, product_dtype
from ternarize.checkpoint import tied_parameters
from ternarize.choice import embedding_multiplier
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.format import Table
from ternarize.plan import Plan
from ternarize.recipe import Recipe
from ternarize.report import LinearReport
from ternarize.runtime import TableEmbedding, TableHead, TernaryLinear, unpacked
from ternarize.solver import LinearStatistics, fit, relative_error
from ternarize.swap import tie_table_heads
from ternarize.tuning import Tuned, make_ternary, make_trainable, tune

FEWEST_TOKENS = 4  # an expert that saw fewer than in_features / FEWEST_TOKENS tokens is fitted without data


@dataclass(frozen=True)
class Fitted:
    """What a linear was fitted from: its float weight [O, I], and the statistics, None where there were too few."""

    weight: Tensor
    statistics: LinearStatistics | None
    tokens: int


def convert_window(
    window: dict[str, nn.Module],
    first: int,
    recipe: Recipe,
    teacher: Walk,
    student: Walk,
    group_sizes: dict[str, int] | None = None,
) -> tuple[list[list[LinearReport]], Tuned | None]:
    """Make the float blocks of a window (experts unfused) ternary in place.

    Args:
        window: the blocks by full name, in order; `first` is the number of the first one.
        teacher, student: hidden states at the window's entrance; both are advanced to its exit.
        group_sizes: of linears that have another one than the recipe's.

    Returns:
        One entry per linear, block by block; and how the tuning ended, if there was one.

    Raises:
        UnsupportedModelError: a linear never ran, so nothing is known about its inputs.
    """
    entrance = list(student.hidden)
    fitted = []
    for offset, (name, block) in enumerate(window.items()):
        fitted.append(fit_block(block, name, first + offset, recipe, teacher, student, group_sizes or {}))
        if recipe.needs_statistics and (offset + 1 < len(window) or not recipe.tune.epochs):
            advance(student, first + offset, block)
    tuned = None
    if recipe.tune.epochs:
        for (name, block), known in zip(window.items(), fitted, strict=True):
            make_trainable(block, {linear: f.weight for linear, f in known.items()}, name, recipe.tune)
        tuned = tune(list(window.values()), first, entrance, teacher.hidden, student, recipe)
        student.hidden = entrance
        for offset, block in enumerate(window.values()):
            make_ternary(block)
            advance(student, first + offset, block)
    return [describe(block, name, known) for (name, block), known in zip(window.items(), fitted, strict=True)], tuned


def fit_block(
    block: nn.Module,
    name: str,
    index: int,
    recipe: Recipe,
    teacher: Walk,
    student: Walk,
    group_sizes: dict[str, int],
) -> dict[str, Fitted]:
    """Capture the statistics of a float block, fit its linears, and put a TernaryLinear in the place of each.

    The teacher walks on; the student's hidden states stay at the entrance.

    Raises:
        UnsupportedModelError: a linear never ran.
    """
    chosen = choose_linears(block, name, recipe.skip).ternary
    statistics: dict[str, LinearStatistics] = {}
    if recipe.needs_statistics:
        statistics = capture(block, index, chosen, teacher, student, recipe.calibration.held_out)
    together: dict[tuple[int, int | None], list[str]] = {}
    fitted = {}
    for linear, module in chosen.items():
        known = statistics.get(linear)
        tokens = known.tokens if known else 0
        if ".experts." in linear:
            if tokens < linear_shape(module)[1] / FEWEST_TOKENS:
                known = None
        elif known is None and recipe.needs_statistics:
            raise UnsupportedModelError(
                f"{linear} never ran on the calibration text, or the model uses its weight without calling it. "
                f"Add {linear!r} to skip in the recipe."
            )
        fitted[linear] = Fitted(linear_weight(module).float(), known, tokens)
        size = group_sizes.get(linear, recipe.group_size)
        together.setdefault((id(known.second_moment) if known else hash(linear), size), []).append(linear)
    for (_, size), members in together.items():
        own = replace(recipe, group_size=size)
        _fit_together(block, name, {member: chosen[member] for member in members}, fitted, own)
    return fitted


def _fit_together(
    block: nn.Module, name: str, members: dict[str, nn.Module], fitted: dict[str, Fitted], recipe: Recipe
) -> None:
    """Fit linears that read the same input as one weight: rows are independent, so the columns are visited once."""
    weights = [fitted[member].weight for member in members]
    try:
        together = fit(torch.cat(weights), fitted[next(iter(members))].statistics, recipe)
    except TernarizeError as error:
        raise TernarizeError(f"{', '.join(members)}: {error}") from error
    start = 0
    for (member, module), weight in zip(members.items(), weights, strict=True):
        linear = TernaryLinear.from_tensor(together.rows(start, start + len(weight)), getattr(module, "bias", None))
        start += len(weight)
        replace_module(block, member, linear, name)


def advance(student: Walk, index: int, block: nn.Module) -> None:
    """Walk the student through a block that is ternary, each weight unpacked once for all batches."""
    with unpacked(block, product_dtype(student.hidden[0].device)):  # as autocast would round it, batch by batch
        student.advance(index, block)


def describe(block: nn.Module, name: str, fitted: dict[str, Fitted]) -> list[LinearReport]:
    """One entry for each ternary linear of a block, as it now is."""
    entries = []
    for member, known in fitted.items():
        linear = block.get_submodule(member[len(name) + 1 :])
        assert isinstance(linear, TernaryLinear)
        tensor = linear.to_tensor()
        stored = sum(b.numel() * b.element_size() for b in linear.buffers())
        entries.append(
            LinearReport(
                name=member,
                shape=tensor.shape,
                zero_share=tensor.zero_share,
                error=relative_error(known.weight, tensor.dequantize(), known.statistics),
                bits=8 * stored / known.weight.numel(),
                tokens=known.tokens,
                data_free=known.statistics is None,
            )
        )
    return entries


def replay_block(
    block: nn.Module,
    name: str,
    index: int,
    recipe: Recipe,
    teacher: Walk,
    student: Walk,
    tensors: dict[str, Tensor],
    group_sizes: dict[str, int],
) -> None:
    """Walk teacher and student through a block that an earlier run finished, read back from `tensors`."""
    if not recipe.needs_statistics:
        return
    teacher.advance(index, block)
    for linear, module in choose_linears(block, name, recipe.skip).ternary.items():
        packed = TernaryLinear.from_packed(
            linear_shape(module),
            group_sizes.get(linear, recipe.group_size),
            {key.removeprefix(f"{linear}."): tensor for key, tensor in tensors.items() if key.startswith(f"{linear}.")},
            recipe.grid == "dlt",
            recipe.scale_bits,
            recipe.shift_bits,
            getattr(module, "bias", None),
        )
        replace_module(block, linear, packed.to(student.hidden[0].device), name)
    advance(student, index, block)


def pack_embeddings(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> dict[str, Table]:
    """Put the embedding and head that the plan names in their places, packed; returns how, by name."""
    tables: dict[str, Table] = {}
    for name, (_, _, bits) in plan.tables.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            table = Table(bits, embedding_multiplier(module, name))
            new: nn.Module = TableEmbedding.from_weight(module.weight, recipe.int8_group_size, *table)
        else:
            assert isinstance(module, nn.Linear)
            table = Table(bits)
            new = TableHead.from_weight(module.weight, recipe.int8_group_size, bits, module.bias)
        tables[name] = table
        replace_module(model, name, new)
    tie_table_heads(model, tied_parameters(model))
    return tables
