"""Every family of models, none of them known by name: converted, loaded, dequantized, and the same all along.

Also the variants of a model that decide where tensors go: tied and untied heads, embeddings kept or in int8, biases,
mixtures of experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, logits, make_checkpoint, make_recipe, read_config, read_tensors, stored_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import ternarize
from ternarize import Recipe, conversion
from ternarize.architecture import find_blocks
from ternarize.block import FEWEST_TOKENS
from ternarize.calibration import Walk
from ternarize.progress import Progress
from ternarize.report import Report
from ternarize.solver import fit
from ternarize.text import calibration_windows, fingerprint

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@dataclass
class Converted:
    """One family: where it came from, where it went, and the student's hidden states after the last block."""

    family: str
    source: Path
    output: Path
    report: Report
    hidden: list[Tensor]


def convert_family(
    family: str, folder: Path, recipe: Recipe, walks: list[Walk] | None = None, **changes: Any
) -> tuple[Path, Path, Report]:
    source = make_checkpoint(folder / "source", family, **changes)
    with pytest.MonkeyPatch.context() as patch:
        if walks is not None:
            original = conversion.convert_window

            def convert_window(*arguments: Any) -> Any:
                walks[:] = [arguments[4]]  # the student's
                return original(*arguments)

            patch.setattr(conversion, "convert_window", convert_window)
        report = conversion.convert(source, folder / "ternary", recipe, progress=Progress(quiet=True))
    return source, folder / "ternary", report


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Converted:
    walks: list[Walk] = []
    source, output, report = convert_family(request.param, tmp_path_factory.mktemp("family"), recipe, walks)
    return Converted(request.param, source, output, report, walks[0].hidden)


def source_with_stored_weights(source: Path, output: Path) -> nn.Module:
    """The float model in stock transformers, each ternary or int8 weight replaced by what the file stands for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in stored_weights(output).items():
            parent, _, last = name.rpartition(".")
            if ".experts." in name and not _has(model, name):
                mixture, _, expert = parent.rpartition(".")
                target = getattr(model.get_submodule(mixture), last)[int(expert)]
            else:
                module = model.get_submodule(name)
                target = module.weight.t() if isinstance(module, Conv1D) else module.weight
            target.copy_(weight if target.shape == weight.shape else weight.t())
    return model


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def test_logits_are_those_of_the_source_with_its_weights_replaced(converted: Converted) -> None:
    student, _ = ternarize.load(converted.output)
    expected = logits(source_with_stored_weights(converted.source, converted.output))
    torch.testing.assert_close(logits(student), expected, rtol=1e-4, atol=1e-5)


def test_student_differs_from_the_source(converted: Converted) -> None:
    student, _ = ternarize.load(converted.output)
    teacher = AutoModelForCausalLM.from_pretrained(converted.source)
    assert not torch.allclose(logits(student), logits(teacher), atol=1e-2)


def test_dequantized_student_is_the_same_and_loads_in_stock_transformers(converted: Converted, tmp_path: Path) -> None:
    student, _ = ternarize.load(converted.output)
    before = logits(student)
    student.dequantize()
    torch.testing.assert_close(logits(student), before, rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert "quantization_config" not in config
    assert "transformers_weights" not in config
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not any(type(module).__module__.startswith("ternarize") for module in stock.modules())
    torch.testing.assert_close(logits(stock), before, rtol=1e-4, atol=1e-5)


def test_hidden_states_walked_during_conversion_are_those_of_the_finished_student(converted: Converted) -> None:
    """The calibration ran every block as the model itself runs it, so the last one's outputs agree."""
    student, _ = ternarize.load(converted.output)
    ids = _calibration_ids(converted.report, converted.source)
    last = student.get_submodule(read_config(converted.output)["quantization_config"]["blocks"])[-1]
    seen: list[Tensor] = []
    last.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        student(input_ids=ids, use_cache=False)
    torch.testing.assert_close(torch.cat(converted.hidden), seen[0], rtol=1e-3, atol=1e-4)


def _calibration_ids(report: Report, source: Path) -> Tensor:
    ids = calibration_windows(tuple(report.data["text"]), source, 16, 64, 0, Progress(quiet=True))
    assert fingerprint(ids) == report.data["sha256"]
    return ids


def test_every_weight_is_reported_once_ternary_int8_or_kept(converted: Converted) -> None:
    report = converted.report
    stock = AutoModelForCausalLM.from_pretrained(converted.source)
    assert report.weights == sum(parameter.numel() for parameter in stock.parameters())
    ternary = sum(o * i for o, i in (entry.shape for entry in report.linears))
    int8 = sum(stock.get_submodule(name).weight.numel() for name in report.int8)
    buffers = {name for name, _ in stock.named_buffers()}
    kept = sum(torch.Size(entry["shape"]).numel() for entry in report.kept if entry["name"] not in buffers)
    assert ternary == report.ternary_weights
    assert ternary + int8 + kept == report.weights
    assert all(entry["reason"] for entry in report.kept)


def test_every_linear_in_the_blocks_is_ternary_in_the_file(converted: Converted) -> None:
    stock = AutoModelForCausalLM.from_pretrained(converted.source)
    path, blocks = find_blocks(stock)
    linears = {name for name, module in blocks.named_modules(prefix=path) if isinstance(module, (nn.Linear, Conv1D))}
    named = {entry.name for entry in converted.report.linears}
    assert linears <= named
    tensors = read_tensors(converted.output)
    for entry in converted.report.linears:
        out_features, in_features = entry.shape
        groups = -(-in_features // min(12, in_features))
        packed, levels, limits = (tensors[f"{entry.name}.{part}"] for part in ("weight", "levels", "limits"))
        assert (packed.dtype, packed.shape) == (torch.uint8, (out_features, -(-in_features // 5)))
        assert (levels.dtype, levels.shape) == (torch.uint8, (out_features, 1 + groups))
        assert (limits.dtype, limits.shape) == (torch.float32, (4,))
        stored = sum(tensor.numel() * tensor.element_size() for tensor in (packed, levels, limits))
        assert entry.bits == pytest.approx(8 * stored / (out_features * in_features))
        assert 0 < entry.error < 2  # of the sum of this error and the one that the prefix brought


# -- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_named_one_by_one_and_the_router_stays_float(family: str, tmp_path: Path, recipe: Recipe) -> None:
    _, output, report = convert_family(family, tmp_path, recipe)
    names = {entry.name for entry in report.linears}
    block = "model.layers.1"
    (mixture,) = {name.partition(".experts.")[0] for name in names if f"{block}." in name and ".experts." in name}
    expected = {f"{mixture}.experts.{e}.{p}" for e in range(4) for p in ("gate_up_proj", "down_proj")}
    assert expected <= names
    tensors = read_tensors(output)
    assert all(tensors[f"{name}.weight"].dtype == torch.uint8 for name in expected)
    assert {tuple(tensors[f"{mixture}.experts.{p}"].shape) for p in ("gate_up_proj", "down_proj")} == {(0,)}
    router = [kept for kept in report.kept if kept["name"].startswith(mixture) and kept["shape"][0] == 4]
    assert router
    assert not any(name.endswith((".router", ".gate")) for name in names)


@pytest.mark.parametrize("family", MIXTURES)
def test_expert_that_saw_too_few_tokens_is_fitted_without_data_and_says_so(
    family: str, tmp_path: Path, text: Path
) -> None:
    recipe = make_recipe(text, calibration={"samples": 1, "length": 10})
    source, output, report = convert_family(family, tmp_path, recipe)
    experts = [entry for entry in report.linears if ".experts." in entry.name]
    few = [entry for entry in experts if entry.tokens < entry.shape[1] / FEWEST_TOKENS]
    assert few
    assert [entry.name for entry in report.linears if entry.data_free] == [entry.name for entry in few]
    stored = stored_weights(output)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for entry in few:
        mixture, expert, projection = entry.name.rsplit(".", 2)
        weight = getattr(original.get_submodule(mixture), projection).detach()[int(expert)]
        weight = weight if weight.shape == entry.shape else weight.t()
        expected = fit(weight, None, recipe).dequantize()
        torch.testing.assert_close(stored[entry.name], expected, rtol=0, atol=0)
        assert entry.error == pytest.approx(float((expected - weight).square().sum() / weight.square().sum()))


def test_experts_stay_fused_and_float_where_all_are_skipped(tmp_path: Path, text: Path) -> None:
    source, output, report = convert_family("mixtral", tmp_path, make_recipe(text, skip=["*.experts.*"]))
    assert not any(".experts." in entry.name for entry in report.linears)
    mixture = "model.layers.0.mlp.experts"
    assert read_tensors(output)[f"{mixture}.gate_up_proj"].shape == (4, 112, 32)
    student, _ = ternarize.load(output)
    expected = logits(source_with_stored_weights(source, output))
    torch.testing.assert_close(logits(student), expected, rtol=1e-4, atol=1e-5)


def test_one_skipped_expert_stays_float_beside_its_ternary_neighbours(tmp_path: Path, text: Path) -> None:
    skipped = "model.layers.0.mlp.experts.2.down_proj"
    source, output, report = convert_family("qwen3_moe", tmp_path, make_recipe(text, skip=[skipped]))
    assert skipped not in {entry.name for entry in report.linears}
    weight = read_tensors(output)[f"{skipped}.weight"]
    original = AutoModelForCausalLM.from_pretrained(source).get_submodule("model.layers.0.mlp.experts").down_proj[2]
    assert torch.equal(weight, original)
    student, _ = ternarize.load(output)
    expected = logits(source_with_stored_weights(source, output))
    torch.testing.assert_close(logits(student), expected, rtol=1e-4, atol=1e-5)


# -- variants of one family -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["int8", "keep"])
@pytest.mark.parametrize("head", ["int8", "keep"])
def test_embedding_and_head_are_stored_as_the_recipe_says(
    tied: bool, embeddings: str, head: str, tmp_path: Path, text: Path
) -> None:
    recipe = make_recipe(text, embeddings=embeddings, head=head)
    source, output, report = convert_family("llama", tmp_path, recipe, tie_word_embeddings=tied)
    expected = ["model.embed_tokens"] if embeddings == "int8" else []
    expected += ["lm_head"] if head == "int8" and not tied else []
    assert sorted(report.int8) == sorted(expected)
    tensors = read_tensors(output)
    assert ("lm_head.weight" in tensors) != tied
    assert (tensors["model.embed_tokens.weight"].dtype == torch.uint8) == (embeddings == "int8")
    student, _ = ternarize.load(output)
    before = logits(student)
    expected_logits = logits(source_with_stored_weights(source, output))
    torch.testing.assert_close(before, expected_logits, rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), before)
    student.dequantize()
    torch.testing.assert_close(logits(student), before, rtol=1e-4, atol=1e-5)


def test_biases_survive(tmp_path: Path, recipe: Recipe) -> None:
    source, output, _ = convert_family("llama", tmp_path, recipe, attention_bias=True, mlp_bias=True)
    original, tensors = read_tensors(source), read_tensors(output)
    biases = [name for name in original if name.endswith(".bias")]
    assert len(biases) == 14
    assert all(torch.equal(tensors[name], original[name]) for name in biases)
    student, _ = ternarize.load(output)
    expected = logits(source_with_stored_weights(source, output))
    torch.testing.assert_close(logits(student), expected, rtol=1e-4, atol=1e-5)


def test_what_stays_float_keeps_the_type_of_the_source(tmp_path: Path, recipe: Recipe) -> None:
    source = make_checkpoint(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    output = tmp_path / "ternary"
    report = conversion.convert(source, output, recipe, progress=Progress(quiet=True))
    original, tensors = read_tensors(source), read_tensors(output)
    assert report.kept
    for kept in report.kept:
        assert tensors[kept["name"]].dtype == torch.bfloat16
        assert torch.equal(tensors[kept["name"]], original[kept["name"]])
    assert ternarize.load(output)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": "symmetric"},
        {"grid": "absmean"},
        {"group_size": None},
        {"group_size": 1},
        {"correction": 1.0, "order": "natural"},
        {"feedback": False, "curvature": False, "refit": False, "correction": 0, "sweeps": 0},
        {"scale_bits": 16, "shift_bits": 16},
        {"scale_bits": 8, "shift_bits": 4},
        {"tune": {"epochs": 1, "window": 2}},
        {"skip": ["*.1.mlp.down_proj", r"re:.*layers\.0\.self_attn\.[qk]_proj"]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_kind_of_recipe_gives_a_folder_that_loads(changes: dict[str, Any], tmp_path: Path, text: Path) -> None:
    source, output, report = convert_family("llama", tmp_path, make_recipe(text, **changes))
    student, _ = ternarize.load(output)
    expected = logits(source_with_stored_weights(source, output))
    torch.testing.assert_close(logits(student), expected, rtol=1e-4, atol=1e-5)
    tensors = read_tensors(output)
    assert any(name.endswith(".shift") for name in tensors) == (changes.get("scale_bits") == 16)
    assert any(name.endswith(".levels") for name in tensors) == (changes.get("scale_bits") != 16)
    assert all(entry.data_free for entry in report.linears) == ("feedback" in changes)
    kept = json.loads((output / "config.json").read_text())["quantization_config"]["kept"]
    assert kept == (
        ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
        if "skip" in changes
        else []
    )
