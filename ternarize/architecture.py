"""Ask a model for its blocks, linears and experts; no architecture is known by name.

The blocks are the longest-weighing list of modules in the model. A linear is an `nn.Linear`, a `Conv1D` (GPT-2's, with
its weight transposed), or one projection of one expert. transformers 5 keeps the experts of a mixture fused in
3-D parameters; `unfuse_experts` takes them apart into linears, so that every other part of the package sees linears
only, and `fuse_experts` puts them back.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ternarize.errors import TernarizeError, UnsupportedModelError

LINEAR_TYPES = (nn.Linear, Conv1D)
_UP_NAMES = ("gate_up_proj", "up_proj")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers: (path, list), the list of modules that holds most of the model's parameters.

    Raises:
        UnsupportedModelError: the model has no such list, or its blocks hold no linear.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder layers (an nn.ModuleList), so it cannot be converted "
            "block by block. Only stacks of layers are supported."
        )
    _, name, blocks = best
    if not any(isinstance(m, LINEAR_TYPES) or is_fused_experts(m) for m in blocks.modules()):
        raise UnsupportedModelError(f"the layers of {type(model).__name__} ({name}) hold no linear to make ternary.")
    return name, blocks


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every float linear inside, experts unfused beforehand."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, LINEAR_TYPES):
            yield name, child


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear as [O, I], whichever way round the module holds it; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear."""
    out_features, in_features = linear_weight(module).shape
    return out_features, in_features


def kept_reason(name: str, module: nn.Module, skip: tuple[str, ...], experts: set[int]) -> str | None:
    """Why this linear stays float, or None where it becomes ternary.

    Args:
        experts: the numbers of experts of the mixtures in its block; a linear with as many outputs routes to them.
    """
    out_features, _ = linear_shape(module)
    for pattern in skip:
        if matches(name, pattern):
            return f"skip: {pattern}"
    if out_features == 1:
        return "one output (a gate)"
    if out_features in experts and not re.search(r"\.experts\.\d+\.", name):
        return "router of the experts"
    return None


def matches(name: str, pattern: str) -> bool:
    """Whether a module name matches `pattern`: shell wildcards, or `re:` and a regular expression (whole name).

    Raises:
        TernarizeError: the regular expression is not valid.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise TernarizeError(f"skip: {pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class BlockLinears:
    """The linears of one block: those that become ternary, and those that stay float with the reason."""

    ternary: dict[str, nn.Module]
    kept: dict[str, str]


def choose_linears(block: nn.Module, prefix: str, skip: tuple[str, ...]) -> BlockLinears:
    """Sort the linears of a block (experts unfused) into ternary and kept, by full name."""
    experts = {len(m.experts()) for m in block.modules() if isinstance(m, UnfusedExperts)}
    ternary: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    for name, module in linears(block, prefix):
        reason = kept_reason(name, module, skip, experts)
        if reason is None:
            ternary[name] = module
        else:
            kept[name] = reason
    return BlockLinears(ternary, kept)


def check_skip(skip: tuple[str, ...], names: list[str]) -> None:
    """Refuse a skip pattern that matches no linear: it is a typo more often than not.

    Raises:
        TernarizeError: naming the pattern, and a linear that exists.
    """
    for pattern in skip:
        if not any(matches(name, pattern) for name in names):
            raise TernarizeError(
                f"skip: {pattern!r} matches none of the {len(names)} linears, such as {names[0]!r}. "
                "Use the full name, shell wildcards (*.down_proj), or re: and a regular expression."
            )


# -- experts -------------------------------------------------------------------------------------------------------


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this module keeps the weights of many experts in 3-D parameters."""
    return any(parameter.ndim >= 3 for parameter in module.parameters(recurse=False)) and hasattr(module, "down_proj")


def check_parameters(block: nn.Module, name: str) -> None:
    """Refuse a block with large parameters that are neither linears nor experts: they would be skipped in silence.

    Raises:
        UnsupportedModelError: naming the parameter.
    """
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, LINEAR_TYPES) or is_fused_experts(module):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 3 and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                raise UnsupportedModelError(
                    f"{path}.{parameter_name} {list(parameter.shape)} in a {type(module).__name__} is neither a linear "
                    "nor a mixture of experts of a known layout, so its weights cannot be made ternary faithfully."
                )


class Expert(nn.Module):
    """The linears of one expert; `UnfusedExperts` runs them."""


class UnfusedExperts(nn.Module):
    """A mixture's experts as separate linears, with the fused module's own gating.

    Children are named by expert number, each with `gate_up_proj` (or `up_proj`) and `down_proj`. The fused module
    lives on, emptied of its weights, for its activation and limits.

    Args:
        fused: a module under transformers' experts contract (`use_experts_implementation`).

    Raises:
        UnsupportedModelError: the module does not keep to the contract.
    """

    fused: Any

    def __init__(self, fused: nn.Module, name: str) -> None:
        super().__init__()
        self.up_name = next((n for n in _UP_NAMES if n in fused._parameters), "")
        known = self.up_name and "down_proj" in fused._parameters and hasattr(fused, "_apply_gate")
        if not known or getattr(fused, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{name}: {type(fused).__name__} keeps its experts in a layout that this version does not know "
                "(transformers' experts contract, gate_up_proj and down_proj, without norms of their own)."
            )
        self.transposed = bool(getattr(fused, "is_transposed", False))
        for e in range(fused._parameters["down_proj"].shape[0]):  # type: ignore[union-attr]
            expert = Expert()
            for projection in (self.up_name, "down_proj"):
                expert.add_module(projection, self._linear(fused, projection, e))
            self.add_module(str(e), expert)
        for projection in (self.up_name, "down_proj"):
            fused._parameters.pop(projection)
            fused._parameters.pop(f"{projection}_bias", None)
            # Stands in the file under the fused name with a shape that stock software refuses: see `format`.
            self.register_buffer(projection, torch.empty(0, dtype=torch.uint8))
        self.__dict__["fused"] = fused  # not a child: it owns no weights any more

    def _linear(self, fused: nn.Module, projection: str, e: int) -> nn.Linear:
        weight = fused._parameters[projection]
        bias = fused._parameters.get(f"{projection}_bias")
        assert weight is not None
        matrix = weight.detach()[e].t() if self.transposed else weight.detach()[e]
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(matrix, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[e], requires_grad=False)
        return linear

    def experts(self) -> list[nn.Module]:
        """The experts in order."""
        return [child for name, child in self._modules.items() if name.isdigit() and child is not None]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [N, H], top_k_index and top_k_weights [N, K] -> [N, H], the weighted sum of the experts."""
        result = torch.zeros_like(hidden_states)
        experts = self.experts()
        for e in top_k_index.unique().tolist():
            if e >= len(experts):  # transformers marks a masked choice with the number of experts
                continue
            token, choice = torch.where(top_k_index == e)
            up = getattr(experts[e], self.up_name)(hidden_states[token])
            inner = self.fused._apply_gate(up) if getattr(self.fused, "has_gate", True) else self.fused.act_fn(up)
            out = experts[e].down_proj(inner) * top_k_weights[token, choice, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result

    def fuse(self) -> Any:
        """The fused module again, its parameters stacked from the experts' float linears."""
        for projection in (self.up_name, "down_proj"):
            modules = [getattr(expert, projection) for expert in self.experts()]
            weight = torch.stack([m.weight.t() if self.transposed else m.weight for m in modules])
            self.fused._parameters[projection] = nn.Parameter(weight.contiguous(), requires_grad=False)
            if modules[0].bias is not None:
                bias = torch.stack([m.bias for m in modules])
                self.fused._parameters[f"{projection}_bias"] = nn.Parameter(bias, requires_grad=False)
        return self.fused


def unfuse_experts(module: nn.Module, name: str, skip: tuple[str, ...] = ()) -> None:
    """Take every fused mixture inside `module` apart, in place, unless all of its linears are skipped."""
    for path, child in list(module.named_modules(prefix=name)):
        if not is_fused_experts(child):
            continue
        up_name = next((n for n in _UP_NAMES if n in child._parameters), "gate_up_proj")
        count = child._parameters["down_proj"].shape[0] if "down_proj" in child._parameters else 1  # type: ignore[union-attr]
        names = [f"{path}.{e}.{projection}" for e in range(count) for projection in (up_name, "down_proj")]
        if not all(any(matches(n, pattern) for pattern in skip) for n in names):
            replace_module(module, path, UnfusedExperts(child, path), name)


def skipped_experts(path: str, module: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, reason) of every linear of a mixture that stays fused, because all of its linears are skipped."""
    if is_fused_experts(module):
        for projection in (*_UP_NAMES, "down_proj"):
            weight = module._parameters.get(projection)
            for e in range(0 if weight is None else weight.shape[0]):
                name = f"{path}.{e}.{projection}"
                pattern = next(p for p in skip if matches(name, p))
                yield name, f"skip: {pattern}"


def fuse_experts(module: nn.Module) -> None:
    """Undo `unfuse_experts`, in place; every expert must be float."""
    for path, child in list(module.named_modules()):
        if isinstance(child, UnfusedExperts):
            replace_module(module, path, child.fuse())


def replace_module(root: nn.Module, path: str, new: nn.Module, prefix: str = "") -> None:
    """Put `new` at `path`, which starts with `prefix`, the name of `root` itself."""
    relative = path[len(prefix) + 1 :] if prefix else path
    parent, _, last = relative.rpartition(".")
    (root.get_submodule(parent) if parent else root)._modules[last] = new
