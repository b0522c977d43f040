"""BitNet b1.58 as transformers has it: one scale for a whole weight, no shift, activations rounded to int8.

    NAME.weight         uint8 [O / 4, I]   trit + 1, two bits each: rows r, r + O/4, r + 2 O/4, r + 3 O/4 in one byte
    NAME.weight_scale   fp16  [1]

What makes a model fit is one scale in every weight: models that were imported from BitNet have it, those that
`ternarize convert` makes do not. The reader rounds the activations of every linear to 8 bits per token, so its logits
are not the student's even where every weight is.

Source: transformers' integrations/bitnet.py, "autobitlinear", "offline".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UnsupportedModelError
from ternarize.export.regroup import fit_again
from ternarize.export.stock import StockTarget, float_linears
from ternarize.export.target import Exactness, TernaryFolder
from ternarize.tensor import TernaryTensor


class BitNet(StockTarget):
    """For stock transformers."""

    name = "bitnet"
    sizes_known = (1,)  # groups do not matter: there is one scale
    tolerance = 0.1  # activations in 8 bits, token by token

    def check(self, folder: TernaryFolder) -> Exactness:
        """As in `Target`."""
        for name, (rows, _) in folder.linears.items():
            if rows % 4:
                raise UnsupportedModelError(
                    f"{name} has {rows} outputs, and bitnet needs a multiple of 4. The dense export takes any."
                )
        return super().check(folder)

    def uneven(self, folder: TernaryFolder, group_size: int) -> str:
        """The first linear with more scales than one."""
        return next((name for name in folder.linears if not has_one_scale(folder.ternary(name))), "")

    def why_uneven(self, folder: TernaryFolder, name: str, group_size: int) -> str:
        """In words."""
        return f"{name} has {folder.ternary(name).scale.numel()} scales, bitnet one for a whole weight"

    def fit(self, tensor: TernaryTensor, group_size: int) -> TernaryTensor:
        """The same trits under their one scale, or the nearest weight that has one."""
        rows, columns = tensor.shape
        if has_one_scale(tensor) and tensor.shift is None:
            return TernaryTensor(tensor.trits, tensor.scale[:, :1], None, columns)
        flat = fit_again(tensor.dequantize().reshape(1, -1), rows * columns, shift=False)
        return TernaryTensor(flat.trits.view(rows, columns), flat.scale.expand(rows, 1), None, columns)

    def pack(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The two tensors of the module's drawing."""
        return {"weight": pack_rows(tensor.trits), "weight_scale": tensor.scale[0, :1].half()}

    def config(self, folder: TernaryFolder, group_size: int) -> dict[str, Any]:
        """transformers' BitNetQuantConfig."""
        return {
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
                "modules_to_not_convert": float_linears(folder),
            }
        }


def has_one_scale(tensor: TernaryTensor) -> bool:
    """Whether all groups of a weight share one scale."""
    return bool((tensor.scale == tensor.scale[0, 0]).all())


def pack_rows(trits: Tensor) -> Tensor:
    """int8 [O, I] -> uint8 [O / 4, I] (see the module's drawing)."""
    quarters = (trits + 1).to(torch.uint8).unflatten(0, (4, -1))
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """uint8 [O / 4, I] -> int8 [O, I] of trits; a code of 3 becomes 2, which is none."""
    return torch.cat([(packed >> 2 * quarter & 3).to(torch.int8) - 1 for quarter in range(4)])
