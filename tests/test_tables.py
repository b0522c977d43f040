"""Embeddings and heads in 6 bits, from the recipe to the exports; int8 is what all other tests have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import copy_folder, logits, make_checkpoint, make_recipe, read_config, read_tensors
from transformers import AutoModelForCausalLM

import ternarize
from ternarize.checkpoint import Checkpoint
from ternarize.conversion import convert
from ternarize.errors import FormatError, TernarizeError
from ternarize.export.export import export
from ternarize.export.target import TernaryFolder
from ternarize.plan import make_plan
from ternarize.progress import Progress
from ternarize.report import Report
from ternarize.runtime import TableEmbedding, TableHead

QUIET = Progress(quiet=True)
SIX = {"embeddings": "int6", "head": "int6", "int8_group_size": 64}
FORM = {"grid": "symmetric", "group_size": 32, "feedback": False, "curvature": False, "refit": False, "correction": 0.0}


@pytest.fixture(scope="module")
def folders(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A llama with a head of its own, in int6 and in int8, and a tied Gemma, whose embedding has a multiplier."""
    place = tmp_path_factory.mktemp("tables")
    made = {}
    for name, family, settings in (
        ("six", "llama", SIX),
        ("eight", "llama", {"int8_group_size": 64}),
        ("tied", "gemma3_text", SIX),
    ):
        tied = name == "tied"
        shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": tied}
        source = make_checkpoint(place / f"{name}-source", family, **shape)
        made[name] = place / name
        convert(source, made[name], make_recipe(text, **FORM, **settings), progress=QUIET)
    return made


def test_the_folder_says_so(folders: dict[str, Path]) -> None:
    config = read_config(folders["six"])["quantization_config"]
    assert (config["format_version"], config["int8"], sorted(config["int6"])) == (
        3,
        {},
        ["lm_head", "model.embed_tokens"],
    )
    tied = read_config(folders["tied"])["quantization_config"]
    assert tied["int6"] == {"model.embed_tokens": 8.0}
    report = Report.read(folders["six"])
    assert (report.int8, report.int6) == ([], ["lm_head", "model.embed_tokens"])
    assert (
        "| embeddings and head | `lm_head` and `model.embed_tokens` in int6 |"
        in (folders["six"] / "README.md").read_text()
    )
    assert report.output_bytes < Report.read(folders["eight"]).output_bytes


@pytest.mark.parametrize("name", ["six", "tied"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_loaded_model_predicts_what_its_float_twin_does(
    name: str, activations: str, folders: dict[str, Path]
) -> None:
    model, _ = ternarize.load(folders[name], activations=activations, dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), TableEmbedding)
    assert isinstance(model.get_output_embeddings(), TableHead) == (name == "six")
    twin.dequantize()
    want = logits(twin)
    assert (logits(model) - want).abs().max() < (1e-4 if activations == "float" else 0.1) * want.abs().max()


def test_saving_keeps_the_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    model, _ = ternarize.load(folders["six"], dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(logits(again), logits(model))


def test_in_place_gives_the_same_tables(folders: dict[str, Path], text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["six"].with_name("six-source"))
    stored, tokenizer = ternarize.load(folders["six"])
    placed = ternarize.ternarize(model, tokenizer, make_recipe(text, **FORM, **SIX))
    assert torch.equal(logits(placed), logits(stored))


@pytest.mark.parametrize("name", ["dense", "metal", "mlx"])
def test_exports_hold_the_table(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders["six"], [name], tmp_path / "out", progress=QUIET)
    assert done.exact
    tensors = read_tensors(done.path)
    table = TernaryFolder(folders["six"]).tensor("lm_head.weight")
    if name != "mlx":
        torch.testing.assert_close(tensors["lm_head.weight"].float(), table, rtol=2**-8, atol=1e-6)
        return
    codes = tensors["lm_head.weight"].view(torch.uint8).float()
    scale, bias = (tensors[f"lm_head.{part}"].float() for part in ("scales", "biases"))
    assert torch.equal(scale * codes + bias, table)


def test_what_does_not_fit_is_refused_before_anything_is_done(folders: dict[str, Path], text: Path) -> None:
    source = folders["six"].with_name("six-source")
    recipe = make_recipe(text, **FORM, **SIX | {"int8_group_size": 20})
    with pytest.raises(TernarizeError, match=r"model\.embed_tokens has 64 columns in groups of 20; int6 takes"):
        make_plan(Checkpoint(source), recipe)


def test_damaged_scales_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_folder(folders["six"], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, -2:] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lm_head\.weight has scales that are not positive"):
        ternarize.load(folder)
