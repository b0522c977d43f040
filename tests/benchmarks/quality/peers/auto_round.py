"""AutoRound (package `auto-round`): rounding learned by signed gradient descent, block by block, on the CPU.

Defaults of the tool: symmetric, 200 iterations, batches of 8 sequences. Ours: 2 bits; `nsamples` and `seqlen` follow
the calibration tensor unless they are set to less. `stored/` holds its own `auto_round` format (GPTQ's layout without
`g_idx`: `qweight`, `scales`, `qzeros`), which is unpacked here: where the width of a layer is no multiple of the group
size, the tool's loader (0.16.1) finds no kernel for the layer and leaves it with random weights.
"""

from __future__ import annotations

import torch
from _common import read_checkpoint, start, stored_bytes
from torch import Tensor


def unpack(packed: Tensor, bits: int) -> Tensor:
    """32-bit words [words, columns] to codes [words * 32 / bits, columns]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[None, :, None]
    return (packed[:, None] >> shifts & 2**bits - 1).flatten(0, 1)


def dequantize(parts: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    """The layer's weight [rows, columns], in the float16 of its scales."""
    codes = unpack(parts["qweight"], bits)
    zeros = unpack(parts["qzeros"].T, bits).T + 1
    zeros, scales = (part.repeat_interleave(group_size, 0)[: len(codes)] for part in (zeros, parts["scales"]))
    return (scales * (codes - zeros)).T


def main() -> None:
    defaults = {"bits": 2, "group_size": 128, "sym": True, "iters": 200, "nsamples": 0, "seqlen": 0, "batch_size": 8}
    job = start("auto_round", defaults)
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    s = job.settings
    s["nsamples"] = s["nsamples"] or len(job.ids)
    s["seqlen"] = s["seqlen"] or job.ids.shape[1]
    ids = job.ids[: s["nsamples"], : s["seqlen"]]
    with job.clock():
        tool = AutoRound(
            AutoModelForCausalLM.from_pretrained(job.source, dtype="auto"),
            AutoTokenizer.from_pretrained(job.source),
            scheme=f"W{s['bits']}A16",
            group_size=s["group_size"],
            sym=s["sym"],
            iters=s["iters"],
            nsamples=s["nsamples"],
            seqlen=s["seqlen"],
            batch_size=s["batch_size"],
            dataset=[{"input_ids": rows} for rows in ids.split(s["batch_size"])],
            device_map="cpu",
        )
        tool.quantize_and_save(str(job.stored), format="auto_round")

    folder = next(job.stored.rglob("config.json")).parent  # in a folder that it names itself
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in read_checkpoint(folder):
        linear, part = name.rsplit(".", 1)
        if part in ("qweight", "qzeros", "scales"):
            layers.setdefault(linear, {})[part] = value
    weights = {f"{name}.weight": dequantize(parts, s["bits"], s["group_size"]) for name, parts in layers.items()}
    job.write_dense(weights)
    if any(value.shape[1] % s["group_size"] for value in weights.values()):
        job.notes.append("The tool cannot load what it wrote: a width is no multiple of the group size.")
    else:
        job.verify(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu"))
    job.write_result(stored_bytes(folder, list(layers)), weights, ["auto-round"])


if __name__ == "__main__":
    main()
