"""A whole model: its float modules swapped for packed ones and back, and told to run natively."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ternarize import decoder, kernels
from ternarize.architecture import (
    LINEAR_TYPES,
    fuse_experts,
    linear_shape,
    linears,
    replace_module,
    unfuse_experts,
)
from ternarize.errors import FormatError
from ternarize.format import Layout, Table
from ternarize.mapped import MappedFiles
from ternarize.runtime import TableEmbedding, TableHead, TernaryLinear, TiedTableHead


def run_natively(model: nn.Module, activations: str | None = None) -> None:
    """Let a model's packed modules use the native kernels where they can: on a CPU, without gradients.

    A model that `decoder` knows takes a whole step in one call where it generates token by token.

    Args:
        model: changed in place.
        activations: "int8", "float", or None for what the environment says (see `kernels.cpu`).

    Raises:
        TernarizeError: no such kind of activations, or TERNARIZE_CPU names a path that cannot be used.
    """
    kind = kernels.default_activations() if activations is None else kernels.check_activations(activations)
    kernels.native()
    for module in model.modules():
        if isinstance(module, (TernaryLinear, TableHead, TiedTableHead)):
            module.activations = kind
    decoder.attach(model)


def lay_out(model: nn.Module) -> None:
    """Check what was just loaded, and lay it out for this processor: linears in its path's form, tables in large pages.

    One module after another, and the pages of its file are given back: saving, and what is not computed natively, reads
    linears from there again.

    Raises:
        FormatError: a packed tensor holds what no conversion writes; its name is in the message.
    """
    files = MappedFiles()
    modules = [(name, module) for name, module in model.named_modules() if _is_packed(module)]
    for name, module in modules:  # tables first, because each is in memory twice for a moment
        if isinstance(module, (TableEmbedding, TableHead)):
            _check_table(name, module)
            table = module.weight
            if kernels.native() and table.device.type == "cpu":
                module.weight = kernels.allocate(table.numel()).view(table.shape).copy_(table)
                files.give_back(table)
    for name, module in modules:
        if isinstance(module, TernaryLinear):
            module.check(name)
            if module.pack() is not None:
                files.give_back(module.weight)
                kernels.trim()


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, (TernaryLinear, TableEmbedding, TableHead)) and not module.weight.is_meta


def _check_table(name: str, module: TableEmbedding | TableHead) -> None:
    """Refuse a table whose scales are impossible.

    Raises:
        FormatError: naming it.
    """
    columns = module.embedding_dim if isinstance(module, TableEmbedding) else module.in_features
    scale = module.weight[:, columns * module.bits // 8 :].clone().view(torch.float16)
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise FormatError(f"{name}.weight has scales that are not positive and finite: the file is corrupted.")


def replace_float_modules(model: nn.Module, layout: Layout) -> None:
    """Swap the linears, embedding and head of a float skeleton for empty packed modules, as `layout` says.

    Raises:
        FormatError: the layout names modules that the model does not have.
    """
    try:
        # A base model (AutoModel) is the same tree without its outermost attribute: "model.layers" is "layers" there.
        prefix = getattr(model, "base_model_prefix", "") + "."
        strip = layout.blocks.startswith(prefix) and not hasattr(model, prefix[:-1])
        path = layout.blocks.removeprefix(prefix) if strip else layout.blocks
        blocks = model.get_submodule(path)
        kept = {name.removeprefix(prefix) if strip else name for name in layout.kept}
        tables = {name.removeprefix(prefix) if strip else name: table for name, table in layout.tables.items()}
        unfuse_experts(blocks, path, tuple(kept))
        for name, linear in list(linears(blocks, path)):
            if name not in kept:
                full = f"{prefix}{name}" if strip else name
                replace_module(model, name, _empty_ternary(linear, layout, layout.group_size_of(full)))
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for name, table in tables.items():
            if strip and not has_module(model, name):
                continue  # the head, which a base model does not have
            replace_module(model, name, _empty_table(model.get_submodule(name), layout.int8_group_size, table))
    except AttributeError as error:
        raise FormatError(
            f"config.json names modules that {type(model).__name__} does not have: {error}. "
            "The folder was written for another architecture, or for another version of transformers."
        ) from error
    tie_table_heads(model, tied)


def tie_table_heads(model: nn.Module, tied: dict[str, str]) -> None:
    """Give every head that shares a packed embedding's table a `TiedTableHead`, and forget the float tie."""
    for target, source in tied.items():
        embedding = model.get_submodule(source.rpartition(".")[0])
        if isinstance(embedding, TableEmbedding):
            name = target.rpartition(".")[0]
            bias = getattr(model.get_submodule(name), "bias", None)
            replace_module(model, name, TiedTableHead(embedding, bias))
            model.all_tied_weights_keys.pop(target, None)  # type: ignore[operator, union-attr]


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Swap every packed module for an ordinary float one, in place: the student as stock software would hold it."""
    decoder.detach(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (TernaryLinear, TableHead)):
            conv1d = getattr(module, "replaces", nn.Linear) is Conv1D
            replace_module(model, name, _float_linear(module.dequantize(), module.bias, dtype, conv1d))
        elif isinstance(module, TableEmbedding):
            table = module.dequantize().to(dtype)
            rows, columns = table.shape
            embedding = ScaledEmbedding(rows, columns, module.multiplier, device="meta")
            embedding.weight = nn.Parameter(table, requires_grad=False)
            replace_module(model, name, embedding)
            for head_name, head in list(model.named_modules()):
                if isinstance(head, TiedTableHead) and head.embedding is module:
                    linear = _float_linear(table, head.bias, dtype)
                    linear.weight = embedding.weight
                    replace_module(model, head_name, linear)
    fuse_experts(model)


class ScaledEmbedding(nn.Embedding):
    """An embedding with a constant multiplier; an ordinary one where that is 1."""

    def __init__(self, rows: int, columns: int, multiplier: float, device: torch.device | str | None = None) -> None:
        super().__init__(rows, columns, device=device)
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        rows = super().forward(ids)
        return rows if self.multiplier == 1.0 else rows * torch.tensor(self.multiplier, dtype=rows.dtype)


def _empty_ternary(linear: nn.Module, layout: Layout, wanted: int | None) -> TernaryLinear:
    out_features, in_features = linear_shape(linear)
    group_size = min(wanted or in_features, in_features)
    device = linear.weight.device  # type: ignore[union-attr]
    bias = getattr(linear, "bias", None) is not None
    bits = layout.scale_bits, layout.shift_bits
    ternary = TernaryLinear(in_features, out_features, group_size, layout.shift, bias, device, *bits)  # type: ignore[arg-type]
    ternary.replaces = type(linear)
    return ternary


def _empty_table(module: nn.Module, group_size: int, table: Table) -> nn.Module:
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        raise FormatError(
            f"config.json's int{table.bits} names a {type(module).__name__}, which is no embedding and no head."
        )
    weight = module.weight
    rows, columns = weight.shape
    if isinstance(module, LINEAR_TYPES):
        return TableHead(rows, columns, group_size, table.bits, module.bias is not None, weight.device)
    return TableEmbedding(rows, columns, group_size, *table, weight.device, weight.dtype)


def _float_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv1d: bool = False) -> nn.Module:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features, bias is not None)
    linear.weight = nn.Parameter((weight.t() if conv1d else weight).to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a model has a module of this name."""
    return any(path == name for path, _ in model.named_modules())
