"""How `generate` is called here: by settings that are named, whatever else a checkpoint's generation_config holds.

What a call leaves open transformers takes from the model's own generation_config: lengths, beams, penalties, a kind of
cache. Some of it would change a measurement in silence, some of it what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

ENDS = ("eos_token_id",)
TASTE = (
    *ENDS,
    "bos_token_id",
    "pad_token_id",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "stop_strings",
)  # what its authors recommend for writing


@contextmanager
def generation_settings(model: Any, kept: tuple[str, ...] = ()) -> Iterator[None]:
    """For the time being nothing but `kept` of the model's own settings fills in what a call of `generate` leaves open.

    Args:
        kept: names in GenerationConfig; `ENDS` for where a text ends, `TASTE` for how it is written, too.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in kept})
    try:
        yield
    finally:
        model.generation_config = own
