"""The product of a packed weight and activations. One dispatch; every path is checked against the reference.

`reference` is plain torch and runs everywhere; `cpu` is the native library, for what `usable` accepts while `native()`
is a path.
"""

from ternarize.kernels.cpu import PackedTernary, check_activations, default_activations, native, usable
from ternarize.kernels.cpu import int8_linear as native_int8_linear
from ternarize.kernels.reference import int8_linear, ternary_linear, ternary_weight

__all__ = [
    "PackedTernary",
    "check_activations",
    "default_activations",
    "int8_linear",
    "native",
    "native_int8_linear",
    "ternary_linear",
    "ternary_weight",
    "usable",
]
