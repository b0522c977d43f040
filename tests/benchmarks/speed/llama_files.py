"""A checkpoint in one of llama.cpp's types, run in the environment of the peer `llama_cpp`.

    python -m tests.benchmarks.speed.llama_files SOURCE FOLDER TYPE THREADS

FOLDER/F16.gguf is written first, if it is not there, and FOLDER/TYPE.gguf quantized from it as `llama-quantize` does by
default; FOLDER/TYPE.json says what that file holds. It has no tokenizer: token ids go in.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..quality.peers._as_gguf import gguf_names, quantize, write_float
from ..quality.peers._common import make, read_checkpoint


def write_f16(source: Path, file: Path) -> None:
    """The float file: matrices in F16."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = gguf_names(config, [name for name, _ in read_checkpoint(source)])
    write_float(read_checkpoint(source), names, config, file, np.float16)


def describe(file: Path) -> dict[str, Any]:
    """Bytes of weights that a token reads, and the types of linears and head, counted.

    The head is "output", or the embedding where the file has no other.
    """
    matrices = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1}
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]
    return {
        "bytes_per_token": sum(int(tensor.n_bytes) for tensor in matrices.values()),
        "types": dict(Counter(tensor.tensor_type.name for tensor in matrices.values()).most_common()),
        "file_bytes": file.stat().st_size,
        "version": {name: metadata.version(name) for name in ("llama-cpp-python", "gguf")},
    }


def main() -> None:
    """Write the files that are missing."""
    source, folder, kind, threads = sys.argv[1:]
    place = Path(folder)
    float_file, file = place / "F16.gguf", place / f"{kind}.gguf"
    make(float_file, lambda partial: write_f16(Path(source), partial))
    make(file, lambda partial: quantize(float_file, partial, kind, int(threads)))
    (place / f"{kind}.json").write_text(json.dumps(describe(file)), encoding="utf-8")


if __name__ == "__main__":
    main()
