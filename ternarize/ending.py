"""The last blocks learn once more, together, from what the teacher says: its distribution of the next token.

Block by block, each learns to come close to the teacher's hidden states, all of them alike. What the head makes of them
is not alike: the last blocks can be taught which of the errors that reached them change the answer. That takes these
blocks, the head and three sets of hidden states in memory, not the models. Scales and shifts learn, codes do not: in so
few steps they gain nothing by it (recipes/README.md). A held-out guard decides, as in tuning.

    loss = KL(teacher || student), nats a token, both read from hidden states by the teacher's own norm and head

A head's logits outweigh everything else in models with large vocabularies: 1024 tokens of Gemma's are 1 GB, and a loss
on them holds six times as much. So the loss goes from piece to piece of the tokens, and its gradient with it.

Shapes: B windows in a batch, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.architecture import find_blocks
from ternarize.block import advance
from ternarize.calibration import PIECE_TOKENS, Walk, finish_walk
from ternarize.checkpoint import Checkpoint, place
from ternarize.lesson import Reference
from ternarize.progress import Progress
from ternarize.recipe import Recipe
from ternarize.tuning import Tuned, count_steps, learn, make_ternary, make_trainable


def tune_ending(
    window: dict[str, nn.Module],
    first: int,
    teacher: Walk,
    student: Walk,
    checkpoint: Checkpoint,
    recipe: Recipe,
    ids: list[Tensor],
    progress: Progress,
) -> Tuned:
    """Learn the scales and shifts of a model's last blocks, ternary before and after.

    Args:
        window: the blocks by full name, in order; `first` is the number of the first one.
        teacher: behind its last block.
        student: where the window begins; it is advanced to the end.
        ids: the calibration windows in batches, int64 [B, T], as they were walked.
    """
    levels = replace(recipe.tune, codes="frozen", levels=True)
    for name, block in window.items():
        make_trainable(block, {}, name, levels)
    outside = checkpoint.skeleton()
    path, blocks = find_blocks(outside)
    checkpoint.load(outside, "", exclude=f"{path}.")
    place(outside, str(ids[0].device))

    def loss(batch: int) -> Tensor:
        hidden = student.through(list(window.values()), first, batch, student.hidden[batch])

        def read(hidden: Tensor, part: slice) -> Tensor:
            return finish_walk(outside, blocks, hidden, ids[batch][:, part], teacher.calls[batch][-1].tuple_output)

        def divergence(hidden: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                expected = Reference.of(read(teacher.hidden[batch][:, part], part), top=0)
            return expected.divergence(read(hidden, part))

        return piecewise_mean(hidden, divergence)

    epochs = recipe.tune.ending_epochs
    with progress.bar("tuning the last blocks", total=count_steps(len(ids), recipe, epochs), unit="step") as bar:
        tuned = learn(list(window.values()), loss, len(ids), epochs, recipe, lambda: bar.update(1))
    for offset, block in enumerate(window.values()):
        make_ternary(block)
        advance(student, first + offset, block)
    return tuned


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
        width = max(1, PIECE_TOKENS // count)
        mean = 0.0
        for start in range(0, tokens, width):
            part = slice(start, min(start + width, tokens))
            piece = hidden[:, part].detach().requires_grad_(learning)
            with torch.set_grad_enabled(learning):
                value = loss(piece, part) * ((part.stop - start) / tokens)
            if learning:
                (gradient[:, part],) = torch.autograd.grad(value, piece)
            mean += float(value)
        ctx.save_for_backward(gradient)
        return torch.tensor(mean, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype) * gradient, None
