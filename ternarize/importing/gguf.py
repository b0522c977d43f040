"""GGUF files whose linears are ternary become ternarize folders: trits and scales come out of the blocks as they are.

TQ1_0, TQ2_0 and Q2_0 are ternary (Q2_0 where nobody used its fourth level), and so is Q4_0 where it holds three levels,
as our own exports do; weights in any other type are dequantized and have to be ternary then (see `folders`). Tables
in Q8_0 stay in 8 bits, with the same codes. All else goes into the smallest float type that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ternarize.architecture import choose_linears, find_blocks
from ternarize.block import embedding_multiplier
from ternarize.checkpoint import make_skeleton, tied_parameters
from ternarize.errors import FormatError, TernarizeError, UnsupportedModelError
from ternarize.export.export import check_places, replacing
from ternarize.export.gguf.blocks import Q2_0, Q4_0, TQ1_0, TQ2_0, read_blocks, unpack
from ternarize.export.gguf.model import (
    ARCHITECTURES,
    ROPE_FACTORS,
    attention_scalar,
    layer_types,
    norm_offset,
    row_order,
    tensor_names,
)
from ternarize.export.gguf.package import load_gguf
from ternarize.export.gguf.vocabulary import pre_tokenizer_of
from ternarize.importing.weight import recognize, with_shift
from ternarize.importing.writing import Form, Imported, lay_out, write_folder
from ternarize.progress import Progress, quiet_transformers
from ternarize.runtime import TernaryLinear
from ternarize.sources import describe_gguf
from ternarize.tensor import TernaryTensor

BLOCKS = {kind.name: kind for kind in (TQ1_0, TQ2_0, Q2_0, Q4_0)}
PERIOD = "attention.sliding_window_pattern"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def import_gguf(
    source: Path, output: Path, skip: tuple[str, ...] = (), force: bool = False, progress: Progress | None = None
) -> Imported:
    """Make a ternarize folder of a GGUF file whose linears are ternary.

    Args:
        source: the file.
        output: the folder to write.
        skip: linears to leave as floats, by name, as in a recipe.
        force: replace what is at `output`.

    Raises:
        TernarizeError: a linear is not ternary; it is named.
        UnsupportedModelError: an architecture or a tokenizer that this does not read.
    """
    progress = progress or Progress()
    check_places(source, [output], force)
    file = _File(source)
    path, blocks = find_blocks(file.model)
    linears: dict[str, nn.Module] = {}
    kept: list[str] = []
    for index, block in enumerate(blocks):
        chosen = choose_linears(block, f"{path}.{index}", skip)
        linears |= chosen.ternary
        kept += chosen.kept
    found: dict[str, TernaryTensor] = {}
    with progress.bar("reading", total=len(linears), unit="linear") as bar:
        for name in linears:
            found[name] = file.linear(name)
            bar.update(1)
    forms = {name: Form.of(tensor) for name, tensor in found.items()}
    tables = file.tables()
    multipliers = {name.removesuffix(".weight"): file.multiplier(name) for name in tables}
    layout = lay_out(source, path, forms, kept, skip, multipliers, file.table_group_size(tables))
    rest = [name for name in file.names if name.removesuffix(".weight") not in found]
    floats = {name: file.float_type(name) for name in rest if name not in tables}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in found.items():
            for last, buffer in TernaryLinear.from_tensor(with_shift(tensor, layout.shift)).named_buffers():
                yield f"{name}.{last}", buffer
        for name in rest:
            table = name in tables
            yield name, file.table(name, layout.int8_group_size) if table else file.float(name).to(floats[name])

    config = json.loads(file.config.to_json_string())
    # The widest of them: nothing is rounded where a model is loaded in the type that it names.
    dtype = max(floats.values(), key=FLOATS.index) if len(set(floats.values())) == 1 else torch.float32
    config |= {"architectures": [type(file.model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    with replacing(output, force) as fresh:
        fresh.mkdir()
        file.tokenizer.save_pretrained(fresh)
        return write_folder(fresh, layout, forms, tensors(), config, str(source), file.known)


class _File:
    """A GGUF file, its tensors by the names that transformers has.

    Raises:
        TernarizeError: no such file, not a GGUF file, or damaged.
        UnsupportedModelError: an architecture, or something of it, that is not read here.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.gguf = load_gguf()
        if not source.is_file():
            raise TernarizeError(f"{source}: no such file.")
        try:
            reader = self.gguf.GGUFReader(source)
            arch = reader.fields["general.architecture"].contents()
        except (ValueError, KeyError, OSError, IndexError) as error:
            raise TernarizeError(f"{source} is not a GGUF file, or damaged: {error}") from error
        if arch not in ARCHITECTURES.values():
            raise UnsupportedModelError(
                f"{source} is of llama.cpp's architecture {arch!r}; GGUF files are imported of "
                f"{', '.join(sorted(set(ARCHITECTURES.values())))}."
            )
        self.known = describe_gguf(reader.fields)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if ROPE_FACTORS in self.tensors:
            raise UnsupportedModelError(
                f"{source} has {ROPE_FACTORS} (Llama 3's rotary positions), from which a config.json cannot be written."
            )
        try:
            with quiet_transformers():
                self.config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
                self.tokenizer = _tokenizer(source, reader)
        except (ValueError, KeyError, OSError, NotImplementedError, RuntimeError, TypeError) as error:
            raise TernarizeError(f"{source}: transformers cannot read this GGUF file: {error}") from error
        _complete(self.config, self.tokenizer, {name: f.contents() for name, f in reader.fields.items()}, source)
        self.model = make_skeleton(self.config, source)
        state = self.model.state_dict()
        ours = [name for name in state if name not in tied_parameters(self.model)]
        self.names = tensor_names(arch, self.config.num_hidden_layers, ours)
        self.shapes = {name: tuple(state[name].shape) for name in ours}
        for name, theirs in self.names.items():
            if theirs not in self.tensors:
                raise TernarizeError(f"{source} lacks the tensor {theirs}, which is {name}. The file is incomplete.")

    def linear(self, name: str) -> TernaryTensor:
        """One linear.

        Raises:
            TernarizeError: it is not ternary.
        """
        tensor = self.tensors[self.names[f"{name}.weight"]]
        kind = BLOCKS.get(tensor.tensor_type.name)
        found = None
        if kind is not None:
            try:
                found = unpack(torch.from_numpy(np.array(tensor.data)), kind, name)
            except FormatError:
                found = None
        elif tensor.tensor_type.name in ("F16", "BF16", "F32", "Q4_1", "Q2_K"):
            found = recognize(self._read(f"{name}.weight"))
        if found is None:
            raise TernarizeError(
                f"{name} is {tensor.tensor_type.name} in {self.source.name}, and not ternary. --skip leaves single "
                "linears as they are; ternarize convert makes a float model ternary."
            )
        order = row_order(self.config, f"{name}.weight")
        if order is None:
            return found
        back = order.argsort()
        shift = None if found.shift is None else found.shift[back]
        return TernaryTensor(found.trits[back], found.scale[back], shift, found.group_size)

    def tables(self) -> list[str]:
        """Embeddings and heads in Q8_0."""
        both = [module for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()) if module]
        names = [f"{name}.weight" for name, module in self.model.named_modules() if module in both]
        return [n for n in names if n in self.names and self.tensors[self.names[n]].tensor_type.name == "Q8_0"]

    def table_group_size(self, tables: list[str]) -> int:
        """64 where neighbouring blocks of all tables share a scale, as in our own exports; else 32."""
        scales = [self._blocks(name)[0] for name in tables]
        even = all(s.shape[1] % 2 == 0 and torch.equal(s[:, ::2], s[:, 1::2]) for s in scales)
        return 64 if even else 32

    def table(self, name: str, group_size: int) -> Tensor:
        """A table as a ternarize folder holds it: uint8 [V, H + 2 G]."""
        scale, codes = self._blocks(name)
        scale = scale[:, :: group_size // 32].contiguous()
        return torch.cat([codes.flatten(1).view(torch.uint8), scale.view(torch.uint8)], 1)

    def multiplier(self, name: str) -> float:
        """What the module puts on the rows of a table."""
        module = self.model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(module, nn.Embedding):
            return 1.0
        rows = torch.ones(1, module.embedding_dim).expand(module.num_embeddings, -1)
        module.weight = nn.Parameter(rows, requires_grad=False)
        return embedding_multiplier(module, name)

    def float(self, name: str) -> Tensor:
        """Any tensor, dequantized, float32, in our order of rows and without what llama.cpp adds."""
        tensor = self._read(name)
        order = row_order(self.config, name)
        return (tensor if order is None else tensor[order.argsort()]) - norm_offset(self.config, name)

    def float_type(self, name: str) -> torch.dtype:
        """The smallest type that holds it."""
        tensor = self.float(name)
        return next(dtype for dtype in FLOATS if torch.equal(tensor.to(dtype).float(), tensor))

    def _read(self, name: str) -> Tensor:
        tensor = self.tensors[self.names[name]]
        if tensor.tensor_type.name == Q2_0.name:  # which gguf 0.19 does not dequantize
            scale, codes = read_blocks(torch.from_numpy(np.array(tensor.data)), Q2_0)
            found = (scale.float()[..., None] * codes).flatten(1)
        else:
            values = self.gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
            found = torch.from_numpy(np.array(values, dtype=np.float32))
        if tuple(found.shape) != self.shapes[name]:
            raise TernarizeError(
                f"{name} is {list(found.shape)} in {self.source.name}, and {list(self.shapes[name])} by its settings."
            )
        return found

    def _blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """Scales fp16 [V, H / 32] and codes int8 [V, H / 32, 32] of a table."""
        blocks = torch.from_numpy(np.array(self.tensors[self.names[name]].data)).unflatten(-1, (-1, 34))
        scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        # A block of zeros has scale 0, which this format does not.
        return torch.where(scale == 0, torch.tensor(2.0**-14).half(), scale), blocks[..., 2:].contiguous().view(
            torch.int8
        )


def _complete(config: Any, tokenizer: Any, fields: dict[str, Any], source: Path) -> None:
    """Give a config what transformers leaves out, or fills with defaults, where it reads a GGUF file's metadata.

    Raises:
        UnsupportedModelError: rotary positions that are scaled.
    """
    arch = fields["general.architecture"]
    if fields.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise UnsupportedModelError(f"{source} scales its rotary positions, which is not imported.")
    for token in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{token}_token_id")
        known = number is not None and number < config.vocab_size  # transformers adds tokens that a family usually has
        setattr(config, f"{token}_token_id", number if known else None)
    width = int(fields.get(f"{arch}.attention.key_length", 0))
    if width:
        config.head_dim = width
    if arch == "gemma3":
        config.query_pre_attn_scalar = attention_scalar(config)
        config.layer_types = layer_types(config.num_hidden_layers, int(fields.get(f"{arch}.{PERIOD}", 6)))
        local = float(fields.get(f"{arch}.rope.freq_base_swa", 10000.0))
        config.rope_parameters["sliding_attention"] = {"rope_type": "default", "rope_theta": local}
        config.final_logit_softcapping = fields.get(f"{arch}.final_logit_softcapping")


def _tokenizer(source: Path, reader: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, by transformers, which gives every byte-level one the same patterns, with its own."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    fields = reader.fields
    if fields["tokenizer.ggml.model"].contents() == "gpt2":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer_of(fields["tokenizer.ggml.pre"].contents())
    return tokenizer
