"""A model as llama.cpp knows it: its architecture's name, metadata, and the names and row order of its tensors.

llama.cpp has a program of its own for every architecture, so here, unlike elsewhere in the package, models are known by
name. What its program does differently from transformers is refused, as far as config.json shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UnsupportedModelError
from ternarize.export.target import TernaryFolder

# model_type in config.json -> llama.cpp's name
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
ROPE_FACTORS = "rope_freqs.weight"


def architecture(folder: TernaryFolder) -> str:
    """llama.cpp's name for a model.

    Raises:
        UnsupportedModelError: none of those that are written here, or one with a setting that llama.cpp does not have.
    """
    config = folder.config
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise UnsupportedModelError(
            f"{folder.path} is of type {config.model_type!r}; GGUF files are written of "
            f"{', '.join(ARCHITECTURES)}. Export it to another format, or run it with ternarize."
        )
    gemma = name == "gemma3"
    activation = getattr(config, "hidden_activation" if gemma else "hidden_act", None)
    wanted: dict[str, tuple[Any, Any]] = {"hidden_act": (activation, "gelu_pytorch_tanh" if gemma else "silu")}
    if gemma:
        wanted["query_pre_attn_scalar"] = (config.query_pre_attn_scalar, attention_scalar(config))
        wanted["attn_logit_softcapping"] = (config.attn_logit_softcapping, None)
        wanted["use_bidirectional_attention"] = (bool(config.use_bidirectional_attention), False)
        local = config.rope_parameters["sliding_attention"]
        wanted["rope_type of sliding_attention"] = (local.get("rope_type", "default"), "default")
        wanted["layer_types"] = (
            list(config.layer_types),
            layer_types(config.num_hidden_layers, _window_period(config)),
        )
    rope = _rope(config)
    wanted["partial_rotary_factor"] = (rope.get("partial_rotary_factor", 1.0), 1.0)
    for setting, (found, needed) in wanted.items():
        if found != needed:
            raise UnsupportedModelError(
                f"{folder.path}: config.json says {setting} {found!r}, and llama.cpp's {name} has {needed!r}, always. "
                "Export it to another format, or run it with ternarize."
            )
    kinds = ("default", "linear", "llama3") if name == "llama" else ("default", "linear")
    if rope.get("rope_type", "default") not in kinds:
        raise UnsupportedModelError(
            f"{folder.path}: rotary positions of type {rope['rope_type']!r} are not written to GGUF files for {name}, "
            f"only {', '.join(kinds)}. Export it to another format, or run it with ternarize."
        )
    return name


def add_settings(writer: Any, config: Any) -> None:
    """Write config.json's settings as metadata."""
    import gguf

    rope = _rope(config)
    width = _head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_window_period(config))
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def tensor_names(arch: str, layers: int, tensors: list[str]) -> dict[str, str]:
    """{a weight or bias by our name: its name in a GGUF file}, in the order in which they lie there.

    Args:
        arch: from `architecture`.
        layers: how many blocks the model has.

    Raises:
        UnsupportedModelError: a tensor that llama.cpp has no name for.
    """
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    mapping = gguf.get_tensor_name_map(number, layers)
    names = {tensor: str(mapping.get_name(tensor, (".weight", ".bias")) or "") for tensor in tensors}
    for tensor, theirs in names.items():
        if not theirs:
            raise UnsupportedModelError(
                f"llama.cpp's {arch} has no tensor {tensor}. Export to another format, or run it with ternarize."
            )
    return dict(sorted(names.items(), key=lambda item: _position(item[1])))


def row_order(config: Any, name: str) -> Tensor | None:
    """For a tensor of our name the row that each of llama.cpp's rows is; None where that is the same one.

    llama.cpp's llama turns neighbouring pairs of a head's rows, where Hugging Face turns its two halves.
    """
    if ARCHITECTURES[config.model_type] != "llama" or ".self_attn." not in name:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    width = _head_width(config)
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).flatten()


def norm_offset(config: Any, name: str) -> float:
    """What llama.cpp has already added to a norm's weight, for a tensor of our name: Gemma's forward adds 1."""
    return 1.0 if config.model_type == "gemma3_text" and name.endswith("norm.weight") else 0.0


def rope_factors(folder: TernaryFolder) -> Tensor | None:
    """How much slower each frequency of the rotary positions turns, float32, for Llama 3; else None."""
    rope = _rope(folder.config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled: Tensor = folder.model.get_decoder().rotary_emb.inv_freq
    width = _head_width(folder.config)
    plain = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / scaled.double()).float()


def _rope(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = parameters.get("full_attention", parameters)
    return full


def _head_width(config: Any) -> int:
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def _context(config: Any) -> int:
    """Tokens for which llama.cpp, which has sliding windows for Gemma only, computes what transformers does."""
    limit: int = config.max_position_embeddings
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    window: int | None = getattr(config, "sliding_window", None)
    return min(limit, window) if window and slides and config.model_type != "gemma3_text" else limit


def attention_scalar(config: Any) -> float:
    """What Gemma 3 divides its queries by the root of: in llama.cpp the head's width, but for the 27B model."""
    return config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim


def _window_period(config: Any) -> int:
    """Every how many layers one attends to everything: in llama.cpp the last of each period."""
    types = list(config.layer_types)
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1


def layer_types(layers: int, period: int) -> list[str]:
    """What Gemma's layers attend to, where the last of each period attends to everything."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def _position(name: str) -> tuple[int, int, str]:
    """Embedding first, then the blocks in order, then the rest."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith("token_embd") else 2), 0, name
