"""The forward of a base model, with native steps where they serve."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ternarize import kernels
from ternarize.decoder.cache import CACHE, Sequence, start_sequence
from ternarize.decoder.plan import Facts, Plan, make_plan
from ternarize.decoder.prompt import read_prompt

_off: list[bool] = [False]


def is_off() -> bool:
    """Whether no native steps are wanted for the time being."""
    return _off[0]


@contextmanager
def linear_by_linear() -> Iterator[None]:
    """No native steps for the time being, in this process."""
    before = _off[0]
    _off[0] = True
    try:
        yield
    finally:
        _off[0] = before


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
        if not traced and not args:
            others = dict(kwargs)
            cache = others.pop(CACHE, None)
            out = self.run(cache, **others) if asks_for_one_text(cache, **others) else None
            if out is not None:
                return out
        model = self.model
        return type(model).forward(model, *args, **kwargs)

    def run(
        self,
        cache: DynamicCache,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | None:
        """The model's output for the next tokens; None where it has to be computed otherwise."""
        model = self.model
        config = model.config
        if model.training or is_off() or not (config.use_cache if use_cache is None else use_cache):
            return None
        if config.output_attentions or config.output_hidden_states or not config.return_dict:
            return None
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        past, count = cache.get_seq_length(), given.shape[1]
        whole = (1, past + count)
        if attention_mask is not None and (attention_mask.shape != whole or not bool(attention_mask.all())):
            return None
        positions = torch.arange(past, past + count, device="cpu")[None] if position_ids is None else position_ids
        sequence = self.sequence(cache, past) if count == 1 else None
        plan = self.plan(cache) if count > 1 else sequence.plan if sequence else None
        if plan is None or not plan.without_gradients():
            return None
        hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        ropes = plan.ropes(model.rotary_emb, positions)
        if ropes is None or not (sequence.takes(hidden) if sequence else kernels.usable(hidden)):
            return None
        if sequence:
            out = sequence.step(hidden, ropes)
            sequence.show()
        else:
            out = model.norm(read_prompt(plan, model.layers, cache, hidden[0], ropes).to(hidden.dtype))[None]
        return BaseModelOutputWithPast(out, cache)

    def sequence(self, cache: DynamicCache, past: int) -> Sequence | None:
        """What goes on in a cache with `past` tokens; None where the library cannot serve the model or the cache.

        Whether the model is what it was is looked at where a sequence begins; in its midst only hooks are.
        """
        path = _path_for(cache)
        sequence = self._sequences.get(cache)
        current = self._plan is not None and self._plan.decoder.path == path
        if current and sequence is not None and sequence.plan is self._plan and sequence.goes_on(cache, past):
            return sequence
        plan = self.plan(cache)
        sequence = None if plan is None else start_sequence(plan, cache, past)
        if sequence is not None:
            self._sequences[cache] = sequence
        return sequence

    def plan(self, cache: DynamicCache) -> Plan | None:
        """Of the model as it is; None where the library cannot serve it or the cache."""
        path = _path_for(cache)
        if path is None:
            return None
        if self._facts is None or not self._facts.hold(path):
            self._facts = Facts(self.model, path)
            self._plan = make_plan(self.model, path, self._facts)
        return self._plan if self._facts.undisturbed() else None


def _path_for(cache: DynamicCache) -> kernels.Native | None:
    """The path in use; None where there is none, or something is to see what passes or keeps the cache elsewhere."""
    return None if _has_any_global_hook() or cache.offloading else kernels.native()


def asks_for_one_text(
    cache: Any,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Any = None,
    use_cache: bool | None = None,
    **others: Any,
) -> bool:
    """Whether the arguments of a forward are of the kind that is served: tokens of one text, and a dynamic cache."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    return (
        type(cache) is DynamicCache
        and (input_ids is None) != (inputs_embeds is None)
        and given is not None
        and given.ndim == (2 if inputs_embeds is None else 3)
        and given.shape[0] == 1
        and given.shape[1] > 0
        and given.device.type == "cpu"
        and (position_ids is None or position_ids.shape == given.shape[:2])
        and (attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2))
        and all(value is None or value is False for value in others.values())
    )
