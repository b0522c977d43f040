"""What a student is taught: the teacher's distributions of the next token, and its features at some depths.

    loss = KL(teacher || student) + off * mean over some depths of (1 - cosine of features)

A head's logits outweigh everything else in models with large vocabularies: 1024 tokens of Gemma's are 1 GB, and a loss
on them holds six times as much. So a model is asked in two steps, for its hidden states behind the last block and for
what its norm and head make of a piece of them; the loss goes from piece to piece, and its gradient with it. Where text
is seen more than once, those hidden states of the teacher are noted on disk: a thousandth of the logits' size, and all
that they are made of.

Sources: Hinton et al. (arXiv 1503.02531) for distillation; TernaryLLM (arXiv 2406.07177) for OFF; Bengio and Senecal
(AISTATS 2003) and Jean et al. (arXiv 1412.2007) for a softmax over a sample of the vocabulary.

Shapes: B windows, T tokens, P tokens of a piece, V vocabulary, H hidden, D depths, K tokens of the text, N drawn ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.calibration import autocast, finish_walk
from ternarize.files import write_tensors
from ternarize.tuning import off_loss

PIECE_TOKENS = 128  # whose logits are in memory at once, where they are learnt from or compared
LOGITS_AT_ONCE = 2**21  # that are made into distributions: float32 in pieces small enough that their memory is kept
LARGER = 8  # times as many tokens at once on an accelerator, where starting a computation takes as long as a small one,
MORE_LOGITS = 64  # and so many times as many logits
DRAWN = 4096  # tokens that a sampled head looks at beside those of the text


def divergence(teacher: Tensor, student: Tensor, top: int = 0) -> Tensor:
    """Mean KL(teacher || student) per token, nats, with gradients for the student.

    Args:
        teacher, student: logits [..., V].
        top: with K > 0, the teacher's likeliest K tokens count, and all others as one outcome.
    """
    if 0 < top < teacher.shape[-1]:
        return _top_divergence(teacher, student, top)
    mean: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2))
    return mean


class _Divergence(torch.autograd.Function):
    """Logits of the student, then of the teacher, [N, V] -> the mean.

    The gradient, softmax(student) - softmax(teacher), costs a pass more while both are at hand, and they are not kept.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:  # type: ignore[override]
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        mean = student.new_zeros((), dtype=torch.float32)
        for part in row_slices(student):
            own, other = student[part].float().log_softmax(-1), teacher[part].float().log_softmax(-1)
            likely = other.exp()
            mean += (likely * other.sub_(own)).sum() / len(student)
            if gradient is not None:
                gradient[part] = own.exp_().sub_(likely).div_(len(student))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return mean

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None


def piece_tokens(device: torch.device) -> int:
    """How many tokens' logits are in memory at once there."""
    return PIECE_TOKENS * (1 if device.type == "cpu" else LARGER)


def row_slices(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of logits [N, V], `LOGITS_AT_ONCE` of them in each, or a row."""
    count, vocabulary = logits.shape
    at_once = LOGITS_AT_ONCE * (1 if logits.device.type == "cpu" else MORE_LOGITS)
    step = max(1, at_once // vocabulary)
    return (slice(start, start + step) for start in range(0, count, step))


def _top_divergence(teacher: Tensor, student: Tensor, top: int) -> Tensor:
    log_p, index = teacher.flatten(0, -2).float().log_softmax(-1).topk(top)
    log_q = student.flatten(0, -2).float().log_softmax(-1).gather(1, index)
    rest_p, rest_q = (1 - part.exp().sum(1).clamp(max=1 - 1e-6) for part in (log_p, log_q))
    inside = (log_p.exp() * (log_p - log_q)).sum(1)
    return (inside + rest_p * (rest_p / rest_q).log()).mean()


def piecewise_mean(hidden: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Mean over the tokens of hidden states [B, T, H] of a loss that looks at each token alone; with gradients.

    Args:
        loss: the mean over those tokens, of hidden states [B, P, H] and the slice of T that they are.
    """
    mean: Tensor = _PiecewiseMean.apply(hidden, loss)
    return mean


class _PiecewiseMean(torch.autograd.Function):
    """The gradient of each piece is taken as soon as its loss is known, so that no two pieces are held together."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:  # type: ignore[override]
        learning = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if learning else hidden.new_empty(0)
        count, tokens = hidden.shape[:2]
        width = max(1, piece_tokens(hidden.device) // count)
        mean = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, tokens, width):
            part = slice(start, min(start + width, tokens))
            piece = hidden[:, part].detach().requires_grad_(learning)
            with torch.set_grad_enabled(learning):
                value = loss(piece, part) * ((part.stop - start) / tokens)
            if learning:
                (gradient[:, part],) = torch.autograd.grad(value, piece)
            mean += value.detach()
        ctx.save_for_backward(gradient)
        return mean.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype) * gradient, None


def hidden_divergence(
    teacher: Callable[[Tensor, slice], Tensor],
    student: Callable[[Tensor, slice], Tensor],
    expected: Tensor,
    hidden: Tensor,
    top: int = 0,
) -> Tensor:
    """Mean KL per token between what is read from the teacher's and the student's hidden states, piece by piece.

    Args:
        teacher, student: logits [B, P, V] of hidden states [B, P, H] and the slice of T that they are.
        expected, hidden: the teacher's and the student's hidden states behind their last blocks, [B, T, H].
        top: as in `divergence`.
    """

    def of_piece(piece: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            likely = teacher(expected[:, part], part)
        return divergence(likely, student(piece, part), top)

    return piecewise_mean(hidden, of_piece)


class SampledHead:
    """A model's head that can be asked about some tokens only: all known ones, and N drawn from the others by lot.

    A drawn token stands for (V - K) / N others, so the logarithm of that is added to its logit: a softmax over K + N
    such logits estimates those tokens' shares of the softmax over V, and the sum that makes up a KL estimates the KL.
    A head that is no plain linear, or has fewer than K + N tokens, is always asked about all.

    Args:
        head: inside its model [V, H]; it answers as this says from now on.
        known: tokens that are always among them, int64 [K].
        seed: of the draws.
    """

    def __init__(self, head: object, known: Tensor, seed: int) -> None:
        self.some: list[Tensor] = []  # weight and bias, if there is one, of known tokens, then of drawn ones
        if type(head) is nn.Linear and len(known) + DRAWN <= head.out_features:
            self.generator = torch.Generator().manual_seed(seed)
            others = torch.ones(head.out_features, dtype=torch.bool, device=known.device)
            others[known] = False
            self.others, self.count = others.nonzero().squeeze(1), len(known)
            self.shares = torch.zeros(self.count + DRAWN, device=known.device)
            self.shares[self.count :] = math.log(len(self.others) / DRAWN)
            self.whole = [part.detach() for part in head.parameters()]
            self.some = [part[torch.cat([known, self.others[:DRAWN]])] for part in self.whole]
            head.forward = self._answer  # type: ignore[method-assign,assignment]
        self.sampling = False

    def _answer(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, *(self.some if self.sampling else self.whole))

    def choose(self, some: bool) -> None:
        """Look at the known tokens and a new draw of others from now on, or at the whole vocabulary."""
        self.sampling = some and bool(self.some)
        if self.sampling:
            order = torch.randperm(len(self.others), generator=self.generator)[:DRAWN]
            drawn = self.others[order.to(self.others.device)]
            for part, whole in zip(self.some, self.whole, strict=True):
                part[self.count :] = whole[drawn]

    def weigh(self, logits: Tensor) -> Tensor:
        """What the model made of the asked tokens' logits, [..., V] or [..., K + N], with what drawn ones stand for."""
        return logits.float() + self.shares if self.sampling else logits


class Reader:
    """A whole model, asked in two steps.

    Args:
        model: a causal language model.
        path: of its list of blocks.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, blocks = model, model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self._tuples = False  # whether the blocks return tuples

    def hidden(self, windows: Tensor, depths: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, T, H] behind the last block, and those at each of the depths, of windows int64 [B, T]."""
        last: list[Tensor] = []

        def take(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            last.append(output[0] if self._tuples else output)

        hook = self.blocks[-1].register_forward_hook(take)
        try:
            out = self.model(
                input_ids=windows, use_cache=False, output_hidden_states=bool(depths), **self._few_logits()
            )
        finally:
            hook.remove()
        return last[0], [out.hidden_states[depth] for depth in depths]

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, P, V] of hidden states [B, P, H] behind the last block; ids, int64 [B, P], are of these tokens."""
        return finish_walk(self.model, self.blocks, hidden, ids, self._tuples)

    def _few_logits(self) -> dict[str, int]:
        """What spares the model the logits of all tokens but the last, where it knows how.

        Its class is asked: `decoder` puts a forward of its own in front.
        """
        known = inspect.signature(type(self.model).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


@dataclass(frozen=True)
class Lesson:
    """Student and teacher before the same windows, int64 [B, T] each.

    Args:
        depths: of the hidden states that OFF compares; off: its weight.
        top: K for the loss, 0 for all.
        notes: a folder in which the teacher's hidden states of each window are kept, rounded to bfloat16.
    """

    student: Reader
    teacher: Reader
    depths: list[int]
    off: float
    top: int = 0
    notes: Path | None = None

    def loss(self, windows: Tensor, numbers: list[int]) -> Tensor:
        """What the student is to lower, with gradients; `numbers` name the windows in the notes."""
        expected, features = self.look_up(windows, numbers) if self.notes else self.ask(windows)
        with torch.enable_grad(), autocast(windows.device):
            hidden, own = self.student.hidden(windows, self.depths)
            loss = self.divergence(windows, expected, hidden, self.top)
            for feature, other in zip(own, features, strict=True):
                loss = loss + self.off / len(self.depths) * off_loss(feature, other)
        return loss

    @torch.no_grad()
    def held_out(self, held: list[tuple[Tensor, Tensor]]) -> float:
        """Mean KL over held-out windows, nats a token; each batch with the teacher's hidden states."""
        total = 0.0
        for windows, expected in held:
            with autocast(windows.device):
                hidden, _ = self.student.hidden(windows, [])
                total += float(self.divergence(windows, expected, hidden)) * len(windows)
        return total / sum(len(windows) for windows, _ in held)

    def divergence(self, windows: Tensor, expected: Tensor, hidden: Tensor, top: int = 0) -> Tensor:
        """Mean KL per token between what teacher and student make of their hidden states [B, T, H]."""

        def read(reader: Reader) -> Callable[[Tensor, slice], Tensor]:
            return lambda piece, part: reader.logits(piece, windows[:, part])

        return hidden_divergence(read(self.teacher), read(self.student), expected, hidden, top)

    @torch.no_grad()
    def ask(self, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's hidden states [B, T, H] behind its last block, and at each depth."""
        with autocast(windows.device):
            return self.teacher.hidden(windows, self.depths)

    def look_up(self, windows: Tensor, numbers: list[int]) -> tuple[Tensor, list[Tensor]]:
        """What `ask` gives, from the notes; what they lack is asked for, and noted."""
        assert self.notes is not None
        files = [self.notes / f"{number}.safetensors" for number in numbers]
        if not all(file.exists() for file in files):
            hidden, features = self.ask(windows)
            for row, file in enumerate(files):
                write_tensors(file, {"hidden": torch.stack([part[row] for part in (hidden, *features)]).bfloat16()})
        noted = [load_file(file, device=str(windows.device))["hidden"] for file in files]
        hidden, *features = torch.stack(noted, 1).to(self.teacher.model.dtype)
        return hidden, features


def note_bytes(tokens: int, hidden_size: int, depths: int) -> int:
    """What the notes of so many tokens take on disk."""
    return 2 * tokens * hidden_size * (1 + depths)
