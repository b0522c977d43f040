"""The worker of llama.cpp, run in the environment of the peer `llama_cpp` or `bitnet_cpp`: its C interface, fed with
token ids.

    python -m tests.benchmarks.speed.llama_worker FILE.gguf THREADS CONTEXT

Its defaults hold but for the size of the context. A token is chosen as `generate` does, the likeliest of all.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from llama_cpp import llama_cpp as native

from .serve import Facts, Times, prompt_ids, serve

if not hasattr(native, "llama_memory_clear"):
    from . import old_llama as native


def load(file: str, threads: int, context: int) -> tuple[Facts, Times]:
    """What `serve` wants.

    Args:
        context: tokens that a prompt and what follows it take at most.
    """
    native.llama_backend_init()
    model = native.llama_model_load_from_file(file.encode(), native.llama_model_default_params())
    params = native.llama_context_default_params()
    params.n_ctx = params.n_batch = context
    params.n_threads = params.n_threads_batch = threads
    state = native.llama_init_from_model(model, params) if model else None
    if not state:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        """Put tokens in; the likeliest next one."""
        tokens = (native.llama_token * len(ids))(*ids)
        if code := native.llama_decode(state, native.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}")
        return int(np.ctypeslib.as_array(native.llama_get_logits_ith(state, -1), (vocabulary,)).argmax())

    def times(threads: int, prompt: int, tokens: int) -> list[float]:
        native.llama_set_n_threads(state, threads, threads)
        native.llama_memory_clear(native.llama_get_memory(state), True)
        ids = prompt_ids(vocabulary, prompt)
        found = [time.perf_counter()]
        for _ in range(1 + tokens):
            ids = [step(ids)]
            found.append(time.perf_counter())
        return found

    times(threads, 1, 0)
    return {"build": native.llama_print_system_info().decode()}, times


if __name__ == "__main__":
    file, threads, context = sys.argv[1:]
    serve(lambda: load(file, int(threads), int(context)))
