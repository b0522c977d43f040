"""The product of a packed weight and activations. One dispatch; every path is checked against the reference.

`reference` is plain torch and runs everywhere; `cpu` is the native library, for what `usable` accepts while `native()`
is a path, and `decoder` all blocks of a model in one call of it; `builtin` is torch's own 4-bit product, where that
library is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ternarize.kernels.builtin import BuiltinTernary
from ternarize.kernels.cpu import Native, PackedTernary, check_activations, default_activations, missing, native, usable
from ternarize.kernels.cpu import table_linear as native_table_linear
from ternarize.kernels.pages import allocate, trim
from ternarize.kernels.reference import table_linear, ternary_linear, ternary_weight

__all__ = [
    "BuiltinTernary",
    "Native",
    "PackedTernary",
    "allocate",
    "check_activations",
    "default_activations",
    "native",
    "native_table_linear",
    "packer",
    "table_linear",
    "ternary_linear",
    "ternary_weight",
    "trim",
    "usable",
]


def packer(
    path: Native | None, rows: int, columns: int, group_size: int
) -> Callable[..., PackedTernary | BuiltinTernary] | None:
    """What lays out a weight [O, I] in groups of S: for a path, or else for torch's operator; None where nothing can.

    It takes trits, levels, bias, I and S, as `BuiltinTernary` does; for a path, levels can be `CodedScales`.
    """
    if path is not None:
        return partial(PackedTernary, path)
    return BuiltinTernary if missing() is not None and BuiltinTernary.fits(rows, columns, group_size) else None
