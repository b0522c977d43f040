"""Exports: a ternarize folder in the formats that other software reads, exactly or not at all.

target     what a format is (`Target`), and what it is made from (`TernaryFolder`)
regroup    a ternary weight in the groups that another format has
stock      what the formats that are Hugging Face folders share; one file each for dense, metal (and mlx),
           compressed, gptq, bitnet
gguf       files for llama.cpp, and back
planned    a folder that is not there yet, to refuse a format before calibration
card       an export's README.md
export     check, say, refuse or write; export.json
verify     reload with the format's own reader, and compare
"""

from __future__ import annotations

from ternarize.errors import TernarizeError, nearest
from ternarize.export.target import Target


def targets() -> dict[str, Target]:
    """Every format by its name."""
    import torch

    from ternarize.export.bitnet import BitNet
    from ternarize.export.compressed import CompressedTensors
    from ternarize.export.dense import Dense
    from ternarize.export.gguf.blocks import TYPES
    from ternarize.export.gguf.target import GgufTarget
    from ternarize.export.gptq import Gptq
    from ternarize.export.metal import Metal, Mlx

    known: list[Target] = [
        Dense(),
        Metal(),
        Metal(torch.bfloat16),
        Mlx(),
        Mlx(torch.bfloat16),
        CompressedTensors(),
        Gptq(),
        BitNet(),
        *(GgufTarget(kind) for kind in TYPES),
    ]
    return {target.name: target for target in known}


def find_targets(formats: list[str]) -> list[Target]:
    """The targets of these names, each once.

    Raises:
        TernarizeError: a name is not known, or there is none.
    """
    known = targets()
    for name in formats:
        if name not in known:
            raise TernarizeError(f"format {name!r} is not known{nearest(name, known)}. Formats: {', '.join(known)}.")
    if not formats:
        raise TernarizeError(f"no format is named. Formats: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(formats)]
