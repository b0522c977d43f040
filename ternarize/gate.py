"""The quality gate: after a conversion, is this still a language model, and how far is it from its teacher?

Student and teacher are compared on the held-out calibration windows, from the hidden states that the walk through the
blocks ends with, so that neither model has to be in memory as a whole; then the packed student goes on writing a
held-out text for a few tokens. A collapsed model is called that.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ternarize.architecture import find_blocks
from ternarize.block import pack_embeddings
from ternarize.calibration import Walk, finish_walk, first_held_out
from ternarize.checkpoint import Checkpoint, place
from ternarize.evaluate import Evaluation, Tally
from ternarize.generation import ENDS, generation_settings
from ternarize.lesson import piece_tokens
from ternarize.plan import Plan
from ternarize.recipe import Recipe

HELD_OUT = "held-out calibration text"
FITTED = "calibration text that it was fitted to, none being held out"
COLLAPSED_KL = 4.0  # nats a token: the student's distribution has little to do with the teacher's
COLLAPSED_AGREEMENT = 0.1  # of the likeliest tokens; guessing the commonest token reaches about 0.05
LOOPING_AGREEMENT = 0.3  # a small model may loop in greedy text although it predicts well
WEAK_RATIO = 2.0  # of the perplexities
FEWEST_DISTINCT = 4  # tokens in the short text; a model that repeats itself has fewer
PROMPT_TOKENS, TEXT_TOKENS = 16, 32
OPENING = "Once upon a time, there was a"
ADVICE = (
    "Use a stronger recipe (fast < balanced < best), more calibration.samples of text like your own, a larger model, "
    "or skip the linears that `ternarize inspect` ranks worst."
)


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Args:
        word: "close", "weak" or "collapsed"; "not compared" where the recipe used no text.
        why: in words, with the figures; what to do is part of it unless the student is close.
        evaluation: the comparison on calibration text, held out where there is enough, None where the recipe used none.
        text: what the student wrote on its own.
    """

    word: str
    why: str
    evaluation: dict[str, Any] | None
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def compare_walks(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, teacher: Walk, student: Walk, ids: list[Tensor]
) -> Evaluation:
    """Compare what teacher and student predict from the hidden states behind their last blocks, on held-out windows.

    Where none are held out, the last batch is what there is, and the evaluation's text says so.

    Args:
        ids: the calibration windows in batches, int64 [B, T], as they were walked.
    """
    device = str(ids[0].device)
    packed = _Outside(checkpoint, device)
    pack_embeddings(packed.model, plan, recipe)
    floats = _Outside(checkpoint, device)  # after it: no two float embeddings are held together
    tally = Tally(with_teacher=True)
    apart = first_held_out(len(ids), recipe.calibration.held_out)
    first = min(apart, len(ids) - 1)
    windows = [(batch, row) for batch in range(first, len(ids)) for row in range(len(ids[batch]))]
    for batch, row in windows:
        own = ids[batch][row]
        for places in torch.arange(len(own) - 1, device=own.device).split(piece_tokens(own.device)):
            expected, answer = (
                outside.read(walk, batch, row, places, own) for outside, walk in ((floats, teacher), (packed, student))
            )
            tally.add(answer, expected, own[places + 1])
    name = HELD_OUT if apart < len(ids) else FITTED
    return tally.result(name, len(windows), ids[0].shape[1])


class _Outside:
    """The source's model, with everything loaded but its blocks."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.model = checkpoint.skeleton()
        path, self.blocks = find_blocks(self.model)
        checkpoint.load(self.model, "", exclude=f"{path}.")
        place(self.model, device)

    def read(self, walk: Walk, batch: int, row: int, places: Tensor, ids: Tensor) -> Tensor:
        """Logits [P, V] at some places, int64 [P], of one window, int64 [T], from a walk behind the last block."""
        hidden, tuples = walk.hidden[batch][row, places][None], walk.calls[batch][-1].tuple_output
        return finish_walk(self.model, self.blocks, hidden, ids[places][None], tuples)[0]


@torch.no_grad()
def judge(student: PreTrainedModel, tokenizer: Any, evaluation: Evaluation | None, prompt: Tensor | None) -> Verdict:
    """Let the student write a little, and say what it is.

    Args:
        evaluation: against the teacher, if there is one.
        prompt: int64 [T], a text to go on from; None is the opening of a tale.
    """
    start = tokenizer(OPENING, return_tensors="pt")["input_ids"][0] if prompt is None else prompt[:PROMPT_TOKENS]
    ids = start[None].to(student.device)
    with generation_settings(student, ENDS):
        whole: Tensor = student.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TEXT_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    out = whole[0, ids.shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True)
    looping = len(out) == TEXT_TOKENS and len(out.unique()) < FEWEST_DISTINCT
    return Verdict(*_verdict(evaluation, looping), None if evaluation is None else evaluation.to_dict(), text)


def _verdict(evaluation: Evaluation | None, looping: bool) -> tuple[str, str]:
    loops = "it repeats itself without end" if looping else ""
    if evaluation is None:
        if looping:
            return "collapsed", f"{loops}. {ADVICE}"
        return (
            "not compared",
            f"the recipe uses no text; such models rarely work, which `ternarize evaluate` shows. {ADVICE}",
        )
    assert evaluation.teacher_perplexity is not None
    assert evaluation.kl is not None
    assert evaluation.agreement is not None
    ratio = evaluation.perplexity / evaluation.teacher_perplexity
    why = (
        f"perplexity {evaluation.perplexity:.4g}, {ratio:.3g} times the teacher's; KL {evaluation.kl:.2f} nats; "
        f"the same top token in {100 * evaluation.agreement:.0f} % of the places{'; ' if looping else ''}{loops}"
    )
    far = evaluation.kl >= COLLAPSED_KL or evaluation.agreement < COLLAPSED_AGREEMENT or math.isnan(ratio)
    if far or (looping and evaluation.agreement < LOOPING_AGREEMENT):
        return "collapsed", f"{why}. {ADVICE}"
    if looping or ratio > WEAK_RATIO:
        return "weak", f"{why}. {ADVICE}"
    return "close", why
