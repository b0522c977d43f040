"""The product of a packed weight and activations. One dispatch; every path is checked against the reference.

`reference` is plain torch and runs everywhere; `cpu` is the native library, for what `usable` accepts while `native()`
is a path; `builtin` is torch's own 4-bit product, where that library is missing.
"""

from __future__ import annotations

from torch import Tensor

from ternarize.kernels.builtin import BuiltinTernary
from ternarize.kernels.cpu import Native, PackedTernary, check_activations, default_activations, missing, native, usable
from ternarize.kernels.cpu import int8_linear as native_int8_linear
from ternarize.kernels.reference import int8_linear, ternary_linear, ternary_weight

__all__ = [
    "BuiltinTernary",
    "Native",
    "PackedTernary",
    "check_activations",
    "default_activations",
    "int8_linear",
    "native",
    "native_int8_linear",
    "pack_ternary",
    "packs",
    "ternary_linear",
    "ternary_weight",
    "usable",
]


def packs(path: Native | None, rows: int, columns: int, group_size: int) -> bool:
    """Whether a weight [O, I] in groups of S can be laid out: for a path, or else for torch's own operator."""
    return path is not None or (missing() is not None and BuiltinTernary.fits(rows, columns, group_size))


def pack_ternary(
    path: Native | None,
    trits: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
) -> PackedTernary | BuiltinTernary:
    """A weight laid out as `packs` says it can be; arguments as in `PackedTernary`."""
    if path is not None:
        return PackedTernary(path, trits, scale, shift, bias, in_features, group_size)
    return BuiltinTernary(trits, scale, shift, bias, in_features, group_size)
