"""The quality gate: it measures what the models themselves say, and calls a collapsed model collapsed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_recipe
from transformers import GenerationConfig

from ternarize import Recipe, conversion, gate
from ternarize.conversion import convert
from ternarize.evaluate import Evaluation, compare, load_any
from ternarize.gate import judge
from ternarize.progress import Progress
from ternarize.text import load_tokenizer

QUIET = Progress(quiet=True)


def test_the_walks_end_gives_the_same_figures_as_whole_models(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    original = conversion.compare_walks

    def compare_walks(*arguments: Any) -> Evaluation:
        kept.extend(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(conversion, "compare_walks", compare_walks)
    monkeypatch.setattr("ternarize.lesson.PIECE_TOKENS", 20)  # four pieces of a window, the last one short
    report = convert(llama, tmp_path / "out", recipe, progress=QUIET)
    found = report.run["verdict"]["evaluation"]
    student, teacher = (load_any(folder, "cpu", torch.float32) for folder in (tmp_path / "out", llama))
    windows = torch.cat(kept)[-found["windows"] :]
    whole = compare(student, teacher, windows, "text", QUIET).to_dict()
    assert found["tokens"] == found["windows"] * 63
    for key in ("perplexity", "teacher_perplexity", "kl"):
        assert found[key] == pytest.approx(whole[key], rel=0.02), key  # the walk may compute in bfloat16


@pytest.mark.parametrize(
    ("calibration", "named"),
    [({"samples": 64}, gate.HELD_OUT), ({"samples": 2}, gate.FITTED), ({"samples": 64, "held_out": 0.0}, gate.FITTED)],
    ids=str,
)
def test_text_that_was_fitted_to_is_not_called_held_out(
    calibration: dict[str, Any], named: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    report = convert(llama, tmp_path / "out", make_recipe(text, calibration=calibration), progress=QUIET)
    assert report.run["verdict"]["evaluation"]["text"] == named
    assert named in (tmp_path / "out" / "README.md").read_text()


class Parrot:
    """Says what it is told to."""

    device = "cpu"
    generation_config = GenerationConfig()

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.tokens])], 1)


TOKENIZER = SimpleNamespace(__call__=None, decode=lambda ids, skip_special_tokens: " ".join(map(str, ids.tolist())))


def evaluation(**changes: float) -> Evaluation:
    values: dict[str, Any] = {"perplexity": 12.0, "teacher_perplexity": 10.0, "kl": 0.2, "agreement": 0.8}
    return Evaluation("text", 1, 64, 63, **(values | changes))


@pytest.mark.parametrize(
    ("changes", "tokens", "word"),
    [
        ({}, list(range(32)), "close"),
        ({"perplexity": 21.0}, list(range(32)), "weak"),
        ({"kl": 4.5}, list(range(32)), "collapsed"),
        ({"agreement": 0.05}, list(range(32)), "collapsed"),
        ({"perplexity": float("nan")}, list(range(32)), "collapsed"),
        ({"perplexity": float("inf"), "kl": 30.0}, list(range(32)), "collapsed"),
        ({}, [7] * 32, "weak"),
        ({"agreement": 0.25}, [7] * 32, "collapsed"),
        ({"agreement": 0.25}, [7, 8, 9] * 10 + [7, 8], "collapsed"),
        ({}, [7, 7, 7], "close"),  # it ended its text by itself
    ],
)
def test_the_word_fits_the_figures(changes: dict[str, float], tokens: list[int], word: str) -> None:
    verdict = judge(Parrot(tokens), TOKENIZER, evaluation(**changes), torch.arange(20))  # type: ignore[arg-type]
    assert verdict.word == word
    assert ("Use a stronger recipe" in verdict.why) == (word != "close")
    assert verdict.text.split() == [str(token) for token in tokens]


def test_a_data_free_model_is_not_vouched_for(llama: Path, text: Path, tmp_path: Path) -> None:
    free = {"feedback": False, "curvature": False, "refit": False, "sweeps": 0, "correction": 0.0}
    report = convert(llama, tmp_path / "out", make_recipe(text, **free), progress=QUIET)
    verdict = report.run["verdict"]
    assert verdict["evaluation"] is None
    assert verdict["word"] in ("not compared", "collapsed")


def test_the_text_is_the_students_own(ternary: Path) -> None:
    student, tokenizer = load_any(ternary, "cpu", torch.float32), load_tokenizer(ternary)
    prompt = torch.arange(5, 25)
    verdict = judge(student, tokenizer, None, prompt)
    out = student.generate(prompt[None, :16], max_new_tokens=32, do_sample=False, pad_token_id=0)[0, 16:]
    assert verdict.text == tokenizer.decode(out, skip_special_tokens=True)
    assert load_file(ternary / "model.safetensors")
