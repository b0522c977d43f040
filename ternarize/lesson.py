"""What a student is taught: the teacher's distributions of the next token, and its features at some depths.

    loss = KL(teacher || student) + off * mean over some depths of (1 - cosine of features)

Where text is seen more than once, what the teacher says of it can be noted on disk, so that it is computed once.

Sources: Hinton et al. (arXiv 1503.02531) for distillation; TernaryLLM (arXiv 2406.07177) for OFF.

Shapes: B windows, T tokens, N = B T, V vocabulary, H hidden, K teacher logits kept for a token, D depths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.calibration import autocast
from ternarize.files import write_tensors
from ternarize.tuning import off_loss


@dataclass(frozen=True)
class Reference:
    """The teacher's distribution for some tokens.

    Args:
        log_p: [N, V], or [N, K] of its likeliest tokens.
        index: int64 [N, K], which those are; None for all.
    """

    log_p: Tensor
    index: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, top: int) -> Reference:
        """From logits [..., V]; `top` is K, 0 for all."""
        log_p = logits.flatten(0, -2).float().log_softmax(-1)
        if not top or top >= log_p.shape[-1]:
            return cls(log_p, None)
        values, index = log_p.topk(top)
        return cls(values, index)

    def divergence(self, logits: Tensor) -> Tensor:
        """Mean KL(teacher || student) per token, nats; tokens outside the likeliest K count as one outcome.

        Args:
            logits: the student's, [..., V].
        """
        log_q = logits.flatten(0, -2).float().log_softmax(-1)
        if self.index is None:
            return nn.functional.kl_div(log_q, self.log_p, reduction="batchmean", log_target=True)
        log_q = log_q.gather(1, self.index)
        rest_p, rest_q = (1 - part.exp().sum(1).clamp(max=1 - 1e-6) for part in (self.log_p, log_q))
        inside = (self.log_p.exp() * (self.log_p - log_q)).sum(1)
        return (inside + rest_p * (rest_p / rest_q).log()).mean()


@dataclass(frozen=True)
class Lesson:
    """Student and teacher before the same windows, int64 [B, T] each.

    Args:
        depths: of the hidden states that OFF compares; off: its weight.
        top: K for the loss, 0 for all.
        notes: a folder in which what the teacher says of each window is kept, rounded to 16 bits; needs a `top`.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    depths: list[int]
    off: float
    top: int = 0
    notes: Path | None = None

    def loss(self, windows: Tensor, numbers: list[int]) -> Tensor:
        """What the student is to lower, with gradients; `numbers` name the windows in the notes."""
        expected, features = self.look_up(windows, numbers) if self.notes else self.ask(windows, self.top)
        with torch.enable_grad(), autocast(windows.device):
            out = self.student(input_ids=windows, use_cache=False, output_hidden_states=bool(self.depths))
            loss = expected.divergence(out.logits)
            for depth, feature in zip(self.depths, features, strict=True):
                loss = loss + self.off / len(self.depths) * off_loss(out.hidden_states[depth], feature)
        return loss

    @torch.no_grad()
    def held_out(self, held: list[tuple[Tensor, Reference]]) -> float:
        """Mean KL over held-out windows, nats a token."""
        total = 0.0
        for windows, expected in held:
            with autocast(windows.device):
                kl = expected.divergence(self.student(input_ids=windows, use_cache=False).logits)
            total += float(kl) * len(windows)
        return total / sum(len(windows) for windows, _ in held)

    @torch.no_grad()
    def ask(self, windows: Tensor, top: int) -> tuple[Reference, list[Tensor]]:
        """The teacher's distributions, K = top, and its features [B, T, H] at each depth."""
        with autocast(windows.device):
            out = self.teacher(input_ids=windows, use_cache=False, output_hidden_states=bool(self.depths))
        return Reference.of(out.logits, top), [out.hidden_states[d] for d in self.depths]

    def look_up(self, windows: Tensor, numbers: list[int]) -> tuple[Reference, list[Tensor]]:
        """What `ask` gives, from the notes; what they lack is asked for, and noted."""
        assert self.notes is not None
        files = [self.notes / f"{number}.safetensors" for number in numbers]
        if not all(file.exists() for file in files):
            for note, file in zip(_notes(*self.ask(windows, self.top), len(windows)), files, strict=True):
                write_tensors(file, note)
        notes = [load_file(file, device=str(windows.device)) for file in files]
        log_p, index = (torch.cat([note[key] for note in notes]) for key in ("log_p", "index"))
        features = [torch.stack([note["features"][d] for note in notes]) for d in range(len(self.depths))]
        return Reference(log_p.float(), index.long()), features


def _notes(expected: Reference, features: list[Tensor], windows: int) -> list[dict[str, Tensor]]:
    """For each window: log_p fp16 [T, K], index int32 [T, K], features bf16 [D, T, H]."""
    assert expected.index is not None
    log_p, index = (part.unflatten(0, (windows, -1)) for part in (expected.log_p.half(), expected.index.int()))
    stacked = torch.stack(features, 1) if features else log_p.new_empty(windows, 0)
    return [
        {"log_p": log_p[number], "index": index[number], "features": stacked[number].bfloat16()}
        for number in range(windows)
    ]


def note_bytes(tokens: int, top: int, features: int) -> int:
    """What the notes of so many tokens take on disk, with so many features of each."""
    return tokens * (6 * top + 2 * features)
