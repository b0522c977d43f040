"""One native call for all blocks of a model, where it generates a token at a time.

`attach` puts a `NativeForward` before the forward of the base models that it knows (Llama, Mistral, Qwen2, Qwen3,
Gemma 3). It takes over where a step is what the library computes: one token behind a dynamic cache, on a CPU, without
gradients, padding or hooks, every linear of every block ternary. Anything else runs as if it were not there. Both ways
can follow each other on one cache: its layers hold the same tensors, only with room behind them.

Between the linears a step computes in float32, whatever the model's dtype; keys and values are rounded to the cache's.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ternarize import kernels
from ternarize.kernels.decoder import LARGEST_HEAD, LINEARS, NORMS, NativeCache, NativeDecoder, Shape
from ternarize.runtime import TernaryLinear

ROOM = 256  # positions by which a cache grows, at least
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


def attach(model: nn.Module) -> None:
    """Let the base models inside that are known take native steps; again after a change that `Facts` cannot see."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if family_of(module) is not None and (forward is None or isinstance(forward, NativeForward)):
            module.forward = NativeForward(module)  # type: ignore[method-assign, assignment]
        if hasattr(type(module), "generate") and any(family_of(child) is not None for child in module.children()):
            _calm(type(module))


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NativeForward):
            del module.forward


_off: list[bool] = [False]


@contextmanager
def linear_by_linear() -> Iterator[None]:
    """No native steps for the time being, in this process."""
    before = _off[0]
    _off[0] = True
    try:
        yield
    finally:
        _off[0] = before


def _calm(kind: Any) -> None:
    """Let models of a class choose the next token of one text in one thread, if they take native steps.

    Choosing takes a few operations on one number for each word. Shared among torch's threads they gain microseconds on
    an idle machine, and lose milliseconds each on one where a thread has to wait for its turn. On the class, because a
    function on the model would keep the model alive.
    """
    original = kind.generate
    if getattr(original, "calm", False):
        return

    def choose(_: nn.Module, __: Any, out: Any) -> None:
        logits = getattr(out, "logits", None)
        if isinstance(logits, Tensor) and logits.shape[0] == 1:
            torch.set_num_threads(1)

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        attached = any(isinstance(child.__dict__.get("forward"), NativeForward) for child in self.children())
        if threads == 1 or _off[0] or not attached:
            return original(self, *args, **kwargs)
        begin = self.register_forward_pre_hook(lambda *_: torch.set_num_threads(threads))
        end = self.register_forward_hook(choose)
        try:
            return original(self, *args, **kwargs)
        finally:
            begin.remove()
            end.remove()
            torch.set_num_threads(threads)

    generate.calm = True  # type: ignore[attr-defined]
    kind.generate = generate


class NativeForward:
    """The forward of a base model, with native steps where they serve.

    Args:
        model: the base model, which owns this and is not kept alive by it; copies and pickles have their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._facts: Facts | None = None
        self._plan: Plan | None = None
        self._sequences: weakref.WeakKeyDictionary[DynamicCache, Sequence] = weakref.WeakKeyDictionary()

    @property
    def model(self) -> Any:
        """The base model."""
        return self._model()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not traced and not args and asks_for_a_step(**kwargs):
            out = self.step(**kwargs)
            if out is not None:
                return out
        model = self.model
        return type(model).forward(model, *args, **kwargs)

    def step(
        self,
        past_key_values: DynamicCache,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | None:
        """The model's output for one token; None where it has to be computed otherwise."""
        model = self.model
        config = model.config
        if model.training or _off[0] or not (config.use_cache if use_cache is None else use_cache):
            return None
        if config.output_attentions or config.output_hidden_states or not config.return_dict:
            return None
        past = past_key_values.get_seq_length()
        if attention_mask is not None and (attention_mask.shape != (1, past + 1) or not bool(attention_mask.all())):
            return None
        sequence = self.sequence(past_key_values, past)
        if sequence is None or not sequence.plan.without_gradients():
            return None
        hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        position = torch.tensor([[past]], device="cpu") if position_ids is None else position_ids
        ropes = sequence.plan.ropes(model.rotary_emb, position)
        if ropes is None or not kernels.usable(hidden) or hidden.dtype != sequence.dtype:
            return None
        out = sequence.step(hidden.float().flatten(), ropes)
        return BaseModelOutputWithPast(out.to(hidden.dtype).view(1, 1, -1), past_key_values)

    def sequence(self, cache: DynamicCache, past: int) -> Sequence | None:
        """What goes on in a cache with `past` tokens; None where the library cannot serve the model or the cache.

        Whether the model is what it was is looked at where a sequence begins; in its midst only hooks are.
        """
        path = kernels.native()
        if path is None or _has_any_global_hook() or cache.offloading:
            return None
        sequence = self._sequences.get(cache)
        current = self._plan is not None and self._plan.decoder.path == path
        if current and sequence is not None and sequence.plan is self._plan and sequence.goes_on(cache, past):
            return sequence
        if self._facts is None or not self._facts.hold(path):
            self._facts = Facts(self.model, path)
            self._plan = make_plan(self.model, path, self._facts)
        if self._plan is None or not self._facts.undisturbed():
            return None
        sequence = start_sequence(self._plan, cache, past)
        if sequence is not None:
            self._sequences[cache] = sequence
        return sequence


def asks_for_a_step(
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    attention_mask: Any = None,
    use_cache: bool | None = None,
    **others: Any,
) -> bool:
    """Whether the arguments of a forward are of the kind that a step serves: one token, and a dynamic cache."""
    token = input_ids if inputs_embeds is None else inputs_embeds
    return (
        type(past_key_values) is DynamicCache
        and (input_ids is None) != (inputs_embeds is None)
        and token is not None
        and tuple(token.shape[:2]) == (1, 1)
        and token.device.type == "cpu"
        and (position_ids is None or position_ids.shape == (1, 1))
        and (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2))
        and all(value is None or value is False for value in others.values())
    )


# -- what a model is ---------------------------------------------------------------------------------------------------


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

    def ropes(self, rotary: nn.Module, position: Tensor) -> Tensor | None:
        """Cosines and sines of a position, float32 [R, 2, D]; None where they are not as long as a head."""
        x = torch.empty(0, dtype=torch.float32, device="cpu")
        parts = [part for kind in self.rope_kinds for part in rotary(x, position, *kind)]
        size = self.decoder.shape.head_size
        return torch.stack([part.view(-1) for part in parts]) if all(p.numel() == size for p in parts) else None


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


# -- keys and values ---------------------------------------------------------------------------------------------------


class Shelf:
    """Keys and values of blocks that are cached alike, in one tensor with room behind them; layers hold views of it.

    What a view shows is never written again: a layer whose tensors are not the last views was cropped, reordered or
    filled by someone else, and gets another shelf.

    Args:
        layers: of the cache.
        window: of layers that keep only the last positions; 0 where they keep all.
        memory: [2 L, 1, key heads, P, D], L the layers.
        end: positions that are there.
    """

    def __init__(self, layers: list[Any], window: int, memory: Tensor, end: int) -> None:
        self.layers, self.window, self.memory, self.first, self.end = layers, window, memory, 0, end
        self.show()

    def show(self) -> None:
        """Let the layers hold what is there."""
        self.views = self.memory[:, :, :, self.first : self.end].unbind()
        for layer, keys, values in zip(self.layers, self.views[::2], self.views[1::2], strict=True):
            layer.keys, layer.values = keys, values

    def goes_on(self, past: int) -> bool:
        """Whether the layers still hold what they were shown, of `past` tokens, and there is room for one more."""
        held = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        same = all(map(operator.is_, held, self.views))
        return same and self.end < self.memory.shape[-2] and _filled(self.layers, self.window, past)

    def native(self) -> NativeCache:
        """As the library takes it."""
        return NativeCache.of(self.memory, self.first, self.end)

    def advance(self) -> None:
        """Show the position that a step added."""
        self.end += 1
        if self.window:
            self.first = max(self.first, self.end - self.window + 1)
            for layer in self.layers:
                layer.cumulative_length += 1
        self.show()


@dataclass(frozen=True)
class Sequence:
    """The tokens of a cache, and the plan that its next one follows."""

    plan: Plan
    shelves: list[Shelf]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.shelves[0].memory.dtype

    def goes_on(self, cache: DynamicCache, past: int) -> bool:
        """Whether the cache is as the last step left it, with room for another, and no hook has come."""
        layers = [cache.layers[i] for _, blocks in self.plan.kinds for i in blocks]
        known = [layer for shelf in self.shelves for layer in shelf.layers]
        same = all(map(operator.is_, layers, known)) and len(cache.layers) == len(known)
        return same and all(shelf.goes_on(past) for shelf in self.shelves) and self.plan.facts.undisturbed()

    def step(self, x: Tensor, ropes: Tensor) -> Tensor:
        """One token: float32 x [H] and ropes [R, 2, D] -> float32 [H]."""
        out = self.plan.decoder.step(x, ropes, [shelf.native() for shelf in self.shelves])
        for shelf in self.shelves:
            shelf.advance()
        return out


def start_sequence(plan: Plan, cache: DynamicCache, past: int) -> Sequence | None:
    """From what a cache with `past` tokens holds; None where that is not what the model's blocks leave there."""
    if len(cache.layers) != plan.decoder.shape.blocks:
        return None
    made = [make_shelf([cache.layers[i] for i in blocks], window, plan, past) for window, blocks in plan.kinds]
    shelves = [shelf for shelf in made if shelf is not None]
    if len(shelves) < len(made) or len({shelf.memory.dtype for shelf in shelves}) > 1:
        return None
    return Sequence(plan, shelves)


def make_shelf(layers: list[Any], window: int, plan: Plan, past: int) -> Shelf | None:
    """Copy what layers of a cache hold to a shelf; None where they are not as blocks of this window fill them.

    Args:
        window: of the blocks; 0 is none.
        past: tokens that were cached.
    """
    kind = type(layers[0])
    limit = window if kind is DynamicSlidingWindowLayer else 0
    if kind not in (DynamicLayer, DynamicSlidingWindowLayer) or any(type(layer) is not kind for layer in layers):
        return None
    if (limit == 0 and kind is DynamicSlidingWindowLayer) or not _filled(layers, limit, past):
        return None
    shape, length = plan.decoder.shape, min(past, limit - 1) if limit else past
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    wanted = (1, shape.key_heads, length, shape.head_size)
    if any(tensor.shape != wanted or not kernels.usable(tensor) or tensor.dtype != held[0].dtype for tensor in held):
        return None
    capacity = length + max(ROOM, length // 2)
    memory = held[0].new_empty(len(held), 1, shape.key_heads, capacity, shape.head_size)
    for row, tensor in zip(memory, held, strict=True):
        row[:, :, :length] = tensor
    return Shelf(layers, limit, memory, length)


def _filled(layers: list[Any], window: int, past: int) -> bool:
    """Whether layers have seen `past` tokens; what they hold is looked at elsewhere."""
    if not window:
        return all(layer.is_initialized for layer in layers)
    return all(
        layer.is_initialized
        and layer.sliding_window == window
        and layer.cumulative_length == past
        and not layer.record_past
        for layer in layers
    )
