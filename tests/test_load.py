"""Loading a converted folder: every way in that transformers has, and none that ends in random weights.

With the package: `ternarize.load`, AutoModelForCausalLM, the concrete class, the base model, device maps, types, saving
again, dequantizing. Without it, in a process where it cannot be imported, stock transformers must raise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import copy_folder, edit_config, logits, make_checkpoint, make_recipe, read_config, read_tensors
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ternarize
from ternarize import Recipe, TernaryLinear, conversion, quantizer
from ternarize.errors import FormatError
from ternarize.evaluate import load_any
from ternarize.format import TRIPWIRE
from ternarize.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def expected(ternary: Path) -> torch.Tensor:
    return logits(ternarize.load(ternary)[0])


@pytest.fixture(scope="module")
def experts_only(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture where nothing but the experts is ternary: everything else could load as it stands."""
    folder = tmp_path_factory.mktemp("experts")
    recipe = make_recipe(text, embeddings="keep", head="keep", skip=["*.self_attn.*"])
    report = conversion.convert(make_checkpoint(folder / "source", "mixtral"), folder / "out", recipe, progress=QUIET)
    assert all(".experts." in entry.name for entry in report.linears)
    assert not report.int8
    return folder / "out"


# -- with the package -------------------------------------------------------------------------------------------------


def test_load_gives_model_and_tokenizer(ternary: Path, llama: Path) -> None:
    model, tokenizer = ternarize.load(ternary)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert sum(isinstance(module, TernaryLinear) for module in model.modules()) == 14
    source = AutoTokenizer.from_pretrained(llama)
    assert tokenizer("abc 012")["input_ids"] == source("abc 012")["input_ids"]
    assert tokenizer.chat_template == source.chat_template


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_from_pretrained_gives_the_same_model(loader: Any, ternary: Path, expected: torch.Tensor) -> None:
    assert torch.equal(logits(loader.from_pretrained(ternary)), expected)


def test_base_model_gives_the_hidden_states_of_the_whole_one(ternary: Path) -> None:
    ids = torch.arange(3, 40)[None]
    whole, base = ternarize.load(ternary)[0], AutoModel.from_pretrained(ternary)
    assert torch.equal(base(input_ids=ids).last_hidden_state, whole.model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map_changes_nothing_in_the_numbers(device_map: Any, ternary: Path, expected: torch.Tensor) -> None:
    assert torch.equal(logits(ternarize.load(ternary, device_map=device_map)[0]), expected)


@pytest.mark.parametrize("buffers", [False, True])
def test_block_offloaded_to_disk_computes_the_same(
    buffers: bool, ternary: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    device_map = dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"], "cpu")
    device_map |= {"lm_head": "cpu", "model.layers.0": "disk"}
    model, _ = ternarize.load(ternary, device_map=device_map, offload_folder=tmp_path, offload_buffers=buffers)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.is_meta == buffers
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_activations_and_leaves_the_packed_weights_alone(
    dtype: torch.dtype, ternary: Path, expected: torch.Tensor
) -> None:
    model, _ = ternarize.load(ternary, dtype=dtype)
    assert model.dtype == dtype
    assert model(input_ids=torch.tensor([[3, 4]])).logits.dtype == dtype
    assert _packed(model) == _packed(ternarize.load(ternary)[0])
    tolerance = {torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    assert float((logits(model) - expected).abs().max()) < tolerance


def test_dtype_auto_is_that_of_the_config(ternary: Path, tmp_path: Path) -> None:
    folder = edit_config(copy_folder(ternary, tmp_path / "copy"), dtype="bfloat16")
    assert ternarize.load(folder)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_a_loaded_model_to_another_dtype_keeps_its_packed_weights(
    dtype: torch.dtype, ternary: Path, tmp_path: Path
) -> None:
    model, _ = ternarize.load(ternary)
    before = _packed(model)
    model.to(dtype)
    assert _packed(model) == before
    model.save_pretrained(tmp_path)
    types = {name: tensor.dtype for name, tensor in read_tensors(tmp_path).items() if name.endswith("limits")}
    assert set(types.values()) == {torch.float32}


def _packed(model: Any) -> dict[str, tuple[torch.dtype, list[Any]]]:
    """Type and values of every packed tensor."""
    return {
        f"{name}.{key}": (tensor.dtype, tensor.tolist())
        for name, module in model.named_modules()
        if type(module).__module__.startswith("ternarize")
        for key, tensor in module.named_buffers(recurse=False)
        if key != "anchor"
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "qwen3_moe"])
def test_save_pretrained_round_trip_is_exact(family: str, recipe: Recipe, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", family)
    conversion.convert(source, tmp_path / "out", recipe, progress=QUIET)
    model, _ = ternarize.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    before, after = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    configs = [read_config(tmp_path / name)["quantization_config"] for name in ("out", "again")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_save_pretrained_in_several_shards_loads_again(ternary: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    ternarize.load(ternary)[0].save_pretrained(tmp_path, max_shard_size="5KB")
    AutoTokenizer.from_pretrained(ternary).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(ternarize.load(tmp_path)[0]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_leaves_ordinary_modules_of_the_models_dtype(dtype: torch.dtype, ternary: Path) -> None:
    model, _ = ternarize.load(ternary, dtype=dtype)
    model.dequantize()
    assert not any(isinstance(module, TernaryLinear) for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_generating_with_a_cache_is_generating_without(family: str, recipe: Recipe, tmp_path: Path) -> None:
    conversion.convert(make_checkpoint(tmp_path / "in", family), tmp_path / "out", recipe, progress=QUIET)
    model, _ = ternarize.load(tmp_path / "out")
    prompt = torch.arange(3, 13)[None]
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 12}
    settings |= {"eos_token_id": [], "pad_token_id": 0}
    with_cache = model.generate(prompt, use_cache=True, **settings)
    assert with_cache.shape == (1, 22)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **settings))


def test_a_padded_batch_gives_each_row_what_it_gives_alone(ternary: Path) -> None:
    model, _ = ternarize.load(ternary)
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        alone = model(input_ids=ids[1:, 4:]).logits
    torch.testing.assert_close(both[1:, 4:], alone, rtol=1e-4, atol=1e-5)


def test_who_wants_the_model_alone_reads_no_tokenizer(ternary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a tokenizer was read")

    monkeypatch.setattr(quantizer.AutoTokenizer, "from_pretrained", read)
    load_any(ternary, "cpu", torch.float32)
    with pytest.raises(AssertionError, match="a tokenizer was read"):
        ternarize.load(ternary)


def test_load_refuses_a_float_checkpoint(llama: Path) -> None:
    with pytest.raises(FormatError, match="is not a ternarize folder"):
        ternarize.load(llama)


# -- without the package ----------------------------------------------------------------------------------------------

STOCK = """
import json, sys
sys.modules["ternarize"] = None  # any import of it raises
import transformers
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
outcomes = {}
for case in sys.argv[1:]:
    loader, folder = case.split("=")
    try:
        globals()[loader].from_pretrained(folder)
        outcomes[case] = "loaded"
    except Exception as error:
        outcomes[case] = f"{type(error).__name__}: {error}"
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def stock(ternary: Path, experts_only: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process without the package says: {"LOADER FOLDER": "loaded" or the error}."""
    work = tmp_path_factory.mktemp("stock")
    folders = {"llama": ternary, "mixtral": experts_only}
    for name, folder in list(folders.items()):
        model, tokenizer = ternarize.load(folder)
        for again, settings in (("resaved", {}), ("resaved-shards", {"max_shard_size": "20KB"})):
            folders[f"{name}-{again}"] = work / f"{name}-{again}"
            model.save_pretrained(work / f"{name}-{again}", **settings)
            tokenizer.save_pretrained(work / f"{name}-{again}")
        model.dequantize()
        folders[f"{name}-dequantized"] = work / f"{name}-dequantized"
        model.save_pretrained(work / f"{name}-dequantized")
    cases = {}
    for name, folder in folders.items():
        concrete = "LlamaForCausalLM" if name.startswith("llama") else "MixtralForCausalLM"
        for loader in ("AutoModelForCausalLM", "AutoModel", concrete):
            cases[f"{loader}={folder}"] = f"{loader} {name}"
    done = subprocess.run([sys.executable, "-c", STOCK, *cases], capture_output=True, text=True, check=True)
    return {cases[case]: outcome for case, outcome in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("saved", ["", "-resaved", "-resaved-shards"])
@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "AutoModel", "concrete"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_the_package_transformers_refuses(family: str, loader: str, saved: str, stock: dict[str, str]) -> None:
    concrete = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}[family]
    outcome = stock[f"{concrete if loader == 'concrete' else loader} {family}{saved}"]
    assert outcome != "loaded"
    assert "Error: " in outcome
    if not saved:
        assert TRIPWIRE in outcome


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_the_package_a_dequantized_folder_loads(family: str, stock: dict[str, str]) -> None:
    """The other tests of this kind fail for the right reason: here the same process loads."""
    assert {outcome for case, outcome in stock.items() if case.endswith(f"{family}-dequantized")} == {"loaded"}


def test_tripwire_says_what_to_install(ternary: Path) -> None:
    assert read_config(ternary)["transformers_weights"] == TRIPWIRE
    assert not (ternary / TRIPWIRE).exists()
    assert "pip-install-ternarize" in TRIPWIRE
