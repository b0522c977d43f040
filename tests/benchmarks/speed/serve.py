"""How a worker answers: lines of JSON over its standard input and output.

    worker   {"load": 1.9, "types": {...}, ...}                    once, when its first token is out
    driver   {"threads": 1, "prompt": 128, "tokens": 64}
    worker   {"prefill": 870.1, "decode": 116.4, "peak_memory": 512000000}

Between two lines a worker waits for the next and computes nothing; when its input ends, it does. An error ends it too,
and what it said last on standard error is why. Nothing but the standard library: peers' environments lack the rest.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from ..quality.peers._peak import peak_memory

Facts = dict[str, Any]
Times = Callable[[int, int, int], list[float]]  # threads, prompt, tokens -> when it began, and when each token was out


def serve(load: Callable[[], tuple[Facts, Times]]) -> None:
    """Load a model, and time it as often as the driver asks.

    Args:
        load: from the model's open to its first token; gives what the driver should know of it, and how to time it:
            seconds at which a prompt goes in and each of 1 + tokens tokens comes out.
    """

    def loaded() -> tuple[Facts, Callable[[Facts], Facts]]:
        facts, times = load()

        def answer(asked: Facts) -> Facts:
            begun, first, *_, last = times(asked["threads"], asked["prompt"], asked["tokens"])
            speed = {"prefill": asked["prompt"] / (first - begun), "decode": asked["tokens"] / (last - first)}
            return speed | {"peak_memory": peak_memory()}

        return facts, answer

    converse(loaded)


def converse(load: Callable[[], tuple[Facts, Callable[[Facts], Facts]]]) -> None:
    """Get ready, and answer as often as the driver asks.

    Args:
        load: gives what the driver should know, and what answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(values: Facts) -> None:
        print(json.dumps(values), file=answers, flush=True)

    started = time.perf_counter()
    facts, answer = load()
    say({"load": time.perf_counter() - started} | facts)
    for line in sys.stdin:
        say(answer(json.loads(line)))


def prompt_ids(vocabulary: int, count: int) -> list[int]:
    """The same random tokens for everybody."""
    generator = random.Random(0)
    return [generator.randrange(vocabulary) for _ in range(count)]
