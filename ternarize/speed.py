"""How fast a folder runs: ready, prefill and decode, as `generate` does them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ternarize.errors import TernarizeError
from ternarize.evaluate import load_any
from ternarize.generation import generation_settings
from ternarize.progress import Progress, quiet_transformers
from ternarize.report import peak_memory


@dataclass(frozen=True)
class Speed:
    """What was measured; of a figure with several rounds, all of them in order.

    Args:
        threads: torch's.
        ready: seconds from the folder to the first token out, weights laid out for the processor.
        prefill: tokens of the prompt per second, one figure a round.
        decode: new tokens per second, one at a time, behind that prompt.
        prompt, tokens: how many of each.
        peak_memory: of the process so far, bytes; None where the system does not tell.
    """

    threads: int
    ready: float
    prefill: list[float]
    decode: list[float]
    prompt: int
    tokens: int
    peak_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure(
    folder: Path,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: list[int],
    device: str,
    dtype: torch.dtype,
    activations: str | None,
    progress: Progress,
) -> list[Speed]:
    """Time a folder (ternarize or float) by greedy generation from random tokens; one result for each of `threads`.

    A round takes every number of threads in turn, so that other load on the machine falls on all alike.

    Args:
        prompt, tokens: how many go in and come out.
        threads: numbers of threads to try; none is torch's own.
        activations: as in `quantizer.load`.

    Raises:
        TernarizeError: the model cannot take so many tokens.
    """
    started = time.perf_counter()
    model: Any = load_any(folder, device, dtype, activations)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    timed_generate(model, ids[:, :1], 1)
    ready = time.perf_counter() - started
    counts = threads or [torch.get_num_threads()]
    prefill: dict[int, list[float]] = {count: [] for count in counts}
    decode: dict[int, list[float]] = {count: [] for count in counts}
    with progress.bar("measuring", total=rounds * len(counts), unit="run") as bar:
        for _ in range(rounds):
            for count in counts:
                with torch_threads(count):
                    begun, first, *_, last = timed_generate(model, ids, 1 + tokens)
                prefill[count].append(prompt / (first - begun))
                decode[count].append(tokens / (last - first))
                bar.update(1)
    return [Speed(count, ready, prefill[count], decode[count], prompt, tokens, peak_memory()) for count in prefill]


def spread(figures: list[float]) -> str:
    """The median of some rounds, and their range."""
    return f"{statistics.median(figures):.1f} ({min(figures):.1f} to {max(figures):.1f})"


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the prompt, and then each new token, is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed_generate(model: Any, ids: Tensor, tokens: int) -> list[float]:
    """Greedily, and exactly so many tokens; when it began, and when each of them was there, in seconds."""
    clock = _Clock()
    try:
        with quiet_transformers(), generation_settings(model):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                eos_token_id=-1,  # none: min_new_tokens costs three operations on the whole vocabulary a token
                do_sample=False,
                streamer=clock,
            )
    except IndexError as error:
        raise TernarizeError(
            f"{type(model).__name__} cannot take {ids.shape[1] + tokens} tokens: {error}. "
            "Choose a smaller --prompt or --tokens."
        ) from error
    return clock.times


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
