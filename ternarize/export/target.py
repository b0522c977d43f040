"""What an export goes from and to: `TernaryFolder` is what a target reads, `Target` is what it does.

A format is called exact for a model where every weight, as the format's reader computes it, lies within `EXACT` of the
largest level of its group: that is what rounding to bfloat16 does at most, the type that models are published in, and
fp16 scales, which the folder's own are, stay far below it. `Exactness.error` says how far each is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ternarize.architecture import UnfusedExperts
from ternarize.checkpoint import SAFETENSORS_DTYPES, make_skeleton, read_config, tied_parameters
from ternarize.errors import FormatError
from ternarize.files import find_shards, read_header
from ternarize.format import QUANT_METHOD, Layout
from ternarize.packing import dequantize_table, split_table
from ternarize.progress import Progress
from ternarize.quantizer import check_names, quant_method
from ternarize.runtime import TableEmbedding, TableHead, TernaryLinear, TiedTableHead
from ternarize.swap import replace_float_modules
from ternarize.tensor import TernaryTensor

EXACT = 2**-8
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Exactness:
    """What a format makes of a model, known before anything is written.

    Args:
        exact: see the module's docstring; of the ternary weights.
        reason: "" or why not, or what is approximated, naming the first linear and the rule.
        error: largest relative error of a weight, ||w - w'|| / ||w|| over any linear; 0.0 where nothing is lost.
    """

    exact: bool
    reason: str
    error: float


class Target(Protocol):
    """One format. A new one is a class with these six, and an entry in the registry of `ternarize.export`.

    Attributes:
        name: "metal", "gguf-tq2_0", ...; that of a format which is a single file starts with the file's ending and "-".
        tolerance: how far the reader's logits may lie from the student's for an exact model, in the mean and as a share
            of their spread: `TOLERANCE`, or what the reader's own arithmetic (int8 activations) makes.
    """

    name: str
    tolerance: float

    def check(self, folder: TernaryFolder) -> Exactness:
        """Whether the format holds this model.

        Raises:
            UnsupportedModelError: it cannot be written at all, not even with loss; the message says why.
        """

    def sizes(self, folder: TernaryFolder) -> tuple[int, int]:
        """Bytes that the ternary weights will take, all their side data counted, and bytes of the weight files."""

    def write(self, folder: TernaryFolder, output: Path, progress: Progress) -> None:
        """Write a fresh temporary path, which the caller renames: a folder or a file, as the format is."""

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """What the format's own reader predicts, float32 [B, T, V], for token ids int64 [B, T].

        Raises:
            TernarizeError: the reader is not installed (the message names what to install), or refuses the file.
        """


class TernaryFolder:
    """A ternarize folder, opened but not read: tensors come one by one, under the names that stock software uses.

    Args:
        path: the folder; the files that are no weights (tokenizer, chat template) are read from there.

    Attributes:
        config: transformers' config of the float model.
        dtype: the type of floats that config.json names; bfloat16 where it names none.
        layout: what config.json says of the packed modules.
        linears: {name: (O, I)} of the ternary linears; an expert's are `...experts.{e}.gate_up_proj`.
        group_sizes: {name: S} of each of them, at most I.
        transposed: names of those whose stock module holds its weight as [I, O] (GPT-2's Conv1D).
        mixtures: paths of the experts that were taken apart; stock software has them fused.
        rest: names of all other parameters and saved buffers (biases of ternary linears too), a tied one once.
        tied: {parameter: the parameter whose tensor it shares}; the shared one is in `rest`.
        tables: {name in `rest` of an embedding or head that is stored in codes: their bits, 8 or 6}.

    Raises:
        FormatError: not a ternarize folder, or damaged.
        TernarizeError: no checkpoint at all.
    """

    def __init__(self, path: Path) -> None:
        if quant_method(path) != QUANT_METHOD:
            raise FormatError(f"{path} is not a ternarize folder: config.json has no ternarize quantization_config.")
        config = read_config(path)
        layout = Layout.from_config(_fields(config.quantization_config))
        self._files = find_shards(path)
        headers = {file: read_header(file) for file in self._files}
        self._where = {name: file for file, header in headers.items() for name in header}
        self._stored = {name: kind for header in headers.values() for name, (kind, _) in header.items()}
        self._open(path, config, layout)
        check_names(self.model, [str(file) for file in self._files])

    def _open(self, path: Path, config: Any, layout: Layout) -> None:
        """Everything that follows from the config alone."""
        for ours in ("quantization_config", "transformers_weights"):
            if hasattr(config, ours):
                delattr(config, ours)
        self.path, self.config, self.layout = path, config, layout
        self.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16  # before a skeleton is
        self.model = make_skeleton(config, path)
        self.tied = tied_parameters(self.model)
        replace_float_modules(self.model, layout)
        named = list(self.model.named_modules())
        self._ternary = {name: module for name, module in named if isinstance(module, TernaryLinear)}
        self._tables = {f"{name}.weight": m for name, m in named if isinstance(m, (TableEmbedding, TableHead))}
        self.linears = {name: (module.out_features, module.in_features) for name, module in self._ternary.items()}
        self.group_sizes = {name: module.group_size for name, module in self._ternary.items()}
        self.transposed = {n for n, module in self._ternary.items() if module.replaces is not torch.nn.Linear}
        self.mixtures = [name for name, module in named if isinstance(module, UnfusedExperts)]
        self.tables = {name: module.bits for name, module in self._tables.items()}
        packed = {f"{name}.{buffer}" for name, module in self._ternary.items() for buffer in module._buffers}
        markers = {f"{name}.{b}" for name, m in named if isinstance(m, UnfusedExperts) for b in m._buffers}
        shared = {n for n, m in named if isinstance(m, TiedTableHead)}
        self.rest = [
            name
            for name in self.model.state_dict()
            if name not in packed | markers | set(self.tied) and name not in {f"{head}.weight" for head in shared}
        ]

    @cached_property
    def identity(self) -> str:
        """sha256 of config.json and the weight files."""
        digest = hashlib.sha256()
        for file in (self.path / "config.json", *self._files):
            with open(file, "rb") as stream:
                while part := stream.read(1 << 22):
                    digest.update(part)
        return digest.hexdigest()

    @property
    def table_dtype(self) -> torch.dtype:
        """The float type that holds a table best at the size of the model's own."""
        return torch.float16 if self.dtype.itemsize == 2 else self.dtype

    def ternary(self, name: str) -> TernaryTensor:
        """One ternary weight; its scale and shift are float16.

        Raises:
            FormatError: the file holds what no conversion writes.
        """
        empty = self._ternary[name]
        tensors = {key: self._read(f"{name}.{key}") for key, buffer in empty._buffers.items() if buffer is not None}
        layout = self.layout
        bits = layout.scale_bits, layout.shift_bits
        linear = TernaryLinear.from_packed(self.linears[name], empty.group_size, tensors, layout.shift, *bits)
        linear.check(name)
        return linear.to_tensor()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One of `rest`: as stored, a table as float32 (its module's own multiplier is not in it).

        Args:
            dtype: what to round floats to; None leaves them.
        """
        stored = self._read(name)
        if name in self.tables:
            stored = dequantize_table(stored, self.shape(name)[1], self.layout.int8_group_size, self.tables[name])
        return stored.to(dtype) if dtype is not None and stored.is_floating_point() else stored

    def table_codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Of one of `tables`: codes int8 [V, H], and scales float16 [V, ceil(H / int8_group_size)]."""
        return split_table(self._read(name), self.shape(name)[1], self.tables[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of `rest`, as `tensor` gives it; nothing is read."""
        if module := self._tables.get(name):
            columns = module.embedding_dim if isinstance(module, TableEmbedding) else module.in_features
            return module.weight.shape[0], columns
        return tuple(self.model.state_dict()[name].shape)

    def stored(self, name: str) -> torch.dtype:
        """The float type in which the folder holds one of `rest`; a table, `table_dtype`."""
        return self.table_dtype if name in self.tables else SAFETENSORS_DTYPES.get(self._stored[name], torch.bfloat16)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


def _fields(config: Any) -> dict[str, Any]:
    """A quantization_config as plain values, whichever form transformers gave it."""
    return config if isinstance(config, dict) else config.to_dict()
