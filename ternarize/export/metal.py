"""Affine 2-bit, as Apple's software has it: weight = scales * code + biases, so that scale and shift are both exact.

    NAME.weight   uint32 [O, I / 16]   codes trit + 1 in {0, 1, 2}, sixteen to a word along the row, first one lowest
    NAME.scales   fp16   [O, I / S]    scale
    NAME.qbiases  fp16   [O, I / S]    shift - scale; rounded to fp16 where there is a shift      (MLX: NAME.biases)

`metal` is what stock transformers reads (quant_method "metal"): on an Apple GPU by kernels that compute on the codes,
elsewhere, with device_map="cpu", dequantized while loading. `mlx` is the same for mlx-lm, and holds int8 and int6
embeddings and heads in 8 bits: codes + 128, biases -128 * scale. S is 32, 64 or 128, one for the whole model.

transformers gives each weight the type of its scales, and asks that all of a model have one type; so every float in the
file is float16, which holds the folder's scales exactly, and the model computes in float16. A model whose activations
leave that type's range (Gemma) needs `metal-bf16` or `mlx-bf16`, which round scales and biases to bfloat16.

Sources: transformers' integrations/metal_quantization.py; mlx.nn.quantize.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export.packed import pack_words
from ternarize.export.stock import StockTarget, float_linears, model_logits, named, transformers_model
from ternarize.export.target import TOLERANCE, Exactness, TernaryFolder
from ternarize.tensor import TernaryTensor, expand_groups

GROUP_SIZES = (32, 64, 128)  # those of the kernels


class Metal(StockTarget):
    """For stock transformers.

    Args:
        dtype: of every float in the file: float16 or bfloat16.
    """

    sizes_known = GROUP_SIZES
    shift = True
    software, biases = "metal", "qbiases"

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.dtype: torch.dtype = dtype
        self.tolerance = TOLERANCE if dtype == torch.float16 else 2e-2
        self.name = self.software if dtype == torch.float16 else f"{self.software}-bf16"

    def check(self, folder: TernaryFolder) -> Exactness:
        """As in `Target`."""
        for name in folder.rest:
            if bool(torch.isinf(folder.tensor(name, self.dtype)).any()):
                raise UnsupportedModelError(f"{name} leaves the range of float16. Export to {self.name}-bf16.")
        return super().check(folder)

    def rounding(self, folder: TernaryFolder) -> str:
        """In bfloat16 scales are; the difference of shift and scale is in both types."""
        if self.dtype == torch.float16:
            return "biases (shift - scale) rounded to float16" if folder.layout.shift else ""
        return "scales and biases rounded to bfloat16"

    def pack(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The three tensors of the module's drawing."""
        scale, bias = self._levels(tensor)
        codes = pack_words(tensor.trits + 1, 2).view(torch.uint32)
        return {"weight": codes, "scales": scale, self.biases: bias}

    def written(self, tensor: TernaryTensor, group_size: int) -> Tensor:
        """scales * code + biases."""
        fitted = self.fit(tensor, group_size)
        columns = tensor.shape[1]
        scale, bias = (expand_groups(level.float(), columns, group_size) for level in self._levels(fitted))
        return scale * (fitted.trits + 1) + bias

    def _levels(self, tensor: TernaryTensor) -> tuple[Tensor, Tensor]:
        """Scales and biases; without a shift, a trit of 0 is a weight of 0 whatever the rounding."""
        scale = tensor.scale.to(self.dtype)
        shift = 0 if tensor.shift is None else tensor.shift.float()
        return scale, (shift - scale.float()).to(self.dtype)

    def config(self, folder: TernaryFolder, group_size: int) -> dict[str, Any]:
        """transformers' MetalConfig."""
        kept = float_linears(folder)
        return {
            "quantization_config": {
                "quant_method": "metal",
                "bits": 2,
                "group_size": group_size,
                "modules_to_not_convert": kept,
            }
        }

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """As in `Target`, with transformers: loaded in the file's type, compared in float32."""
        # Without device_map transformers asks for an Apple GPU.
        model = transformers_model(output, "auto", device_map="cpu")
        if not bool(torch.isfinite(model_logits(model, ids[:1])).all()):
            raise TernarizeError(
                f"{output}: this model's activations leave the range of {named(model.dtype)}. "
                f"Export to {self.software}-bf16 instead."
            )
        return model_logits(model.float(), ids)


class Mlx(Metal):
    """For mlx-lm."""

    software, biases = "mlx", "biases"

    def config(self, folder: TernaryFolder, group_size: int) -> dict[str, Any]:
        """mlx-lm's "quantization", with an entry for each 8-bit table."""
        quantization: dict[str, Any] = {"group_size": group_size, "bits": 2, "mode": "affine"}
        for name in self._kept_tables(folder):
            module = name.removesuffix(".weight")
            quantization[module] = {"group_size": folder.layout.int8_group_size, "bits": 8, "mode": "affine"}
        return {"quantization": quantization, "quantization_config": quantization} | older_fields(folder)

    def tables(self, folder: TernaryFolder) -> str:
        """What becomes of tables of codes, in words."""
        return "" if self._kept_tables(folder) == list(folder.tables) else super().tables(folder)

    def rest(self, folder: TernaryFolder) -> Iterator[tuple[str, Tensor]]:
        """All else, tables as 8-bit codes."""
        exact = self._kept_tables(folder)
        for name, tensor in super().rest(folder):
            if name not in exact:
                yield name, tensor
                continue
            codes, scale = folder.table_codes(name)
            module = name.removesuffix(".weight")
            yield name, pack_words(codes.to(torch.int16) + 128, 8).view(torch.uint32)
            yield f"{module}.scales", scale.to(self.dtype)
            yield f"{module}.biases", -128 * scale.to(self.dtype)

    def rest_bytes(self, folder: TernaryFolder) -> int:
        """Bytes of `rest`."""
        total = super().rest_bytes(folder)
        for name in self._kept_tables(folder):
            rows, columns = folder.shape(name)
            total += rows * (columns + 4 * columns // folder.layout.int8_group_size)
            total -= rows * columns * self.dtype.itemsize
        return total

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """As in `Target`, with mlx-lm, in float32."""
        try:
            import mlx.core as mx
            import numpy as np
            from mlx_lm.utils import load_model
        except ImportError as error:
            raise TernarizeError(
                f"reading an mlx export needs mlx and mlx-lm ({error}). Run: pip install mlx-lm, "
                "and outside of macOS pip install 'mlx[cpu]'"
            ) from error
        try:
            model, _ = load_model(output)
        except (ValueError, KeyError, OSError) as error:
            raise TernarizeError(f"{output}: mlx-lm cannot load it: {error}") from error
        model.set_dtype(mx.float32)
        return torch.cat([torch.from_numpy(np.array(model(mx.array([window])))) for window in ids.tolist()])

    def _kept_tables(self, folder: TernaryFolder) -> list[str]:
        """Which of the tables become 8-bit codes: those whose groups MLX has; rounded scales would be worse."""
        if self.dtype != torch.float16:
            return []
        size = folder.layout.int8_group_size
        return [n for n in folder.tables if size in GROUP_SIZES and folder.shape(n)[1] % size == 0]


def older_fields(folder: TernaryFolder) -> dict[str, Any]:
    """Rotary settings, and which blocks slide, under the names that they had before transformers 5, which mlx-lm reads;
    without them it would go on with its defaults, and with another model.
    """
    settings = getattr(folder.config, "rope_parameters", None) or {}
    kinds = settings if any(isinstance(value, dict) for value in settings.values()) else {"full_attention": settings}
    fields: dict[str, Any] = {}
    if full := dict(kinds.get("full_attention") or {}):
        fields["rope_theta"] = full.pop("rope_theta", None)
        fields["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
    if sliding := kinds.get("sliding_attention"):
        fields["rope_local_base_freq"] = sliding["rope_theta"]
    blocks = list(getattr(folder.config, "layer_types", None) or [])
    if "full_attention" in blocks and "sliding_attention" in blocks:
        fields["sliding_window_pattern"] = blocks.index("full_attention") + 1
    return {key: value for key, value in fields.items() if value is not None}
