"""Gradients of a loss, on a CUDA device by a graph: recorded in one step, replayed in all others.

A step of distillation is some twenty thousand small computations, which take Python longer to start than a GPU to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3  # steps before the one that is recorded: libraries choose and allocate in them


class Gradients:
    """Leaves the gradients of a loss in `.grad` of what learns.

    A loss that looks at values on its way, as a mixture of experts does that sends each token to its own, cannot be
    recorded and is computed anew in every step.

    Args:
        loss: of windows int64 [B, T], B and T the same in every call, and their numbers.
        learning: the parameters.
    """

    def __init__(self, loss: Callable[[Tensor, list[int]], Tensor], learning: list[nn.Parameter]) -> None:
        self.loss, self.learning = loss, learning
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recorded: Tensor | None = None  # the windows that the graph reads

    def __call__(self, windows: Tensor, numbers: list[int]) -> None:
        """Compute them for these windows."""
        if windows.device.type == "cuda" and self.recorded is None:
            self._record(windows.clone(), numbers)
        if self.graph is None or self.recorded is None:
            self._compute(windows, numbers)
        else:
            self.recorded.copy_(windows)
            self.graph.replay()

    def _compute(self, windows: Tensor, numbers: list[int]) -> None:
        for parameter in self.learning:
            parameter.grad = None
        self.loss(windows, numbers).backward()

    def _record(self, windows: Tensor, numbers: list[int]) -> None:
        self.recorded = windows
        here, aside = torch.cuda.current_stream(windows.device), torch.cuda.Stream(windows.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._compute(windows, numbers)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        for parameter in self.learning:
            parameter.grad = None  # the graph makes its own, and writes them in every replay
        try:
            with torch.cuda.device(windows.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.loss(windows, numbers).backward()
        except RuntimeError:  # torch's for a computation that cannot be recorded; the steps go on without
            return
        self.graph = graph
