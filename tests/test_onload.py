"""A float checkpoint becomes ternary while transformers loads it: what `convert` makes of it without data, no more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import copy_folder, edit_config, edit_tensors, logits, make_checkpoint, read_config, read_tensors
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import ternarize
from ternarize import TernarizeConfig, TernaryLinear, quantizer
from ternarize.errors import FormatError, TernarizeError
from ternarize.progress import Progress

QUIET = Progress(quiet=True)


def load(source: Path, **options: Any) -> Any:
    """`source`, made ternary while it is loaded."""
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=TernarizeConfig(**options))


def check_as_converted(source: Path, folder: Path, **options: Any) -> Any:
    """The model loaded on the fly holds what the converted folder does, and saves a folder like it."""
    recipe = TernarizeConfig(**options).recipe
    assert not recipe.needs_statistics
    ternarize.convert(source, folder / "converted", recipe, progress=QUIET)
    converted, _ = ternarize.load(folder / "converted")
    model = load(source, **options)
    assert type(model) is type(converted)
    expected, found = converted.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(logits(model), logits(converted))
    model.save_pretrained(folder / "saved")
    saved = read_tensors(folder / "saved")
    before = read_tensors(folder / "converted")
    assert saved.keys() == before.keys()
    assert all(saved[name].dtype == tensor.dtype for name, tensor in before.items())
    layouts = [read_config(folder / name)["quantization_config"] for name in ("converted", "saved")]
    assert layouts[0] == layouts[1]
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert torch.equal(logits(again), logits(model))
    return model


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt2", "opt", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
)
def test_model_is_what_convert_makes_without_data(family: str, tmp_path: Path) -> None:
    check_as_converted(make_checkpoint(tmp_path / "source", family), tmp_path, group_size=12)


@pytest.mark.parametrize(
    "options",
    [
        {"grid": "dlt", "group_size": 8, "scale_bits": 8},
        {"grid": "absmean", "group_size": None, "scale_bits": 16},
        {"group_size": 12, "skip": ["*.down_proj", "model.layers.0.self_attn.*"]},
    ],
    ids=str,
)
def test_options_are_those_of_the_recipe(options: dict[str, Any], tmp_path: Path) -> None:
    model = check_as_converted(make_checkpoint(tmp_path / "source", tie_word_embeddings=True), tmp_path, **options)
    skipped = [name for name in options.get("skip", ()) if name == "*.down_proj"]
    assert isinstance(model.model.layers[1].mlp.down_proj, TernaryLinear) != bool(skipped)


def test_one_skipped_expert_stays_float_beside_its_ternary_neighbours(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral")
    check_as_converted(source, tmp_path, group_size=12, skip=["model.layers.1.mlp.experts.2.down_proj"])


def test_bfloat16_checkpoint_stays_bfloat16_where_it_is_not_packed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "gemma3_text")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    model = check_as_converted(source, tmp_path, group_size=12)
    assert model.dtype == torch.bfloat16


def test_model_generates_natively_and_dequantizes(llama: Path) -> None:
    model = load(llama, group_size=12)
    assert not model.training
    assert all(module.activations for module in model.modules() if isinstance(module, TernaryLinear))
    out = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert out.shape == (1, 7)
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_base_model_is_the_inside_of_the_whole_one(llama: Path) -> None:
    ids = torch.arange(3, 40)[None]
    whole = load(llama, group_size=12)
    base = AutoModel.from_pretrained(llama, quantization_config=TernarizeConfig(group_size=12))
    assert torch.equal(base(input_ids=ids).last_hidden_state, whole.model(input_ids=ids).last_hidden_state)


def test_one_config_serves_several_models(llama: Path, tmp_path: Path) -> None:
    config = TernarizeConfig(group_size=12)
    first = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "gpt2", "gpt2"), quantization_config=config)
    assert config.to_dict() == TernarizeConfig(group_size=12).to_dict()
    assert first.config.quantization_config.layout.blocks == "model.layers"


def test_config_may_be_a_dictionary(llama: Path) -> None:
    options = {"quant_method": "ternarize", "group_size": 12, "skip": ["*.up_proj"]}
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=options)
    assert torch.equal(logits(model), logits(load(llama, group_size=12, skip=["*.up_proj"])))


def test_warning_comes_once_and_names_convert(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantizer._say_what_is_lost.cache_clear()
    with caplog.at_level(logging.WARNING, "ternarize"):
        load(llama, group_size=12)
        load(llama, group_size=12)
    assert sum("ternarize.convert(source, folder)" in record.message for record in caplog.records) == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "round"}, "TernarizeConfig: grid is 'round'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"scale_bits": 5}, "scale_bits is 5, but must be one of 16, 8, 4"),
        ({"skip": ["*.no_such"]}, "matches none of the 14 linears"),
        ({"skip": "*.no_such"}, "'*.no_such' matches none of the 14 linears"),
        ({"skip": 5}, "skip is 5, but must be a list of strings"),
        ({"group_size": 1000}, "wider than every linear"),
        ({"group_size": 12, "skip": ["*"]}, "leaves no linear"),
    ],
)
def test_bad_option_is_refused_with_its_rule(options: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(TernarizeError, match=message.replace("*", r"\*")):
        load(llama, **options)


def test_weight_that_is_not_finite_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = edit_tensors(copy_folder(llama, tmp_path / "bad"), lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    with pytest.raises(TernarizeError, match=f"{name}: 1 of 1792 weights are NaN or infinite"):
        load(source, group_size=12)


def test_scale_beyond_fp16_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    source = edit_tensors(copy_folder(llama, tmp_path / "bad"), lambda tensors: tensors[f"{name}.weight"].mul_(1e7))
    with pytest.raises(TernarizeError, match=f"{name}: a scale or shift of .* does not fit in fp16"):
        load(source, group_size=12)


def test_missing_weight_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    source = edit_tensors(copy_folder(llama, tmp_path / "bad"), lambda tensors: tensors.pop(f"{name}.weight"))
    with pytest.raises(TernarizeError, match=f"lacks the weights of 1 modules of LlamaForCausalLM, such as {name}"):
        load(source, group_size=12)


def test_disk_is_refused(llama: Path, tmp_path: Path) -> None:
    device_map = {"": "cpu", "model.layers.0": "disk"}
    with pytest.raises(TernarizeError, match="'disk'"):
        LlamaForCausalLM.from_pretrained(
            llama, quantization_config=TernarizeConfig(), device_map=device_map, offload_folder=tmp_path
        )


def test_folder_whose_config_says_nothing_is_still_refused(llama: Path, tmp_path: Path) -> None:
    for number, config in enumerate([{}, {"group_size": 12}]):
        folder = copy_folder(llama, tmp_path / str(number))
        edit_config(folder, quantization_config={"quant_method": "ternarize"} | config)
        with pytest.raises(FormatError, match="format_version None"):
            AutoModelForCausalLM.from_pretrained(folder)
