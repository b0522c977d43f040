"""Whole models: how fast they are ready, read a prompt and write, and what they hold meanwhile, beside other runtimes.

    python -m tests.benchmarks.speed sample:smollm2-135m=OUT qwen.gguf random:2048x5632x22x32x4x32000 --out speed.json
    python -m tests.benchmarks.speed --table speed.json > speed.md

A model is SOURCE=FOLDER, a checkpoint and what `ternarize convert` made of it; SOURCE alone, which is then converted
data-free, for speed does not depend on the values; or random:HIDDENxINNERxLAYERSxHEADSxKV_HEADSxVOCABULARY, a Llama
with random weights. llama.cpp's files are written from the same checkpoint: F16 by `gguf`, the others from it by
`llama_model_quantize` as it does by default. What it cannot pack, such as rows that are no multiple of 256, it packs in
other types: those that a file holds are listed.

bitnet.cpp comes in no package. BITNET_CPP in the environment names a clone of github.com/microsoft/BitNet at c82b5e6
(its llama.cpp's interface is the one that the worker knows), built as its setup does, with shared libraries: copy
preset_kernels/bitnet_b1_58-3B/bitnet-lut-kernels-tl2.h to include/bitnet-lut-kernels.h, then `cmake -B build
-DBITNET_X86_TL2=OFF -DBUILD_SHARED_LIBS=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++` and `cmake --build
build`. Its files are I2_S, one scale for a whole matrix.

Everyone has a process of its own, which waits while others compute. In a round each takes its turn, in another order
each time, so that other work on the machine falls on all alike: the same random tokens go in, and so many come out, the
likeliest each time. A first prompt, with each number of threads, is not timed.

    load         seconds from the opening of the model, whose files were read just before, to its first token
    prefill      tokens of the prompt a second, up to the first token behind it
    decode       tokens a second, one at a time, behind that prompt
    peak memory  of the process, to its end, file pages in memory included; Python and torch are part of it
    read         bytes of the weights that a token reads: all linears and the head as they lie in memory, biases,
                 norms and rows of the embedding left out. Of mixtures of experts it would count all experts.
    bandwidth    bytes a second that a plain sum over 256 MiB reads with as many threads, just before each turn;
                 read x decode is given as a share of it

A ratio is one of the same round: a contender's decode over ternarize's. Tables give medians, and their range.

Rows are written as they come. A model that is measured again replaces its old rows, others in the file stay.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import TernarizeError
from ternarize.files import write_text
from ternarize.kernels import cpu
from ternarize.progress import Progress
from ternarize.report import dump_json, versions
from ternarize.sources import cache_folder
from ternarize.speed import torch_threads

from ..results import command, rows_of
from .contenders import Contestant, Setting, choose
from .models import Model, find
from .table import draw, markdown

BUFFER = 256 << 20  # bytes that a measurement of the bandwidth reads
SUMS = 5  # of them; the median counts
CHOICES = ("OMP_", cpu.CPU_VARIABLE, cpu.ACTIVATIONS_VARIABLE)  # of the environment, that change speed


def main() -> None:
    """Parse, run, print the table."""
    command(_parser().parse_args(), run, markdown, draw)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("models", nargs="*", metavar="MODEL", help="SOURCE=FOLDER, SOURCE or random:SHAPE")
    option("--contender", action="append", default=[], help="name, tool or pattern; repeat; default: all")
    option("--out", type=Path, default=Path("speed.json"))
    option("--table", type=Path, help="only print this results file and draw its plot")
    option("--threads", type=int, action="append", help="repeat to compare (default: 1 and 2)")
    option("--contexts", type=int, action="append", help="tokens of a prompt; repeat to compare (default: 128)")
    option("--tokens", type=int, default=32, help="that come out behind it")
    option("--rounds", type=int, default=5)
    option("--restart", action="store_true", help="one process at a time, a new one each round: less memory, longer")
    option("--patience", type=float, default=1800, help="seconds that one may take to load, or for one turn")
    option("--environments", type=Path, default=cache_folder() / "peers", help="peers' virtual environments")
    option("--work", type=Path, default=cache_folder() / "speed", help="models made for this, gigabytes, and logs")
    return parser


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Measure every model, and write the results down after each round.

    Raises:
        TernarizeError: a model, contender or number that makes no sense, or results of other settings in the file.
    """
    if not arguments.models:
        raise TernarizeError("MODEL says what to measure; --table FILE needs none.")
    setting = Setting(
        tuple(arguments.threads or (1, 2)),
        tuple(arguments.contexts or (128,)),
        arguments.tokens,
        arguments.rounds,
        arguments.restart,
        arguments.patience,
        arguments.environments,
    )
    if min(*setting.threads, *setting.contexts, setting.tokens, setting.rounds) < 1:
        raise TernarizeError("--threads, --contexts, --tokens and --rounds are at least 1.")
    names = choose(arguments.contender)
    results = {"machine": machine(), "settings": setting.to_dict()}
    measured = rows_of(arguments.out, results, "model")
    for text in arguments.models:
        model = find(text, arguments.work.absolute(), progress)
        for row in measure(model, names, setting, progress):
            measured[model.name] = row
            write_text(arguments.out, dump_json(results | {"rows": list(measured.values())}) + "\n")


def measure(model: Model, names: list[str], setting: Setting, progress: Progress) -> Iterator[dict[str, Any]]:
    """Let everybody run; the model's row of the results so far, after each round."""
    contestants = [Contestant(name, model.place) for name in names]
    row: dict[str, Any] = {"model": model.name, "bandwidth": [], "contenders": [each.row for each in contestants]}
    try:
        for name, contestant in zip(names, contestants, strict=True):
            progress.say(f"{model.name}: {name} is made ready, output in {contestant.log}")
            contestant.prepare(model, setting, progress)
            if not setting.restart:
                contestant.start(setting)
        with progress.bar(model.name, total=setting.rounds, unit="round") as bar:
            for number in range(setting.rounds):
                row["bandwidth"] += play(number, contestants, setting)
                yield row
                bar.update(1)
    finally:
        for contestant in contestants:
            contestant.stop()
    for name, contestant in zip(names, contestants, strict=True):
        if "error" in contestant.row:
            progress.say(f"{model.name}: {name} failed, {contestant.row['error']}")


def play(number: int, contestants: list[Contestant], setting: Setting) -> list[dict[str, Any]]:
    """One round: every number of threads behind every prompt, by everybody in turns.

    Args:
        number: of the round; who begins depends on it.

    Returns:
        The bandwidth of the memory before each turn.
    """
    buffer, bandwidth = torch.ones(BUFFER // 4), []
    requests = [(threads, prompt) for threads in setting.threads for prompt in setting.contexts]
    first = number % len(contestants)
    for turn in [requests] if setting.restart else [[request] for request in requests]:
        for threads, prompt in turn:
            entry = {"round": number, "threads": threads, "prompt": prompt, "load_average": os.getloadavg()[0]}
            bandwidth.append(entry | {"bandwidth": read_bandwidth(buffer, threads)})
        for contestant in contestants[first:] + contestants[:first]:
            contestant.start(setting)
            for threads, prompt in turn:
                contestant.run(number, threads, prompt, setting.tokens)
            if setting.restart:
                contestant.stop()
    return bandwidth


def read_bandwidth(buffer: Tensor, threads: int) -> float:
    """Bytes a second that a plain sum reads, of wall time as everything here."""
    found = []
    with torch_threads(threads):
        for _ in range(SUMS):
            start = time.perf_counter()
            buffer.sum()
            found.append(buffer.nbytes / (time.perf_counter() - start))
    return statistics.median(found)


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    path = cpu.native()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "features": cpu.features(),
        "path": path.name if path else cpu.REFERENCE,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(CHOICES)},
    }
