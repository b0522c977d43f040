"""Tiny random models of many families, as real checkpoint folders with a real (tiny) tokenizer.

Beside them what many tests need: a recipe that fits, a folder's files to compare or to damage, and a slow reader of the
format, written from its description and not with the package's own packing.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ternarize import Recipe
from ternarize.tensor import TernaryTensor, group_count

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
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

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
    "deepseek_v3": _LLAMA | _EXPERTS | _LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
    "modernbert-decoder": _LLAMA | {"global_attn_every_n_layers": 1},
}  # fmt: skip


# A task of lm-eval on the items of a JSON file: question, choices, right.
TASK = """\
task: {name}
tag: some
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""

# What byte-level tokenizers learn from, and are asked: spaces, digits, contractions, scripts, symbols.
TEXTS = [
    "Hello world,  two  spaces and   three.\n\n\tTabs\r\n",
    "3 33 333 3333 12345678901 3.14159 1,000,000",
    "don't I'VE you'll WE'RE x's",
    "def f(x):\n    if x > 0:\n\t\treturn x**2  # comment\n",
    "Gr\u00f6\u00dfe na\u00efve caf\u00e9 \u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600\U0001f680 \u2705 \u00bd \u00b2 \u2167 \u0663",
    " ",
    "<s>a</s> b<extra>c",
]


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


def byte_level(*splits: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `TEXTS` with a few merges, split by the patterns given."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(splits or [pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens(["<extra>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


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
        state = model.state_dict()
        for name, buffer in model.named_buffers():  # DeepSeek's correction of the router
            if name in state and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def make_checkpoint(folder: Path, family: str = "llama", chat: bool = False, **changes: Any) -> Path:
    """Save `make_model` and its tokenizer as a checkpoint folder."""
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer(chat).save_pretrained(folder)
    return folder


def random_ternary(rows: int, columns: int, size: int, shift: bool = False, seed: int = 0) -> TernaryTensor:
    """Trits, scales and shifts that bfloat16 holds exactly only by chance."""
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    groups = rows, group_count(columns, size)
    scale = (torch.rand(groups, generator=generator) + 0.1).half()
    return TernaryTensor(
        trits, scale, (torch.randn(groups, generator=generator) * 16).round().half() / 64 if shift else None, size
    )


@torch.no_grad()
def make_ternary_checkpoint(folder: Path, family: str, dtype: torch.dtype, **form: Any) -> Path:
    """A float checkpoint whose linears inside the blocks are ternary."""
    model = make_model(family)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "layers." in name and parameter.ndim == 2:
            parameter.copy_(random_ternary(*parameter.shape, seed=number, **form).dequantize() * 0.25)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_text(path: Path, count: int = 4000, seed: int = 0) -> Path:
    """A text file of random letters and spaces of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    letters = ["\n", " ", *characters()[5:]]
    ids = torch.randint(len(letters), (count,), generator=generator).tolist()
    path.write_text("".join(letters[i] for i in ids))
    return path


# -- helpers --------------------------------------------------------------------------------------------------------


def make_recipe(text: Path, **changes: Any) -> Recipe:
    """A recipe for tiny models: short groups (the last one of a row shorter still), little text."""
    calibration = {"text": [str(text)], "samples": 16, "length": 64} | changes.pop("calibration", {})
    return Recipe.from_dict({"group_size": 12, "int8_group_size": 20, "calibration": calibration} | changes)


@torch.no_grad()
def logits(model: Any, seed: int = 3) -> Tensor:
    """What a model predicts for fixed random tokens, float32 [1, 40, V]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, 40), generator=generator)
    return model(input_ids=ids, use_cache=False).logits.float()


def run_threads(count: int, work: Callable[[int], object]) -> None:
    """`work(number)` in so many threads at once; none of them may take a minute."""
    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, target))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of config.json."""
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weight files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a folder with one weight file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes | dict[str, Any]]:
    """Every file of a converted folder, report and card without what differs from run to run: the command, times."""
    files: dict[str, bytes | dict[str, Any]] = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    report = json.loads((folder / "report.json").read_text())
    del report["run"]
    card = (folder / "README.md").read_text().split("## Make it again")[0].encode()
    return files | {"report.json": report, "README.md": card}


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights that a converted folder stands for, {module name: [rows, columns]}; slow, from the spec.

    Both packings are written down in `ternarize.format` and `ternarize.packing`; nothing of theirs is called here.
    """
    tensors = read_tensors(folder)
    layout = read_config(folder)["quantization_config"]
    weights = {}
    sides = (".scale", ".levels")
    for name in sorted(key.rpartition(".")[0] for key in tensors if key.endswith(sides)):
        packed, scale, shift = (tensors.get(f"{name}.{part}") for part in ("weight", "scale", "shift"))
        assert packed is not None
        if scale is None:
            scale, shift = _levels(tensors[f"{name}.levels"], tensors[f"{name}.limits"], layout, name, folder)
        digits = torch.stack([packed.int() // 3**d % 3 - 1 for d in range(5)], dim=-1).flatten(1)
        columns = _columns(packed.shape[1], scale.shape[1], layout["group_size"], name, folder)
        group = torch.arange(columns) // (layout["group_size"] or columns)
        weight = scale.float()[:, group] * digits[:, :columns]
        weights[name] = weight if shift is None else weight + shift.float()[:, group]
    for name in layout["int8"]:
        record, group_size = tensors[f"{name}.weight"], layout["int8_group_size"]
        groups = next(g for g in range(1, record.shape[1]) if -(-(record.shape[1] - 2 * g) // group_size) == g)
        columns = record.shape[1] - 2 * groups
        scales = record[:, columns:].contiguous().view(torch.float16).float()
        codes = record[:, :columns].contiguous().view(torch.int8).float()
        weights[name] = codes * scales[:, torch.arange(columns) // group_size]
    return weights


def _levels(record: Tensor, limits: Tensor, layout: dict[str, Any], name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Scale and shift [rows, groups] of coded levels, number by number in Python's floats; shift is 0 if not stored."""
    report = json.loads((folder / "report.json").read_text())
    columns = next(entry["shape"][1] for entry in report["linears"] if entry["name"] == name)
    groups = -(-columns // (layout["group_size"] or columns))
    bits, shift_bits = layout["scale_bits"], layout["shift_bits"] if layout["shift"] else 0
    lo, hi, span, reach = limits.tolist()
    scales, shifts = [], []
    for first, *rest in record.tolist():
        stream = [nibble for byte in rest for nibble in (byte % 16, byte // 16)]

        def code(number: int, width: int, start: int, stream: list[int] = stream) -> int:
            at = start + number * (width // 4)
            return stream[at] if width == 4 else stream[at] + 16 * stream[at + 1]

        top = lo + (hi - lo) * first / 255
        row = [2 ** (top - span * code(g, bits, 0) / (2**bits - 1)) for g in range(groups)]
        scales.append(row)
        middle = 2 ** (shift_bits - 1) if shift_bits else 2
        codes = [code(g, shift_bits, groups * bits // 4) if shift_bits else middle for g in range(groups)]
        shifts.append([s * reach * (c - middle) / (middle - 1) for s, c in zip(row, codes, strict=True)])
    return torch.tensor(scales, dtype=torch.float64).half(), torch.tensor(shifts, dtype=torch.float64).half()


def _columns(packed: int, groups: int, group_size: int | None, name: str, folder: Path) -> int:
    """Input features of a ternary linear, which the tensors alone leave open by a few: the report says."""
    report = json.loads((folder / "report.json").read_text())
    columns: int = next(entry["shape"][1] for entry in report["linears"] if entry["name"] == name)
    assert -(-columns // 5) == packed
    assert -(-columns // (group_size or columns)) == groups
    return columns
