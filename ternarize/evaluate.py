"""Measure a model: perplexity by the field's convention, and how far it is from its teacher.

Perplexity: windows of `length` tokens without overlap, exp of the mean negative log-likelihood of every token but the
first of each window. KL and agreement compare the two models' next-token distributions at the same places.

Shapes: B windows, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ternarize import hub
from ternarize.calibration import check_ids
from ternarize.checkpoint import Checkpoint
from ternarize.errors import TernarizeError
from ternarize.lesson import row_slices
from ternarize.progress import Progress, quiet_transformers
from ternarize.quantizer import load_model, quant_method
from ternarize.report import REPORT_FILE, Report
from ternarize.text import draw, evaluation_windows, load_tokenizer, read_whole, self_windows, split_source

HELD_OUT_SEED = 1_000_003  # for the model's own text, so that it is not the calibration's


@dataclass(frozen=True)
class Evaluation:
    """One measurement.

    Args:
        text: the source, as named.
        windows, length, tokens: how much was measured; tokens are those predicted.
        perplexity, teacher_perplexity: exp of the mean negative log-likelihood per token.
        kl: mean of KL(teacher || student) per token, nats.
        agreement: share of tokens where both models' likeliest next token is the same.
    """

    text: str
    windows: int
    length: int
    tokens: int
    perplexity: float
    teacher_perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def compare(
    student: PreTrainedModel, teacher: PreTrainedModel | None, ids: Tensor, text: str, progress: Progress
) -> Evaluation:
    """Measure a student, beside its teacher if there is one.

    Args:
        ids: int64 [B, T].
        text: what to call it.
    """
    tally = Tally(with_teacher=teacher is not None)
    with progress.bar(f"measuring on {text}", total=len(ids), unit="window") as bar:
        for window in ids:
            logits = _logits(student, window)
            reference = None if teacher is None else _logits(teacher, window).to(logits.device)
            tally.add(logits, reference, window[1:].to(logits.device))
            bar.update(1)
    return tally.result(text, len(ids), ids.shape[1])


class Tally:
    """Sums over tokens, of which an Evaluation is the mean.

    Args:
        with_teacher: whether teacher logits will be given.
    """

    def __init__(self, with_teacher: bool) -> None:
        self.with_teacher = with_teacher
        self.tokens = 0
        self.nll = self.teacher_nll = self.kl = self.same = 0.0

    def add(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> None:
        """Take in logits [N, V], and the tokens int64 [N] that they should predict."""
        self.tokens += len(target)
        for part in row_slices(student):
            log_q = student[part].float().log_softmax(-1)
            self.nll -= float(log_q.gather(1, target[part, None]).sum())
            if teacher is not None:
                log_p = teacher[part].float().log_softmax(-1)
                self.teacher_nll -= float(log_p.gather(1, target[part, None]).sum())
                self.kl += float((log_p.exp() * (log_p - log_q)).sum())
                self.same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def result(self, text: str, windows: int, length: int) -> Evaluation:
        """The means."""
        n = self.tokens
        if not self.with_teacher:
            return Evaluation(text, windows, length, n, _exp(self.nll / n))
        return Evaluation(
            text, windows, length, n, _exp(self.nll / n), _exp(self.teacher_nll / n), self.kl / n, self.same / n
        )


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Logits [T - 1, V] that predict the window's tokens from the second on."""
    check_ids(model, window)
    try:
        return model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
    except IndexError as error:
        raise TernarizeError(
            f"{type(model).__name__} cannot take windows of {len(window)} tokens: {error}. Choose a smaller --length."
        ) from error


def _exp(mean: float) -> float:
    """exp that ends at infinity instead of an exception."""
    return math.exp(mean) if mean < 700 else math.inf


def evaluate(
    folder: Path,
    teacher: Path | None,
    texts: list[str],
    length: int,
    windows: int | None,
    device: str,
    dtype: torch.dtype,
    progress: Progress,
    save: bool = True,
    activations: str = "float",
) -> list[Evaluation]:
    """Measure a folder (ternarize or float) on several texts, and write the result into a ternarize folder's report.

    Args:
        teacher: the float checkpoint to compare with; None measures perplexity alone.
        texts: sources as in `text`; `self` is text that the teacher writes, with another seed than calibration's.
        length: tokens in a window.
        windows: at most so many of each text; None is all.
        save: whether report.json and the card of a ternarize folder take up the result.
        activations: as in `load_any`.

    Raises:
        TernarizeError: a text or folder that cannot be read, or one too short.
    """
    student = load_any(folder, device, dtype, activations)
    reference = None if teacher is None else load_any(teacher, device, dtype)
    if (
        reference is not None
        and reference.config.get_text_config().vocab_size != student.config.get_text_config().vocab_size
    ):
        raise TernarizeError(f"{folder} and its teacher {teacher} have other vocabularies. Give the right --teacher.")
    tokenizer = load_tokenizer(folder)
    results = []
    for source in texts:
        name, _ = split_source(source)
        if name == "self":
            if teacher is None:
                raise TernarizeError("text self is what the teacher writes: give --teacher, or another --text.")
            ids = self_windows(teacher, windows or 16, length, HELD_OUT_SEED, progress, device)
        elif name == "pydoc" and windows:
            ids = draw(evaluation_windows(read_whole(name), tokenizer, length, None), windows, seed=0)
        else:
            ids = evaluation_windows(read_whole(name), tokenizer, length, windows)
        results.append(compare(student, reference, ids, _label(name, texts, activations, dtype), progress))
    if save and (folder / REPORT_FILE).is_file():
        save_evaluation(folder, results)
    return results


def _label(name: str, texts: list[str], activations: str, dtype: torch.dtype) -> str:
    """What to call a measurement: the text, a file without its folder where no other is called so, and how it ran."""
    short = [Path(split_source(source)[0]).name for source in texts]
    whole = name in ("self", "pydoc") or short.count(Path(name).name) > 1
    return ", ".join([name if whole else Path(name).name, *computed_in(activations, dtype)])


def computed_in(activations: str, dtype: torch.dtype) -> list[str]:
    """What is to be said of how a model ran; nothing where all was float32."""
    how = [] if activations == "float" else [f"{activations} activations"]
    return how + ([] if dtype == torch.float32 else [str(dtype).removeprefix("torch.")])


def save_evaluation(folder: Path, results: list[Evaluation]) -> None:
    """Write measurements into report.json and the card; a text measured again replaces its old row.

    Not one that has the teacher beside it, where the new one has not.
    """
    report = Report.read(folder)
    rows = {row["text"]: row for row in report.run.get("evaluation", [])}
    rows |= {r.text: r.to_dict() for r in results if r.kl is not None or rows.get(r.text, {}).get("kl") is None}
    report.run["evaluation"] = list(rows.values())
    hub.save_report(folder, report)


def load_any(folder: Path, device: str, dtype: torch.dtype, activations: str | None = "float") -> PreTrainedModel:
    """A ternarize folder or a float checkpoint, ready to run.

    Args:
        activations: as in `quantizer.load`; "float" gives the same figures on every machine.

    Raises:
        TernarizeError: it is neither.
    """
    method = quant_method(folder)
    with quiet_transformers():
        if method is not None:
            model: Any = load_model(folder, dtype=dtype, activations=activations)
        else:
            Checkpoint(folder).skeleton()  # refuses what is incomplete, which transformers would fill at random
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval()
