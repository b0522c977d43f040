"""The targets gguf-tq1_0, gguf-tq2_0, gguf-q2_0, gguf-q4_0, gguf-q4_1 and gguf-q2_k: one file for llama.cpp.

Rows that are no whole blocks of the wanted type are written in the next type that holds them exactly, as `FALLBACKS`
lists them; a GGUF file may mix types, and llama.cpp's own quantizer does. Where not one linear fits, the model is
refused. Everything else is stored exactly: int8 and int6 tables as Q8_0, with the same codes and scales, where their
groups are multiples of its blocks; other matrices in the smallest of F16, BF16 and F32 that holds them; vectors in F32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ternarize.errors import UnsupportedModelError
from ternarize.export.gguf import llama
from ternarize.export.gguf.blocks import Q2_0, Q4_0, Q4_1, BlockType, pack, stored
from ternarize.export.gguf.model import (
    ROPE_FACTORS,
    add_settings,
    architecture,
    norm_offset,
    rope_factors,
    row_order,
    tensor_names,
)
from ternarize.export.gguf.package import load_gguf
from ternarize.export.gguf.vocabulary import Vocabulary, read_vocabulary
from ternarize.export.regroup import regroup, relative_error
from ternarize.export.target import EXACT, Exactness, TernaryFolder
from ternarize.progress import Progress, quiet_transformers
from ternarize.tensor import TernaryTensor, expand_groups

Q8_0 = BlockType("Q8_0", 8, 7, 32, 34)
F16 = BlockType("F16", 1, 1, 1, 2)
BF16 = BlockType("BF16", 30, 32, 1, 2)
F32 = BlockType("F32", 0, 0, 1, 4)
FALLBACKS = (Q2_0, Q4_0, Q4_1)  # for rows that are no whole blocks: the smallest that is exact, else a float type
_UINT8 = np.dtype(np.uint8)
FLOATS = {F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32}


class GgufTarget:
    """One of the block types as a `Target`.

    Args:
        kind: what the ternary weights are written as, where they can be.
    """

    tolerance = (
        0.02  # llama.cpp takes Gemma's GELU from a table in fp16; without it, differences are a thousandth of this
    )

    def __init__(self, kind: BlockType) -> None:
        self.kind = kind
        self.name = f"gguf-{kind.name.lower()}"

    def plan(self, folder: TernaryFolder) -> dict[str, BlockType]:
        """{linear: the type that it is written as}.

        Raises:
            UnsupportedModelError: no linear has rows of whole blocks.
        """
        chosen = {}
        for name, (_, columns) in folder.linears.items():
            layout = columns, folder.group_sizes[name], folder.layout.shift
            floats = F32 if folder.layout.shift else F16  # scale * trit is an fp16 number, with a shift it is none
            exact = next((kind for kind in FALLBACKS if kind.holds(*layout)), floats)
            chosen[name] = self.kind if self.kind.fits(columns) else exact
        if self.kind not in chosen.values():
            widths = sorted({columns for _, columns in folder.linears.values()})
            others = [f"gguf-{kind.name.lower()}" for kind in FALLBACKS if any(map(kind.fits, widths))]
            raise UnsupportedModelError(
                f"{self.name} has blocks of {self.kind.width} weights, and no linear of {folder.path} has rows of "
                f"whole blocks: they have {', '.join(map(str, widths))} columns. Export to "
                f"{' or '.join(others) or 'another format'}."
            )
        return chosen

    def check(self, folder: TernaryFolder) -> Exactness:
        """As in `Target`; only weights that their layout alone does not make exact are read."""
        load_gguf()
        _names(folder)
        _vocabulary(folder)
        plan = self.plan(folder)
        layout = folder.layout
        largest, worst, exact = 0.0, "", True
        for name, kind in plan.items():
            known = kind.holds(folder.linears[name][1], folder.group_sizes[name], layout.shift)
            if (known and not layout.shift) or kind in FLOATS:
                continue
            error, deviation = _loss(folder.ternary(name), kind)
            exact = exact and deviation <= EXACT
            if error > largest:
                largest, worst = error, name
        if exact:
            return Exactness(True, self._mixture(folder, plan), largest)
        if layout.shift and not self.kind.shift:
            reason = f"{worst} has shifts, which {self.name} cannot hold"
        else:
            reason = f"{worst} has groups of {folder.group_sizes[worst]}, {self.name} one scale for {self.kind.width}"
            reason += " or multiples of one" if self.kind.unit else ""
        return Exactness(False, f"{reason}; the nearest weights would be written", largest)

    def sizes(self, folder: TernaryFolder) -> tuple[int, int]:
        """As in `Target`; the tokenizer, which lies in the same file, is not counted."""
        plan = self.plan(folder)
        parts = _parts(folder, _names(folder), plan)
        ternary = sum(kind.bytes(*folder.linears[name]) for name, kind in plan.items())
        return ternary, sum(part.kind.bytes(1, part.count) for part in parts)

    def write(self, folder: TernaryFolder, output: Path, progress: Progress) -> None:
        """As in `Target`: one file."""
        gguf = load_gguf()
        arch = architecture(folder)
        parts = _parts(folder, _names(folder), self.plan(folder))
        writer = gguf.GGUFWriter(output, arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(folder.path.resolve().name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(self.kind.file_type)
        add_settings(writer, folder.config)
        _vocabulary(folder).add_to(writer)
        types = gguf.GGMLQuantizationType
        for part in parts:
            bytes_ = part.kind.bytes(1, part.shape[-1])
            shape = (*part.shape[:-1], bytes_)
            size = part.kind.bytes(1, part.count)
            writer.add_tensor_info(part.name, shape, _UINT8, size, raw_dtype=types(part.kind.number))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress.bar(f"writing {self.name}", total=len(parts), unit="tensor") as bar:
                for part in parts:
                    writer.write_tensor_data(part.read().contiguous().view(torch.uint8).numpy())
                    bar.update(1)
        finally:
            writer.close()

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """As in `Target`: llama.cpp's, of the weights that it reads; see `llama` for what its own rounding adds."""
        with llama.float_copy(output) as copy:
            return llama.logits(copy, ids)

    def _mixture(self, folder: TernaryFolder, plan: dict[str, BlockType]) -> str:
        """Which linears are in another type than was asked for, in words."""
        counts = Counter(kind.name for kind in plan.values() if kind is not self.kind)
        if not counts:
            return ""
        widths = sorted({folder.linears[name][1] for name, kind in plan.items() if kind is not self.kind})
        others = " and ".join(f"{count} linears as {name}" for name, count in counts.items())
        columns = ", ".join(map(str, widths))
        return f"{others}, exact too: rows of {columns} columns are no multiple of {self.kind.width}"


@dataclass(frozen=True)
class _Part:
    """A tensor of the file: its name there, its type, its shape in weights, and what gives its bytes, row by row."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def count(self) -> int:
        """Weights in it."""
        return torch.Size(self.shape).numel()


def _parts(folder: TernaryFolder, names: dict[str, str], plan: dict[str, BlockType]) -> list[_Part]:
    """All tensors of a file, none of them packed yet."""
    parts = []
    factors = rope_factors(folder)
    if factors is not None:
        parts.append(_Part(ROPE_FACTORS, F32, tuple(factors.shape), lambda: factors))
    shape: tuple[int, ...]
    for ours, theirs in names.items():
        linear = ours.removesuffix(".weight")
        if linear in plan:
            kind, shape = plan[linear], folder.linears[linear]
            read = _linear_reader(folder, linear, kind)
        elif ours in folder.tables and _as_q8_0(folder, ours):
            kind, shape, read = Q8_0, folder.shape(ours), _table_reader(folder, ours)
        else:
            kind, shape = _float_type(folder, ours), folder.shape(ours)
            read = _float_reader(folder, ours, kind)
        parts.append(_Part(theirs, kind, shape, read))
    return parts


def _names(folder: TernaryFolder) -> dict[str, str]:
    tensors = [f"{linear}.weight" for linear in folder.linears] + folder.rest
    return tensor_names(architecture(folder), folder.config.num_hidden_layers, tensors)


def _linear_reader(folder: TernaryFolder, name: str, kind: BlockType) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = folder.ternary(name)
        order = row_order(folder.config, f"{name}.weight")
        if order is not None:
            shift = None if tensor.shift is None else tensor.shift[order]
            tensor = TernaryTensor(tensor.trits[order], tensor.scale[order], shift, tensor.group_size)
        if kind in FLOATS:
            return tensor.dequantize(FLOATS[kind])
        return pack(_fitted(tensor, kind), kind)

    return read


def _table_reader(folder: TernaryFolder, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        codes, scale = folder.table_codes(name)
        rows, columns = codes.shape
        scale = expand_groups(scale, columns // Q8_0.width, folder.layout.int8_group_size // Q8_0.width)
        blocks = [scale.contiguous().view(torch.uint8).view(rows, -1, 2), codes.view(torch.uint8).view(rows, -1, 32)]
        return torch.cat(blocks, -1)

    return read


def _float_reader(folder: TernaryFolder, name: str, kind: BlockType) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = folder.tensor(name).float() + norm_offset(folder.config, name)
        order = row_order(folder.config, name)
        return (tensor if order is None else tensor[order]).to(FLOATS[kind])

    return read


def _as_q8_0(folder: TernaryFolder, name: str) -> bool:
    columns, group_size = folder.shape(name)[1], folder.layout.int8_group_size
    return columns % Q8_0.width == 0 and (group_size % Q8_0.width == 0 or group_size >= columns)


def _float_type(folder: TernaryFolder, name: str) -> BlockType:
    """The smallest float type that holds a tensor as it is; F32 for vectors, which llama.cpp wants so."""
    if len(folder.shape(name)) == 1:
        return F32
    tensor = folder.tensor(name).float()
    return next(kind for kind, dtype in FLOATS.items() if torch.equal(tensor.to(dtype).float(), tensor))


def _fitted(tensor: TernaryTensor, kind: BlockType) -> TernaryTensor:
    """A weight whose groups are those of `kind`; nothing is lost where they can be cut so."""
    return regroup(tensor, kind.unit or kind.width, kind.shift)


def _loss(tensor: TernaryTensor, kind: BlockType) -> tuple[float, float]:
    """What `kind` makes of a weight: ||w - w'|| / ||w||, and the largest |w - w'| by its group's largest level."""
    weight, written = tensor.dequantize(), stored(_fitted(tensor, kind), kind)
    level = tensor.scale.float() if tensor.shift is None else tensor.scale.float() + tensor.shift.float().abs()
    deviation = (weight - written).abs() / expand_groups(level, tensor.shape[1], tensor.group_size)
    return relative_error(weight, written), float(deviation.max())


def _vocabulary(folder: TernaryFolder) -> Vocabulary:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    return read_vocabulary(tokenizer, folder.config.vocab_size)
