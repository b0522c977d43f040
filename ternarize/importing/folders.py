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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.architecture import (
    check_skip,
    choose_linears,
    find_blocks,
    linear_weight,
    replace_module,
    unfuse_experts,
)
from ternarize.checkpoint import (
    Checkpoint,
    copy_side_files,
    find_shards,
    make_skeleton,
    read_config,
    read_header,
    release,
    tied_parameters,
    write_text,
)
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export.bitnet import unpack_rows
from ternarize.export.export import check_places, replacing
from ternarize.export.stock import write_shards
from ternarize.format import TRIPWIRE, Layout
from ternarize.importing.card import write_card
from ternarize.progress import Progress
from ternarize.quantizer import quant_method
from ternarize.runtime import TernaryLinear
from ternarize.sources import describe
from ternarize.tensor import TernaryTensor, expand_groups, group_count

LARGEST_GROUP = 1024  # beside the whole row
FEW_ROWS = 8  # that a group size is tried on first


@dataclass(frozen=True)
class Imported:
    """What was found.

    Args:
        linears: how many became ternary.
        group_sizes: {S: how many linears have it}.
        shift: whether they have one.
        bits_per_ternary_weight: all side data counted.
    """

    linears: int
    group_sizes: dict[int, int]
    shift: bool
    bits_per_ternary_weight: float


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
    found: dict[str, tuple[int, bool]] = {}
    kept: list[str] = []
    with progress.bar("reading", total=len(blocks), unit="block") as bar:
        for index, block in enumerate(blocks):
            chosen = opened.block(f"{path}.{index}", block)
            kept += chosen[1]
            for linear_name, tensor in chosen[0].items():
                found[linear_name] = tensor.group_size, tensor.shift is not None
            opened.forget(block)
            bar.update(1)
    check_skip(skip, [*found, *kept])
    if not found:
        raise TernarizeError(f"{source} has no linear left to import: skip takes all of them.")
    shift = any(moved for _, moved in found.values())
    sizes = Counter(size for size, _ in found.values())
    usual = sizes.most_common(1)[0][0]
    layout = Layout(
        blocks=path,
        group_size=usual,
        shift=shift,
        kept=tuple(sorted(kept)),
        int8={},
        int8_group_size=64,
        group_sizes={name: size for name, (size, _) in found.items() if size != usual},
    )
    stored = weights = 0
    opened = _open(source, skip)  # once more: reading takes mixtures apart
    _, blocks = find_blocks(opened.model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal stored, weights
        yield from opened.outside(path)
        for index, block in enumerate(blocks):
            for linear_name, tensor in opened.block(f"{path}.{index}", block)[0].items():
                bias = getattr(opened.model.get_submodule(linear_name), "bias", None)
                linear = TernaryLinear.from_tensor(with_shift(tensor, shift), bias)
                stored += sum(buffer.nbytes for buffer in linear.buffers())
                weights += linear.in_features * linear.out_features
                replace_module(opened.model, linear_name, linear)
            for full, tensor in block.state_dict(prefix=f"{path}.{index}.").items():
                yield full, opened.as_source(full, tensor)
            blocks[index] = nn.Identity()

    with replacing(output, force) as fresh:
        fresh.mkdir()
        write_shards(fresh, tensors())
        copy_side_files(source, fresh)
        fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
        fields["architectures"] = [type(opened.model).__name__]
        fields |= {"quantization_config": layout.to_config(), "transformers_weights": TRIPWIRE}
        write_text(fresh / "config.json", json.dumps(fields, indent=2) + "\n")
        known = describe(name or str(source), source)
        base = {"base_model": known.pop("name")} if "name" in known else {}
        known.pop("gated", None)
        write_card(fresh, name or str(source), base | known, layout, len(found), 8 * stored / weights)
    return Imported(len(found), dict(sizes), shift, 8 * stored / weights)


# -- one weight ----------------------------------------------------------------------------------------------------


def recognize(weight: Tensor) -> TernaryTensor | None:
    """The ternary form of a weight [O, I], in its own type; None where it has none.

    The largest groups that hold are taken, and a shift only where there is none without.
    """
    columns = weight.shape[1]
    for levels in (_symmetric, _moved):
        for size in (columns, *range(min(columns - 1, LARGEST_GROUP), 3, -1)):
            if all(_fits(part, size, levels) for part in (weight[:FEW_ROWS], weight)):
                return _form(weight, size, levels)
    return None


def _fits(weight: Tensor, size: int, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> bool:
    scale, shift = levels(_grouped(weight, size))
    columns = weight.shape[1]
    wide, moved = (expand_groups(level.half().float(), columns, size) for level in (scale, shift))
    trits = ((weight.float() - moved) / wide).round().clamp(-1, 1)
    return torch.equal((wide * trits + moved).to(weight.dtype), weight)


def _form(weight: Tensor, size: int, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> TernaryTensor:
    columns = weight.shape[1]
    scale, shift = (level.half() for level in levels(_grouped(weight, size)))
    wide, moved = (expand_groups(level.float(), columns, size) for level in (scale, shift))
    trits = ((weight.float() - moved) / wide).round().clamp(-1, 1).to(torch.int8)
    return TernaryTensor(trits, scale, shift if levels is _moved else None, size)


def _grouped(weight: Tensor, size: int) -> Tensor:
    """float32 [O, G, S]; a short last group is filled with its own last column."""
    padding = group_count(weight.shape[1], size) * size - weight.shape[1]
    wide = weight.float()
    return torch.cat([wide, wide[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, size))


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [O, G] where the levels are -s, 0, s: the largest is s. A group of zeros may have any scale."""
    scale = groups.abs().amax(-1)
    return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)


def _moved(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [O, G] with a shift: three levels are the two ends and the middle.

    Of two levels any two of three may be meant: the first pair whose scale and shift float16 holds is taken. One level
    is its shift, and what float16 leaves of it.
    """
    low, high = groups.aminmax(dim=-1)
    middle, span = (high + low) / 2, high - low
    three = ((groups > low[..., None]) & (groups < high[..., None])).any(-1)
    scale, shift = span / 2, middle
    for other in (low, high):
        better = ~three & ~(_in_half(scale) & _in_half(shift)) & _in_half(span) & _in_half(other)
        scale, shift = torch.where(better, span, scale), torch.where(better, other, shift)
    one = span == 0
    shift = torch.where(one, low.half().float(), shift)
    scale = torch.where(one, (low - shift).abs(), scale)
    return torch.where(scale > 0, scale, 1.0), shift


def _in_half(values: Tensor) -> Tensor:
    return values.half().float() == values


def with_shift(tensor: TernaryTensor, shift: bool) -> TernaryTensor:
    """The same weight with a shift of 0, where its folder has shifts."""
    if not shift or tensor.shift is not None:
        return tensor
    return TernaryTensor(tensor.trits, tensor.scale, torch.zeros_like(tensor.scale), tensor.group_size)


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
