"""ternary-quant (package `ternary-quant`): groupwise asymmetric ternary, one plane or two.

Driven as its `quantize-broad` command does, over every linear of the decoder blocks ("text_backbone"): `planes=1` is
its default scheme `groupwise`, `planes=2` its scheme `tritplane2`. Defaults of the tool, all kept: groups of 32, 10
refits, errors weighted by the mean square of the inputs. Only the calibration batches are ours, and they come through
a hook of our own: the tool would hold every linear's inputs of all batches at once, where all that it uses of them
are mean squares. Codes are stored at two bits, scale and shift of a group in float16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from _common import start
from torch import Tensor, nn


class MeanSquare:
    """Stands for the tool's `ActivationCapture`: one row whose square is the mean square of all rows seen."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def register(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self.add)

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        self.total = rows.square().sum(0) + (0 if self.total is None else self.total)
        self.rows += len(rows)

    def get_activations(self) -> Tensor | None:
        return None if self.total is None else (self.total / self.rows).sqrt().float()[None]

    def remove(self) -> None:
        self.hook.remove()


def bytes_of(stored: Path) -> int:
    """Every array in the files of the linears (`codes/*.bin` and the like, or `tritplane/*.npz`)."""
    plain = sum(file.stat().st_size for file in stored.glob("*/*.bin"))
    return plain + sum(array.nbytes for file in stored.glob("tritplane/*.npz") for array in np.load(file).values())


def main() -> None:
    job = start("ternary_quant", {"planes": 1, "group_size": 32, "n_iter": 10, "batch_size": 2})
    from ternary_quant import generative_adapters as tool
    from ternary_quant.inference import load_ternary_model
    from ternary_quant.storage import load_quantized_params, save_quantized_model

    tool.ActivationCapture = MeanSquare
    s = job.settings
    with job.clock():
        model, _, info = tool.load_generative_model(str(job.source), device="cpu", dtype=torch.float32)
        config = tool.BroadQuantizationConfig(
            components=["text_backbone"],
            scheme="groupwise" if s["planes"] == 1 else f"tritplane{s['planes']}",
            n_planes=s["planes"],
            group_size=s["group_size"],
            n_iter=s["n_iter"],
        )
        batches = [{"input_ids": ids} for ids in job.ids.split(s["batch_size"])]
        result = tool.quantize_components_inplace(model, info, batches, config)
        save_quantized_model(
            ternary_params=result.quantized_params,
            model_name=str(job.source),
            model_config=model.config,
            quant_config=config,
            output_dir=str(job.stored),
            stats=result.stats,
            summary=result.summary,
            method_name=result.summary["method_name"],
            model_family=info.model_family,
        )

    params, _ = load_quantized_params(str(job.stored))
    weights = {f"{name}.weight": param.dequantize() for name, param in params.items()}
    job.notes.append("The tool computes in bfloat16 on a CPU; the dense weights keep the float32 of its dequantize().")
    job.write_dense(weights)
    job.verify(lambda: load_ternary_model(str(job.stored), device="cpu")[0])
    job.write_result(bytes_of(job.stored), weights, ["ternary-quant"])


if __name__ == "__main__":
    main()
