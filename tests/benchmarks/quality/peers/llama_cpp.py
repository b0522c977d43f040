"""llama.cpp's 2-bit types (package `llama-cpp-python`, GGUF by `gguf`), with an importance matrix.

The source is written as a float32 GGUF, `llama_model_quantize` turns it into the `type` asked for (Q2_K, Q2_K_S,
IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M, TQ1_0, TQ2_0), and the result is read back. The importance matrix is what llama.cpp's own
tool makes: the mean square of every input of a linear layer, here over the calibration tokens (products in bfloat16
where the processor has instructions for it, as in ternarize). Default of the tool: its recipe puts larger types into
some layers (they are counted as stored); `pure=1` asks for the one type everywhere. Embeddings and head stay in
float32.

All of these types pack 256 weights of a row. Where a width is no multiple of 256, llama.cpp falls back to types of
more than 4 bits; this adapter stops with an error instead. Architectures: llama, qwen2, qwen3.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from _as_gguf import gguf_names, heads_of, quantize, reorder, write_float
from _common import Job, block_linears, read_checkpoint, start
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


def importance(job: Job) -> dict[str, Tensor]:
    """Mean square of every input of every linear inside the decoder blocks."""
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}
    for name, module in block_linears(model).items():

        def add(_: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).float().square().sum(0)

        module.register_forward_pre_hook(add)
    fast = any(probe() for probe in (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
        for row in job.ids:
            model(row[None], use_cache=False)
    return {name: value / job.ids.numel() for name, value in sums.items()}


def quantize_with(matrix: dict[str, Tensor], job: Job, before: Path, after: Path) -> None:
    from llama_cpp import llama_cpp as native

    arrays = {name: np.ascontiguousarray(value.numpy(), dtype=np.float32) for name, value in matrix.items()}
    entries = (native.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one stays empty
    for entry, (name, array) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    quantize(
        before,
        after,
        job.settings["type"],
        torch.get_num_threads(),
        token_embedding_type=native.GGML_TYPE_F32,
        output_tensor_type=native.GGML_TYPE_F32,
        pure=job.settings["pure"],
        imatrix=ctypes.cast(entries, ctypes.POINTER(native.llama_model_imatrix_data)),
    )


def main() -> None:
    job = start("llama_cpp", {"type": "Q2_K", "pure": False})
    config = json.loads((job.source / "config.json").read_text())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.source))
    linears = block_linears(skeleton)
    for name, module in linears.items():
        if module.in_features % 256:
            raise SystemExit(
                f"llama.cpp cannot store {name} as {job.settings['type']}: its {module.in_features} columns are no "
                "multiple of 256. llama.cpp would fall back to a type of more than 4 bits, which is not wanted here."
            )
    import gguf

    names = gguf_names(config, [name for name, _ in read_checkpoint(job.source)])

    before, after = job.out / "float.gguf", job.stored / "model.gguf"
    with job.clock():
        write_float(read_checkpoint(job.source), names, config, before, np.float32)
        matrix = {names[f"{name}.weight"]: value for name, value in importance(job).items()}
        quantize_with(matrix, job, before, after)
    before.unlink()

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(after).tensors}
    weights, linear_bytes, types = {}, 0, Counter()
    for linear in linears:
        name = f"{linear}.weight"
        tensor, heads = stored[names[name]], heads_of(config, name)
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        weights[name] = reorder(value, heads, back=True) if heads else value
        linear_bytes += tensor.n_bytes
        types[tensor.tensor_type.name] += 1
    job.notes.append("Types of the linears: " + ", ".join(f"{n} {t}" for t, n in types.most_common()) + ".")
    job.write_dense(weights)
    job.write_result(linear_bytes, weights, ["llama-cpp-python", "gguf"])


if __name__ == "__main__":
    main()
