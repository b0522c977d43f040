"""The plan: from config and headers alone it says what the conversion then does, to the byte but for file headers."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, make_checkpoint, make_recipe, make_tokenizer, read_tensors
from transformers import AutoModelForCausalLM, LlamaConfig

from ternarize import Recipe, plan
from ternarize.checkpoint import Checkpoint
from ternarize.conversion import convert
from ternarize.plan import Plan, make_plan
from ternarize.progress import Progress
from ternarize.report import peak_memory


def planned(source: Path, recipe: Recipe) -> Plan:
    return make_plan(Checkpoint(source), recipe)


def assert_plan_is_what_happens(source: Path, recipe: Recipe, output: Path) -> Plan:
    before = planned(source, recipe)
    report = convert(source, output, recipe, progress=Progress(quiet=True))
    tensors = read_tensors(output).values()
    assert before.output_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert before.ternary == {entry.name: entry.shape for entry in report.linears}
    assert {name: bits for name, (_, _, bits) in before.tables.items()} == (
        dict.fromkeys(report.int8, 8) | dict.fromkeys(report.int6, 6)
    )
    assert [dataclasses.astuple(kept) for kept in before.kept] == [
        (kept["name"], tuple(kept["shape"]), kept["reason"]) for kept in report.kept
    ]
    assert (before.model, before.weights, before.ternary_weights, before.source_bytes) == (
        report.model,
        report.weights,
        report.ternary_weights,
        report.source_bytes,
    )
    return before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_conversion_does_what_the_plan_says(family: str, recipe: Recipe, tmp_path: Path) -> None:
    assert_plan_is_what_happens(make_checkpoint(tmp_path / "source", family), recipe, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": "symmetric", "group_size": None},
        {"embeddings": "keep", "head": "keep"},
        {"skip": ["*.down_proj", "*.0.self_attn.*"]},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_follows_the_recipe_and_the_sources_dtype(
    changes: dict[str, Any], dtype: torch.dtype, text: Path, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=96, head_dim=16, intermediate_size=160)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    before = assert_plan_is_what_happens(source, make_recipe(text, **changes), tmp_path / "out")
    reasons = {kept.name: kept.reason for kept in before.kept}
    assert reasons["model.layers.0.input_layernorm.weight"] == "one value per feature (norm or bias)"
    if "embeddings" in changes:
        assert reasons["model.embed_tokens.weight"] == reasons["lm_head.weight"] == "recipe: keep"
    if "skip" in changes:
        assert reasons["model.layers.1.mlp.down_proj.weight"] == "skip: *.down_proj"
        assert reasons["model.layers.0.self_attn.q_proj.weight"] == "skip: *.0.self_attn.*"


def test_real_files_are_larger_by_their_headers_alone_which_are_small(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=256, intermediate_size=640)
    recipe = make_recipe(text, group_size=64)
    made = planned(source, recipe)
    report = convert(source, tmp_path / "out", recipe, progress=Progress(quiet=True))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", weights[:8])
    assert len(weights) == report.output_bytes == made.output_bytes + 8 + header
    assert made.output_bytes == pytest.approx(report.output_bytes, rel=0.02)


def test_planning_reads_no_weight_and_writes_nothing(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan reads nothing")

    monkeypatch.setattr(Checkpoint, "load", load)
    monkeypatch.chdir(tmp_path)
    before = sorted(llama.parent.rglob("*"))
    made = planned(llama, recipe)
    assert json.loads(json.dumps(made.to_dict()))["ternary_weights"] == made.ternary_weights
    assert sorted(llama.parent.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_plan_of_a_large_model_takes_no_memory(text: Path, tmp_path: Path) -> None:
    """Seven billion weights in a file that is all holes: whoever read it would need 13 GB."""
    config = LlamaConfig()  # its defaults are LLaMA 7B
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    with open(weights, "rb+") as file:
        file.truncate(8 + len(encoded) + end)
    before = peak_memory()
    recipe = make_recipe(text, group_size=64, int8_group_size=64, calibration={"samples": 128, "length": 512})
    made, writing = planned(tmp_path, recipe), planned(tmp_path, recipe.with_text("self"))
    assert before is None or peak_memory() - before < 200_000_000
    assert made.weights == 6_738_415_616
    assert len(made.ternary) == 7 * 32
    per_weight = 1.6 + 2 * 4 / 64 + 8 / 4096  # trits, levels, and a byte a row; most rows have 4096 columns
    assert 8 * made.output_bytes == pytest.approx(per_weight * made.ternary_weights + 8.25 * 2 * 32000 * 4096, rel=1e-3)
    assert 2e9 < made.peak_memory < 13e9
    floats = 4 * made.weights + 64 * 512 * 32 * 2 * 4 * 4096  # of the writer: weights, keys and values of 64 windows
    assert floats < writing.peak_memory < 1.1 * floats


def test_more_text_needs_more_memory_and_time(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_matmul_rate", lambda: 1e9)
    little, much = (planned(llama, make_recipe(text, calibration={"samples": n})) for n in (16, 160_000))
    assert much.peak_memory - little.peak_memory >= 2 * 4 * 64 * 32 * (160_000 - 16)
    assert much.seconds > 100 * little.seconds > 0


def test_learning_from_predictions_takes_the_time_of_the_head(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_matmul_rate", lambda: 1e9)
    recipes = [make_recipe(text, tune={"epochs": 1, "ending": ending, "ending_epochs": 5.0}) for ending in (0, 1)]
    without, with_head = (planned(llama, recipe) for recipe in recipes)
    vocabulary, width = with_head.tables["model.embed_tokens"][:2]
    tokens = recipes[1].calibration.samples * recipes[1].calibration.length
    assert with_head.seconds - without.seconds > 5 * tokens * 3 * 2 * vocabulary * width / 1e9


def test_plan_says_when_the_model_writes_its_own_text(llama: Path, text: Path) -> None:
    assert not planned(llama, make_recipe(text)).writes_text
    assert planned(llama, make_recipe(Path("self"))).writes_text
    mixture = make_recipe(text, calibration={"text": [str(text), "self@0.5"]})
    assert planned(llama, mixture).writes_text


def test_router_of_a_mixture_is_kept_with_its_reason(recipe: Recipe, tmp_path: Path) -> None:
    made = planned(make_checkpoint(tmp_path / "source", "qwen3_moe"), recipe)
    kept = {kept.name: kept.reason for kept in made.kept}
    assert kept["model.layers.0.mlp.gate.weight"] == "not a linear (Qwen3MoeTopKRouter)"
    assert not any(name.endswith(".gate") for name in made.ternary)
