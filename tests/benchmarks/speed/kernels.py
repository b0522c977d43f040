"""The kernels alone: how fast a packed weight meets activations, beside llama.cpp's and torch's own operators.

    python -m tests.benchmarks.speed.kernels [--size 2048] [--group-size 64] [--threads 1] [--json FILE]

Matrices of size x size are cycled over more memory than the last cache holds, as a model's linears are. All contenders
take turns within each round, so that other work on the machine hits them alike; a figure is the median over the rounds.
Time is CPU time of the process that computes: with one thread that is the time it would take alone, up to what others
do to caches. llama.cpp's types are computed by its own library, in a process that waits for its turn: what it
rearranges when it loads a model (Q4_0 for some processors) is not rearranged.

    Gw/s        1e9 weights a second, decode: one token
    x TQ2_0     that, over llama.cpp's TQ2_0 in the same round, and its range
    bandwidth   the bytes it reads, as a share of what a plain sum over as much memory reads in the same round
    GOP/s       1e9 multiplications and additions a second, prefill
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ternarize.errors import TernarizeError
from ternarize.kernels import cpu
from ternarize.packing import CodedScales, encode_levels, pack_trits, quantize_table, split_scales
from ternarize.sources import cache_folder

from ..quality.contenders import environment
from .contenders import PACKAGE
from .table import ratio_range
from .workers import Worker

TABLE_GROUP = 64
CYCLED = 96 << 20  # bytes of weights of one contender
FEW = 2  # matrices for many tokens
PATIENCE = 600.0  # seconds for one answer of llama.cpp's worker
KINDS = ("TQ2_0", "TQ1_0", "Q2_K", "Q4_0", "Q4_K", "F16")
RIVAL = "llama.cpp TQ2_0"

Call = Callable[[Tensor], object]  # activations, with one matrix


@dataclass(frozen=True)
class Kernel:
    """A contender.

    Args:
        bytes: of one matrix.
        seconds: tokens, budget -> CPU seconds of one product, over `budget` seconds of them.
    """

    bytes: int
    seconds: Callable[[int, float], float]


def ternary_contenders(size: int, group_size: int) -> dict[str, tuple[list[Call], int]]:
    """{name: (one call for each matrix, bytes of one matrix)} of every path, by what a group has."""
    found: dict[str, tuple[list[Call], int]] = {}
    groups = -(-size // group_size)
    trits = pack_trits(torch.randint(-1, 2, (size, size), dtype=torch.int8))
    scale, some = (torch.rand(size, groups) + 0.1).half(), torch.randn(size, groups).half()
    coded = split_scales(encode_levels(scale, None, 4, 0))
    assert coded is not None
    kinds: tuple[tuple[str, tuple[Tensor, Tensor | None] | CodedScales, bool], ...] = (
        ("int8", (scale, some), False),
        ("int8, no shift", (scale, None), False),
        ("int8, scales of 4 bits", coded, False),
        ("float", (scale, some), True),
    )
    for name, supported in cpu.paths().items():
        if not supported:
            continue
        path = cpu.select(name)
        assert path is not None
        for kind, levels, exact in kinds:
            one = cpu.PackedTernary(path, trits, levels, None, size, group_size)
            count = FEW if name == "scalar" else max(FEW, CYCLED // one.packed.numel())
            packed = [cpu.PackedTernary(path, trits, levels, None, size, group_size) for _ in range(count)]
            calls: list[Call] = [lambda x, p=p, exact=exact: p.linear(x, exact) for p in packed]  # type: ignore[misc]
            found[f"{name}, {kind}"] = calls, one.packed.numel()
    return found


def table_contenders(size: int) -> dict[str, tuple[list[Call], int]]:
    """Tables of the path in use, with the groups that recipes give them."""
    path = cpu.native()
    found: dict[str, tuple[list[Call], int]] = {}
    for bits in () if path is None else (8, 6):
        records = quantize_table(torch.randn(size, size), TABLE_GROUP, bits)
        tables = [records.clone() for _ in range(CYCLED // records.numel())]
        calls: list[Call] = [
            lambda x, r=r, b=bits: cpu.table_linear(x, r, None, TABLE_GROUP, b, False)  # type: ignore[misc]
            for r in tables
        ]
        found[f"int{bits} table, {path.name}"] = calls, records.numel()
    return found


def torch_contenders(size: int, group_size: int) -> dict[str, tuple[list[Call], int]]:
    """What torch itself has: bfloat16, and 4 bits with scale and zero."""
    found: dict[str, tuple[list[Call], int]] = {}
    weights = [torch.randn(size, size).bfloat16() for _ in range(max(2, CYCLED // (2 * size * size)))]
    calls: list[Call] = [lambda x, w=w: torch.nn.functional.linear(x.bfloat16(), w) for w in weights]  # type: ignore[misc]
    found["torch bfloat16"] = calls, 2 * size * size
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (size, size), dtype=torch.int32), 1)
    levels = torch.rand(size // group_size, size, 2).bfloat16()
    packed = [codes.clone() for _ in range(CYCLED // codes.numel())]
    calls = [
        lambda x, w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), w, group_size, levels)  # type: ignore[misc]
        for w in packed
    ]
    found["torch int4pack"] = calls, codes.numel() + levels.numel() * 2
    return found


def own_process(calls: list[Call], bytes_: int, size: int) -> Kernel:
    """A contender whose calls are made here, through all matrices for one token and a few of them for many."""

    def seconds(tokens: int, budget: float) -> float:
        x, used = torch.randn(tokens, size), calls if tokens == 1 else calls[:FEW]
        start, done = time.process_time(), 0
        while done < FEW or time.process_time() - start < budget:
            used[done % len(used)](x)
            done += 1
        return (time.process_time() - start) / done

    return Kernel(bytes_, seconds)


@contextmanager
def llama_contenders(size: int, threads: int, environments: Path) -> Iterator[dict[str, Kernel]]:
    """llama.cpp's types that rows of this size fit, in a process of its own; none where that cannot be had, and why is
    printed.
    """
    environments.mkdir(parents=True, exist_ok=True)
    log = environments / "kernels.log"
    try:
        python = environment("llama_cpp", environments, log).absolute()
        command = [str(python), "-m", f"{PACKAGE}.ggml_worker", str(size), str(CYCLED), str(threads), *KINDS]
        worker = Worker(command, log, PATIENCE)
    except TernarizeError as error:
        print(f"llama.cpp is left out: {error}", file=sys.stderr)
        yield {}
        return

    def kernel(kind: str, bytes_: int) -> Kernel:
        def seconds(tokens: int, budget: float) -> float:
            matrices = CYCLED // bytes_ if tokens == 1 else FEW
            answer = worker.ask(kind=kind, tokens=tokens, matrices=matrices, budget=budget)
            return float(answer["seconds"])

        return Kernel(bytes_, seconds)

    try:
        yield {f"llama.cpp {kind}": kernel(kind, bytes_) for kind, bytes_ in worker.facts["bytes"].items()}
    finally:
        worker.close()


def read_bandwidth(buffer: Tensor) -> float:
    """Bytes a second that a plain sum reads."""
    start = time.process_time()
    buffer.sum()
    return buffer.numel() * buffer.element_size() / (time.process_time() - start)


def measure(kernels: dict[str, Kernel], size: int, tokens: int, rounds: int, budget: float) -> list[dict[str, object]]:
    """One row per contender, medians over the rounds."""
    buffer = torch.ones(CYCLED // 4)
    decode: dict[str, list[float]] = {name: [] for name in kernels}
    share: dict[str, list[float]] = {name: [] for name in kernels}
    prefill: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds):
        for name, kernel in kernels.items():
            bandwidth = read_bandwidth(buffer)
            mean = kernel.seconds(1, budget)
            decode[name].append(size * size / mean / 1e9)
            share[name].append(kernel.bytes / mean / bandwidth)
            prefill[name].append(2 * tokens * size * size / kernel.seconds(tokens, budget) / 1e9)
    rival = decode.get(RIVAL)
    compared = {
        name: [one / other for one, other in zip(rates, rival, strict=True)] if rival else []
        for name, rates in decode.items()
    }
    return [
        {
            "kernel": name,
            "bits a weight": round(8 * kernel.bytes / size**2, 3),
            "decode Gw/s": round(statistics.median(decode[name]), 2),
            "x TQ2_0": ratio_range(compared[name]),
            "of read bandwidth": round(statistics.median(share[name]), 3),
            f"prefill GOP/s, {tokens} tokens": round(statistics.median(prefill[name]), 1),
        }
        for name, kernel in kernels.items()
    ]


def print_table(rows: list[dict[str, object]]) -> None:
    """As Markdown."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of a matrix")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of a prefill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.15, help="CPU seconds of each figure in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--environments", type=Path, default=cache_folder() / "peers", help="as in the other benchmark")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, group_size = options.size, options.group_size
    own = ternary_contenders(size, group_size) | table_contenders(size) | torch_contenders(size, group_size)
    kernels = {name: own_process(calls, bytes_, size) for name, (calls, bytes_) in own.items()}
    with llama_contenders(size, options.threads, options.environments) as others:
        rows = measure(kernels | others, size, options.tokens, options.rounds, options.budget)
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
