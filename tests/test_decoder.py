"""Native steps against the ordinary forward: every family, every path, every way to mix the two on one cache."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, make_model, run_threads
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, StaticCache

import ternarize
from ternarize import TernaryLinear, TernaryTensor, decoder
from ternarize.architecture import find_blocks, linears, replace_module
from ternarize.decoder import forward
from ternarize.decoder.cache import CACHE
from ternarize.kernels import cpu
from ternarize.kernels.decoder import NativeDecoder
from ternarize.swap import dequantize_modules, run_natively
from ternarize.tensor import expand_groups, group_count

pytestmark = pytest.mark.skipif(not cpu.paths(), reason=f"no native library: {cpu.load_library()[1]}")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")  # the last four with windows or norms of their own
GROUP = 12  # leaves a short last group in every linear of the tiny models


def make_ternary(family: str = "llama", activations: str = "float", seed: int = 0, **changes: Any) -> Any:
    """A tiny random model with ternary linears, run natively."""
    model = make_model(family, seed, **changes)
    path, blocks = find_blocks(model)
    for name, linear in list(linears(blocks, path)):
        replace_module(model, name, ternary(linear))
    model.requires_grad_(False)
    run_natively(model, activations)
    return model


def ternary(linear: Any, group: int = GROUP) -> TernaryLinear:
    weight = linear.weight.detach()
    groups = group_count(weight.shape[1], group)
    scale = torch.rand(weight.shape[0], groups).add(0.5).mul(weight.abs().mean()).half().float()
    trits = (weight / expand_groups(scale, weight.shape[1], group)).round().clamp(-1, 1).to(torch.int8)
    shift = (torch.randn_like(scale) * 0.02).half().float()
    bias = None if linear.bias is None else linear.bias.detach()
    return TernaryLinear.from_tensor(TernaryTensor(trits, scale, shift, group), bias)


def tokens(count: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, cache: Any, **arguments: Any) -> Tensor:
    out: Tensor = model(input_ids=ids, **{CACHE: cache}, use_cache=True, **arguments).logits
    return out


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))


class Counts(list[int]):
    """Its only element: native steps so far."""

    prompts: list[int]  # tokens of each text that was read natively


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts what runs natively."""
    count = Counts([0])
    count.prompts = []
    one, many = NativeDecoder.step, forward.read_prompt

    def step(self: NativeDecoder, *arguments: Any) -> Tensor:
        count[0] += 1
        return one(self, *arguments)

    def read(*arguments: Any) -> Tensor:
        count.prompts.append(len(arguments[3]))
        return many(*arguments)

    monkeypatch.setattr(NativeDecoder, "step", step)
    monkeypatch.setattr(forward, "read_prompt", read)
    return count


def walk(model: Any, parts: list[Any], cache: Any) -> list[Tensor]:
    """Logits of each part: a number of tokens that go through at once, or what else to do with the cache."""
    out = []
    for i, part in enumerate(parts):
        if callable(part):
            part(cache)
        else:
            out.append(logits(model, tokens(part, seed=i), cache))
    return out


def compare(model: Any, parts: list[Any], new: Callable[[], Any], steps: Counts, expected: int) -> None:
    """Both ways through `parts`; the caches hold the same in the end."""
    ours, theirs = new(), new()
    steps.prompts.clear()
    got = walk(model, parts, ours)
    read = [part for part in parts if isinstance(part, int) and part > 1]
    assert (steps[0], steps.prompts) == (expected, read)
    with decoder.linear_by_linear():
        want = walk(model, parts, theirs)
    assert (steps[0], steps.prompts) == (expected, read)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert_close(one.keys, other.keys)
        assert_close(one.values, other.values)


# -- one token ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_match_the_forward(family: str, path: cpu.Native, steps: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.cache, "ROOM", 4)  # caches grow again and again
    model = make_ternary(family)
    compare(model, [5, *[1] * 30], lambda: DynamicCache(config=model.config), steps, 30)
    assert model.model.forward._plan.decoder.path == path


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_keeps_all_positions_serves_windows_too(family: str, steps: Counts) -> None:
    compare(make_ternary(family), [20, *[1] * 10], DynamicCache, steps, 10)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 10},
        {"num_key_value_heads": 3, "num_attention_heads": 9, "head_dim": 64, "hidden_size": 36},
        {"num_key_value_heads": 2, "num_attention_heads": 14, "head_dim": 38, "hidden_size": 28},
        {"attention_bias": True, "mlp_bias": True},
        {"intermediate_size": 41, "hidden_size": 36, "head_dim": 34, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_variants_of_llama(changes: dict[str, Any], path: cpu.Native, steps: Counts) -> None:
    model = make_ternary(**changes)
    compare(model, [7, *[1] * 20], lambda: DynamicCache(config=model.config), steps, 20)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_same(family: str, steps: Counts) -> None:
    model = make_ternary(family)
    arguments: dict[str, Any] = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False}
    ids = tokens(9)
    got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    assert (steps[0], steps.prompts) == (47, [9])
    with decoder.linear_by_linear():
        want = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_activations_are_as_far_from_exact_ones_as_ever(family: str, path: cpu.Native, steps: Counts) -> None:
    """Not the same: what rounds one activation up and the next one down is the last bit of a float."""
    model, exact = make_ternary(family, "int8"), make_ternary(family)
    parts = [5, *[1] * 20]
    with decoder.linear_by_linear():
        want = torch.cat(walk(exact, parts, DynamicCache()), 1)
        ordinary = torch.cat(walk(model, parts, DynamicCache()), 1)
    got = torch.cat(walk(model, parts, DynamicCache()), 1)
    assert steps[0] == 20
    assert 0 < (got - want).norm() < 1.2 * (ordinary - want).norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_sixteen_bit_models_are_closer_to_the_exact_result(
    family: str, dtype: torch.dtype, path: cpu.Native, steps: Counts
) -> None:
    model = make_ternary(family)
    parts = [5, *[1] * 20]
    with decoder.linear_by_linear():
        exact = torch.cat(walk(model, parts, DynamicCache()), 1)
        model.to(dtype)
        ordinary = torch.cat(walk(model, parts, DynamicCache()), 1)
    got = torch.cat(walk(model, parts, DynamicCache()), 1)
    assert steps[0] == 20
    assert got.dtype == dtype
    assert (got - exact).norm() < 1.1 * (ordinary - exact).norm()


@torch.no_grad()
def test_threads_do_not_change_a_step(steps: Counts) -> None:
    model = make_ternary(hidden_size=512, intermediate_size=1024, num_attention_heads=8, head_dim=64)
    model.lm_head = torch.nn.Identity()  # torch's, whose sums do depend on its threads on some processors
    before = torch.get_num_threads()
    prompt = DynamicCache()
    walk(model, [100], prompt)
    want = walk(model, [1, 1, 1], copy.deepcopy(prompt))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        got = walk(model, [1, 1, 1], copy.deepcopy(prompt))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.set_num_threads(before)
    assert steps[0] == 12


# -- a prompt ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cached", ["all", "windows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_longer_than_windows_follow_each_other(
    family: str, cached: str, path: cpu.Native, steps: Counts
) -> None:
    model = make_ternary(family)
    config = model.config if cached == "windows" else None
    compare(model, [20, 9, 1, 2, 30], lambda: DynamicCache(config=config), steps, 1)


@torch.no_grad()
def test_a_prompt_is_read_piece_by_piece(path: cpu.Native, steps: Counts) -> None:
    compare(make_ternary(intermediate_size=41), [600, 1], DynamicCache, steps, 1)


@torch.no_grad()
def test_gate_and_up_may_have_groups_of_their_own(path: cpu.Native, steps: Counts) -> None:
    model = make_ternary(mlp_bias=True)
    for block, source in zip(model.model.layers, make_model("llama", 1, mlp_bias=True).model.layers, strict=True):
        block.mlp.up_proj = ternary(source.mlp.up_proj, group=5)
    run_natively(model, "float")
    compare(model, [20, 1], DynamicCache, steps, 1)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True, "intermediate_size": 41}], ids=str)
def test_int8_prompts_are_as_far_from_exact_ones_as_ever(
    changes: dict[str, Any], path: cpu.Native, steps: Counts
) -> None:
    model, exact = make_ternary(activations="int8", **changes), make_ternary(**changes)
    with decoder.linear_by_linear():
        want, ordinary = logits(exact, tokens(300), DynamicCache()), logits(model, tokens(300), DynamicCache())
    got = logits(model, tokens(300), DynamicCache())
    assert steps.prompts == [300]
    assert 0 < (got - want).norm() < 1.2 * (ordinary - want).norm()


# -- one cache, both ways ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_and_ordinary_forwards_take_turns(family: str, steps: Counts) -> None:
    model = make_ternary(family)
    parts = [4, 1, 1, lambda cache: cache.crop(-3), 1, 3, 1, 1, lambda cache: cache.crop(-1), 1, 12, 1, 1, 5, 1]
    compare(model, parts, lambda: DynamicCache(config=model.config), steps, 9)


def test_inference_mode_comes_and_goes(steps: Counts) -> None:
    model = make_ternary()
    ours, theirs = DynamicCache(), DynamicCache()
    modes: tuple[Any, ...] = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    for seed, (count, mode) in enumerate([(4, 0), (1, 1), (1, 0), (1, 2), (2, 1), (1, 2), (1, 1)]):
        with modes[mode]():
            got = logits(model, tokens(count, seed=seed), ours)
        with decoder.linear_by_linear(), torch.inference_mode():
            assert_close(got, logits(model, tokens(count, seed=seed), theirs))
    assert steps[0] == 5


@torch.no_grad()
def test_what_was_cached_is_never_written_again(steps: Counts) -> None:
    model, cache = make_ternary(), DynamicCache()
    walk(model, [6, 1, 1, 1], cache)
    held = cache.layers[1].keys
    before = held.clone()
    twin = copy.deepcopy(cache)
    cache.crop(-2)
    first = logits(model, tokens(1, seed=50), cache)
    assert torch.equal(held, before)
    twin.crop(-2)
    assert torch.equal(logits(model, tokens(1, seed=50), twin), first)
    logits(model, tokens(1, seed=51), cache)
    last = cache.layers[0].keys.clone()
    logits(model, tokens(1, seed=52), twin)
    assert torch.equal(cache.layers[0].keys, last)
    assert steps[0] == 7


@torch.no_grad()
def test_a_full_mask_positions_and_embeddings_are_served(steps: Counts) -> None:
    model = make_ternary()

    def run() -> list[Tensor]:
        cache, ids = DynamicCache(), tokens(1, seed=5)
        logits(model, tokens(6), cache)
        out = [logits(model, ids, cache, attention_mask=torch.ones(1, 7, dtype=torch.long))]
        out.append(logits(model, ids, cache, position_ids=torch.tensor([[11]])))
        embedded = model.get_input_embeddings()(ids)
        out.append(model(inputs_embeds=embedded, **{CACHE: cache}, output_attentions=False).logits)
        return out

    got = run()
    assert steps[0] == 3
    with decoder.linear_by_linear():
        want = run()
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


# -- what is not served ------------------------------------------------------------------------------------------------


def refused(model: Any, steps: Counts, cache: Any = None, batch: int = 1, padding: int = 0, **arguments: Any) -> None:
    """Neither a token nor several are computed natively, and the result is the ordinary one."""
    before = steps[0], list(steps.prompts)

    def run(count: int) -> Tensor:
        used = DynamicCache(config=model.config) if cache is None else cache()
        with torch.no_grad(), decoder.linear_by_linear():
            logits(model, tokens(6, batch=batch), used)
        if padding:
            arguments["attention_mask"] = torch.tensor([[0] * padding + [1] * (6 + count - padding)])
        return logits(model, tokens(count, seed=4, batch=batch), used, **arguments)

    got = [run(count) for count in (1, 3)]
    assert (steps[0], steps.prompts) == before
    with decoder.linear_by_linear():
        assert all(torch.equal(a, run(count)) for a, count in zip(got, (1, 3), strict=True))


def test_other_requests_run_as_ever(steps: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ternary(attn_implementation="eager")
    refused(model, steps, batch=2)
    refused(model, steps, padding=2)
    refused(model, steps, output_attentions=True)
    refused(model, steps, output_hidden_states=True)
    refused(model, steps, lambda: StaticCache(config=model.config, max_cache_len=32))
    with torch.autocast("cpu"):
        refused(model, steps)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    refused(model, steps)
    model.requires_grad_(False)
    model.train()
    refused(model, steps)
    model.eval()
    for setting in ("output_attentions", "output_hidden_states"):
        setattr(model.config, setting, True)
        refused(model, steps)
        setattr(model.config, setting, False)
    monkeypatch.setattr(cpu, "_chosen", [None])  # as TERNARIZE_CPU=torch
    refused(model, steps)
    monkeypatch.undo()


class Skipped(nn.Module):
    """In a block's place."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


def test_models_that_are_not_as_known_run_as_ever(steps: Counts) -> None:
    for family in ("gemma2", "phi3", "smollm3", "olmo2"):
        model = make_ternary(family)
        refused(model, steps)
        assert not any(isinstance(module.__dict__.get("forward"), decoder.NativeForward) for module in model.modules())
    model = make_ternary()
    with torch.no_grad():
        walk(model, [4, 1, 1], DynamicCache())
    assert steps[0] == 2
    adapted = model.model.layers[1].mlp
    adapted.up_proj = nn.Sequential(adapted.up_proj)  # as an adapter wraps it
    refused(model, steps)
    adapted.up_proj = adapted.up_proj[0]
    model.model.layers[0].mlp.down_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 32)
    refused(model, steps)
    del model.model.layers[0].mlp.down_proj.forward
    block, model.model.layers[1] = model.model.layers[1], Skipped()
    refused(model, steps)
    model.model.layers[1] = block
    run_natively(model.model.layers[0].mlp.down_proj, "int8")  # one of another kind
    refused(model, steps)
    run_natively(model, "int8")
    with torch.no_grad():
        walk(model, [4, 1], DynamicCache())
    assert steps[0] == 3
    dequantize_modules(model, torch.float32)
    assert "forward" not in model.model.__dict__
    refused(model, steps)


@torch.no_grad()
def test_hooks_are_called_from_the_next_token_on(steps: Counts) -> None:
    model, cache = make_ternary(), DynamicCache()
    seen: list[int] = []
    walk(model, [4, 1], cache)
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    walk(model, [1, 1], cache)
    assert (steps[0], len(seen)) == (1, 2)
    hook.remove()
    walk(model, [1, 1], cache)
    assert (steps[0], len(seen)) == (3, 2)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    walk(model, [1], cache)
    everywhere.remove()
    assert steps[0] == 3
    assert len(seen) > 10
    model(tokens(3), output_hidden_states=True)  # leaves hooks of transformers' own behind
    walk(model, [1], cache)
    assert steps[0] == 4


@torch.no_grad()
def test_changed_weights_count_from_the_next_text_on(steps: Counts) -> None:
    model = make_ternary(seed=0)
    first = walk(model, [4, 1, 1], DynamicCache())
    model.load_state_dict(make_ternary(seed=1).state_dict())
    assert not torch.allclose(walk(model, [4, 1, 1], DynamicCache())[-1], first[-1], atol=1e-2)
    compare(model, [4, 1, 1], DynamicCache, steps, 6)
    steps[0] = 0
    model.model.norm.weight.mul_(2)
    compare(model, [4, 1, 1], DynamicCache, steps, 2)
    steps[0] = 0
    model.model.layers[0].input_layernorm.weight = nn.Parameter(torch.ones(32), requires_grad=False)
    compare(model, [4, 1, 1], DynamicCache, steps, 2)


# -- generation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_itself_runs_in_one_thread_and_the_model_in_all(steps: Counts) -> None:
    model, ids = make_ternary(), tokens(5)
    inside: list[int] = []
    outside: list[int] = []
    model.model.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))

    class Watch(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            outside.append(torch.get_num_threads())
            if len(outside) == 8:
                raise KeyError("enough")
            return scores

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
        model.generate(ids, logits_processor=[Watch()], **arguments)
        assert (set(inside), outside, steps[0]) == ({3}, [1] * 5, 4)
        with pytest.raises(KeyError, match="enough"):
            model.generate(ids, logits_processor=[Watch()], **arguments)
        assert torch.get_num_threads() == 3
        del inside[:], outside[:]
        model.generate(tokens(5, batch=2), logits_processor=[Watch()], **arguments)
        assert (set(inside), outside) == ({3}, [3] * 5)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_thread_that_begins_beside_another_generation_computes_in_all() -> None:
    model, ids, rival = make_ternary(), tokens(5), make_ternary(seed=1)
    inside: list[int] = []
    model.model.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))
    arguments: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}

    class Meanwhile(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert torch.get_num_threads() == 1
            run_threads(1, lambda _: model.generate(ids, **arguments))
            return scores

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rival.generate(ids, logits_processor=[Meanwhile()], **arguments)
        assert inside == [3] * 9
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# -- copies, threads, processes ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_and_pickles_step_for_themselves(steps: Counts, tmp_path: Path) -> None:
    model = make_ternary()
    want = walk(model, [4, 1, 1], DynamicCache())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.model.forward.model is twin.model
        before = steps[0]
        assert all(torch.equal(a, b) for a, b in zip(walk(twin, [4, 1, 1], DynamicCache()), want, strict=True))
        assert steps[0] == before + 2
        twin.model.norm.weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(walk(model, [4, 1, 1], DynamicCache()), want, strict=True))


@torch.no_grad()
def test_a_model_goes_when_nobody_holds_it(steps: Counts) -> None:
    model = make_ternary()
    model.generate(tokens(5), max_new_tokens=4, eos_token_id=-1, do_sample=False)
    assert steps[0] == 3
    gc.collect()
    gone = weakref.ref(model), weakref.ref(model.model), weakref.ref(model.model.layers[0])
    del model
    assert [reference() for reference in gone] == [None] * 3


@torch.no_grad()
def test_a_loaded_folder_steps_and_saves(ternary: Path, tmp_path: Path, steps: Counts) -> None:
    model, _ = ternarize.load(ternary)
    compare(model, [6, *[1] * 10], lambda: DynamicCache(config=model.config), steps, 10)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = walk(model, [4, 1, 1], DynamicCache())
    assert all(torch.equal(a, b) for a, b in zip(walk(again, [4, 1, 1], DynamicCache()), want, strict=True))


@torch.no_grad()
def test_compiled_models_run_as_ever(steps: Counts) -> None:
    model = make_ternary()
    cache, twin = DynamicCache(), DynamicCache()
    walk(model, [4], cache), walk(model, [4], twin)
    compiled = torch.compile(model, backend="eager")
    got = compiled(input_ids=tokens(1), **{CACHE: cache}).logits
    assert steps[0] == 0
    assert_close(got, logits(model, tokens(1), twin))
    assert steps[0] == 1


@torch.no_grad()
def test_models_and_threads_do_not_disturb_each_other() -> None:
    models = [make_ternary(family, seed=seed) for seed, family in enumerate(("llama", "gemma3_text"))]
    want = [walk(model, [4, *[1] * 20], DynamicCache(config=model.config)) for model in models]
    wrong: list[int] = []

    def work(number: int) -> None:
        model = models[number % 2]
        with torch.no_grad():
            for _ in range(3):
                got = walk(model, [4, *[1] * 20], DynamicCache(config=model.config))
                if not all(torch.equal(a, b) for a, b in zip(got, want[number % 2], strict=True)):
                    wrong.append(number)

    run_threads(4, work)
    assert not wrong


FORK = """
import os, signal, sys, torch
sys.path.insert(0, {folder!r})
from transformers import DynamicCache
from test_decoder import make_ternary, walk
torch.set_grad_enabled(False)
torch.set_num_threads(1)
model = make_ternary(hidden_size=512, intermediate_size=1024, num_attention_heads=8, head_dim=64)
model.lm_head = torch.nn.Identity()  # torch's own may wait for threads that a fork does not copy
prompt = DynamicCache()
walk(model, [8, 1], prompt)
torch.set_num_threads(2)
step = lambda: walk(model, [1, 1, 1], prompt)[-1]
want = step()
child = os.fork()
if child == 0:
    signal.alarm(20)
    prompt.crop(-3)
    os._exit(0 if torch.equal(step(), want) else 1)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on() -> None:
    code = FORK.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
