"""What all imports end with: a layout for what was found, and the folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize.architecture import check_skip
from ternarize.errors import TernarizeError
from ternarize.export.stock import write_shards
from ternarize.files import write_text
from ternarize.format import TRIPWIRE, Layout
from ternarize.importing.card import write_card
from ternarize.packing import packed_columns
from ternarize.tensor import TernaryTensor, group_count


@dataclass(frozen=True)
class Form:
    """A linear that was found to be ternary: its shape (O, I), its group size S, and whether it has a shift."""

    shape: tuple[int, int]
    group_size: int
    shift: bool

    @classmethod
    def of(cls, tensor: TernaryTensor) -> Form:
        """Of a weight that was recognized."""
        return cls(tensor.shape, tensor.group_size, tensor.shift is not None)


@dataclass(frozen=True)
class Imported:
    """What was found.

    Args:
        linears: how many became ternary.
        group_sizes: {S: how many linears have it}.
        shift: whether they have one.
        bits_per_ternary_weight: all side data counted.
    """

    linears: int
    group_sizes: dict[int, int]
    shift: bool
    bits_per_ternary_weight: float


def lay_out(
    source: Path,
    blocks: str,
    found: dict[str, Form],
    kept: list[str],
    skip: tuple[str, ...],
    tables: dict[str, float] | None = None,
    table_group_size: int = 64,
) -> Layout:
    """The layout of the folder that an import writes: one shift for all, the group size that most have.

    Args:
        source: as messages name it.
        blocks: the path of the decoder layers.
        found, kept: the linears in them that are ternary, by name, and those that are not.
        skip: linears to leave as they are, by name, as in a recipe.
        tables, table_group_size: {name: multiplier} of int8 embeddings and heads, and columns that share a scale.

    Raises:
        TernarizeError: nothing is left, or `skip` names what is not there.
    """
    check_skip(skip, [*found, *kept])
    if not found:
        raise TernarizeError(f"{source} has no linear left to import: skip takes all of them.")
    usual = Counter(form.group_size for form in found.values()).most_common(1)[0][0]
    return Layout(
        blocks=blocks,
        group_size=usual,
        shift=any(form.shift for form in found.values()),
        kept=tuple(sorted(kept)),
        int8=tables or {},
        int8_group_size=table_group_size,
        group_sizes={name: form.group_size for name, form in found.items() if form.group_size != usual},
    )


def write_folder(
    folder: Path,
    layout: Layout,
    found: dict[str, Form],
    tensors: Iterator[tuple[str, Tensor]],
    config: dict[str, Any],
    name: str,
    known: dict[str, Any],
) -> Imported:
    """Write weights, config.json and card into a folder that has the side files.

    Args:
        folder: where.
        layout, found: as in `lay_out`.
        tensors: of the whole model, by name; taken one after another.
        config: of config.json, but for what this package adds.
        name, known: the source, as the user gave it, and what `sources.describe` says of it.
    """
    write_shards(folder, tensors)
    fields = config | {"quantization_config": layout.to_config(), "transformers_weights": TRIPWIRE}
    write_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    stored = sum(_stored_bytes(form, layout.shift) for form in found.values())
    bits = 8 * stored / sum(form.shape[0] * form.shape[1] for form in found.values())
    write_card(folder, name, known, layout, len(found), bits)
    sizes = Counter(form.group_size for form in found.values())
    return Imported(len(found), dict(sizes), layout.shift, bits)


def _stored_bytes(form: Form, shift: bool) -> int:
    """Trits, and fp16 scales and shifts."""
    rows, columns = form.shape
    return rows * (packed_columns(columns) + 2 * (1 + shift) * group_count(columns, form.group_size))
