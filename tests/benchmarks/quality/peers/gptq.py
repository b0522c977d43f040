"""GPTQ (package `gptqmodel`), on the CPU.

Defaults of the tool, all kept: symmetric, `desc_act` off with group-aware reordering (`act_group_aware`) in its
place, no static groups, true sequential, its own damping. Ours: 2 bits. `stored/` holds what its `save` writes:
`qweight`, `scales`, `qzeros` and `g_idx` of every linear, and all of them are counted.
"""

from __future__ import annotations

import os

import torch
from _common import start, stored_bytes
from transformers import PreTrainedModel


def main() -> None:
    job = start("gptq", {"bits": 2, "group_size": 128, "sym": True, "desc_act": False, "batch_size": 1})
    # On two cores the tool's pool would get one worker, and its loader asks for two of them.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    batch_size = job.settings.pop("batch_size")
    with job.clock():
        config = QuantizeConfig(**{k: v for k, v in job.settings.items() if k != "verify"}, device="cpu")
        model = GPTQModel.load(str(job.source), config)
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.ids]
        model.quantize(rows, batch_size=batch_size)
        model.save(str(job.stored))

    def load() -> PreTrainedModel:  # in float16, the type of the stored scales
        kernel = BACKEND.GPTQ_TORCH
        return GPTQModel.load(str(job.stored), device="cpu", backend=kernel, dtype=torch.float16).model

    linears = {n: m for n, m in load().named_modules() if isinstance(m, BaseQuantLinear)}
    weights = {f"{name}.weight": module.dequantize_weight().T for name, module in linears.items()}
    job.settings |= {"batch_size": batch_size, "act_group_aware": config.act_group_aware}
    job.settings |= {"damp_percent": config.damp_percent, "true_sequential": config.true_sequential}
    job.write_dense(weights)
    job.verify(load)
    job.write_result(stored_bytes(job.stored, list(linears)), weights, ["gptqmodel"])


if __name__ == "__main__":
    main()
