"""A byte budget: the allocation against all combinations, the ranking against a model with one weight changed."""

from __future__ import annotations

import itertools
import json
import random as rng
from pathlib import Path

import pytest
import torch
from tiny import (
    VOCABULARY,
    contents,
    copy_folder,
    edit_tensors,
    logits,
    make_model,
    make_recipe,
    random_ternary,
    read_config,
)
from torch import Tensor

from ternarize.architecture import linear_weight
from ternarize.budget import Choice, allocate, group_sizes, rank
from ternarize.conversion import convert
from ternarize.errors import TernarizeError
from ternarize.evaluate import load_any
from ternarize.progress import Progress
from ternarize.recipe import Recipe

QUIET = Progress(quiet=True)


@pytest.mark.parametrize("seed", range(8))
def test_an_allocation_is_the_best_at_its_own_bytes(seed: int) -> None:
    generator = rng.Random(seed)
    choices = {}
    for name in "abcde":
        harm = generator.uniform(0.1, 5)
        choices[name] = [
            Choice(size, generator.randint(900, 1100) // 10 + 4096 // size, harm * size**0.4 + generator.random())
            for size in (16, 32, 64, 128)
        ]
    cheapest = sum(min(c.bytes for c in own) for own in choices.values())
    dearest = sum(max(c.bytes for c in own) for own in choices.values())
    for limit in range(cheapest, dearest + 20, 37):
        chosen = allocate(choices, limit)
        spent = sum(c.bytes for c in chosen.values())
        assert spent <= limit
        damage = sum(c.damage for c in chosen.values())
        best = min(
            sum(c.damage for c in combination)
            for combination in itertools.product(*choices.values())
            if sum(c.bytes for c in combination) <= limit
        )
        step = max(abs(a.damage - b.damage) for own in choices.values() for a in own for b in own)
        assert damage <= best + step  # what is left of the budget is less than one step
    full = allocate(choices, dearest)
    assert sum(c.damage for c in full.values()) == pytest.approx(
        sum(min(c.damage for c in own) for own in choices.values())
    )


def test_a_budget_below_the_cheapest_is_refused_with_both_figures() -> None:
    with pytest.raises(TernarizeError, match="100 bytes, but the budget allows 99"):
        allocate({"a": [Choice(64, 100, 1.0)]}, 99)


def test_group_sizes_lie_around_the_recipes() -> None:
    assert group_sizes(Recipe(group_size=64), 576) == [16, 32, 64, 128, 256]
    assert group_sizes(Recipe(group_size=64), 100) == [16, 32, 64, 100]
    assert group_sizes(Recipe(group_size=12), 40) == [12, 24, 40]
    assert group_sizes(Recipe(group_size=None), 40) == [16, 20, 40]


def test_ranking_measures_one_linear_at_a_time_and_puts_the_weights_back() -> None:
    model = make_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    damages = rank(model, names, lambda name, weight: weight * (1 if "v_proj" in name else 0.5), ids, QUIET)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert damages[names[0]] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        linear_weight(model.get_submodule(names[1])).mul_(0.5)
        log_q = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert damages[names[1]] == pytest.approx(expected, rel=0.1)  # the ranking may compute in bfloat16


@pytest.mark.parametrize(("budget", "bits"), [(3.2, 16), (2.6, 4)])
def test_a_conversion_keeps_its_budget_and_loads(
    llama: Path, text: Path, tmp_path: Path, budget: float, bits: int
) -> None:
    recipe = make_recipe(text, budget=budget, group_size=40, scale_bits=bits, shift_bits=bits)
    report = convert(llama, tmp_path / "out", recipe, progress=QUIET)
    assert report.bits_per_ternary_weight <= budget
    layout = read_config(tmp_path / "out")["quantization_config"]
    assert layout["format_version"] == 2
    assert layout["group_sizes"]
    student = load_any(tmp_path / "out", "cpu", torch.float32)
    for entry in report.linears:
        expected = min(layout["group_sizes"].get(entry.name, 40), entry.shape[1])
        assert student.get_submodule(entry.name).group_size == expected
    dense = load_any(tmp_path / "out", "cpu", torch.float32).dequantize()
    torch.testing.assert_close(logits(student), logits(dense), atol=1e-4, rtol=0)


def test_more_budget_is_less_error(llama: Path, text: Path, tmp_path: Path) -> None:
    errors = [
        convert(llama, tmp_path / str(b), make_recipe(text, budget=b, group_size=20), progress=QUIET).mean_error
        for b in (2.5, 3.0)
    ]
    assert errors[1] < errors[0]


def test_what_is_ternary_already_or_nothing_can_be_in_a_budget(llama: Path, text: Path, tmp_path: Path) -> None:
    name, other = (f"model.layers.0.{which}_proj" for which in ("self_attn.o", "mlp.up"))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.weight"].zero_()
        tensors[f"{other}.weight"].copy_(random_ternary(56, 32, 20).dequantize())

    source = edit_tensors(copy_folder(llama, tmp_path / "source"), change)
    report = convert(source, tmp_path / "out", make_recipe(text, budget=2.7, group_size=20), progress=QUIET)
    assert report.bits_per_ternary_weight <= 2.7
    sizes = read_config(tmp_path / "out")["quantization_config"]["group_sizes"]
    assert sizes[name] == max(sizes.values())  # what is nothing is given nothing
    assert sizes.get(other, 20) <= 20  # and what its groups hold is not lost to coarser ones


def test_a_budget_of_its_own_is_fixed_by_the_first_run(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ternarize import conversion

    recipe = make_recipe(text, budget=2.7, group_size=20)
    convert(llama, tmp_path / "whole", recipe, progress=QUIET)
    original = conversion.convert_window

    def stop(*arguments: object) -> object:
        if arguments[1] == 1:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert_window", stop)
        with pytest.raises(TernarizeError):
            convert(llama, tmp_path / "cut", recipe, progress=QUIET)
    assert json.loads((tmp_path / "cut.partial" / "group_sizes.json").read_text())
    monkeypatch.setattr(conversion, "spend", None)
    convert(llama, tmp_path / "cut", recipe, resume=True, progress=QUIET)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
