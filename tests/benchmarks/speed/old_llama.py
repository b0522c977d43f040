"""What `llama_worker` calls, in terms of llama.cpp's interface of September 2024, which is bitnet.cpp's."""

from __future__ import annotations

from typing import Any

from llama_cpp import llama_cpp as native

llama_token = native.llama_token
llama_backend_init = native.llama_backend_init
llama_model_default_params = native.llama_model_default_params
llama_context_default_params = native.llama_context_default_params
llama_model_load_from_file = native.llama_load_model_from_file
llama_init_from_model = native.llama_new_context_with_model
llama_vocab_n_tokens = native.llama_n_vocab
llama_set_n_threads = native.llama_set_n_threads
llama_decode = native.llama_decode
llama_get_logits_ith = native.llama_get_logits_ith
llama_print_system_info = native.llama_print_system_info

_past = 0  # tokens in the one context's cache: a batch says where it begins


def llama_model_get_vocab(model: Any) -> Any:
    """A model is its own vocabulary."""
    return model


def llama_get_memory(context: Any) -> Any:
    """A context is its own memory."""
    return context


def llama_memory_clear(context: Any, data: bool) -> None:
    """Forget all tokens."""
    global _past
    native.llama_kv_cache_clear(context)
    _past = 0


def llama_batch_get_one(tokens: Any, count: int) -> Any:
    """A batch behind what the context has read."""
    global _past
    batch = native.llama_batch_get_one(tokens, count, _past, 0)
    _past += count
    return batch
