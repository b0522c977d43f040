"""GPTQ, 2-bit symmetric: weight = scales * (code - 2), of whose codes 1, 2 and 3 are used. No shift.

    NAME.qweight  int32 [I / 16, O]   trit + 2, sixteen to a word down a column, first one lowest
    NAME.scales   fp16  [I / S, O]
    NAME.qzeros   int32 [I / S, O / 16]   the zero point 2, stored as 1 (format version 1 subtracts one)
    NAME.g_idx    int32 [I]               the group of every column

Read by gptqmodel. O and I must be multiples of 16.

Source: gptqmodel's nn_modules/qlinear and utils/model.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export.packed import pack_words
from ternarize.export.stock import StockTarget, float_linears, model_logits
from ternarize.export.target import Exactness, TernaryFolder
from ternarize.files import write_text
from ternarize.progress import Progress
from ternarize.tensor import TernaryTensor


class Gptq(StockTarget):
    """For gptqmodel."""

    name = "gptq"
    sizes_known = (16, 32, 64, 128, 256, 512, 1024)

    def check(self, folder: TernaryFolder) -> Exactness:
        """As in `Target`."""
        for name, (rows, _) in folder.linears.items():
            if rows % 16:
                raise UnsupportedModelError(
                    f"{name} has {rows} outputs, and gptq needs a multiple of 16. The dense export takes any."
                )
        return super().check(folder)

    def pack(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The four tensors of the module's drawing."""
        rows, columns = tensor.shape
        groups = tensor.scale.shape[1]
        return {
            "qweight": pack_words(tensor.trits + 2, 2).t(),
            "scales": tensor.scale.half().t(),
            "qzeros": pack_words(torch.ones(groups, rows, dtype=torch.int8), 2),
            "g_idx": torch.arange(columns, dtype=torch.int32) // tensor.group_size,
        }

    def config(self, folder: TernaryFolder, group_size: int) -> dict[str, Any]:
        """gptqmodel's quantization_config; linears that stay float are left out by name."""
        inside = [name for name in float_linears(folder) if name.startswith(f"{folder.layout.blocks}.")]
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 2,
                "group_size": group_size,
                "sym": True,
                "desc_act": False,
                "lm_head": False,
                "checkpoint_format": "gptq",
                "pack_dtype": "int32",
                "dynamic": {f"-:^{re.escape(name)}$": {} for name in inside} or None,
                "meta": {"quantizer": ["ternarize:0"]},
            }
        }

    def write(self, folder: TernaryFolder, output: Path, progress: Progress) -> None:
        """As in `Target`; gptqmodel wants its settings in a file of their own, too."""
        super().write(folder, output, progress)
        fields = json.loads((output / "config.json").read_text(encoding="utf-8"))
        write_text(output / "quantize_config.json", json.dumps(fields["quantization_config"], indent=2) + "\n")

    def logits(self, output: Path, ids: Tensor) -> Tensor:
        """As in `Target`, with gptqmodel's kernel for plain torch."""
        try:
            from gptqmodel import BACKEND, GPTQModel
        except ImportError as error:
            raise TernarizeError(
                f"reading a gptq export needs gptqmodel ({error}). Run: pip install gptqmodel"
            ) from error
        try:
            model = GPTQModel.load(str(output), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            raise TernarizeError(f"{output}: gptqmodel cannot load it: {error}") from error
        return model_logits(model.float().eval(), ids)  # scales are float16 in the file; the products are not to be
