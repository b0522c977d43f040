"""compressed-tensors, "pack-quantized" 2-bit symmetric: codes -2..1, of which -1, 0 and 1 are used. No shift.

    NAME.weight_packed   int32 [O, I / 16]   codes + 2, sixteen to a word along the row, first one lowest
    NAME.weight_scale    fp16  [O, I / S]
    NAME.weight_shape    int64 [2]           O, I

Read by stock transformers, which dequantizes, and by vLLM on CUDA. The package itself is not needed to write.

Source: compressed-tensors' compressors/pack_quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ternarize.export.packed import pack_words
from ternarize.export.stock import StockTarget, float_linears
from ternarize.export.target import TernaryFolder
from ternarize.tensor import TernaryTensor


class CompressedTensors(StockTarget):
    """For stock transformers and vLLM."""

    name = "compressed-tensors"
    sizes_known = (16, 32, 64, 128, 256)

    def pack(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The three tensors of the module's drawing."""
        return {
            "weight_packed": pack_words(tensor.trits + 2, 2),
            "weight_scale": tensor.scale.half(),
            "weight_shape": torch.tensor(tensor.shape),
        }

    def config(self, folder: TernaryFolder, group_size: int) -> dict[str, Any]:
        """One group of linears."""
        weights = {
            "num_bits": 2,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group_size,
            "dynamic": False,
        }
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": float_linears(folder),
            }
        }
