"""What the formats that are Hugging Face folders share: a config, tokenizer files, and other tensors for each linear.

Embeddings and heads that are int8 or int6 in the folder have no place in most of these formats. They are written as
floats: float16, which rounds each value by at most 2^-11 of it, or float32 where the model is float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export.regroup import fitting_group_size, is_cut, regroup, relative_error, weights
from ternarize.export.target import EXACT, TOLERANCE, Exactness, TernaryFolder
from ternarize.files import INDEX_FILE, SINGLE_FILE, copy_side_files, write_tensors, write_text
from ternarize.progress import Progress, quiet_transformers, size
from ternarize.runtime import TableHead, TiedTableHead
from ternarize.tensor import TernaryTensor, group_count

SHARD_BYTES = 4_000_000_000


class StockTarget:
    """A format with one group size for the whole model, whose linears keep their names.

    A subclass says what it can hold, and packs.
    """

    name = ""
    sizes_known: tuple[int, ...] = ()  # group sizes that the format's readers take
    shift = False
    tolerance = TOLERANCE
    dtype: torch.dtype | None = None  # of all floats in the file; None leaves them as the folder has them

    def pack(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The tensors of one linear by their last name, such as {"weight": ...}, without the bias."""
        raise NotImplementedError

    def config(self, folder: TernaryFolder, group_size: int) -> dict[str, Any]:
        """What config.json has beside the float model's fields."""
        raise NotImplementedError

    def check(self, folder: TernaryFolder) -> Exactness:
        """As in `Target`."""
        refuse_strange_linears(folder, self.name)
        group_size = self.group_size(folder)
        uneven = self.uneven(folder, group_size)
        missing_shift = folder.layout.shift and not self.shift
        note = "; ".join(filter(None, [self.rounding(folder), self.tables(folder)]))
        if not uneven and not missing_shift and not self.rounding(folder):
            return Exactness(True, note, 0.0)
        error = max(relative_error(t.dequantize(), self.written(t, group_size)) for _, t in weights(folder))
        if error < EXACT and (not missing_shift or error == 0):
            return Exactness(True, note, error)
        if missing_shift:
            reason = f"{next(iter(folder.linears))} has shifts, which {self.name} cannot hold"
        else:
            reason = self.why_uneven(folder, uneven, group_size)
        return Exactness(False, f"{reason}; the nearest weights would be written", error)

    def sizes(self, folder: TernaryFolder) -> tuple[int, int]:
        """As in `Target`."""
        group_size = self.group_size(folder)
        ternary = sum(count * self._bytes(shape, group_size) for shape, count in shapes(folder).items())
        return ternary, ternary + self.rest_bytes(folder)

    def write(self, folder: TernaryFolder, output: Path, progress: Progress) -> None:
        """As in `Target`."""
        group_size = self.group_size(folder)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            with progress.bar(f"writing {self.name}", total=len(folder.linears), unit="linear") as bar:
                for name, tensor in weights(folder):
                    for last, packed in self.pack(self.fit(tensor, group_size)).items():
                        yield f"{name}.{last}", packed
                    bar.update(1)
            yield from self.rest(folder)

        dtype = {} if self.dtype is None else {"dtype": named(self.dtype)}
        write_folder(folder, output, tensors(), self.config(folder, group_size) | dtype)

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """As in `Target`, with transformers."""
        return model_logits(transformers_model(output, torch.float32), ids)

    def uneven(self, folder: TernaryFolder, group_size: int) -> str:
        """The first linear whose groups the format does not have, or ""."""
        return next((name for name in folder.linears if not is_cut(folder, name, group_size)), "")

    def why_uneven(self, folder: TernaryFolder, name: str, group_size: int) -> str:
        """In words."""
        columns, own = folder.linears[name][1], folder.group_sizes[name]
        return f"{name} has groups of {own} in {columns} columns, {self.name} groups of {group_size}"

    def rounding(self, folder: TernaryFolder) -> str:
        """What of the ternary weights is rounded although they fit, in words."""
        return ""

    def tables(self, folder: TernaryFolder) -> str:
        """What becomes of tables of codes, in words."""
        if not folder.tables:
            return ""
        values = sum(torch.Size(folder.shape(name)).numel() for name in folder.tables)
        bits = " and ".join(sorted({f"int{bits}" for bits in folder.tables.values()}))
        dtype = self.dtype or folder.table_dtype
        return f"{' and '.join(folder.tables)} from {bits} to {named(dtype)}, {size(values * dtype.itemsize)}"

    def rest(self, folder: TernaryFolder) -> Iterator[tuple[str, Tensor]]:
        """All that is not ternary, under its name; tables of codes as floats."""
        for name in folder.rest:
            yield name, folder.tensor(name, self.dtype or folder.stored(name))

    def rest_bytes(self, folder: TernaryFolder) -> int:
        """Bytes of `rest`."""
        counts = {name: torch.Size(folder.shape(name)).numel() for name in folder.rest}
        return sum(count * (self.dtype or folder.stored(name)).itemsize for name, count in counts.items())

    def written(self, tensor: TernaryTensor, group_size: int) -> Tensor:
        """The float weight as the format's reader computes it."""
        return self.fit(tensor, group_size).dequantize()

    def fit(self, tensor: TernaryTensor, group_size: int) -> TernaryTensor:
        """The weight as the format can hold it."""
        return regroup(tensor, group_size, self.shift)

    def group_size(self, folder: TernaryFolder) -> int:
        """The one to write.

        Raises:
            UnsupportedModelError: none divides the columns of every linear.
        """
        if found := fitting_group_size(folder, self.sizes_known):
            return found
        for group_size in sorted(self.sizes_known):
            if all(columns % group_size == 0 for _, columns in folder.linears.values()):
                return group_size
        least = min(self.sizes_known)
        name = next(name for name, (_, columns) in folder.linears.items() if columns % least)
        raise UnsupportedModelError(
            f"{name} has {folder.linears[name][1]} input columns, and {self.name} needs a multiple of {least}. "
            "The dense export takes any."
        )

    def _bytes(self, shape: tuple[int, int], group_size: int) -> int:
        trits = torch.zeros(shape, dtype=torch.int8)
        scale = torch.ones(shape[0], group_count(shape[1], group_size), dtype=torch.float16)
        packed = self.pack(TernaryTensor(trits, scale, None, group_size))
        return sum(tensor.nbytes for tensor in packed.values())


def refuse_strange_linears(folder: TernaryFolder, name: str) -> None:
    """Refuse what only a float export can hold.

    Raises:
        UnsupportedModelError: naming the module.
    """
    if folder.mixtures:
        raise UnsupportedModelError(
            f"{folder.mixtures[0]} is a mixture of experts, which {name} is not written for. The dense export takes it."
        )
    if folder.transposed:
        raise UnsupportedModelError(
            f"{min(folder.transposed)} is a Conv1D, which readers of {name} leave alone. The dense export takes it."
        )


def named(dtype: torch.dtype) -> str:
    """`torch.float16` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def shapes(folder: TernaryFolder) -> dict[tuple[int, int], int]:
    """How many ternary linears there are of each shape."""
    counts: dict[tuple[int, int], int] = {}
    for shape in folder.linears.values():
        counts[shape] = counts.get(shape, 0) + 1
    return counts


def float_linears(folder: TernaryFolder) -> list[str]:
    """Names of the modules that stock software has as linears and that are not ternary: heads, and what was kept."""
    kinds = (torch.nn.Linear, TableHead, TiedTableHead)
    return [name for name, module in folder.model.named_modules() if isinstance(module, kinds)]


def write_folder(
    folder: TernaryFolder, output: Path, tensors: Iterator[tuple[str, Tensor]], config: dict[str, Any]
) -> None:
    """Write a checkpoint: weights in shards, the float model's config.json with `config` added, tokenizer files."""
    output.mkdir()
    write_shards(output, tensors)
    copy_side_files(folder.path, output)
    fields = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
    for ours in ("quantization_config", "transformers_weights"):
        fields.pop(ours, None)
    write_text(output / "config.json", json.dumps(fields | config, indent=2) + "\n")


def write_shards(output: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors as they come into files of about `SHARD_BYTES`, with an index where there are several."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        if held and filled + tensor.nbytes > SHARD_BYTES:
            files.append(_write_part(output, len(files), held))
            held, filled = {}, 0
        held[name] = tensor
        filled += tensor.nbytes
    files.append(_write_part(output, len(files), held))
    if len(files) == 1:
        (output / "0.part").rename(output / SINGLE_FILE)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(files):
        shard = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (output / f"{number}.part").rename(output / shard)
        where |= dict.fromkeys(names, shard)
    total = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    write_text(output / INDEX_FILE, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def _write_part(output: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    write_tensors(output / f"{number}.part", tensors)
    return list(tensors)


def transformers_model(output: Path, dtype: torch.dtype | str, **settings: Any) -> Any:
    """A folder as stock transformers loads it.

    Raises:
        TernarizeError: transformers refuses it, or lacks a package.
    """
    try:
        with quiet_transformers(), torch.compiler.set_stance("force_eager"):
            return AutoModelForCausalLM.from_pretrained(output, dtype=dtype, trust_remote_code=False, **settings).eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise TernarizeError(f"{output}: transformers cannot load it: {error}") from error


@torch.no_grad()
def model_logits(model: Any, ids: Tensor) -> Tensor:
    """float32 [B, T, V], one window at a time."""
    with torch.compiler.set_stance("force_eager"):  # some readers compile, which takes minutes for a few windows
        return torch.cat([model(input_ids=window[None], use_cache=False).logits.float() for window in ids])
