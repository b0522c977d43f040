"""Imports: what is ternary already becomes a folder of the same weights; what is not is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import edit_config, logits, make_checkpoint, make_ternary_checkpoint, random_ternary, read_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

import ternarize
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export import targets
from ternarize.export.bitnet import pack_rows, unpack_rows
from ternarize.export.export import export
from ternarize.export.target import TernaryFolder
from ternarize.importing.folders import import_checkpoint, recognize
from ternarize.progress import Progress
from ternarize.publish import prepare
from ternarize.tensor import TernaryTensor

QUIET = Progress(quiet=True)


@pytest.mark.parametrize("size", [7, 12, 16, 32, 56])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_size_and_levels_are_found(size: int, shift: bool, dtype: torch.dtype) -> None:
    made = random_ternary(24, 56, size, shift)
    if dtype == torch.bfloat16:  # levels that this type holds, as a checkpoint in it has them
        made = TernaryTensor(made.trits, made.scale.bfloat16().half(), made.shift, size)
    weight = made.dequantize(dtype)
    found = recognize(weight)
    if shift and dtype != torch.float32:  # rounded sums need not be levels of any scale and shift
        assert found is None or torch.equal(found.dequantize(dtype), weight)
        return
    assert found is not None
    assert found.group_size == size
    assert torch.equal(found.dequantize(dtype), weight)


def test_an_imported_folder_has_a_card_that_says_what_it_is(tmp_path: Path) -> None:
    source = make_ternary_checkpoint(tmp_path / "source", "llama", torch.float32, size=16)
    (source / "README.md").write_text("---\nlicense: mit\n---\nthe source's own\n")
    found = import_checkpoint(source, tmp_path / "out", progress=QUIET, name="you/bitnet")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("you/bitnet", "quantized")
    assert (data["license"], data["library_name"]) == ("mit", "transformers")
    assert "# bitnet, ternary" in card.text
    assert f"the {found.linears} linears" in card.text
    assert f"| bits per ternary weight | {found.bits_per_ternary_weight:.3f} (trits and scales" in card.text
    assert "one scale of 16 bits for each group of 16 columns" in card.text
    assert "| embeddings and head | floats, as in the source |" in card.text
    parcel = prepare(tmp_path / "out", "me/bitnet-ternary")
    assert 'ternarize.load("me/bitnet-ternary")' in parcel.card
    local = import_checkpoint(source, tmp_path / "local", progress=QUIET)
    assert local == found
    assert "base_model" not in ModelCard((tmp_path / "local" / "README.md").read_text()).data.to_dict()


def test_floats_are_not_recognized() -> None:
    assert recognize(torch.randn(16, 64, generator=torch.Generator().manual_seed(0))) is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_imported_folder_predicts_what_its_source_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_ternary_checkpoint(tmp_path / "source", family, dtype, size=16)
    found = import_checkpoint(source, tmp_path / "out", progress=QUIET)
    assert set(found.group_sizes) == {16}
    assert not found.shift
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    model, tokenizer = ternarize.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert tokenizer("abc")["input_ids"]
    stored, folder = read_tensors(source), TernaryFolder(tmp_path / "out")
    for name in folder.linears:
        assert torch.equal(folder.ternary(name).dequantize(dtype), stored[f"{name}.weight"])
    for name in folder.rest:
        assert torch.equal(folder.tensor(name), stored[name])


def test_shifts_are_imported_beside_linears_without(tmp_path: Path) -> None:
    source = make_ternary_checkpoint(tmp_path / "source", "llama", torch.float32, size=8, shift=True)
    found = import_checkpoint(source, tmp_path / "out", progress=QUIET)
    assert found.shift
    folder, stored = TernaryFolder(tmp_path / "out"), read_tensors(source)
    assert all(torch.equal(folder.ternary(n).dequantize(), stored[f"{n}.weight"]) for n in folder.linears)


def test_a_float_model_is_refused_by_its_first_linear_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TernarizeError, match=r"model\.layers\.0\.self_attn\.q_proj is not ternary"):
        import_checkpoint(llama, tmp_path / "out", progress=QUIET)
    assert not list(tmp_path.iterdir())


def test_skipped_linears_stay_as_they_are(tmp_path: Path) -> None:
    source = make_ternary_checkpoint(tmp_path / "source", "llama", torch.float32, size=16)
    import_checkpoint(source, tmp_path / "out", ("*.down_proj",), progress=QUIET)
    folder = TernaryFolder(tmp_path / "out")
    assert not any("down_proj" in name for name in folder.linears)
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    torch.testing.assert_close(logits(ternarize.load(tmp_path / "out")[0]), expected, rtol=1e-4, atol=1e-4)


# -- BitNet --------------------------------------------------------------------------------------------------------


def test_rows_are_packed_as_transformers_packs_them() -> None:
    integrations = pytest.importorskip("transformers.integrations.bitnet")
    trits = random_ternary(24, 10, 10).trits
    assert torch.equal(pack_rows(trits), integrations.pack_weights(trits.clone()))
    assert torch.equal(unpack_rows(pack_rows(trits)), trits)


@torch.no_grad()
def make_bitnet(folder: Path, kind: str, family: str = "llama") -> tuple[Path, dict[str, Tensor]]:
    """A BitNet checkpoint as transformers reads it, and the float32 weights that it stands for."""
    make_checkpoint(folder, family)
    from safetensors.torch import load_file, save_file

    tensors, weights = load_file(folder / "model.safetensors"), {}
    for number, name in enumerate([n for n, t in tensors.items() if "layers." in n and t.ndim == 2]):
        made = random_ternary(*tensors[name].shape, tensors[name].shape[1], seed=number)
        scale = torch.tensor([0.0625 + 0.03125 * number])
        if kind == "online":  # master weights, rounded on every use
            weight = tensors[name].float()
            mean = weight.abs().mean()
            trits = (weight * (1 / mean)).round().clamp(-1, 1)
            tensors[name] = weight.bfloat16()
            mean = tensors[name].float().abs().mean()
            trits = (tensors[name].float() * (1 / mean)).round().clamp(-1, 1)
            weights[name] = (trits / (1 / mean)).bfloat16().float()
            continue
        tensors[name] = pack_rows(made.trits)
        tensors[f"{name}_scale"] = scale if kind == "autobitlinear" else 1 / scale
        weights[name] = made.trits * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if kind == "bitlinear" else "autobitlinear",
        "quantization_mode": "online" if kind == "online" else "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    edit_config(folder, quantization_config=quantization)
    return folder, weights


@pytest.mark.parametrize("kind", ["autobitlinear", "bitlinear", "online"])
def test_bitnet_checkpoints_are_imported_weight_by_weight(kind: str, tmp_path: Path) -> None:
    source, weights = make_bitnet(tmp_path / "source", kind)
    found = import_checkpoint(source, tmp_path / "out", progress=QUIET)
    assert found.linears == len(weights) == 14
    folder = TernaryFolder(tmp_path / "out")
    for name in folder.linears:
        torch.testing.assert_close(folder.ternary(name).dequantize(), weights[f"{name}.weight"], rtol=2**-11, atol=0)


def in_8_bits(module: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """What BitNet's linears make of a token's activations: multiples of its largest over 127."""
    (values,) = inputs
    step = values.abs().amax(-1, keepdim=True) / 127
    return (values / step).round() * step


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@torch.no_grad()
def test_bitnet_goes_in_and_out_again(family: str, tmp_path: Path) -> None:
    source, _ = make_bitnet(tmp_path / "source", "autobitlinear", family)
    import_checkpoint(source, tmp_path / "out", progress=QUIET)
    (done,) = export(tmp_path / "out", ["bitnet"], progress=QUIET)
    assert done.exact
    assert done.error == 0
    written, stored = read_tensors(done.path), read_tensors(source)
    assert all(torch.equal(written[name].to(tensor.dtype), tensor) for name, tensor in stored.items())
    ids = torch.arange(3, 43)[None]
    target = targets()["bitnet"]
    expected = target.logits(source, ids)
    assert torch.equal(target.logits(done.path, ids), expected)
    model: Any = ternarize.load(tmp_path / "out", dtype=torch.float32)[0]
    student = model(input_ids=ids, use_cache=False).logits
    difference = (expected - student).abs().mean() / student.std()
    assert 0 < float(difference) < target.tolerance  # the reader rounds activations to 8 bits
    for name in TernaryFolder(tmp_path / "out").linears:
        model.get_submodule(name).register_forward_pre_hook(in_8_bits)
    rounded = model(input_ids=ids, use_cache=False).logits
    assert float((expected - rounded).abs().max() / rounded.std()) < 1e-3  # all of it, but for what falls at a half


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    source, _ = make_bitnet(tmp_path / "source", "autobitlinear")
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "use_rms_norm": True}
    edit_config(source, quantization_config=quantization)
    with pytest.raises(UnsupportedModelError, match="use_rms_norm"):
        import_checkpoint(source, tmp_path / "out", progress=QUIET)
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 2, "group_size": 64})
    with pytest.raises(UnsupportedModelError, match="gptq"):
        import_checkpoint(source, tmp_path / "out", progress=QUIET)
