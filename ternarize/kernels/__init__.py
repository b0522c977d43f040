"""The product of a packed weight and activations. One dispatch; every path is checked against the reference."""

from ternarize.kernels.reference import int8_linear, ternary_linear, ternary_weight

__all__ = ["int8_linear", "ternary_linear", "ternary_weight"]
