"""The modules of a ternary model: they hold packed bytes and compute with them.

`TernaryLinear` serves converting, loading and running alike; `TableEmbedding` and `TableHead` do the same for the
embedding and the output head.

Where a model is loaded (`swap.run_natively`), products on a CPU go to the native kernels; a conversion never does
that, so that its numbers are the reference's on every machine. A linear that runs natively has its weight a second
time, laid out for the processor: by the recipes 2.1 bits a weight beside the file's 1.75, which need not be in memory
then (see `mapped`). A head's table is read where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ternarize import kernels
from ternarize.errors import FormatError
from ternarize.packing import (
    check_packed,
    decode_levels,
    dequantize_table,
    level_row_bytes,
    outermost_levels,
    pack_trits,
    packed_columns,
    quantize_table,
    split_scales,
    table_row_bytes,
    unpack_trits,
)
from ternarize.tensor import Levels, TernaryTensor, group_count


class TernaryLinear(nn.Module):
    """y = x W' + bias with W = scale * trits + shift, kept packed.

    Args:
        in_features, out_features: I, O.
        group_size: S, at most I.
        shift: whether the grid has one.
        bias: whether the linear has one; a float parameter [O].
        device: of the (empty) buffers.
        scale_bits, shift_bits: 16, or 8 or 4 for coded levels.

    Buffers: `weight` uint8 [O, ceil(I / 5)], and `scale` and `shift` fp16 [O, G]; or, where they are coded, `levels`
    uint8 [O, R] and `limits` float32 [4] (see `packing`).
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    levels: Tensor | None
    limits: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        shift: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        scale_bits: int = 16,
        shift_bits: int = 16,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.scale_bits, self.shift_bits = scale_bits, shift_bits if shift else 0
        self.replaces: type[nn.Module] = nn.Linear  # what `dequantize_modules` puts back
        groups = group_count(in_features, group_size)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((out_features, packed_columns(in_features)), torch.uint8)
        }
        if scale_bits == 16:
            shapes["scale"] = ((out_features, groups), torch.float16)
            if shift:
                shapes["shift"] = ((out_features, groups), torch.float16)
        else:
            record = level_row_bytes(groups, self.scale_bits, self.shift_bits)
            shapes |= {"levels": ((out_features, record), torch.uint8), "limits": ((4,), torch.float32)}
        for name in ("weight", "scale", "shift", "levels", "limits"):
            empty = torch.empty(shapes[name][0], dtype=shapes[name][1], device=device) if name in shapes else None
            self.register_buffer(name, empty)
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None
        self.activations: str | None = None  # "int8" or "float" natively; None is the reference
        self._packed: kernels.PackedTernary | kernels.BuiltinTernary | None = None
        self._packed_from: list[tuple[Tensor, int]] = []
        self._packed_codes = False  # whether of scales, if they are of a kind that can stay so
        self._unpacked: Tensor | None = None  # the weight, while `unpacked` keeps it

    @classmethod
    def from_tensor(cls, tensor: TernaryTensor, bias: Tensor | None = None) -> TernaryLinear:
        """Pack a fitted weight; scale and shift are stored as its levels say, or in fp16."""
        tensors: dict[str, Tensor] = {"weight": pack_trits(tensor.trits)}
        levels = tensor.levels
        if levels is not None:
            tensors |= {"levels": levels.record, "limits": levels.limits}
            return cls.from_packed(
                tensor.shape,
                tensor.group_size,
                tensors,
                levels.shift_bits > 0,
                levels.scale_bits,
                levels.shift_bits,
                bias,
            )
        tensors["scale"] = tensor.scale.half()
        if tensor.shift is not None:
            tensors["shift"] = tensor.shift.half()
        return cls.from_packed(tensor.shape, tensor.group_size, tensors, tensor.shift is not None, bias=bias)

    @classmethod
    def from_packed(
        cls,
        shape: tuple[int, int],
        group_size: int | None,
        tensors: dict[str, Tensor],
        shift: bool,
        scale_bits: int = 16,
        shift_bits: int = 16,
        bias: Tensor | None = None,
    ) -> TernaryLinear:
        """From the tensors of a file, by buffer name (see `format`); shape is (O, I)."""
        out_features, in_features = shape
        size = min(group_size or in_features, in_features)
        linear = cls(in_features, out_features, size, shift, bias is not None, "meta", scale_bits, shift_bits)
        for name, buffer in linear._buffers.items():
            if buffer is not None:
                linear._buffers[name] = tensors[name]
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return linear

    def _apply(self, fn: Any, recurse: bool = True) -> TernaryLinear:
        """Move, but never round: scale, shift and limits stay as the file holds them under .to(dtype)."""
        before = {name: self._buffers[name] for name in ("scale", "shift", "limits")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    @property
    def coded(self) -> Levels | None:
        """The codes of scales and shifts; None where the file holds fp16."""
        if self.levels is None or self.limits is None:
            return None
        return Levels(self.levels, self.limits, self.scale_bits, self.shift_bits)

    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """Scale and shift, fp16 [O, G]; shift is None where the grid has none."""
        coded = self.coded
        if coded is None:
            assert self.scale is not None
            return self.scale, self.shift
        return decode_levels(coded, group_count(self.in_features, self.group_size))

    def to_tensor(self) -> TernaryTensor:
        """The weight as a TernaryTensor."""
        trits = unpack_trits(self.weight, self.in_features)
        return TernaryTensor(trits, *self.read_levels(), self.group_size, self.coded)

    def dequantize(self) -> Tensor:
        """The float32 weight, [O, I]."""
        return kernels.ternary_weight(self.weight, *self.read_levels(), self.in_features, self.group_size)

    def check(self, name: str) -> None:
        """Refuse contents that no conversion writes.

        Raises:
            FormatError: impossible bytes, or a scale or shift that is not finite, or a scale that is not positive.
        """
        check_packed(self.weight, self.in_features, f"{name}.weight")
        if self.limits is not None and not bool(torch.isfinite(self.limits).all()):
            raise FormatError(f"{name}.limits has NaN or infinite values: the file is corrupted.")
        scale, shift = self.read_levels() if self.coded is None else outermost_levels(self.coded)
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise FormatError(f"{name}.scale has values that are not positive and finite: the file is corrupted.")
        if shift is not None and not bool(torch.isfinite(shift).all()):
            raise FormatError(f"{name}.shift has NaN or infinite values: the file is corrupted.")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in x's dtype."""
        if self._unpacked is not None:
            return _float_product(x, self._unpacked, self.bias)
        if self.activations is not None and kernels.usable(x, self.bias):
            packed, exact = self.pack(), self.activations == "float"
            if packed is not None and packed.takes(x, exact):
                return packed.linear(x, exact)
        return kernels.ternary_linear(x, self.weight, *self.read_levels(), self.bias, self.group_size)

    def pack(self) -> kernels.PackedTernary | kernels.BuiltinTernary | None:
        """The weight laid out for this processor, made at the first use and again after its tensors changed.

        None where only the reference computes, and while torch.compile traces a linear that has not run yet.
        """
        if torch.compiler.is_compiling():
            return self._packed
        path = kernels.native()
        make = kernels.packer(path, self.out_features, self.in_features, self.group_size)
        if self.weight.device.type != "cpu" or make is None:
            return None
        current = [(t, _version(t)) for t in (*self._buffers.values(), self.bias) if t is not None]
        codes = path is not None and self.levels is not None and self.activations != "float"  # "float": exact scales
        kept = self._packed is not None and self._packed.path == path and self._packed_codes == codes
        if not kept or not _same(self._packed_from, current):
            coded = self.coded if codes else None
            scales = None if coded is None else split_scales(coded)
            levels = self.read_levels() if scales is None else scales
            self._packed = make(self.weight, levels, self.bias, self.in_features, self.group_size)
            self._packed_from, self._packed_codes = current, codes
        return self._packed

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


class TableEmbedding(nn.Module):
    """Token ids -> rows of a table of codes.

    Args:
        rows, columns: V, H.
        group_size: columns that share a scale.
        bits: of a code, 8 or 6.
        multiplier: what the module that it replaces put on each row (Gemma's sqrt(H)).
    """

    weight: Tensor
    anchor: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        group_size: int,
        bits: int = 8,
        multiplier: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, columns
        self.group_size, self.bits, self.multiplier = group_size, bits, multiplier
        shape = (rows, table_row_bytes(columns, group_size, bits))
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        # Has no value: it follows the model's .to(dtype), which bytes cannot.
        self.register_buffer("anchor", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @classmethod
    def from_weight(cls, weight: Tensor, group_size: int, bits: int = 8, multiplier: float = 1.0) -> TableEmbedding:
        """Quantize a float table [V, H]."""
        rows, columns = weight.shape
        embedding = cls(rows, columns, group_size, bits, multiplier, device="meta")
        embedding.weight = quantize_table(weight, group_size, bits)
        embedding.anchor = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return embedding

    def dequantize(self) -> Tensor:
        """The float32 table, [V, H], without the multiplier."""
        return dequantize_table(self.weight, self.embedding_dim, self.group_size, self.bits)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H], in the model's dtype."""
        rows = dequantize_table(self.weight[ids], self.embedding_dim, self.group_size, self.bits).to(self.anchor.dtype)
        return rows if self.multiplier == 1.0 else rows * torch.tensor(self.multiplier, dtype=rows.dtype)


class TableHead(nn.Module):
    """y = x W' + bias with a table of codes of its own, of 8 or 6 bits."""

    weight: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        group_size: int,
        bits: int = 8,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.group_size, self.bits = rows, columns, group_size, bits
        shape = (rows, table_row_bytes(columns, group_size, bits))
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.empty(rows, device=device), requires_grad=False) if bias else None
        self.activations: str | None = None  # as in TernaryLinear
        self._unpacked: Tensor | None = None  # likewise

    @classmethod
    def from_weight(cls, weight: Tensor, group_size: int, bits: int = 8, bias: Tensor | None = None) -> TableHead:
        """Quantize a float head [V, H]."""
        rows, columns = weight.shape
        head = cls(rows, columns, group_size, bits, bias is not None, device="meta")
        head.weight = quantize_table(weight, group_size, bits)
        if bias is not None:
            head.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return head

    def dequantize(self) -> Tensor:
        """The float32 table, [V, H]."""
        return dequantize_table(self.weight, self.in_features, self.group_size, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., V], in x's dtype."""
        if self._unpacked is not None:
            return _float_product(x, self._unpacked, self.bias)
        return _table_product(x, self.weight, self.bias, self.group_size, self.bits, self.activations)


class TiedTableHead(nn.Module):
    """The output head of a model that uses its embedding's table; owns nothing but a bias."""

    embedding: TableEmbedding

    def __init__(self, embedding: TableEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a child: the table is stored once, by the embedding
        self.bias = bias
        self.out_features, self.in_features = embedding.num_embeddings, embedding.embedding_dim
        self.activations: str | None = None  # as in TernaryLinear
        self._unpacked: Tensor | None = None  # likewise

    def dequantize(self) -> Tensor:
        """The float32 table, [V, H]."""
        return self.embedding.dequantize()

    @property
    def weight(self) -> Tensor:
        """The embedding's table; some models look at it while transformers initializes them."""
        return self.embedding.weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Nothing: `model.tie_weights()` puts the table here that the head reads from the embedding anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., V], in x's dtype."""
        if self._unpacked is not None:
            return _float_product(x, self._unpacked, self.bias)
        table = self.embedding.weight.to(x.device)
        return _table_product(x, table, self.bias, self.embedding.group_size, self.embedding.bits, self.activations)


def _float_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = nn.functional.linear(x, weight)
    return out if bias is None else out + bias.to(out.dtype)


def _table_product(
    x: Tensor, table: Tensor, bias: Tensor | None, group_size: int, bits: int, activations: str | None
) -> Tensor:
    if activations is not None and kernels.usable(x, bias) and kernels.native() is not None:
        return kernels.native_table_linear(x, table, bias, group_size, bits, exact=activations == "float")
    return kernels.table_linear(x, table, bias, group_size, bits)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(before: list[tuple[Tensor, int]], now: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(now) and all(a is b and m == n for (a, m), (b, n) in zip(before, now, strict=True))


@contextmanager
def unpacked(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the ternary linears and heads of a model, or of a part of one, keep their weights unpacked for now, in
    `dtype`: they are to run many times.
    """
    packed = [module for module in model.modules() if isinstance(module, (TernaryLinear, TableHead, TiedTableHead))]
    for module in packed:
        module._unpacked = module.dequantize().to(dtype)
    try:
        yield
    finally:
        for module in packed:
            module._unpacked = None
