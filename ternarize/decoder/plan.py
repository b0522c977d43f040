"""What a base model is, described to the native library; refused where it is anything else.

A model is recognised by the classes that it is made of. What a description was made from is noted (`Facts`), so that it
is made again when that changes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ternarize import kernels
from ternarize.kernels.decoder import LARGEST_HEAD, LINEARS, NORMS, NativeDecoder, Shape
from ternarize.runtime import TernaryLinear

ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
SETTINGS = (  # of a config, that the blocks' forward reads
    "num_hidden_layers",
    "sliding_window",
    "layer_types",
    "attention_dropout",
    "use_bidirectional_attention",
    "_attn_implementation_internal",
)
_version = operator.attrgetter("_version")
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PATHS = dict(zip(LINEARS, (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), strict=True))


@dataclass(frozen=True)
class Family:
    """How transformers spells a family.

    Args:
        prefix: of its classes.
        model: the base model's class, behind the prefix.
        norms: {name in the library: path in a block}.
        offset: added to the weight of a norm.
        sliding: whether its config's sliding window means anything.
        ropes: whether each kind of block has a rope of its own.
    """

    prefix: str
    norms: dict[str, str]
    model: str = "Model"
    offset: float = 0.0
    sliding: bool = True
    ropes: bool = False


_TWO = {"attention": "input_layernorm", "feed": "post_attention_layernorm"}
_HEADS = {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}
_FOUR = {
    "attention": "input_layernorm",
    "attention_end": "post_attention_layernorm",
    "feed": "pre_feedforward_layernorm",
    "feed_end": "post_feedforward_layernorm",
}
FAMILIES = {
    "llama": Family("Llama", _TWO, sliding=False),
    "mistral": Family("Mistral", _TWO),
    "qwen2": Family("Qwen2", _TWO),
    "qwen3": Family("Qwen3", _TWO | _HEADS),
    "gemma3": Family("Gemma3", _FOUR | _HEADS, "TextModel", offset=1.0, ropes=True),
}


class Facts:
    """What a plan is made from, or refused for, so that one can tell whether it still holds.

    Args:
        model: a base model.
        path: that the linears are laid out for.
    """

    def __init__(self, model: Any, path: kernels.Native) -> None:
        self.path = path
        self.places: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.values: list[Any] = []
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        self.hooks: list[dict[int, Any]] = []
        self.parameters: list[nn.Parameter] = []
        self.pointers: list[int] = []  # theirs, which .to(dtype) changes
        for key in SETTINGS:
            self.add(model.config.__dict__, key)
        for module in (*model.layers.modules(), model.norm):
            self.add_module(module)

    def add(self, place: dict[str, Any], name: str) -> None:
        """That `place[name]` is what it is now, or is missing."""
        self.places.append(place)
        self.names.append(name)
        self.values.append(place.get(name))

    def add_module(self, module: nn.Module) -> None:
        """A module's children and tensors, and what intervenes in its forward."""
        self.add(module.__dict__, "forward")
        if isinstance(module, TernaryLinear):
            self.add(module.__dict__, "activations")
            self.add(module.__dict__, "_unpacked")
        for place in (module._modules, module._buffers, module._parameters):
            for name, value in place.items():
                if value is not None:
                    self.add(place, name)
                if isinstance(value, Tensor) and not value.is_inference():
                    self.tensors.append(value)
                    self.versions.append(value._version)
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        parameters = [p for p in module._parameters.values() if p is not None]
        self.parameters += parameters
        self.pointers += [p.data_ptr() for p in parameters]

    def hold(self, path: kernels.Native) -> bool:
        """Whether all of it is still so, but for hooks."""
        same = self.path == path and all(map(operator.is_, map(dict.get, self.places, self.names), self.values))
        same = same and list(map(_version, self.tensors)) == self.versions
        return same and [p.data_ptr() for p in self.parameters] == self.pointers

    def undisturbed(self) -> bool:
        """Whether there are no hooks but those that transformers leaves behind, which rest until asked."""
        return not any(self.hooks) or all(
            getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
            for hooks in self.hooks
            for hook in hooks.values()
        )


@dataclass(frozen=True)
class Plan:
    """A model as the library computes it.

    Args:
        decoder: the library's description.
        facts: what it was made from.
        kinds: (window, blocks) that are cached alike; a window of 0 is none.
        rope_kinds: arguments of the model's rotary embedding, one tuple a rope.
    """

    decoder: NativeDecoder
    facts: Facts
    kinds: list[tuple[int, list[int]]]
    rope_kinds: list[tuple[str, ...]]

    def without_gradients(self) -> bool:
        """Whether nobody wants a gradient of what is inside the blocks."""
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in self.facts.parameters))

    def ropes(self, rotary: nn.Module, positions: Tensor) -> Tensor | None:
        """Cosines and sines of positions [1, T], float32 [T, R, 2, D]; None where they are not as long as a head."""
        x = torch.empty(0, dtype=torch.float32, device="cpu")
        parts = [part for kind in self.rope_kinds for part in rotary(x, positions, *kind)]
        wanted = (1, positions.shape[1], self.decoder.shape.head_size)
        return torch.stack([part[0] for part in parts], 1) if all(part.shape == wanted for part in parts) else None


class _Other(Exception):
    """A model is not what the library computes."""


def _require(condition: object) -> None:
    if not condition:
        raise _Other


def family_of(module: nn.Module) -> Family | None:
    """The family whose base model this is."""
    return next((family for name, family in FAMILIES.items() if _is(module, name, family.model)), None)


def _is(module: nn.Module, family: str, name: str) -> bool:
    kind = type(module)
    known = f"transformers.models.{family}.modeling_{family}"
    return kind.__module__ == known and kind.__name__ == FAMILIES[family].prefix + name


def make_plan(model: nn.Module, path: kernels.Native, facts: Facts) -> Plan | None:
    """Describe a base model to the library; None where it is not what that computes."""
    try:
        return _make_plan(model, path, facts)
    except _Other:
        return None


def _make_plan(model: Any, path: kernels.Native, facts: Facts) -> Plan:
    name = type(model).__module__.rpartition("modeling_")[2]
    family, config = FAMILIES[name], model.config
    blocks = list(model.layers)[: config.num_hidden_layers]
    _require(blocks and config._attn_implementation in ("sdpa", "eager"))
    _require(not config.attention_dropout and not getattr(config, "use_bidirectional_attention", False))
    _require(all(_is_block(block, name, family) for block in blocks))
    _require(_is(model.norm, name, "RMSNorm") and not model.norm.__dict__.get("forward"))
    exact = blocks[0].self_attn.q_proj.activations == "float"
    decoder = NativeDecoder(path, _shape(blocks), exact)
    for i, block in enumerate(blocks):
        for linear, place in PATHS.items():
            decoder.set_linear(i, linear, _packed(block.get_submodule(place), exact))
        for norm, place in family.norms.items():
            _set_norm(decoder, i, norm, block.get_submodule(place), family)
    _set_norm(decoder, len(blocks), NORMS[0], model.norm, family)
    kinds, rope_kinds = _set_attentions(decoder, blocks, family, config)
    return Plan(decoder, facts, kinds, rope_kinds)


def _is_block(block: Any, name: str, family: Family) -> bool:
    """Whether a block is made of what its family's blocks are made of, with ternary linears, and of nothing else."""
    inside = dict(block.named_modules())
    made_of = {"", "self_attn", "mlp", "mlp.act_fn", *PATHS.values(), *family.norms.values()}
    if inside.keys() != made_of or any(module.__dict__.get("forward") for module in inside.values()):
        return False
    activation = type(inside["mlp.act_fn"])
    return (
        all(type(inside[place]) is TernaryLinear for place in PATHS.values())
        and all(_is(inside[place], name, "RMSNorm") for place in family.norms.values())
        and _is(block, name, "DecoderLayer")
        and _is(inside["self_attn"], name, "Attention")
        and _is(inside["mlp"], name, "MLP")
        and activation.__module__.startswith(("torch.nn.", "transformers."))
        and activation.__name__ in ACTIVATIONS
    )


def _shape(blocks: list[Any]) -> Shape:
    """What all blocks have in common."""
    attention, feed = blocks[0].self_attn, blocks[0].mlp
    size, hidden, inner = attention.head_dim, attention.q_proj.in_features, feed.up_proj.out_features
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    wanted = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    wanted += [(hidden, inner), (hidden, inner), (inner, hidden)]
    for block in blocks:
        linears = [block.get_submodule(place) for place in PATHS.values()]
        _require([(linear.in_features, linear.out_features) for linear in linears] == wanted)
        _require(block.self_attn.head_dim == size and type(block.mlp.act_fn) is type(feed.act_fn))
    _require(size <= LARGEST_HEAD and size % 2 == 0 and queries % keys == 0 and keys % size == 0)
    activation = ACTIVATIONS[type(feed.act_fn).__name__]
    return Shape(len(blocks), hidden, inner, queries // size, keys // size, size, activation)


def _packed(linear: TernaryLinear, exact: bool) -> kernels.PackedTernary:
    _require(linear.activations == ("float" if exact else "int8") and linear._unpacked is None)
    packed = linear.pack()
    if not isinstance(packed, kernels.PackedTernary):
        raise _Other
    return packed


def _set_norm(decoder: NativeDecoder, block: int, name: str, norm: Any, family: Family) -> None:
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    _require(norm.weight.device.type == "cpu")
    decoder.set_norm(block, name, (norm.weight.detach().float() + family.offset).contiguous(), epsilon)


def _set_attentions(
    decoder: NativeDecoder, blocks: list[Any], family: Family, config: Any
) -> tuple[list[tuple[int, list[int]]], list[tuple[str, ...]]]:
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(blocks)
    slides = [family.sliding and kind == "sliding_attention" for kind in types]
    windows = [(config.sliding_window or 0) if slide else 0 for slide in slides[: len(blocks)]]
    _require(1 not in windows)  # transformers' cache then holds all positions
    kinds = [(window, [i for i, w in enumerate(windows) if w == window]) for window in sorted(set(windows))]
    ropes: list[tuple[str, ...]] = [(kind,) for kind in sorted(set(types))] if family.ropes else [()]
    for number, (window, members) in enumerate(kinds):
        for place, i in enumerate(members):
            rope = ropes.index((types[i],)) if family.ropes else 0
            decoder.set_attention(i, blocks[i].self_attn.scaling, window, rope, number, place)
    return kinds, ropes
