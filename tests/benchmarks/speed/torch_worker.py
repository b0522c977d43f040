"""The worker of what runs on torch: ternarize, transformers in bfloat16, and its linears in torch's dynamic int8.

python -m tests.benchmarks.speed.torch_worker ternarize|bfloat16|int8 FOLDER THREADS
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from transformers import AutoModelForCausalLM

from ternarize.runtime import TableHead, TernaryLinear, TiedTableHead
from ternarize.speed import timed_generate, torch_threads

from .serve import Facts, Times, prompt_ids, serve

DTYPES = {"ternarize": "auto", "bfloat16": torch.bfloat16, "int8": torch.float32}


def read(kind: str, folder: Path) -> Any:
    """A folder as transformers loads it for anybody; int8 is its linears, with activations rounded as they come."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[kind]).eval()
    if kind != "int8":
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)  # no second copy


def load(kind: str, folder: Path, threads: int) -> tuple[Facts, Times]:
    """What `serve` wants."""
    torch.set_num_threads(threads)
    model = read(kind, folder)
    vocabulary = model.get_input_embeddings().num_embeddings

    def times(threads: int, prompt: int, tokens: int) -> list[float]:
        with torch_threads(threads):
            return timed_generate(model, torch.tensor([prompt_ids(vocabulary, prompt)]), 1 + tokens)

    times(threads, 1, 0)
    return facts(model), times


def facts(model: nn.Module) -> Facts:
    """Bytes of weights that a token reads, and the types of linears and head, counted."""
    read = [weights(module) for module in model.modules()]
    return {
        "bytes_per_token": sum(part.numel() * part.element_size() for _, parts in read for part in parts),
        "types": dict(Counter(name for name, parts in read if parts)),
    }


def weights(module: nn.Module) -> tuple[str, list[Tensor]]:
    """The type of a linear's or a head's weight and the tensors that are read of it, bias left out; else nothing."""
    if isinstance(module, TernaryLinear):
        packed = module.pack()
        held = dict(module.named_buffers()) if packed is None else vars(packed)
        return "ternary", [value for name, value in held.items() if isinstance(value, Tensor) and name != "bias"]
    if isinstance(module, DynamicLinear):
        return "int8", [module.weight()]
    if isinstance(module, (TableHead, TiedTableHead)):
        return "int8", [module.weight]
    return (str(module.weight.dtype).partition(".")[2], [module.weight]) if isinstance(module, nn.Linear) else ("", [])


if __name__ == "__main__":
    kind, folder, threads = sys.argv[1:]
    serve(lambda: load(kind, Path(folder), int(threads)))
