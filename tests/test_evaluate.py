"""Measuring: perplexity, KL and agreement against slow direct computations, the windows, where results are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import contents, copy_folder, make_model, make_text, make_tokenizer, read_tensors
from tokenizers import processors
from torch import Tensor

import ternarize
from ternarize import evaluate as module
from ternarize import lesson
from ternarize.errors import TernarizeError
from ternarize.evaluate import Evaluation, compare, evaluate
from ternarize.files import find_shards
from ternarize.progress import Progress
from ternarize.report import Report
from ternarize.text import evaluation_windows

QUIET = Progress(quiet=True)


def measure(folder: Path, teacher: Path | None, *texts: Path | str, **changes: Any) -> list[Evaluation]:
    settings: dict[str, Any] = {"length": 32, "windows": 3, "device": "cpu", "dtype": torch.float32, "progress": QUIET}
    return evaluate(folder, teacher, [str(text) for text in texts], **(settings | changes))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def distributions(model: Any, window: Tensor) -> list[list[float]]:
    """Log-probabilities of the next token at every place, each from its own pass over what came before."""
    rows = []
    for end in range(1, len(window)):
        logits = model(input_ids=window[None, :end]).logits[0, -1].double()
        rows.append((logits - logits.exp().sum().log()).tolist())
    return rows


def test_perplexity_is_what_a_slow_direct_computation_gives(ids: Tensor) -> None:
    model = make_model("llama")
    total, count = 0.0, 0
    for window in ids:
        for place, row in enumerate(distributions(model, window)):
            total -= row[int(window[place + 1])]
            count += 1
    result = compare(model, None, ids, "text", QUIET)
    assert (result.tokens, result.windows, result.length) == (count, 3, 20)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.teacher_perplexity is result.kl is result.agreement is None


def test_kl_and_agreement_are_what_a_slow_direct_computation_gives(ids: Tensor) -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    kl, same, nll, count = 0.0, 0, 0.0, 0
    for window in ids:
        pairs = zip(distributions(teacher, window), distributions(student, window), strict=True)
        for place, (p, q) in enumerate(pairs):
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            same += p.index(max(p)) == q.index(max(q))
            nll -= p[int(window[place + 1])]
            count += 1
    result = compare(student, teacher, ids, "text", QUIET)
    assert result.kl == pytest.approx(kl / count, rel=1e-4)
    assert result.kl is not None
    assert result.kl > 0.1
    assert result.agreement == pytest.approx(same / count)
    assert result.teacher_perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_model_against_itself_has_no_distance(ids: Tensor) -> None:
    model = make_model("llama")
    result = compare(model, model, ids, "text", QUIET)
    assert result.kl == 0
    assert result.agreement == 1
    assert result.perplexity == result.teacher_perplexity


def test_result_does_not_depend_on_the_chunks(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    whole = compare(student, teacher, ids, "text", QUIET)
    monkeypatch.setattr(lesson, "LOGITS_AT_ONCE", 3 * student.config.vocab_size)
    chunked = compare(student, teacher, ids, "text", QUIET)
    for name in ("perplexity", "teacher_perplexity", "kl", "agreement"):
        assert getattr(chunked, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_hopeless_model_has_infinite_perplexity_and_no_exception(ids: Tensor) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert compare(model, None, ids, "text", QUIET).perplexity == math.inf


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    tokenizer = make_tokenizer()
    text = "abcdefghij" * 7
    ids = evaluation_windows(text, tokenizer, 16, None)
    assert ids.shape == (4, 16)
    assert ids.flatten().tolist() == tokenizer(text)["input_ids"][:64]
    assert torch.equal(evaluation_windows(text, tokenizer, 16, 3), ids[:3])


def test_every_window_starts_with_bos_where_the_tokenizer_has_that_habit() -> None:
    tokenizer = make_tokenizer()
    plain = tokenizer("abcdefghij" * 7)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    ids = evaluation_windows("abcdefghij" * 7, tokenizer, 16, None)
    assert ids[:, 0].tolist() == [1, 1, 1, 1]
    assert ids[:, 1:].flatten().tolist() == plain[:60]


def test_text_too_short_for_a_window_is_refused(llama: Path, tmp_path: Path) -> None:
    short = make_text(tmp_path / "short.txt", 31)
    with pytest.raises(TernarizeError, match="the evaluation text holds 31 tokens, too few for one window of 32"):
        measure(llama, None, short)


def test_float_checkpoint_is_measured_and_left_as_it_is(llama: Path, text: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    (result,) = measure(llama, None, text)
    assert 1 < result.perplexity < 1e6
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


def test_folder_is_measured_as_its_loaded_model(ternary: Path, llama: Path, text: Path) -> None:
    (result,) = measure(ternary, llama, text, save=False)
    student, tokenizer = ternarize.load(ternary)
    ids = evaluation_windows(text.read_text(), tokenizer, 32, 3)
    teacher = module.load_any(llama, "cpu", torch.float32)
    assert result == compare(student, teacher, ids, text.name, QUIET)
    assert result.kl is not None
    assert result.kl > 0


def test_all_windows_are_measured_where_no_limit_is_given(llama: Path, tmp_path: Path) -> None:
    (result,) = measure(llama, None, make_text(tmp_path / "text.txt", 5 * 32 + 31), windows=None)
    assert (result.windows, result.tokens) == (5, 5 * 31)


def test_records_are_measured_as_one_text(llama: Path, tmp_path: Path) -> None:
    records = [{"text": "first one"}, {"messages": [{"role": "user", "content": "second"}] * 9}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "a.txt").write_text("\n\n".join(["first one", *["second"] * 9]))
    lines, plain = measure(llama, None, tmp_path / "a.jsonl", tmp_path / "a.txt")
    assert lines.windows == 2
    assert lines.perplexity == plain.perplexity


def test_own_text_is_the_teachers_and_not_what_it_wrote_for_calibration(ternary: Path, llama: Path) -> None:
    with pytest.raises(TernarizeError, match="give --teacher"):
        measure(ternary, None, "self")
    (result,) = measure(ternary, llama, "self", save=False)
    assert result.text == "self"
    assert result.windows == 3
    assert result == measure(ternary, llama, "self", save=False)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_measures_nearly_the_same(dtype: torch.dtype, ternary: Path, llama: Path, text: Path) -> None:
    (full,), (half,) = (measure(ternary, llama, text, dtype=d, save=False) for d in (torch.float32, dtype))
    assert half.perplexity == pytest.approx(full.perplexity, rel=0.1)
    assert half.perplexity != full.perplexity


def test_result_is_written_into_report_and_card_and_a_later_one_takes_its_place(
    ternary: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    other = make_text(tmp_path / "other.txt", seed=5)
    first, second = measure(folder, llama, text, other)
    assert Report.read(folder).run["evaluation"] == [first.to_dict(), second.to_dict()]
    (later,) = measure(folder, llama, text, windows=2)
    assert later.perplexity != first.perplexity
    assert Report.read(folder).run["evaluation"] == [later.to_dict(), second.to_dict()]
    card = (folder / "README.md").read_text()
    for result in (later, second):
        assert f"{result.perplexity:.2f} | {result.kl:.3f} | {100 * (result.agreement or 0):.1f} %" in card
    assert f"{first.perplexity:.2f}" not in card
    assert "Not measured yet" not in card
    before, after = contents(ternary), contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"README.md"}  # the report's run aside


def test_nothing_is_written_where_saving_is_off(ternary: Path, text: Path, tmp_path: Path) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    measure(folder, None, text, save=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in ternary.iterdir()
    }
    assert find_shards(folder)
    assert read_tensors(folder)


def test_figures_of_other_settings_and_texts_have_rows_of_their_own(ternary: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_folder(ternary, tmp_path / "student")
    texts = [tmp_path / name / "test.txt" for name in ("a", "b")]
    for number, path in enumerate(texts):
        path.parent.mkdir()
        path.write_text(f"{number} some text of its own {number * 7}\n" * 40)
    measure(folder, llama, *texts)
    measure(folder, llama, texts[0])
    measure(folder, llama, texts[0], activations="int8", dtype=torch.bfloat16)
    measure(folder, None, texts[0])  # no teacher beside it: takes nothing away
    rows = {row["text"]: row for row in Report.read(folder).run["evaluation"]}
    assert list(rows) == [*map(str, texts), "test.txt", "test.txt, int8 activations, bfloat16"]
    assert all(row["kl"] is not None for row in rows.values())
