"""The loop behind `generate` beside transformers' own: the same tokens, calls and cache, or not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoder import FAMILIES, make_ternary, steps, tokens
from tiny import VOCABULARY
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ternarize import decoder
from ternarize.decoder import loop
from ternarize.decoder.cache import CACHE, ROOM
from ternarize.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.paths(), reason=f"no native library: {cpu.load_library()[1]}")
__all__ = ["steps"]  # a fixture


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each run of the loop began behind."""
    begun: list[int] = []
    go_on = loop._go_on

    def noted(model: Any, ids: Tensor, *arguments: Any, **others: Any) -> Tensor:
        begun.append(ids.shape[1])
        return go_on(model, ids, *arguments, **others)

    monkeypatch.setattr(loop, "_go_on", noted)
    return begun


def write(model: Any, ids: Tensor, count: int, **arguments: Any) -> Any:
    """`generate`, from the same seed."""
    torch.manual_seed(5)
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": -1} | arguments
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def write_by_transformers(model: Any, ids: Tensor, count: int, **arguments: Any) -> Any:
    """The same by its own loop, with native steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_served", lambda *_, **__: False)
        return write(model, ids, count, **arguments)


class Calls(BaseStreamer):  # type: ignore[misc]
    """What a streamer is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


class Raise(LogitsProcessor):  # type: ignore[misc]
    """Raises at its `count`th call."""

    def __init__(self, count: int, error: type[BaseException]) -> None:
        self.count, self.error = count, error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count -= 1
        if self.count == 0:
            raise self.error
        return scores


class AtLength(StoppingCriteria):  # type: ignore[misc]
    """Ends a text at so many tokens, and notes what it was asked with."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.asked.append((input_ids.shape[1], scores))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def assert_same_cache(got: DynamicCache, want: DynamicCache) -> None:
    for mine, other in zip(got.layers, want.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
        assert getattr(mine, "cumulative_length", 0) == getattr(other, "cumulative_length", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_cache_are_transformers(family: str, own: list[int], steps: list[int]) -> None:
    model, ids = make_ternary(family), tokens(9)
    mine, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    count = ROOM + 40  # the cache grows once, and rotations are computed many times
    got, want = write(model, ids, count, **{CACHE: mine}), write_by_transformers(model, ids, count, **{CACHE: other})
    assert torch.equal(got, want)
    assert (own, steps[0]) == ([10], 2 * (count - 1))
    assert_same_cache(mine, other)
    more = torch.cat([got, tokens(3, seed=1)], 1)  # the next turn of a conversation
    got, want = write(model, more, 20, **{CACHE: mine}), write_by_transformers(model, more, 20, **{CACHE: other})
    assert torch.equal(got, want)
    assert own[1:] == [more.shape[1] + 1]
    assert_same_cache(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_tokens_are_transformers(dtype: torch.dtype, own: list[int]) -> None:
    model, ids = make_ternary().to(dtype), tokens(6)
    taste: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3}
    got, want = write(model, ids, 60, **taste), write_by_transformers(model, ids, 60, **taste)
    assert torch.equal(got, want)
    assert len(set(got[0].tolist())) > 10
    assert own == [7]


@pytest.mark.parametrize("scaling", ["dynamic", "yarn"])
def test_rotations_that_follow_the_length(scaling: str, own: list[int]) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    model = make_ternary(rope_parameters=rope, max_position_embeddings=32)
    got, want = write(model, tokens(9), 90), write_by_transformers(model, tokens(9), 90)
    assert torch.equal(got, want)
    assert own == [10]


def test_a_text_ends_where_it_would(own: list[int]) -> None:
    model, ids = make_ternary(), tokens(5)
    whole = write(model, ids, 40)[0].tolist()
    ends = whole[30]
    length = whole.index(ends, 5) + 1  # where that token comes first
    got = write(model, ids, 40, eos_token_id=ends, pad_token_id=0)
    assert got[0].tolist() == whole[:length]
    del own[:]
    assert write(model, ids, 40, eos_token_id=whole[5], pad_token_id=0)[0].tolist() == whole[:6]
    assert write(model, ids, 1)[0].tolist() == whole[:6]
    assert own == []  # the first token was the last
    mine, other = AtLength(17), AtLength(17)
    got = write(model, ids, 40, stopping_criteria=[mine])
    assert torch.equal(got, write_by_transformers(model, ids, 40, stopping_criteria=[other]))
    assert mine.asked == other.asked == [(length, None) for length in range(6, 18)]


def test_a_streamer_is_told_the_same() -> None:
    model, ids, mine, other = make_ternary(), tokens(5), Calls(), Calls()
    write(model, ids, 12, streamer=mine)
    write_by_transformers(model, ids, 12, streamer=other)
    assert mine.told == other.told
    assert (len(mine.told), mine.told[-1]) == (14, "end")  # the prompt, tokens, and the end


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_what_was_written_before_an_error_is_in_the_cache(error: type[BaseException], own: list[int]) -> None:
    model, ids, mine, other = make_ternary(), tokens(5), DynamicCache(), DynamicCache()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(error):
            write(model, ids, 40, logits_processor=[Raise(9, error)], **{CACHE: mine})
        assert torch.get_num_threads() == 3
        with pytest.raises(error):
            write_by_transformers(model, ids, 40, logits_processor=[Raise(9, error)], **{CACHE: other})
    finally:
        torch.set_num_threads(before)
    assert own == [6]
    assert mine.get_seq_length() == 13
    assert_same_cache(mine, other)


def test_the_model_computes_in_all_threads_and_tokens_are_chosen_in_one(own: list[int]) -> None:
    model, inside, outside = make_ternary(), [], []
    model.lm_head.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))

    class Watch(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            outside.append(torch.get_num_threads())
            return scores

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        write(model, tokens(5), 6, logits_processor=[Watch()])
        assert (inside, outside, own) == ([3] * 6, [1] * 6, [6])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("place", ["", "model", "model.layers.1.mlp.up_proj", "model.rotary_emb"])
def test_hooks_that_come_in_its_midst_are_called(place: str, own: list[int]) -> None:
    model, ids, seen = make_ternary(), tokens(5), []

    class HookLater(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 9:
                hooks.append(model.get_submodule(place).register_forward_hook(lambda *_: seen.append(1)))
            return scores

    hooks: list[Any] = []
    embedded: list[int] = []
    watch = model.model.embed_tokens.register_forward_hook(lambda *_: embedded.append(1))
    got = write(model, ids, 12, logits_processor=[HookLater()])
    watch.remove()
    assert (own, len(seen)) == ([6], 7)  # of 12 tokens 5 were there
    assert len(embedded) == 12
    hooks.pop().remove()
    assert torch.equal(got, write_by_transformers(model, ids, 12, logits_processor=[HookLater()]))


def test_other_requests_are_left_to_transformers(own: list[int]) -> None:
    model, ids = make_ternary(), tokens(5)
    out = write(model, ids, 6, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 6
    assert write(model, tokens(5, batch=2), 6).shape == (2, 11)
    padded = torch.tensor([[0, 0, 1, 1, 1]])
    model.generate(input_ids=ids, attention_mask=padded, max_new_tokens=4, do_sample=False, pad_token_id=0)
    write(model, ids, 4, use_cache=False)
    write(model, ids, 4, cache_implementation="static")
    write(model, ids, 4, num_beams=2, pad_token_id=0)
    model.generate(inputs_embeds=model.model.embed_tokens(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    with decoder.linear_by_linear():
        write(model, ids, 4)
    model.train()
    write(model, ids, 4)
    model.eval()
    for module in (model, model.model):
        hook = module.register_forward_hook(lambda *_: None)
        write(model, ids, 4)
        hook.remove()
    bare = make_ternary()
    del bare.model.forward
    write(bare, ids, 4)
    capped = make_ternary("gemma3_text", final_logit_softcapping=2.0)
    assert torch.equal(write(capped, ids, 4), write_by_transformers(capped, ids, 4))
    assert own == []
    write(model, ids, 4)
    assert own == [6]


def test_another_text_may_be_written_in_its_midst(own: list[int]) -> None:
    model, ids, inner = make_ternary(), tokens(5), []

    class Meanwhile(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 9:
                inner.append(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1))
            return scores

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = write(model, ids, 8, logits_processor=[Meanwhile()])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, inner[0])
    assert own == [6, 6]


def test_models_whose_heads_are_their_own_class(own: list[int]) -> None:
    """A subclass may compute logits in another way: its forward is called."""
    model, ids = make_ternary(), tokens(5)

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = nn.functional.one_hot(torch.full((1, 1), 7), VOCABULARY).float()
            return out

    model.__class__ = Doubled
    assert write(model, ids, 4)[0, 5:].tolist() == [7] * 4
    assert own == []
