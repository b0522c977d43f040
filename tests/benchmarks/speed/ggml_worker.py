"""The worker of llama.cpp's kernels alone, run in the environment of the peer `llama_cpp`: ggml's products of one
matrix after the other with the same activations, by its own graph.

    python -m tests.benchmarks.speed.ggml_worker SIZE BYTES THREADS TYPE ...

It begins with the bytes of a matrix of SIZE x SIZE in each type that such rows fit. Asked {"kind": "TQ2_0", "tokens":
1, "matrices": 90, "budget": 0.15} it answers with the CPU seconds that one of so many takes (all that BYTES hold, at
most), activations rounded as the type wants them. Matrices lie as in a file: what llama.cpp rearranges when it loads a
model (Q4_0 for some processors) is not rearranged here.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from .serve import Facts, converse

FLOAT = gguf.GGMLQuantizationType.F32
OVERHEAD = 1 << 30  # bytes for what ggml notes of tensors and graphs, and for rounded activations, anew in each run


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """What is used of the library."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        base, cpu = (ctypes.CDLL(str(next(folder.glob(f"libggml-{part}.*")))) for part in ("base", "cpu"))
        pointer, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.init = self._function(base.ggml_init, pointer, InitParams)
        self.new_matrix = self._function(base.ggml_new_tensor_2d, pointer, pointer, whole, number, number)
        self.data = self._function(base.ggml_get_data, pointer, pointer)
        self.multiply = self._function(base.ggml_mul_mat, pointer, pointer, pointer, pointer)
        self.new_graph = self._function(base.ggml_new_graph_custom, pointer, pointer, ctypes.c_size_t, ctypes.c_bool)
        self.free = self._function(base.ggml_free, None, pointer)
        self.add = self._function(base.ggml_build_forward_expand, None, pointer, pointer)
        self.quantize = self._function(
            base.ggml_quantize_chunk, ctypes.c_size_t, whole, pointer, pointer, number, number, number, pointer
        )
        self.compute = self._function(cpu.ggml_graph_compute_with_ctx, whole, pointer, pointer, whole)

    @staticmethod
    def _function(function: ctypes._CFuncPtr, result: type | None, *arguments: type) -> ctypes._CFuncPtr:
        function.restype, function.argtypes = result, arguments
        return function


def bytes_of(kind: str, size: int) -> int:
    """Of a matrix of size x size; 0 where its rows are no multiple of the type's blocks."""
    block, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 0 if size % block else size * size // block * stored


class Matrices:
    """Packed matrices of one type.

    Args:
        ggml: the library.
        kind: a type's name.
        size: rows and columns.
        count: how many.
    """

    def __init__(self, ggml: Ggml, kind: str, size: int, count: int) -> None:
        self.ggml, self.size = ggml, size
        bytes_ = bytes_of(kind, size)
        self.context = ggml.init(InitParams(count * (bytes_ + 1024) + OVERHEAD, None, False))
        type_ = gguf.GGMLQuantizationType[kind].value
        values = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
        packed = np.empty(bytes_, dtype=np.uint8)
        ggml.quantize(type_, values.ctypes.data, packed.ctypes.data, 0, size, size, None)
        self.weights = [ggml.new_matrix(self.context, type_, size, size) for _ in range(count)]
        for weight in self.weights:
            ctypes.memmove(ggml.data(weight), packed.ctypes.data, bytes_)

    def seconds(self, tokens: int, matrices: int, threads: int, budget: float) -> float:
        """CPU seconds of one product, over `budget` seconds of them, a graph of `matrices` at a time."""
        ggml, used = self.ggml, self.weights[:matrices]
        room = len(used) * (4 * self.size * tokens + 1024) + 4 * self.size * tokens + OVERHEAD
        context = ggml.init(InitParams(room, None, False))
        x = ggml.new_matrix(context, FLOAT.value, self.size, tokens)
        activations = np.random.default_rng(1).standard_normal((tokens, self.size), dtype=np.float32)
        ctypes.memmove(ggml.data(x), activations.ctypes.data, activations.nbytes)
        graph = ggml.new_graph(context, 2 * len(used) + 8, False)
        for weight in used:
            ggml.add(graph, ggml.multiply(context, weight, x))
        started, done = time.process_time(), 0
        while not done or time.process_time() - started < budget:
            if ggml.compute(context, graph, threads):
                raise RuntimeError("ggml_graph_compute failed")
            done += len(used)
        taken = (time.process_time() - started) / done
        ggml.free(context)
        return taken


def main() -> None:
    """Answer until nobody asks."""
    size, cycled, threads = map(int, sys.argv[1:4])
    ggml = Ggml()

    @functools.cache
    def matrices(kind: str) -> Matrices:
        return Matrices(ggml, kind, size, max(2, cycled // bytes_of(kind, size)))

    def answer(asked: Facts) -> Facts:
        held = matrices(asked["kind"])
        count = min(asked["matrices"], len(held.weights))
        return {"seconds": held.seconds(asked["tokens"], count, threads, asked["budget"])}

    converse(lambda: ({"bytes": {kind: bytes_of(kind, size) for kind in sys.argv[4:] if bytes_of(kind, size)}}, answer))


if __name__ == "__main__":
    main()
