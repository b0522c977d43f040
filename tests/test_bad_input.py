"""Bad input: each kind gets an error of ours that names the value, the rule and the next step; nothing is lost.

Every refusal is checked to leave neither an output folder nor a change in what was there before.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    copy_folder,
    edit_config,
    edit_tensors,
    make_checkpoint,
    make_recipe,
    make_tokenizer,
    read_config,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

import ternarize
from ternarize import Recipe
from ternarize.checkpoint import check_finite
from ternarize.cli import run
from ternarize.conversion import convert
from ternarize.errors import FormatError, TernarizeError, UnsupportedModelError
from ternarize.progress import Progress

QUIET = Progress(quiet=True)
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return copy_folder(llama, tmp_path / "source")


@pytest.fixture(scope="module")
def in_fp16(llama: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder whose scales and shifts are fp16."""
    output = tmp_path_factory.mktemp("fp16") / "fp16"
    convert(llama, output, replace(recipe, scale_bits=16, shift_bits=16), progress=QUIET)
    return output


@pytest.fixture
def packed(in_fp16: Path, tmp_path: Path) -> Path:
    """A converted folder to damage; scales and shifts are fp16."""
    return copy_folder(in_fp16, tmp_path / "packed")


@pytest.fixture
def coded(ternary: Path, tmp_path: Path) -> Path:
    """A converted folder to damage; scales and shifts are coded."""
    return copy_folder(ternary, tmp_path / "coded")


@pytest.fixture
def refused(recipe: Recipe, tmp_path: Path) -> Callable[..., None]:
    """Convert, expect the error, and check that no output appeared."""

    def check(source: Path | str, match: str, error: type[TernarizeError] = TernarizeError, **changes: Any) -> None:
        output = tmp_path / "refused"
        with pytest.raises(error, match=match):
            convert(source, output, changes.pop("recipe", recipe), progress=QUIET, **changes)
        assert not output.exists()

    return check


def write_shards(folder: Path, names: list[str]) -> Path:
    """Replace the one weight file by an index that names the given shards."""
    (folder / "model.safetensors").unlink()
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# -- not a checkpoint -------------------------------------------------------------------------------------------------


def test_source_that_is_not_there(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder")


def test_name_that_is_neither_folder_nor_reachable_on_the_hub(refused: Callable[..., None]) -> None:
    refused("nobody/nothing", "'nobody/nothing' is not a local folder, and the Hub could not be reached")


def test_unknown_sample(refused: Callable[..., None]) -> None:
    refused("sample:nothing", "sample:nothing is not known. Samples: sample:smollm2-135m")


def test_source_that_is_a_file(refused: Callable[..., None], text: Path) -> None:
    refused(text, "is a file. Give a checkpoint's folder")


def test_empty_folder(refused: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty is not a checkpoint: it has no config\.json")


def test_folder_without_config(refused: Callable[..., None], source: Path) -> None:
    (source / "config.json").unlink()
    refused(source, r"is not a checkpoint: it has no config\.json")


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", "null", '{"model_type": "nothing_like_it"}', "\x00\xff"])
def test_config_that_transformers_cannot_read(config: str, refused: Callable[..., None], source: Path) -> None:
    (source / "config.json").write_text(config)
    refused(source, r"config\.json: transformers cannot read this config")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": -32}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}],
    ids=str,
)
def test_config_with_impossible_values(changes: dict[str, Any], refused: Callable[..., None], source: Path) -> None:
    refused(edit_config(source, **changes), ".")


def test_folder_without_weights(refused: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, rf"has neither model\.safetensors nor {INDEX}")


def test_pickled_checkpoint_is_not_opened_and_the_way_out_is_named(refused: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(source, r"pytorch_model\.bin, a pickle: load it with transformers and save_pretrained it as safetensors")


def test_model_without_a_stack_of_layers(refused: Callable[..., None], source: Path) -> None:
    refused(edit_config(source, num_hidden_layers=0), "no list of decoder layers", UnsupportedModelError)


def test_model_that_is_no_causal_language_model(refused: Callable[..., None], source: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(source, "cannot build a causal language model of type 'vit'", UnsupportedModelError)


@pytest.mark.parametrize("method", ["gptq", "fp8", None])
def test_quantized_source(method: str | None, refused: Callable[..., None], source: Path) -> None:
    edit_config(source, quantization_config={"bits": 4} | ({"quant_method": method} if method else {}))
    refused(source, rf"is already quantized \({method}\)\. Convert the original", UnsupportedModelError)


def test_ternary_source(refused: Callable[..., None], ternary: Path) -> None:
    refused(ternary, r"is already quantized \(ternarize\)", UnsupportedModelError)


def test_source_without_tokenizer(refused: Callable[..., None], source: Path) -> None:
    for file in source.glob("tokenizer*"):
        file.unlink()
    refused(source, "has no tokenizer that transformers can read")


EVIL = """
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "evil"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokens(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_in_a_checkpoint_is_not_run_and_nobody_is_asked(
    part: str, refused: Callable[..., None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on standard output, and run the code on a yes."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(str(prompt)) or "y")
    (source / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    if part == "config":
        edit_config(
            source, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        )
    else:
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["evil.Tokens", "evil.Tokens"]}}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(source, "custom code|tokenizer|config")
    assert not asked
    assert not (tmp_path / "mark").exists()


# -- damaged weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 100, 3000, -1])
def test_truncated_weights(size: int, refused: Callable[..., None], source: Path) -> None:
    weights = source / "model.safetensors"
    os.truncate(weights, size if size >= 0 else weights.stat().st_size + size)
    refused(source, r"model\.safetensors is truncated or not a safetensors file")


def test_weights_that_are_no_safetensors(refused: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").write_text("<html>404</html>" * 1000)
    refused(source, r"model\.safetensors is truncated or not a safetensors file")


def test_header_that_claims_more_than_the_file_holds(refused: Callable[..., None], source: Path) -> None:
    header = {"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 128)
    refused(source, r"model\.safetensors is truncated or not a safetensors file")


def test_header_longer_than_the_file(refused: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(source, r"model\.safetensors is truncated or not a safetensors file")


def test_missing_shard(refused: Callable[..., None], source: Path) -> None:
    refused(write_shards(source, ["model-00001-of-00001.safetensors"]), r"model-00001-of-00001\.safetensors is named")


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors", "..\\evil.safetensors", "..", "", 5]
)
def test_shard_name_that_points_outside_the_folder(name: Any, refused: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "evil.safetensors")
    (source / "model.safetensors").touch()
    refused(write_shards(source, [name]), "which is not a plain file name")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 5}'])
def test_index_that_is_none(index: str, refused: Callable[..., None], source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / INDEX).write_text(index)
    refused(source, rf"{INDEX} is not a safetensors index")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(value: float, name: str, refused: Callable[..., None], source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors[name].flatten()[5:7].fill_(value))
    count = 56 * 32 if name.startswith(UP) else 32 if "norm" in name else 64 * 32
    refused(source, rf"{name}: 2 of {count} weights are NaN or infinite")


def test_finite_weights_whose_sum_is_not_are_left_alone() -> None:
    huge = torch.full((8, 8), 3e38)
    assert torch.isinf(huge.sum())
    check_finite("huge", huge)
    huge[2, 3:5] = float("nan")
    with pytest.raises(TernarizeError, match="huge: 2 of 64 weights are NaN or infinite"):
        check_finite("huge", huge)


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_missing_tensor(name: str, refused: Callable[..., None], source: Path) -> None:
    refused(edit_tensors(source, lambda tensors: tensors.pop(name)), rf"lacks 1 of the parameters .* {name}")


def test_config_with_more_layers_than_the_file(refused: Callable[..., None], source: Path) -> None:
    refused(edit_config(source, num_hidden_layers=3), r"lacks 9 of the parameters of LlamaForCausalLM")


def test_tensor_of_another_shape(refused: Callable[..., None], source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.update({f"{UP}.weight": torch.ones(55, 32)}))
    refused(source, rf"{UP}\.weight: the file holds \[55, 32\], but config\.json asks for \[56, 32\]")


def test_weights_stored_as_integers_are_not_taken_for_floats(refused: Callable[..., None], source: Path) -> None:
    """Quantized by someone who left no quantization_config: converting the codes would give nonsense in silence."""
    codes = torch.ones(56, 32, dtype=torch.int8)
    edit_tensors(source, lambda tensors: tensors.update({f"{UP}.weight": codes}))
    refused(source, UP)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"hidden_size": 2**16, "intermediate_size": 2**16},
        {"hidden_size": 2**22, "intermediate_size": 2**24},
        {"vocab_size": 2**40},
    ],
    ids=str,
)
def test_config_that_claims_other_or_huge_sizes(
    changes: dict[str, Any], refused: Callable[..., None], source: Path
) -> None:
    refused(edit_config(source, **changes), ".")


def test_weights_too_large_for_the_file(refused: Callable[..., None], source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors[f"{UP}.weight"].mul_(1e7))
    refused(source, rf"{UP}: a scale or shift of .* does not fit in fp16 \(largest 65504\).*skip")


# -- recipe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, -1, 57, 10**9])
def test_group_size_that_makes_no_sense(
    group_size: int, refused: Callable[..., None], llama: Path, text: Path, recipe: Recipe
) -> None:
    match = rf"group_size.* {group_size}.*(at least 1|Choose at most 56), or null"
    if group_size < 1:
        with pytest.raises(TernarizeError, match=match):
            make_recipe(text, group_size=group_size)
    else:
        refused(llama, match, recipe=make_recipe(text, group_size=group_size))


def test_skip_pattern_that_matches_nothing(refused: Callable[..., None], llama: Path, text: Path) -> None:
    match = r"skip: '\*\.dwon_proj' matches none of the 14 linears, such as 'model\.layers\.0\.self_attn\.q_proj'"
    refused(llama, match, recipe=make_recipe(text, skip=["*.down_proj", "*.dwon_proj"]))


def test_skip_pattern_that_is_no_regular_expression(refused: Callable[..., None], llama: Path, text: Path) -> None:
    refused(llama, r"'re:\(' is not a regular expression", recipe=make_recipe(text, skip=["re:("]))


def test_skip_that_leaves_nothing(refused: Callable[..., None], llama: Path, text: Path) -> None:
    refused(llama, "leaves no linear to make ternary", recipe=make_recipe(text, skip=["*"]))


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "a few words"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_calibration_text_that_fills_no_window(
    words: str, name: str, refused: Callable[..., None], llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(json.dumps({"text": words}) if words and name.endswith("jsonl") else words)
    refused(llama, rf"{name} holds \d+ tokens, too few for one window of 64", recipe=make_recipe(file))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": 1}', 'line 1 has neither "text" nor "messages".*found: prompt'),
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.txt.gz", b"no gzip", "cannot be read as UTF-8"),
    ],
)
def test_calibration_text_that_cannot_be_read(
    name: str, content: bytes, match: str, refused: Callable[..., None], llama: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(llama, match, recipe=make_recipe(tmp_path / name))


@pytest.mark.parametrize("name", ["missing.txt", "nobody/nothing", "wikitext2", "self@-1", "self@x"])
def test_unknown_text_source(
    name: str, refused: Callable[..., None], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(llama, f"text source '{name}'", recipe=make_recipe(Path(name)))


def test_mended_text_needs_no_flag_to_start_over(llama: Path, text: Path, tmp_path: Path) -> None:
    """Nothing was done yet, so there is nothing to resume or to give up."""
    with pytest.raises(TernarizeError, match="no such file"):
        convert(llama, tmp_path / "out", make_recipe(tmp_path / "tpyo.txt"), progress=QUIET)
    convert(llama, tmp_path / "out", make_recipe(text), progress=QUIET)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_longer_than_the_model_has_positions(
    family: str, refused: Callable[..., None], text: Path, tmp_path: Path
) -> None:
    key = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[family]
    refused(make_checkpoint(tmp_path / "short", family, **{key: 32}), r"calibration\.length")


def test_tokenizer_with_more_tokens_than_the_model(refused: Callable[..., None], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "small", vocab_size=32)
    make_tokenizer().save_pretrained(source)
    refused(source, "token")


# -- output -----------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_output_that_is_not_empty_is_left_alone(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "inner").mkdir(parents=True)
    (output / "inner" / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(TernarizeError, match=r"out exists and is not empty.*--force to replace it"):
            convert(llama, output, recipe, resume=resume, progress=QUIET)
    assert tree(tmp_path) == {"out/inner/mine.txt": b"mine"}


def test_output_that_is_a_file_is_left_alone_even_by_force(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TernarizeError, match="out is a file"):
        convert(llama, tmp_path / "out", recipe, force=True, progress=QUIET)
    assert tree(tmp_path) == {"out": b"mine"}


def test_output_below_a_file(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TernarizeError, match="file"):
        convert(llama, tmp_path / "file" / "out", recipe, progress=QUIET)
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("force", [False, True])
def test_folders_of_others_that_bear_the_names_we_use_are_left_alone(
    name: str, force: bool, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """Converting around them or refusing to start are both fine."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with contextlib.suppress(TernarizeError):
        convert(llama, tmp_path / "out", recipe, force=force, progress=QUIET)
    assert (tmp_path / name / "mine.txt").exists()


def test_file_in_the_place_of_the_work_folder(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(TernarizeError, match=r"out\.partial"):
        convert(llama, tmp_path / "out", recipe, progress=QUIET)
    assert tree(tmp_path) == {"out.partial": b"mine"}


@pytest.mark.parametrize("place", ["itself", "its parent"])
def test_source_is_never_replaced_by_its_own_conversion(
    place: str, source: Path, recipe: Recipe, tmp_path: Path
) -> None:
    before = tree(source)
    output = source if place == "itself" else tmp_path
    with pytest.raises(TernarizeError, match="source"):
        convert(source, output, recipe, force=True, progress=QUIET)
    assert tree(source) == before


def test_disk_too_small_is_refused_before_anything_is_computed(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 10_000, 10_000))
    with pytest.raises(TernarizeError, match=r"has 10\.0 kB free, but this needs about .* kB more"):
        convert(llama, tmp_path / "out", recipe, progress=QUIET)
    assert list(tmp_path.iterdir()) == []


# -- a converted folder -----------------------------------------------------------------------------------------------


LOADERS = {"load": ternarize.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}
each_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)


def set_item(name: str, index: Any, value: Any) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].__setitem__(index, value)


@each_loader
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_item(f"{UP}.weight", (3, 2), 243), rf"{UP}\.weight: a packed byte is 243, but five trits fill 0\.\.242"),
        (set_item(f"{UP}.weight", (3, 2), 255), rf"{UP}\.weight: a packed byte is 255"),
        (set_item(f"{UP}.weight", (3, -1), 242), rf"{UP}\.weight: the padding after column 32"),
        (set_item(f"{UP}.scale", (0, 0), 0), rf"{UP}\.scale has values that are not positive"),
        (set_item(f"{UP}.scale", (0, 0), -0.5), rf"{UP}\.scale has values that are not positive"),
        (set_item(f"{UP}.scale", (0, 0), float("nan")), rf"{UP}\.scale has values that are not"),
        (set_item(f"{UP}.scale", (0, 0), float("inf")), rf"{UP}\.scale has values that are not"),
        (set_item(f"{UP}.shift", (0, 0), float("nan")), rf"{UP}\.shift has NaN or infinite"),
        (set_item("model.embed_tokens.weight", (7, slice(-2, None)), 0x7E), "model.embed_tokens"),
        (set_item("lm_head.weight", (7, slice(-2, None)), 0xFF), "lm_head"),
    ],
    ids=["243", "255", "padding", "zero", "negative", "nan", "inf", "shift", "int8 embedding", "int8 head"],
)
def test_packed_values_that_no_conversion_writes(
    loader: Callable[[Path], Any], change: Callable[[dict[str, Tensor]], None], match: str, packed: Path
) -> None:
    with pytest.raises(FormatError, match=match):
        loader(edit_tensors(packed, change))


@each_loader
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_item(f"{UP}.limits", 1, float("nan")), rf"{UP}\.limits has NaN or infinite"),
        (set_item(f"{UP}.limits", 1, float("inf")), rf"{UP}\.limits has NaN or infinite"),
        (set_item(f"{UP}.limits", slice(0, 2), 99.0), rf"{UP}\.scale has values that are not positive and finite"),
        (set_item(f"{UP}.limits", 3, 1e30), rf"{UP}\.shift has NaN or infinite"),
        (lambda tensors: tensors.pop(f"{UP}.limits"), rf"1 missing: {UP}\.limits"),
        (lambda tensors: tensors.pop(f"{UP}.levels"), rf"1 missing: {UP}\.levels"),
    ],
    ids=["nan", "inf", "too large", "shift", "no limits", "no levels"],
)
def test_levels_that_no_conversion_writes(
    loader: Callable[[Path], Any], change: Callable[[dict[str, Tensor]], None], match: str, coded: Path
) -> None:
    with pytest.raises(FormatError, match=match):
        loader(edit_tensors(coded, change))


@each_loader
@pytest.mark.parametrize("part", [f"{UP}.weight", f"{UP}.scale", f"{UP}.shift", "model.norm.weight", "lm_head.weight"])
def test_packed_folder_that_lacks_a_tensor(loader: Callable[[Path], Any], part: str, packed: Path) -> None:
    with pytest.raises(FormatError, match=rf"1 missing: {part}\. Nothing was loaded"):
        loader(edit_tensors(packed, lambda tensors: tensors.pop(part)))


@each_loader
def test_packed_folder_with_a_tensor_too_many(loader: Callable[[Path], Any], packed: Path) -> None:
    with pytest.raises(FormatError, match="1 unexpected: stranger"):
        loader(edit_tensors(packed, lambda tensors: tensors.update(stranger=torch.ones(1))))


@each_loader
@pytest.mark.parametrize(
    "wrong", [torch.zeros(56, 8, dtype=torch.uint8), torch.zeros(56, 7, dtype=torch.int8), torch.zeros(56, 32)]
)
def test_packed_tensor_of_another_shape_or_type(loader: Callable[[Path], Any], wrong: Tensor, packed: Path) -> None:
    with pytest.raises(FormatError, match=rf"1 of another shape: {UP}\.weight"):
        loader(edit_tensors(packed, lambda tensors: tensors.update({f"{UP}.weight": wrong})))


@each_loader
@pytest.mark.parametrize("size", [0, 100, 3000, -1])
def test_packed_folder_that_is_truncated(loader: Callable[[Path], Any], size: int, packed: Path) -> None:
    weights = packed / "model.safetensors"
    os.truncate(weights, size if size >= 0 else weights.stat().st_size + size)
    with pytest.raises(TernarizeError, match=r"model\.safetensors is truncated or not a safetensors file"):
        loader(packed)


@each_loader
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 4}, "format_version 4; this ternarize reads 1, 2, 3. Upgrade with"),
        ({"format_version": 2}, "incomplete or damaged: KeyError"),
        ({"format_version": None}, "format_version None"),
        ({"packing": "base4"}, "packing 'base4'; this ternarize reads 'base3'. Upgrade with"),
        ({"group_size": 11}, "of another shape"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "many"}, "group_size 'many'"),
        ({"int8_group_size": 4}, "of another shape"),
        ({"shift": False}, "14 unexpected"),
        ({"blocks": "model.nothing"}, "names modules that LlamaForCausalLM does not have"),
        ({"blocks": None}, "blocks|modules"),
        ({"kept": None}, "incomplete or damaged"),
        ({"kept": ["model.layers.0.mlp.up_proj"]}, "of another shape|missing|unexpected"),
        ({"int8": {"model.nothing": 1.0}}, "names modules that LlamaForCausalLM does not have"),
        ({"int8": {"model.norm": 1.0}}, "."),
        ({"int8": {}}, "of another shape"),
        ({"int8": {"model.embed_tokens": float("nan"), "lm_head": 1.0}}, "."),
    ],
    ids=str,
)
def test_packed_folder_whose_config_does_not_fit(
    loader: Callable[[Path], Any], changes: dict[str, Any], match: str, packed: Path
) -> None:
    edit_config(packed, quantization_config=read_config(packed)["quantization_config"] | changes)
    with pytest.raises(FormatError, match=match):
        loader(packed)


@each_loader
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 2**22, "intermediate_size": 2**24}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}],
    ids=str,
)
def test_packed_folder_whose_model_is_of_another_size(
    loader: Callable[[Path], Any], changes: dict[str, Any], packed: Path
) -> None:
    with pytest.raises(FormatError, match=r"do not hold what config\.json promises"):
        loader(edit_config(packed, **changes))


@each_loader
def test_packed_folder_whose_index_leads_out_of_it(loader: Callable[[Path], Any], packed: Path) -> None:
    names = list(load_file(packed / "model.safetensors"))
    (packed / "model.safetensors").rename(packed.parent / "evil.safetensors")
    weight_map = dict.fromkeys(names, "../evil.safetensors")
    (packed / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(TernarizeError, match=r"evil\.safetensors"):
        loader(packed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
    ],
    ids=["no config", "damaged config", "no weights", "no tokenizer", "another method"],
)
def test_load_explains_a_folder_that_is_none_of_ours(damage: Callable[[Path], Any], packed: Path) -> None:
    damage(packed)
    with pytest.raises(TernarizeError):
        ternarize.load(packed)


@pytest.mark.parametrize("name", ["text.txt", "missing/folder", "nobody/nothing"])
def test_load_explains_a_name_that_is_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TernarizeError, match=name):
        ternarize.load(name)


# -- by the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["convert", "SOURCE", "--set", "group_szie=8"], 2, "unknown key 'group_szie' (did you mean 'group_size'?)"),
        (["convert", "SOURCE", "--set", "group_size=eight"], 2, "group_size is 'eight', but must be a whole number"),
        (["convert", "SOURCE", "--set", "grid=dtl"], 2, "grid is 'dtl', but must be one of dlt"),
        (["convert", "SOURCE", "--set", "group_size"], 2, "has no '='"),
        (["convert", "SOURCE", "--recipe", "fats"], 2, "recipe 'fats' is not one of those shipped"),
        (["convert", "SOURCE", "--recipe", "missing.yaml"], 2, "recipe missing.yaml: No such file"),
        (["convert", "SOURCE", "--recipe", "bad.yaml"], 2, "unknown key 'gird' (did you mean 'grid'?)"),
        (["convert", "SOURCE", "--set", "group_size=0"], 2, "group_size is 0, but must be at least 1"),
        (["convert", "SOURCE", "--text", "missing.txt", "--set", "group_size=8"], 2, "no such file"),
        (["convert", "SOURCE", "--device", "quantum"], 2, "device 'quantum' cannot be used"),
        (["convert", "NOTHING"], 2, "no such folder"),
        (["plan", "QUANTIZED"], 3, "already quantized (gptq)"),
        (["convert", "QUANTIZED"], 3, "already quantized (gptq)"),
        (["evaluate", "NOTHING"], 2, "no such folder"),
        (["evaluate", "SOURCE", "--text", "missing.txt"], 2, "no such file"),
        (["evaluate", "SOURCE", "--text", "self"], 2, "give --teacher"),
        (["evaluate", "SOURCE", "--text", "short.txt"], 2, "too few for one window of 2048"),
        (["evaluate", "SOURCE", "--dtype", "int4"], 2, "dtype 'int4' is not one of"),
        (["evaluate", "SOURCE", "--teacher", "OTHER", "--length", "8", "--text", "short.txt"], 2, "vocabular"),
        (["evaluate", "TERNARY", "--teacher", "HOLES", "--length", "8", "--text", "short.txt"], 2, "lacks"),
        (["evaluate", "BROKEN"], 2, "config.json"),
        (["evaluate", "SHORT", "--length", "64", "--text", "TEXT"], 2, "--length"),
        (["generate", "SHORT", "abc", "-n", "100"], 2, "--tokens"),
        (["generate", "NOTHING", "a"], 2, "no such folder"),
        (["generate", "TERNARY", ""], 2, "the prompt is empty"),
        (["generate", "NOCHAT", "a", "--chat"], 2, "has no chat template"),
        (["generate", "BROKEN", "a"], 2, "config.json"),
        (["inspect", "SOURCE"], 2, "Is"),
        (["inspect", "TERNARY", "--plot", "plot.xyz"], 2, "cannot draw into"),
        (["inspect", "TERNARY", "--plot", "missing/plot.png"], 2, "cannot draw into"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line_gives_one_message_and_an_exit_code(
    arguments: list[str],
    code: int,
    match: str,
    llama: Path,
    ternary: Path,
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = {"SOURCE": llama, "TERNARY": copy_folder(ternary, tmp_path / "ternary"), "NOTHING": tmp_path / "nothing"}
    folders["TEXT"] = text
    for name in {"QUANTIZED", "OTHER", "HOLES", "BROKEN", "NOCHAT", "SHORT"} & set(arguments):
        folders[name] = tmp_path / name.lower()
    if "QUANTIZED" in folders:
        edit_config(copy_folder(llama, folders["QUANTIZED"]), quantization_config={"quant_method": "gptq"})
    if "OTHER" in folders:
        make_checkpoint(folders["OTHER"], vocab_size=80)
    if "HOLES" in folders:
        edit_tensors(copy_folder(llama, folders["HOLES"]), lambda tensors: tensors.pop(f"{UP}.weight"))
    if "BROKEN" in folders:
        (copy_folder(ternary, folders["BROKEN"]) / "config.json").write_text("{")
    if "NOCHAT" in folders:
        make_checkpoint(folders["NOCHAT"])
    if "SHORT" in folders:
        make_checkpoint(folders["SHORT"], "gpt2", n_positions=32)
    work = tmp_path / "work"
    work.mkdir()
    (work / "bad.yaml").write_text("gird: dlt\n")
    (work / "short.txt").write_text("a few words")
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["ternarize", *(str(folders.get(word, word)) for word in arguments)])
    with pytest.raises(SystemExit) as exit_:
        run()
    out, err = capfd.readouterr()
    assert exit_.value.code == code, err
    assert match in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert out == "" or arguments[0] in ("inspect", "generate")
    assert not list(work.glob("*-ternary"))
