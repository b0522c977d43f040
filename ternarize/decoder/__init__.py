"""One native call for all blocks of a model, where it generates a token at a time; two for each block of a prompt.

`attach` puts a `NativeForward` before the forward of the base models that it knows (Llama, Mistral, Qwen2, Qwen3,
Gemma 3). It takes over where the library computes what is asked for: one text's tokens behind a dynamic cache, on a
CPU, without gradients, padding or hooks, every linear of every block ternary. Anything else runs as if it were not
there. All ways can follow each other on one cache: its layers hold the same tensors, only with room behind them.

Between the linears it computes in float32, whatever the model's dtype; keys and values are rounded to the cache's, and
a prompt's queries too.
"""

from __future__ import annotations

from torch import nn

from ternarize.decoder.forward import NativeForward, linear_by_linear
from ternarize.decoder.loop import take_over
from ternarize.decoder.plan import family_of

__all__ = ["NativeForward", "attach", "detach", "linear_by_linear"]


def attach(model: nn.Module) -> None:
    """Let the base models inside that are known take native steps; again after a change that `Facts` cannot see."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if family_of(module) is not None and (forward is None or isinstance(forward, NativeForward)):
            module.forward = NativeForward(module)  # type: ignore[method-assign, assignment]
        if hasattr(type(module), "generate") and any(family_of(child) is not None for child in module.children()):
            take_over(type(module))


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NativeForward):
            del module.forward
