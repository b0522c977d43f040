"""One text behind `generate`: in how many threads a token is chosen, and a loop of its own from the second token on.

Around each token transformers prepares arguments, wraps outputs and checks both, for milliseconds: as long as all
blocks of a small model take. `take_over` puts a loop in the place of `_sample` that asks the model for nothing but
logits; what processes them, ends a text and streams it is called as ever. The first token, prompt and checks included,
is transformers' own, and so is everything where `_served` says no.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ternarize.decoder.cache import CACHE, Sequence
from ternarize.decoder.forward import NativeForward, is_off
from ternarize.decoder.plan import FAMILIES

ROPES = 64  # positions whose rotations are computed at once
OPEN = ("attention_mask", "position_ids", "logits_to_keep", "use_cache", CACHE)  # arguments of a model that may be set


class _Generations:
    """How many generations are under way in this process, and with how many threads the first of them began.

    A thread that uses torch for the first time gets the number that is set at that moment, by whatever thread. Beside a
    generation that chooses its next token it would get one, and keep it.
    """

    def __init__(self) -> None:
        self._lock, self._running, self._threads = threading.Lock(), 0, 1

    def begin(self) -> int:
        """The threads that this one is to have."""
        with self._lock:
            if self._running == 0:
                self._threads = torch.get_num_threads()
            self._running += 1
            return self._threads

    def end(self) -> None:
        """Of one of them."""
        with self._lock:
            self._running -= 1


_generations = _Generations()


class _Threads:
    """A hook before a model's forward: it computes in so many threads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, *_: Any) -> None:
        torch.set_num_threads(self.count)


def _choose_alone(_: nn.Module, __: Any, out: Any) -> None:
    """A hook behind it: the next token of one text is chosen in one."""
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor) and logits.shape[0] == 1:
        torch.set_num_threads(1)


def take_over(kind: Any) -> None:
    """Let models of a class write one text as this module says, if they take native steps.

    Choosing takes a few operations on one number for each word. Shared among torch's threads they gain microseconds on
    an idle machine, and lose milliseconds each on one where a thread has to wait for its turn. On the class, because a
    function on the model would keep the model alive.
    """
    if getattr(kind.generate, "taken_over", False):
        return
    generate, sample = kind.generate, getattr(kind, "_sample", None)
    threads = threading.local()  # `count`: those of the generation that a thread is in; 0 behind it

    @functools.wraps(generate)
    def calm_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_off() or not any(_native(child) for child in self.children()):
            return generate(self, *args, **kwargs)
        outer, count = getattr(threads, "count", 0), _generations.begin()
        hooks = []
        try:
            threads.count = count
            torch.set_num_threads(count)
            if count > 1:
                before = self.register_forward_pre_hook(_Threads(count))
                hooks = [before, self.register_forward_hook(_choose_alone)]
            return generate(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            torch.set_num_threads(count)
            threads.count = outer
            _generations.end()

    def sample_one(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = getattr(threads, "count", 0)
        if args or not count or not _served(self, input_ids, **kwargs):
            return sample(self, input_ids, *args, **kwargs)  # type: ignore[misc]
        first, streamer = _FirstToken(kwargs["stopping_criteria"]), kwargs.get("streamer")
        begun = kwargs | {"stopping_criteria": first, "streamer": streamer and _Unended(streamer)}
        ids: Tensor = sample(self, input_ids, **begun)  # type: ignore[misc]
        if not first.stopped:
            ids = _go_on(self, ids, count, **kwargs)
        if streamer is not None:
            streamer.end()
        return ids

    calm_generate.taken_over = True  # type: ignore[attr-defined]
    kind.generate = calm_generate
    if sample is not None:
        kind._sample = functools.wraps(sample)(sample_one)


def _native(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), NativeForward)


def _served(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    **asked: Any,
) -> bool:
    """Whether `_sample` is asked for the tokens of one text and nothing else, by a model of blocks and a head."""
    family = FAMILIES.get(type(model).__module__.rpartition("modeling_")[2])
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    mask, positions = asked.get("attention_mask"), asked.get("position_ids")
    count = input_ids.shape[-1]
    return (
        family is not None
        and not is_off()
        and not model.training
        and type(model).__name__ == f"{family.prefix}ForCausalLM"
        and _native(model.model)
        and not (model.model._forward_hooks or model.model._forward_pre_hooks)
        and "forward" not in model.__dict__
        and all(isinstance(hook, _Threads) or hook is _choose_alone for hook in hooks)
        and not getattr(model.config, "final_logit_softcapping", None)
        and isinstance(stopping_criteria, StoppingCriteriaList)
        and logits_processor is not None
        and not (synced_gpus or generation_config.return_dict_in_generate)
        and input_ids.shape[0] == 1
        and input_ids.device.type == "cpu"
        and type(asked.get(CACHE)) is DynamicCache
        and asked.get("use_cache", True)
        and (mask is None or (mask.shape == (1, count) and bool(mask.all())))
        and (positions is None or positions[0].tolist() == list(range(count))[-positions.shape[-1] :])
        and all(value is None or value is False for name, value in asked.items() if name not in OPEN)
    )


class _FirstToken(StoppingCriteriaList):  # type: ignore[misc]
    """Ends a text after one token, and notes whether it would have ended there.

    Args:
        criteria: the text's own.
    """

    stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped: Tensor = super().__call__(input_ids, scores, **kwargs)
        self.stopped = bool(stopped.all())
        return torch.ones_like(stopped)


class _Unended(BaseStreamer):  # type: ignore[misc]
    """A streamer that is told of tokens, and not yet of the end."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        self._streamer.put(value)

    def end(self) -> None:
        pass


def _go_on(
    model: Any,
    ids: Tensor,
    threads: int,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **asked: Any,
) -> Tensor:
    """All tokens [1, T] of a text of which the last is not in the cache yet."""
    writer = _Writer(model, asked[CACHE])
    try:
        while True:
            torch.set_num_threads(threads)
            logits = writer.logits(ids[:, -1:])
            torch.set_num_threads(1)
            scores = logits_processor(ids, logits.to(torch.float32, copy=True))
            if generation_config.do_sample:
                chosen = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                chosen = torch.argmax(scores, dim=-1)
            ids = torch.cat([ids, chosen[:, None]], dim=-1)
            stopped = bool(stopping_criteria(ids, None).all())
            if streamer is not None:
                streamer.put(chosen)
            if stopped:
                return ids
    finally:
        writer.close()


class _Writer:
    """The logits behind one token after the other of a text, by native steps while they serve.

    While it writes, the layers of the cache do not show what the steps add; `close` lets them.

    Args:
        model: with a head.
        cache: the tokens so far, without the next one.
    """

    def __init__(self, model: Any, cache: DynamicCache) -> None:
        self.model, self.cache, self.past = model, cache, cache.get_seq_length()
        self._sequence: Sequence | None = None
        self._ropes, self._first = torch.empty(0, device="cpu"), 0
        rotary = model.model.rotary_emb
        kinds = getattr(rotary, "rope_type", "")
        names = [str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])]
        self._growing = any("dynamic" in name or name == "longrope" for name in names)  # frequencies follow the length
        hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in (model, model.model, rotary)]
        self._hooks = [(of_one, len(of_one)) for both in hooks for of_one in both]

    def logits(self, ids: Tensor) -> Tensor:
        """ids [1, 1], the next token -> [1, V]."""
        self.past += 1
        out = self._native_logits(ids)
        if out is None:
            self.close()
            out = self.model(input_ids=ids, use_cache=True, **{CACHE: self.cache}).logits
        return out[:, -1]

    def _native_logits(self, ids: Tensor) -> Tensor | None:
        sequence = self._sequence_now()
        ropes = None if sequence is None else self._ropes_of(sequence, self.past - 1)
        if sequence is None or ropes is None:
            return None
        hidden = self.model.model.embed_tokens(ids)
        return self.model.lm_head(sequence.step(hidden, ropes)) if sequence.takes(hidden) else None

    def close(self) -> None:
        """Let the cache show what is in it."""
        if self._sequence is not None:
            self._sequence.show()
            self._sequence = None

    def _sequence_now(self) -> Sequence | None:
        if is_off() or any(len(hooks) != count for hooks, count in self._hooks):
            return None
        kept = self._sequence
        if kept is None or not kept.has_room() or not kept.plan.facts.undisturbed() or _has_any_global_hook():
            self.close()
            self._sequence = self.model.model.forward.sequence(self.cache, self.past - 1)
        return self._sequence

    def _ropes_of(self, sequence: Sequence, position: int) -> Tensor | None:
        if not self._first <= position < self._first + len(self._ropes):
            count = 1 if self._growing else ROPES
            positions = torch.arange(position, position + count, device="cpu")[None]
            found = sequence.plan.ropes(self.model.model.rotary_emb, positions)
            if found is None:
                return None
            self._ropes, self._first = found, position
        return self._ropes[position - self._first]
