"""Plain bfloat16: an ordinary checkpoint that everything reads, at the size of the teacher.

Every weight is `scale * trit + shift` rounded to bfloat16, by at most 2^-8 of it. What was float16 or float32 in the
source is bfloat16 here. A mixture's experts are fused again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ternarize.export.regroup import relative_error, weights
from ternarize.export.stock import model_logits, transformers_model, write_folder
from ternarize.export.target import Exactness, TernaryFolder
from ternarize.progress import Progress

DTYPE = torch.bfloat16


class Dense:
    """Plain bfloat16."""

    name = "dense"
    tolerance = 2e-2

    def check(self, folder: TernaryFolder) -> Exactness:
        """As in `Target`: exact, by the definition that allows this rounding."""
        error = max(relative_error(t.dequantize(), t.dequantize(DTYPE).float()) for _, t in weights(folder))
        return Exactness(True, "each weight rounded to bfloat16", error)

    def sizes(self, folder: TernaryFolder) -> tuple[int, int]:
        """As in `Target`."""
        ternary = sum(rows * columns for rows, columns in folder.linears.values())
        others = sum(torch.Size(folder.shape(name)).numel() for name in folder.rest)
        return DTYPE.itemsize * ternary, DTYPE.itemsize * (ternary + others)

    def write(self, folder: TernaryFolder, output: Path, progress: Progress) -> None:
        """As in `Target`."""
        with progress.bar("writing dense", total=len(folder.linears), unit="linear") as bar:

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for name in folder.linears:
                    if not _in_mixture(folder, name):
                        weight = folder.ternary(name).dequantize(DTYPE)
                        yield f"{name}.weight", weight.t() if name in folder.transposed else weight
                    bar.update(1)
                for name in folder.rest:
                    if not _in_mixture(folder, name):
                        yield name, folder.tensor(name, DTYPE)
                for path in folder.mixtures:
                    yield from _fused(folder, path)

            write_folder(folder, output, tensors(), {"dtype": "bfloat16"})

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """As in `Target`, with transformers."""
        return model_logits(transformers_model(output, torch.float32), ids)


def _in_mixture(folder: TernaryFolder, name: str) -> bool:
    return any(name.startswith(f"{path}.") for path in folder.mixtures)


def _fused(folder: TernaryFolder, path: str) -> Iterator[tuple[str, Tensor]]:
    """The experts' linears stacked as the stock module holds them: [E, O, I] or [E, I, O], and biases [E, O]."""
    mixture = folder.model.get_submodule(path)
    count = len(mixture.experts())  # type: ignore[operator]
    for projection in (mixture.up_name, "down_proj"):
        names = [f"{path}.{e}.{projection}" for e in range(count)]
        parts = [
            folder.ternary(name).dequantize(DTYPE) if name in folder.linears else folder.tensor(f"{name}.weight", DTYPE)
            for name in names
        ]
        yield f"{path}.{projection}", torch.stack([part.t() if mixture.transposed else part for part in parts])
        if f"{names[0]}.bias" in folder.rest:
            yield f"{path}.{projection}_bias", torch.stack([folder.tensor(f"{name}.bias", DTYPE) for name in names])
