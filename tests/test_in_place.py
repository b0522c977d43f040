"""A loaded model becomes ternary in place: the very thing that converting its folder and loading that gives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, make_checkpoint, make_recipe, make_tokenizer, read_config, read_tensors
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import ternarize
from ternarize import Recipe, in_place
from ternarize.errors import StoppedError, TernarizeError, UnsupportedModelError
from ternarize.progress import Progress
from ternarize.quantizer import TernarizeQuantizer

QUIET = Progress(quiet=True)


def load(source: Path, **settings: Any) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(source, **settings), AutoTokenizer.from_pretrained(source)


def check_as_converted(source: Path, folder: Path, recipe: Recipe) -> Any:
    """In memory and through files come the same tensors, types and logits, also after saving."""
    report = ternarize.convert(source, folder / "converted", recipe, progress=QUIET)
    converted, _ = ternarize.load(folder / "converted")
    model, tokenizer = load(source)
    made = ternarize.ternarize(model, tokenizer, recipe, progress=QUIET)
    assert made is model
    assert type(model) is type(converted)
    expected, found = converted.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(logits(model), logits(converted))
    assert model.ternarize_report.linears == report.linears
    model.save_pretrained(folder / "saved")
    before, saved = read_tensors(folder / "converted"), read_tensors(folder / "saved")
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in saved.items()}
    layouts = [read_config(folder / name)["quantization_config"] for name in ("converted", "saved")]
    assert layouts[0] == layouts[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "saved")), logits(model))
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3_text", {}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
    ],
)
def test_model_is_what_its_folder_becomes(family: str, changes: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    check_as_converted(make_checkpoint(tmp_path / "source", family, **changes), tmp_path, recipe)


TUNE = {"epochs": 1, "ending": 1}
DISTILL = {"epochs": 1, "samples": 8, "batch": 2, "check": 2, "patience": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": TUNE},
        {"distill": DISTILL},
        {"budget": 2.9, "scale_bits": 16, "shift_bits": 16},
        {"calibration": {"text": ["self"], "samples": 8, "length": 32, "random": 0.25}},
        {"skip": ["*.down_proj"], "embeddings": "keep"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_recipe_works(changes: dict[str, Any], llama: Path, text: Path, tmp_path: Path) -> None:
    check_as_converted(llama, tmp_path, make_recipe(text, **changes))


def test_bfloat16_model_writes_its_own_text_in_float32(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", chat=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    model = check_as_converted(
        source, tmp_path, make_recipe(text, calibration={"text": ["self"], "samples": 4, "length": 32})
    )
    assert model.dtype == torch.bfloat16


def test_model_made_in_python_needs_no_folder(recipe: Recipe, llama: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(llama).config)
    ternarize.ternarize(model, make_tokenizer(), recipe, progress=QUIET)
    assert isinstance(model.hf_quantizer, TernarizeQuantizer)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    out = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert out.shape == (1, 7)


def test_verdict_is_said(recipe: Recipe, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = ternarize.ternarize(*load(llama), recipe)
    assert model.ternarize_report.run["verdict"]["why"] in capfd.readouterr().err


# -- refusals, after which the model is as it was ---------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_stopping_leaves_the_model_and_no_files(
    error: type[BaseException], recipe: Recipe, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = load(llama)
    model.train()
    before = _state(model)
    original = in_place.LoadedModel.load

    def load_some(self: Any, skeleton: Any, *prefixes: str, **settings: Any) -> None:
        if prefixes == ("model.layers.1.",):
            raise error
        original(self, skeleton, *prefixes, **settings)

    monkeypatch.setattr(in_place.LoadedModel, "load", load_some)
    with pytest.raises(StoppedError, match="the model is as it was before"):
        ternarize.ternarize(model, tokenizer, recipe, progress=QUIET)
    check_untouched(model, before)
    assert not list(tmp_path.iterdir())


def test_model_with_a_weight_that_is_not_finite_is_refused(recipe: Recipe, llama: Path) -> None:
    model, tokenizer = load(llama)
    model.train()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    before = _state(model)
    with pytest.raises(TernarizeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 1792 weights are NaN"):
        ternarize.ternarize(model, tokenizer, recipe, progress=QUIET)
    check_untouched(model, before)


def test_other_modules_than_the_configs_are_refused(recipe: Recipe, llama: Path) -> None:
    model, tokenizer = load(llama)
    model.model.layers[0].mlp.add_module("adapter", nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match=r"adapter\.weight and 1 more. Merge adapters"):
        ternarize.ternarize(model, tokenizer, recipe, progress=QUIET)


def test_base_model_is_refused(recipe: Recipe, llama: Path) -> None:
    model = AutoModel.from_pretrained(llama)
    with pytest.raises(UnsupportedModelError, match="LlamaModel, but only LlamaForCausalLM"):
        ternarize.ternarize(model, make_tokenizer(), recipe, progress=QUIET)


def test_what_is_no_model_or_tokenizer_is_refused(recipe: Recipe, llama: Path) -> None:
    model, tokenizer = load(llama)
    with pytest.raises(UnsupportedModelError, match="a Linear is no model of transformers"):
        ternarize.ternarize(nn.Linear(4, 4), tokenizer, recipe, progress=QUIET)  # type: ignore[arg-type]
    with pytest.raises(TernarizeError, match="a NoneType is no tokenizer"):
        ternarize.ternarize(model, None, recipe, progress=QUIET)  # type: ignore[arg-type]


def test_ternary_model_is_refused(recipe: Recipe, ternary: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        ternarize.ternarize(*ternarize.load(ternary), recipe, progress=QUIET)


def test_offloaded_model_is_refused(recipe: Recipe, llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(llama, device_map={"": "disk"}, offload_folder=tmp_path)
    with pytest.raises(TernarizeError, match="not in memory"):
        ternarize.ternarize(model, tokenizer, recipe, progress=QUIET)
