"""Format versions stay readable: folders of a few kilobytes, written once, and what their models predict.

`tests/golden/v1/llama` has what a dense model can have: shift, bias, a short last group, an int8 embedding, an int8
head of its own, linears that stayed float. `tests/golden/v1/mixtral` has experts, a tied head, no shift, one group a
row. `tests/golden/v2/llama` has scales and shifts in 4 and 8 bits, `tests/golden/v3/llama` an embedding in int8 and a
head in int6. They are never written again; another version of the
format gets a folder of its own beside them. They were made by

    python tests/test_golden.py FOLDER

with `write_golden` below, from fixed seeds, by ternarize 0.1.0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint, make_recipe, make_text, read_config, read_tensors, stored_weights
from transformers import AutoModelForCausalLM

import ternarize
from ternarize.conversion import convert
from ternarize.progress import Progress

GOLDEN = Path(__file__).parent / "golden" / "v1"
CODED = Path(__file__).parent / "golden" / "v2" / "llama"
SIX = Path(__file__).parent / "golden" / "v3" / "llama"
IDS = [[7, 23, 5, 61, 40, 12, 33, 8]]
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name: (config, recipe)
    "llama": (
        {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1},
        {"group_size": 12, "skip": ["*.k_proj"]},
    ),
    "mixtral": (
        {"num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size": 24, "tie_word_embeddings": True},
        {"group_size": None, "grid": "symmetric"},
    ),
}


def write_golden(folder: Path) -> None:
    """Make the folders; sources are named by relative paths, so that none of a machine's stand in the reports."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    for name, (config, settings) in MODELS.items():
        make_checkpoint(Path(f"{name}-source"), name, **config)
        recipe = make_recipe(make_text(Path("text.txt")), **settings)
        convert(f"{name}-source", name, recipe, progress=Progress(quiet=True))
        Path(name, "README.md").unlink()  # the card is no part of the format


def write_coded(folder: Path) -> None:
    """Make the folder of version 2."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_checkpoint(Path("llama-source"), "llama", num_hidden_layers=1)
    recipe = make_recipe(make_text(Path("text.txt")), scale_bits=4, shift_bits=8)
    convert("llama-source", "llama", recipe, progress=Progress(quiet=True))
    Path("llama", "README.md").unlink()


def write_six(folder: Path) -> None:
    """Make the folder of version 3."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_checkpoint(Path("llama-source"), "llama", num_hidden_layers=1, hidden_size=64, intermediate_size=24)
    form = {"grid": "symmetric", "scale_bits": 4, "int8_group_size": 64, "head": "int6"}
    convert("llama-source", "llama", make_recipe(make_text(Path("text.txt")), **form), progress=Progress(quiet=True))
    Path("llama", "README.md").unlink()


LOGITS: dict[str, list[float]] = {
    "llama": [-0.274023, 1.573814, 2.042969, -0.287107, 0.483684, -0.792056, 2.192575, 0.029774],
    "mixtral": [1.150518, 1.564906, 0.360184, -2.08677, 0.195827, -2.684309, -2.096845, -0.513999],
}


CODED_LOGITS = [-1.281406, 4.253516, 1.325195, -2.621945, 0.593367, -0.65529, -1.516289, 0.47495]


def test_version_2_predicts_what_it_always_did() -> None:
    model, _ = ternarize.load(CODED)
    found = model(input_ids=torch.tensor(IDS)).logits[0, -1, :8]
    torch.testing.assert_close(found, torch.tensor(CODED_LOGITS), rtol=0, atol=1e-5)
    assert read_config(CODED)["quantization_config"]["format_version"] == 2
    for name, weight in stored_weights(CODED).items():
        torch.testing.assert_close(model.get_submodule(name).dequantize(), weight, rtol=1e-3, atol=1e-6)
    assert sum(path.stat().st_size for path in CODED.iterdir()) <= 30_000


SIX_LOGITS = [-1.127503, -0.776402, -0.633189, -0.367527, -1.764531, -0.936492, -1.524567, -0.710925]


def test_version_3_predicts_what_it_always_did() -> None:
    model, _ = ternarize.load(SIX)
    found = model(input_ids=torch.tensor(IDS)).logits[0, -1, :8]
    torch.testing.assert_close(found, torch.tensor(SIX_LOGITS), rtol=0, atol=1e-5)
    config = read_config(SIX)["quantization_config"]
    assert (config["format_version"], list(config["int8"]), list(config["int6"])) == (
        3,
        ["model.embed_tokens"],
        ["lm_head"],
    )
    assert sum(path.stat().st_size for path in SIX.iterdir()) <= 40_000


@pytest.mark.parametrize("name", MODELS)
def test_version_1_predicts_what_it_always_did(name: str) -> None:
    model, tokenizer = ternarize.load(GOLDEN / name)
    found = model(input_ids=torch.tensor(IDS)).logits[0, -1, :8]
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), rtol=0, atol=1e-5)
    assert tokenizer("Abc 01")["input_ids"] == [31, 6, 7, 4, 57, 58]


@pytest.mark.parametrize("name", MODELS)
def test_version_1_loads_through_transformers_and_dequantizes(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    model.dequantize()
    found = model(input_ids=torch.tensor(IDS)).logits[0, -1, :8]
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), rtol=0, atol=1e-5)


def test_bytes_of_version_1_mean_what_the_description_says() -> None:
    """One row by hand: byte = sum of (trit + 1) 3^i, weight = scale trit + shift."""
    tensors = read_tensors(GOLDEN / "llama")
    name = "model.layers.0.self_attn.q_proj"
    packed, scale, shift = (tensors[f"{name}.{part}"][0].tolist() for part in ("weight", "scale", "shift"))
    weights = []
    for column in range(32):
        trit = packed[column // 5] // 3 ** (column % 5) % 3 - 1
        weights.append(scale[column // 12] * trit + shift[column // 12])
    model, _ = ternarize.load(GOLDEN / "llama")
    torch.testing.assert_close(model.get_submodule(name).dequantize()[0], torch.tensor(weights))
    torch.testing.assert_close(stored_weights(GOLDEN / "llama")[name][0], torch.tensor(weights))


def test_folders_are_of_version_1_small_and_name_no_machine() -> None:
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000
    assert {read_config(GOLDEN / name)["quantization_config"]["format_version"] for name in MODELS} == {1}
    for path in files:
        assert b"/tmp" not in path.read_bytes()
        assert b"/home" not in path.read_bytes()
        assert b"/root" not in path.read_bytes()


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]).resolve() / "v1")
    write_coded(Path(sys.argv[1]).resolve() / "v2")
    write_six(Path(sys.argv[1]).resolve() / "v3")
