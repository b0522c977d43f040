"""The package `gguf`, optional, and what it does not know yet."""

from __future__ import annotations

from typing import Any

from ternarize.errors import TernarizeError
from ternarize.export.gguf.blocks import Q2_0


def load_gguf() -> Any:
    """The package, able to read and write Q2_0, which llama.cpp has had since July 2026 and gguf 0.19 lacks.

    Raises:
        TernarizeError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise TernarizeError("GGUF files need the package gguf. Run: pip install 'ternarize[gguf]'") from error
    types = gguf.GGMLQuantizationType
    if Q2_0.name not in types.__members__:
        member = int.__new__(types, Q2_0.number)
        member._name_, member._value_ = Q2_0.name, Q2_0.number
        types._member_map_[Q2_0.name] = types._value2member_map_[Q2_0.number] = member
        gguf.GGML_QUANT_SIZES[member] = (Q2_0.width, Q2_0.size)
    return gguf
