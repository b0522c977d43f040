"""What of a model becomes ternary, int8 or int6, and what stays float: the same for every way to convert one.

Only shapes are looked at, so a skeleton on the meta device will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ternarize.architecture import (
    LINEAR_TYPES,
    check_parameters,
    check_skip,
    choose_linears,
    find_blocks,
    linear_shape,
    skipped_experts,
    unfuse_experts,
)
from ternarize.checkpoint import tied_parameters
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.format import Layout, Table
from ternarize.packing import check_table
from ternarize.recipe import Recipe

TABLE_BITS = {"int8": 8, "int6": 6}


@dataclass(frozen=True)
class Choice:
    """See the module's docstring.

    Args:
        blocks: path of the list of decoder layers.
        ternary: {linear: (O, I)}.
        tables: {embedding or head: bits of a code}.
        kept: {linear inside the blocks that stays float: why}.
    """

    blocks: str
    ternary: dict[str, tuple[int, int]]
    tables: dict[str, int]
    kept: dict[str, str]


def choose(model: PreTrainedModel, recipe: Recipe) -> Choice:
    """Decide for each linear, embedding and head of a float model; its experts are unfused in place.

    Raises:
        UnsupportedModelError: a part of the model cannot be converted faithfully.
        TernarizeError: the recipe does not fit the model (a skip that matches nothing, too large a group).
    """
    path, blocks = find_blocks(model)
    tables = choose_tables(model, recipe)
    ternary: dict[str, tuple[int, int]] = {}
    kept: dict[str, str] = {}
    seen: dict[int, str] = {}
    all_linears: list[str] = []
    for index, block in enumerate(blocks):
        prefix = f"{path}.{index}"
        check_parameters(block, prefix)
        for name, module in block.named_modules(prefix=prefix):
            if isinstance(module, LINEAR_TYPES) and seen.setdefault(id(module), name) != name:
                raise UnsupportedModelError(
                    f"{name} is the same module as {seen[id(module)]}; sharing is not supported."
                )
        unfuse_experts(block, prefix, recipe.skip)
        fused = {
            name: reason
            for path_, m in block.named_modules(prefix=prefix)
            for name, reason in skipped_experts(path_, m, recipe.skip)
        }
        all_linears += fused
        kept |= fused
        chosen = choose_linears(block, prefix, recipe.skip)
        all_linears += [*chosen.ternary, *chosen.kept]
        ternary |= {name: linear_shape(module) for name, module in chosen.ternary.items()}
        kept |= chosen.kept
    check_skip(recipe.skip, all_linears)
    if not ternary:
        raise TernarizeError("the recipe's skip leaves no linear to make ternary. Remove some of its patterns.")
    widest = max(i for _, i in ternary.values())
    if recipe.group_size is not None and recipe.group_size > widest:
        raise TernarizeError(
            f"group_size {recipe.group_size} is wider than every linear of {type(model).__name__} "
            f"(widest: {widest} input columns). Choose at most {widest}, or null for one group a row."
        )
    return Choice(path, ternary, tables, kept)


def make_layout(
    recipe: Recipe, blocks: str, kept: list[str], tables: dict[str, Table], group_sizes: dict[str, int] | None = None
) -> Layout:
    """What the folder's config says of its tensors.

    Args:
        blocks, kept: as a `Choice` has them.
        tables: of embeddings and heads, by name.
        group_sizes: of linears, where they may have another one than the recipe's.
    """
    return Layout(
        blocks=blocks,
        group_size=recipe.group_size,
        shift=recipe.grid == "dlt",
        kept=tuple(sorted(kept)),
        int8={name: table.multiplier for name, table in tables.items() if table.bits == 8},
        int6={name: table.multiplier for name, table in tables.items() if table.bits == 6},
        int8_group_size=recipe.int8_group_size,
        scale_bits=recipe.scale_bits,
        shift_bits=recipe.shift_bits if recipe.grid == "dlt" else recipe.scale_bits,
        group_sizes={name: size for name, size in (group_sizes or {}).items() if size != recipe.group_size},
    )


def find_embeddings(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Names of the input embedding and of the output head, where the model says that it has them."""
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(model.get_input_embeddings())), names.get(id(model.get_output_embeddings()))


def choose_tables(model: PreTrainedModel, recipe: Recipe) -> dict[str, int]:
    """{embedding or head that does not stay float: bits of a code}; a tied head is not among them, it has no table.

    Raises:
        TernarizeError: the recipe's bits do not fit a table.
    """
    embedding, head = find_embeddings(model)
    tied = tied_parameters(model)
    chosen: dict[str, int] = {}
    if embedding and recipe.embeddings != "keep" and isinstance(model.get_submodule(embedding), nn.Embedding):
        chosen[embedding] = TABLE_BITS[recipe.embeddings]
    own_head = head and f"{head}.weight" not in tied
    if head and own_head and recipe.head != "keep" and isinstance(model.get_submodule(head), nn.Linear):
        chosen[head] = TABLE_BITS[recipe.head]
    for name, bits in chosen.items():
        check_table(model.get_parameter(f"{name}.weight").shape[1], recipe.int8_group_size, bits, name)
    return chosen


@torch.no_grad()
def embedding_multiplier(module: nn.Embedding, name: str) -> float:
    """The constant that an embedding's own forward puts on its rows (Gemma: sqrt(H)); 1.0 for a plain one.

    Raises:
        UnsupportedModelError: it does more than that.
    """
    ids = torch.arange(min(64, module.num_embeddings), device=module.weight.device)
    rows, out = module.weight[ids], module(ids)
    used = rows.abs() > 1e-3 * rows.abs().max()
    multiplier = float((out[used] / rows[used]).median()) if bool(used.any()) else 1.0
    if not torch.allclose(out, rows * multiplier, rtol=1e-4, atol=1e-6):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is more than a table of rows times a constant. "
            "Set embeddings: keep in the recipe."
        )
    return multiplier
