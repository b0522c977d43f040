"""HQQ (package `hqq`): half-quadratic quantization, without calibration data.

Defaults of the tool: axis 1, optimized zero points, scale and zero point in float16 (`compute_dtype`), packed 2-bit
codes. Ours: 2 bits, groups of 64. `stored/` holds what `AutoHQQHFModel.save_quantized` writes.
"""

from __future__ import annotations

import torch
from _common import start


def main() -> None:
    job = start("hqq", {"bits": 2, "group_size": 64, "axis": 1})
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    with job.clock():
        model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float16)
        s = job.settings
        config = BaseQuantizeConfig(nbits=s["bits"], group_size=s["group_size"], axis=s["axis"])
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
        AutoHQQHFModel.save_quantized(model, str(job.stored))

    stored = torch.load(job.stored / "qmodel.pt", weights_only=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    parts = ("W_q", "scale", "zero")
    linear_bytes = sum(stored[name][part].nbytes for name in linears for part in parts)
    weights = {f"{name}.weight": module.dequantize() for name, module in linears.items()}
    job.notes.append("Data-free. Weights are dequantized in float16, as the tool does.")
    job.write_dense(weights)
    job.verify(lambda: AutoHQQHFModel.from_quantized(str(job.stored), device="cpu", cache_dir=None))
    job.write_result(linear_bytes, weights, ["hqq"])


if __name__ == "__main__":
    main()
