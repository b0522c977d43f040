"""The last blocks, or all, learn once more, together, from what the teacher says: its distribution of the next token.

Block by block, each learns to come close to the teacher's hidden states, all of them alike. What the head makes of them
is not alike: blocks that learn together can be taught which of the errors that reached them change the answer. That
takes these blocks, a byte for each of their weights, the head and three sets of hidden states in memory, not the
models. Scales and shifts learn, codes do not: in so few steps they gain nothing by it (recipes/README.md). A held-out
guard decides, as in tuning.

    loss = KL(teacher || student), nats a token, both read from hidden states by the teacher's own norm and head

With a large vocabulary the head is most of a step's work. So a step looks at the tokens of the text and at some others,
drawn anew, that stand for the rest of the vocabulary (`SampledHead`). Held-out windows are judged by all of it.

Shapes: B windows in a batch, T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ternarize.architecture import find_blocks
from ternarize.block import advance
from ternarize.calibration import Walk, finish_walk, product_dtype
from ternarize.checkpoint import Checkpoint, place
from ternarize.lesson import SampledHead, hidden_divergence
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
    """Learn the scales and shifts of a model's last blocks, or of all, ternary before and after.

    Args:
        window: the blocks by full name, in order; `first` is the number of the first one.
        teacher: behind its last block.
        student: where the window begins; it is advanced to the end.
        ids: the calibration windows in batches, int64 [B, T], as they were walked.
    """
    levels = replace(recipe.tune, codes="frozen", levels=True, level_rate=recipe.tune.ending_rate)
    recipe = replace(recipe, tune=levels)
    for name, block in window.items():
        make_trainable(block, {}, name, levels)
    outside = checkpoint.skeleton()
    path, blocks = find_blocks(outside)
    checkpoint.load(outside, "", exclude=f"{path}.")
    place(outside, str(ids[0].device))
    if isinstance(head := outside.get_output_embeddings(), nn.Module):
        head.to(product_dtype(ids[0].device))  # once, not for every piece
    sampled = SampledHead(head, torch.cat(ids).unique(), recipe.calibration.seed)

    def loss(batch: int) -> Tensor:
        sampled.choose(some=torch.is_grad_enabled())  # held-out windows are judged by all tokens
        hidden = student.through(list(window.values()), first, batch, student.hidden[batch])

        def read(hidden: Tensor, part: slice) -> Tensor:
            tuple_output = teacher.calls[batch][-1].tuple_output
            return sampled.weigh(finish_walk(outside, blocks, hidden, ids[batch][:, part], tuple_output))

        return hidden_divergence(read, read, teacher.hidden[batch], hidden)

    epochs = recipe.tune.ending_epochs
    steps = count_steps(len(ids), recipe, epochs)
    with progress.bar(f"tuning {len(window)} blocks together", total=steps, unit="step") as bar:
        tuned = learn(list(window.values()), loss, len(ids), epochs, recipe, lambda: bar.update(1))
    for offset, block in enumerate(window.values()):
        make_ternary(block)
        advance(student, first + offset, block)
    return tuned
