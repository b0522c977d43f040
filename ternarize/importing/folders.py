"""Checkpoints that are ternary already become ternarize folders: nothing is fitted, and every weight stays what it is.

Two kinds are read. In one, the weights are ordinary floats of which every group of columns holds two or three levels,
-s, 0 and s, or those moved by a shift; the group size is found, the largest that holds. The other is BitNet b1.58 as
transformers stores it: packed trits and one scale a weight (see `export.bitnet`), or the floats that it was trained as,
which are rounded to three levels by the mean of |w| on every use.

What is asked of each weight: scale * trit + shift with scale and shift in float16, rounded to the type of the source,
is the source's weight, bit for bit. Embeddings and all else stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.architecture import (
    choose_linears,
    find_blocks,
    linear_weight,
    replace_module,
    unfuse_experts,
)
from ternarize.checkpoint import Checkpoint, make_skeleton, read_config, release, tied_parameters
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export.bitnet import unpack_rows
from ternarize.export.export import check_places, replacing
from ternarize.files import copy_side_files, find_shards, read_header
from ternarize.importing.weight import recognize, with_shift
from ternarize.importing.writing import Form, Imported, lay_out, write_folder
from ternarize.progress import Progress
from ternarize.quantizer import quant_method
from ternarize.runtime import TernaryLinear
from ternarize.sources import describe
from ternarize.tensor import TernaryTensor


def import_checkpoint(
    source: Path,
    output: Path,
    skip: tuple[str, ...] = (),
    force: bool = False,
    progress: Progress | None = None,
    name: str | None = None,
) -> Imported:
    """Make a ternarize folder of a checkpoint whose linears are ternary already.

    Args:
        source: a Hugging Face folder.
        output: the folder to write.
        skip: linears to leave as they are, by name, as in a recipe.
        force: replace what is at `output`.
        name: the source as the user gave it, a Hub id perhaps, for the card.

    Raises:
        TernarizeError: a linear is not ternary, or not one that float16 scales hold; the first is named.
        UnsupportedModelError: a structure or quantization that this does not read.
    """
    progress = progress or Progress()
    check_places(source, [output], force)
    opened = _open(source, skip)
    path, blocks = find_blocks(opened.model)
    found: dict[str, Form] = {}
    kept: list[str] = []
    with progress.bar("reading", total=len(blocks), unit="block") as bar:
        for index, block in enumerate(blocks):
            ternary, others = opened.block(f"{path}.{index}", block)
            found |= {linear: Form.of(tensor) for linear, tensor in ternary.items()}
            kept += others
            opened.forget(block)
            bar.update(1)
    layout = lay_out(source, path, found, kept, skip)
    opened = _open(source, skip)  # once more: reading takes mixtures apart

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from opened.outside(path)
        blocks_again = find_blocks(opened.model)[1]
        for index, block in enumerate(blocks_again):
            for linear, tensor in opened.block(f"{path}.{index}", block)[0].items():
                bias = getattr(opened.model.get_submodule(linear), "bias", None)
                replace_module(opened.model, linear, TernaryLinear.from_tensor(with_shift(tensor, layout.shift), bias))
            for full, tensor in block.state_dict(prefix=f"{path}.{index}.").items():
                yield full, opened.as_source(full, tensor)
            blocks_again[index] = nn.Identity()

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    title = name or str(source)
    with replacing(output, force) as fresh:
        fresh.mkdir()
        copy_side_files(source, fresh)
        config["architectures"] = [type(opened.model).__name__]
        return write_folder(fresh, layout, found, tensors(), config, title, describe(title, source))


# -- what is read --------------------------------------------------------------------------------------------------


def _open(source: Path, skip: tuple[str, ...]) -> _Floats:
    method = quant_method(source)
    if method is None:
        return _Floats(source, skip)
    if method == "bitnet":
        return _BitNet(source, skip)
    raise UnsupportedModelError(
        f"{source} is quantized by {method!r}, which is not read here: only bitnet and plain float checkpoints are."
    )


class _Floats:
    """A float checkpoint, one block of it in memory at a time."""

    def __init__(self, source: Path, skip: tuple[str, ...]) -> None:
        self.skip = skip
        self.checkpoint = Checkpoint(source)
        self.model: PreTrainedModel = self.checkpoint.skeleton()

    def block(self, name: str, block: nn.Module) -> tuple[dict[str, TernaryTensor], list[str]]:
        """Read a block; its ternary linears by full name, and the names of those that stay."""
        self.checkpoint.load(self.model, f"{name}.")
        unfuse_experts(block, name, self.skip)
        chosen = choose_linears(block, name, self.skip)
        return {path: self.linear(path, module) for path, module in chosen.ternary.items()}, list(chosen.kept)

    def linear(self, name: str, module: nn.Module) -> TernaryTensor:
        """One linear that has been read.

        Raises:
            TernarizeError: it is not ternary.
        """
        found = recognize(linear_weight(module).to(self.checkpoint.source_dtype(f"{name}.weight")))
        if found is None:
            raise TernarizeError(
                f"{name} is not ternary: no groups of its columns, of any size from 4 up, hold only -s, 0 and s (or "
                "those with a shift) with an s that float16 holds. ternarize convert makes a float model ternary; "
                "--skip leaves single linears as they are."
            )
        return found

    def forget(self, block: nn.Module) -> None:
        """Free a block's memory."""
        release(block)

    def outside(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Everything but the blocks."""
        self.checkpoint.load(self.model, "", exclude=f"{path}.")
        tied = tied_parameters(self.model)
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(f"{path}.") and name not in tied:
                yield name, self.as_source(name, tensor)

    def as_source(self, name: str, tensor: Tensor) -> Tensor:
        """What stays float in the type that it had; packed tensors as they are."""
        floats = tensor.dtype == torch.float32
        return tensor.to(self.checkpoint.source_dtype(name)) if floats else tensor


class _BitNet(_Floats):
    """BitNet b1.58 as transformers stores it: names are the model's, so its tensors are read as they stand."""

    def __init__(self, source: Path, skip: tuple[str, ...]) -> None:
        self.skip = skip
        config = read_config(source)
        settings: Any = config.quantization_config
        self.settings = settings if isinstance(settings, dict) else settings.to_dict()
        if self.settings.get("use_rms_norm"):
            raise UnsupportedModelError(
                f"{source} puts an RMSNorm of its own before each linear (use_rms_norm), which a plain model has not."
            )
        del config.quantization_config
        self.model = make_skeleton(config, source)
        headers = {shard: read_header(shard) for shard in find_shards(source)}
        self.where = {name: shard for shard, header in headers.items() for name in header}

    def block(self, name: str, block: nn.Module) -> tuple[dict[str, TernaryTensor], list[str]]:
        """As above."""
        plain = tuple(self.settings.get("modules_to_not_convert") or ())
        skip = (*self.skip, *(f"re:.*{pattern}" for pattern in plain))
        chosen = choose_linears(block, name, skip)
        ternary = {path: self.linear(path, module) for path, module in chosen.ternary.items()}
        names = [key for key in block.state_dict(prefix=f"{name}.") if key.removesuffix(".weight") not in ternary]
        for key in names:
            self._fill(key)
        return ternary, list(chosen.kept)

    def linear(self, name: str, module: nn.Module) -> TernaryTensor:
        """As above: packed trits and their scale, or floats that are rounded as their training rounded them."""
        weight, shape = self._read(f"{name}.weight"), tuple(linear_weight(module).shape)
        if weight.dtype != torch.uint8:
            if self.settings.get("quantization_mode") == "online":
                weight = _absmean(weight)
            elif f"{name}.weight_scale" in self.where:
                weight = weight * self._read(f"{name}.weight_scale").to(weight.dtype)
            found = recognize(weight)
            if found is None:
                raise TernarizeError(
                    f"{name} of a BitNet checkpoint is not ternary: the file is damaged, or another's."
                )
            return found
        trits = unpack_rows(weight)
        if tuple(trits.shape) != shape or int(trits.max()) > 1:
            raise TernarizeError(
                f"{name}.weight is {list(weight.shape)} packed, for a linear of {list(shape)}, or holds a code that is "
                "no trit: the file is damaged, or packed in another way."
            )
        stored = self._read(f"{name}.weight_scale").float().reshape(())
        scale = stored if self.settings.get("linear_class") == "autobitlinear" else 1 / stored
        half = scale.half()
        if float((half.float() - scale).abs()) > 2**-11 * float(scale) or not float(half) > 0:
            raise TernarizeError(f"{name} has the scale {float(scale)}, which float16 does not hold.")
        return TernaryTensor(trits, half.expand(shape[0], 1).contiguous(), None, shape[1])

    def outside(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """As above."""
        tied = tied_parameters(self.model)
        for name in self.model.state_dict():
            if not name.startswith(f"{path}.") and name not in tied:
                yield name, self._read(name)

    def as_source(self, name: str, tensor: Tensor) -> Tensor:
        """They never had another type."""
        return tensor

    def _fill(self, name: str) -> None:
        owner, _, last = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(self._read(name), requires_grad=False)
        else:
            module._buffers[last] = self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self.where:
            raise TernarizeError(
                f"{name} is not in the files: the checkpoint is incomplete, or of another architecture."
            )
        with safe_open(self.where[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


def _absmean(weight: Tensor) -> Tensor:
    """BitNet's rounding in training (arXiv 2402.17764), as transformers computes it."""
    scale = 1 / weight.float().abs().mean().clamp(min=1e-5)
    return ((weight.float() * scale).round().clamp(-1, 1) / scale).to(weight.dtype)
