"""A checkpoint as a GGUF file, and what llama.cpp makes of it: for the adapter `llama_cpp`, and where speed is timed.

Needs `gguf` and `llama-cpp-python`. Architectures: llama, qwen2, qwen3. Nothing of `_common` is used here: an adapter
imports this file before `_common`, which takes the folder off the path.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

LOG_ERROR = 4  # ggml's level
ROTARY = (".self_attn.q_proj.", ".self_attn.k_proj.")


def reorder(weight: Tensor, heads: int, back: bool = False) -> Tensor:
    """Rows of q and k between the two halves of Hugging Face and the pairs of llama.cpp's `llama` (norm rotary)."""
    split = (heads, -1, 2) if back else (heads, 2, weight.shape[0] // heads // 2)
    return weight.unflatten(0, split).transpose(1, 2).reshape(weight.shape)


def heads_of(config: dict[str, Any], name: str) -> int | None:
    """The number of heads whose rows llama.cpp wants in another order, if any."""
    if config["model_type"] != "llama" or not any(part in name for part in ROTARY):
        return None
    return config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]


def gguf_names(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """{a tensor's name in the checkpoint: its name in a GGUF file}."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == config["model_type"])
    mapping = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    return {name: mapping.get_name(name, (".weight", ".bias")) for name in names}


def write_float(
    tensors: Iterable[tuple[str, Tensor]], names: dict[str, str], config: dict[str, Any], file: Path, dtype: type
) -> None:
    """Write a float GGUF without a tokenizer.

    Args:
        tensors: the checkpoint's, by their names there.
        names: from `gguf_names`.
        config: the checkpoint's config.json.
        dtype: of matrices, np.float32 or np.float16; vectors are float32.
    """
    import gguf

    writer = gguf.GGUFWriter(file, config["model_type"])
    _add_settings(writer, config)
    for name, value in tensors:
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        heads = heads_of(config, name)
        value = reorder(value.float(), heads) if heads else value.float()
        writer.add_tensor(names[name], value.numpy().astype(dtype if value.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: Any, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def quantize(before: Path, after: Path, kind: str, threads: int, **settings: Any) -> None:
    """Let llama.cpp quantize a float GGUF to a type such as Q4_K_M.

    Args:
        settings: fields of `llama_model_quantize_params`; without any, its recipe mixes types as its users get them.

    Raises:
        RuntimeError: it refuses.
    """
    from llama_cpp import llama_cpp as native

    reasons = []

    @native.llama_log_callback
    def note(level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR:
            reasons.append(text.decode(errors="replace").strip())

    native.llama_log_set(note, None)
    params = native.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{kind}")
    for name, value in settings.items():
        setattr(params, name, value)
    refused = native.llama_model_quantize(str(before).encode(), str(after).encode(), ctypes.byref(params))
    native.llama_log_set(ctypes.cast(None, native.llama_log_callback), None)
    if refused:
        raise RuntimeError(f"llama_model_quantize failed for {kind}: {'; '.join(reasons)}")
