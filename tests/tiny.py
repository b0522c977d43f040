"""Tiny random models of many families, as real checkpoint folders with a real (tiny) tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
HIDDEN = 32

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# One small configuration per family: model_type -> config fields.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 16},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _HEAD,
    "gemma2": _LLAMA | _HEAD | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | _HEAD | {"sliding_window": 16, "query_pre_attn_scalar": 8, "num_hidden_layers": 3}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": _LLAMA,
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "ffn_dim": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": HIDDEN,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon": {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "olmo2": _LLAMA,
    "granite": _LLAMA | {"embedding_multiplier": 3.0},
    "stablelm": _LLAMA,
    "cohere": _LLAMA | {"logit_scale": 0.5},
    "smollm3": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": _LLAMA | _HEAD | _EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt_oss": _LLAMA | _HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}  # fmt: skip


def characters() -> list[str]:
    """The vocabulary: three special tokens, newline and space in byte-level spelling, then letters and digits."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456"
    return ["<pad>", "<s>", "</s>", "Ċ", "Ġ", *letters]


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a character."""
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(characters())}, [], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return tokenizer


def make_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model whose activations differ enough between channels to be worth calibrating."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5, generator=generator)
                parameter.mul_(torch.rand(parameter.shape[-1], generator=generator) * 2 + 0.2)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_checkpoint(folder: Path, family: str = "llama", chat: bool = False, **changes: Any) -> Path:
    """Save `make_model` and its tokenizer as a checkpoint folder."""
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer(chat).save_pretrained(folder)
    return folder


def make_text(path: Path, count: int = 4000, seed: int = 0) -> Path:
    """A text file of random letters and spaces of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    letters = ["\n", " ", *characters()[5:]]
    ids = torch.randint(len(letters), (count,), generator=generator).tolist()
    path.write_text("".join(letters[i] for i in ids))
    return path
