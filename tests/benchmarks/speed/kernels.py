"""The kernels alone: how fast a packed weight meets activations, beside torch's own operators.

    python tests/benchmarks/speed/kernels.py [--size 2048] [--group-size 64] [--threads 1] [--json FILE]

Matrices of size x size are cycled over more memory than the last cache holds, as a model's linears are. All contenders
take turns within each round, so that other work on the machine hits them alike; a figure is the median over the rounds.
Time is CPU time of this process: with one thread that is the time it would take alone, up to what others do to caches.

    Gw/s        1e9 weights a second, decode: one token
    bandwidth   the bytes it reads, as a share of what a plain sum over as much memory reads in the same round
    GOP/s       1e9 multiplications and additions a second, prefill
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ternarize.kernels import cpu
from ternarize.packing import pack_trits, quantize_table

TABLE_GROUP = 64
CYCLED = 96 << 20  # bytes of weights of one contender

Call = Callable[[Tensor, int], object]  # activations and the number of the matrix


def ternary_contenders(size: int, group_size: int) -> dict[str, tuple[list[Call], int]]:
    """{name: (one call for each matrix, bytes of one matrix)} of every path, with scale and shift."""
    found: dict[str, tuple[list[Call], int]] = {}
    groups = -(-size // group_size)
    trits = pack_trits(torch.randint(-1, 2, (size, size), dtype=torch.int8))
    scale, shift = (torch.rand(size, groups) + 0.1).half(), torch.randn(size, groups).half()
    for name, supported in cpu.paths().items():
        if not supported:
            continue
        path = cpu.select(name)
        assert path is not None
        one = cpu.PackedTernary(path, trits, scale, shift, None, size, group_size)
        bytes_ = one.packed.numel()
        count = 2 if name == "scalar" else max(2, CYCLED // bytes_)
        packed = [cpu.PackedTernary(path, trits, scale, shift, None, size, group_size) for _ in range(count)]
        for exact, kind in ((False, "int8"), (True, "float")):
            calls: list[Call] = [lambda x, _, p=p, exact=exact: p.linear(x, exact) for p in packed]  # type: ignore[misc]
            found[f"{name}, {kind} activations"] = calls, bytes_
    return found


def table_contenders(size: int) -> dict[str, tuple[list[Call], int]]:
    """Tables of the path in use, with the groups that recipes give them."""
    path = cpu.native()
    found: dict[str, tuple[list[Call], int]] = {}
    for bits in () if path is None else (8, 6):
        records = quantize_table(torch.randn(size, size), TABLE_GROUP, bits)
        tables = [records.clone() for _ in range(CYCLED // records.numel())]
        calls: list[Call] = [
            lambda x, _, r=r, b=bits: cpu.table_linear(x, r, None, TABLE_GROUP, b, False)  # type: ignore[misc]
            for r in tables
        ]
        found[f"int{bits} table, {path.name}"] = calls, records.numel()
    return found


def torch_contenders(size: int, group_size: int) -> dict[str, tuple[list[Call], int]]:
    """What torch itself has: bfloat16, and 4 bits with scale and zero."""
    found: dict[str, tuple[list[Call], int]] = {}
    weights = [torch.randn(size, size).bfloat16() for _ in range(max(2, CYCLED // (2 * size * size)))]
    calls: list[Call] = [lambda x, _, w=w: torch.nn.functional.linear(x.bfloat16(), w) for w in weights]  # type: ignore[misc]
    found["torch bfloat16"] = calls, 2 * size * size
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (size, size), dtype=torch.int32), 1)
    levels = torch.rand(size // group_size, size, 2).bfloat16()
    packed = [codes.clone() for _ in range(CYCLED // codes.numel())]
    calls = [
        lambda x, _, w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), w, group_size, levels)  # type: ignore[misc]
        for w in packed
    ]
    found["torch int4pack"] = calls, codes.numel() + levels.numel() * 2
    return found


def rate_of(calls: list[Call], x: Tensor, budget: float) -> float:
    """Mean CPU seconds of a call, over `budget` seconds of calls that cycle through the matrices."""
    start = time.process_time()
    done = 0
    while done < 2 or time.process_time() - start < budget:
        calls[done % len(calls)](x, done)
        done += 1
    return (time.process_time() - start) / done


def read_bandwidth(buffer: Tensor) -> float:
    """Bytes a second that a plain sum reads."""
    start = time.process_time()
    buffer.sum()
    return buffer.numel() * buffer.element_size() / (time.process_time() - start)


def measure(size: int, group_size: int, tokens: int, rounds: int, budget: float) -> list[dict[str, object]]:
    """One row per contender, medians over the rounds."""
    contenders = ternary_contenders(size, group_size) | table_contenders(size) | torch_contenders(size, group_size)
    one, many = torch.randn(1, size), torch.randn(tokens, size)
    buffer = torch.ones(CYCLED // 4)
    decode: dict[str, list[float]] = {name: [] for name in contenders}
    share: dict[str, list[float]] = {name: [] for name in contenders}
    prefill: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (calls, bytes_) in contenders.items():
            bandwidth = read_bandwidth(buffer)
            mean = rate_of(calls, one, budget)
            decode[name].append(size * size / mean / 1e9)
            share[name].append(bytes_ / mean / bandwidth)
            prefill[name].append(2 * tokens * size * size / rate_of(calls[:2], many, budget) / 1e9)
    return [
        {
            "kernel": name,
            "bits a weight": round(8 * bytes_ / size**2, 3),
            "decode Gw/s": round(statistics.median(decode[name]), 2),
            "of read bandwidth": round(statistics.median(share[name]), 3),
            f"prefill GOP/s, {tokens} tokens": round(statistics.median(prefill[name]), 1),
        }
        for name, (_, bytes_) in contenders.items()
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
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.size, options.group_size, options.tokens, options.rounds, options.budget)
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
