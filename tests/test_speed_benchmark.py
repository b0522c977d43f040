"""The speed benchmark: workers and what they are asked, rounds, failures, bytes that a token reads, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import benchmarks.speed.run
import numpy as np
import pytest
import torch
from benchmarks.quality.peers._as_gguf import gguf_names, heads_of, reorder, write_float
from benchmarks.speed import contenders, kernels, torch_worker
from benchmarks.speed.contenders import BITNET, CONTENDERS, Contestant, built_bitnet, choose
from benchmarks.speed.models import DATA_FREE, find
from benchmarks.speed.run import _parser, run
from benchmarks.speed.table import draw, markdown
from benchmarks.speed.workers import Worker
from tiny import make_checkpoint, read_config, read_tensors

import ternarize
from ternarize.errors import TernarizeError
from ternarize.progress import Progress

SHAPE = "random:32x64x2x4x2x64"  # 64 columns at least make a group
WORKER = """
import sys
from tests.benchmarks.speed.serve import serve

def load():
    print("a library prints on standard output")
    return {"types": {"x": 1}, "bytes_per_token": 8}, times

def times(threads, prompt, tokens):
    with open(sys.argv[1], "a") as asked:
        print(sys.argv[2], threads, prompt, tokens, file=asked)
    if prompt == 13:
        raise ValueError("13 tokens are too many")
    if prompt == 99:
        import time
        time.sleep(60)
    return [0.0, 2.0, *(3.0 + 0.5 * number for number in range(tokens))]

serve(load)
"""


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.speed.run, "BUFFER", 8 << 20)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A worker without a model; it notes what it is asked in a file beside it."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def command(script: Path, name: str = "x") -> list[str]:
    """Run it; -c, so that its folder is not where modules come from."""
    return [sys.executable, "-c", script.read_text(), str(script.with_suffix(".asked")), name]


def measure(out: Path, work: Path, *more: str) -> dict[str, Any]:
    """Run the benchmark with small numbers; the results, models and contenders by name."""
    options = ["--tokens=3", "--rounds=2", f"--work={work}", f"--environments={work}", f"--out={out}"]
    run(_parser().parse_args([*options, *more]), Progress(quiet=True))
    results: dict[str, Any] = json.loads(out.read_text())
    for row in results["rows"]:
        row["contenders"] = {each["contender"]: each for each in row["contenders"]}
    return results | {"rows": {row["model"]: row for row in results["rows"]}}


def test_protocol(script: Path, tmp_path: Path) -> None:
    """What libraries print is no answer; speeds follow from times; peak memory is the worker's own."""
    ballast = torch.ones(100 << 20)  # 400 MB here are none there
    worker = Worker(command(script), tmp_path / "log", patience=60)
    assert worker.facts.pop("load") < 5
    assert worker.facts == {"types": {"x": 1}, "bytes_per_token": 8}
    answer = worker.ask(threads=2, prompt=10, tokens=4)
    assert answer["prefill"] == 10 / 2
    assert answer["decode"] == pytest.approx(4 / (4.5 - 2))
    assert 1 << 20 < answer["peak_memory"] < ballast.nbytes // 4
    assert script.with_suffix(".asked").read_text() == "x 2 10 4\n"
    assert (tmp_path / "log").read_text() == "a library prints on standard output\n"
    worker.close()
    assert worker.process.poll() is not None


@pytest.mark.parametrize(
    ("prompt", "patience", "error"),
    [(13, 60, "exit code 1: ValueError: 13 tokens are too many"), (99, 1, "no answer within 1 s")],
)
def test_worker_fails(script: Path, tmp_path: Path, prompt: int, patience: float, error: str) -> None:
    """One that ends, or says nothing for too long, is an error that says so, and leaves no process."""
    worker = Worker(command(script), tmp_path / "log", patience=60)
    worker.patience = patience
    with pytest.raises(TernarizeError) as caught:
        worker.ask(threads=1, prompt=prompt, tokens=1)
    assert str(caught.value) == error
    assert worker.process.poll() is not None


@pytest.mark.parametrize("restart", [False, True])
def test_turns(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool) -> None:
    """Everybody takes turns in each round, in another order; who fails is listed and the others go on."""

    def prepare(self: Contestant, *_: object) -> tuple[list[str], dict[str, Any]]:
        if self.row["contender"] == "transformers:int8":
            raise ValueError("no such linears")
        return command(script, self.row["contender"]), {"file_bytes": 5}

    monkeypatch.setattr(Contestant, "_prepare", prepare)
    more = ["--contender", "ternarize", "--contender", "transformers", "--contender", "llama_cpp:F16", "--threads=1"]
    options = [SHAPE, *more, "--contexts=7", "--contexts=9", *(["--restart"] if restart else [])]
    row = measure(tmp_path / "out.json", tmp_path, *options)["rows"][SHAPE]
    one, two, three = names = ["ternarize", "transformers:bfloat16", "llama_cpp:F16"]
    asked = [line.rsplit(" ", 3) for line in script.with_suffix(".asked").read_text().splitlines()]
    timed = [(name, int(prompt)) for name, _, prompt, tokens in asked if tokens != "1"]
    orders = [names, [two, three, one]]  # the second round begins with the second
    if restart:
        assert timed == [(name, prompt) for order in orders for name in order for prompt in (7, 9)]
    else:
        assert timed == [(name, prompt) for order in orders for prompt in (7, 9) for name in order]
    assert len(asked) - len(timed) == len(row["contenders"][one]["load"]) * len(names)  # one untimed, after each load
    assert [len(row["contenders"][name]["load"]) for name in names] == [2 if restart else 1] * 3
    assert row["contenders"]["transformers:int8"]["error"] == "ValueError: no such linears"
    assert [(run["round"], run["prompt"]) for run in row["contenders"][one]["runs"]] == [(0, 7), (0, 9), (1, 7), (1, 9)]
    assert [(entry["round"], entry["prompt"]) for entry in row["bandwidth"]] == [(0, 7), (0, 9), (1, 7), (1, 9)]
    assert all(entry["bandwidth"] > 1e8 for entry in row["bandwidth"])


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random shape through the real workers; what cannot run is listed; the file takes up another model."""

    def no_network(*_: object) -> Path:
        raise TernarizeError("exit code 1: ERROR: no network")

    monkeypatch.setattr(contenders, "environment", no_network)
    out = tmp_path / "out.json"
    options = ["--contexts=5", "--threads=1"]
    results = measure(out, tmp_path, SHAPE, "--contender", "transformers", "--contender", "*:F16", *options)
    rows = results["rows"][SHAPE]["contenders"]
    assert list(rows) == ["transformers:bfloat16", "transformers:int8", "llama_cpp:F16"]
    assert rows["llama_cpp:F16"]["error"] == "exit code 1: ERROR: no network"
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 64
    assert rows["transformers:bfloat16"]["bytes_per_token"] == 2 * weights
    assert rows["transformers:bfloat16"]["types"] == {"bfloat16": 15}
    assert rows["transformers:int8"]["bytes_per_token"] == weights
    for name in ("transformers:bfloat16", "transformers:int8"):
        assert all(run["prefill"] > 0 and run["decode"] > 0 for run in rows[name]["runs"])
        assert len(rows[name]["runs"]) == 2

    source = make_checkpoint(tmp_path / "llama", intermediate_size=64)
    results = measure(out, tmp_path, str(source), "--contender", "ternarize", *options)
    assert list(results["rows"]) == [SHAPE, "llama"]
    row = results["rows"]["llama"]["contenders"]["ternarize"]
    assert row["types"] == {"ternary": 14, "int8": 1}
    assert row["file_bytes"] < 4 * weights
    with pytest.raises(TernarizeError, match=r"was measured with settings .* choose another --out"):
        measure(out, tmp_path, SHAPE, *options, "--tokens=4")


def test_random_checkpoint(tmp_path: Path) -> None:
    """It has the shape that was asked for, is written once, and its data-free conversion holds what recipes choose."""
    quiet = Progress(quiet=True)
    model = find(SHAPE, tmp_path, quiet)
    shapes = {name: list(tensor.shape) for name, tensor in read_tensors(model.source).items()}
    assert shapes["model.layers.1.mlp.down_proj.weight"] == [32, 64]
    assert shapes["model.layers.1.self_attn.v_proj.weight"] == [16, 32]
    assert shapes["lm_head.weight"] == [64, 32]
    assert "model.layers.2.mlp.down_proj.weight" not in shapes
    assert read_tensors(model.source)["lm_head.weight"].dtype == torch.bfloat16
    written = (model.source / "model.safetensors").stat().st_mtime_ns
    folder = model.ternary(quiet)
    assert find(SHAPE, tmp_path, quiet) == model
    assert (model.source / "model.safetensors").stat().st_mtime_ns == written
    assert find(f"{SHAPE}={folder}", tmp_path, quiet).ternary(quiet) == folder
    layout = read_config(folder)["quantization_config"]
    assert (layout["group_size"], layout["scale_bits"], layout["shift_bits"], layout["shift"]) == (32, 4, 4, False)
    assert not DATA_FREE.needs_statistics
    for text, error in ((f"{SHAPE}x1", "is no shape"), ("random:axb", "is no shape"), (f"{SHAPE}=no", "not a folder")):
        with pytest.raises(TernarizeError, match=error):
            find(text, tmp_path, quiet)


def test_bytes_per_token(ternary: Path) -> None:
    """Of ternary linears what the path in use reads, of the head its table, of nothing else anything."""
    model = ternarize.load(ternary)[0]
    found = torch_worker.facts(model)
    head, linears = model.lm_head, [m for m in model.modules() if isinstance(m, ternarize.runtime.TernaryLinear)]
    packed = sum(linear.pack().packed.numel() for linear in linears)
    assert found["bytes_per_token"] == packed + head.weight.numel()
    with ternarize.kernels.cpu.using("torch"):  # no path: the file's tensors, unless torch's own operator takes them
        held = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
        assert torch_worker.facts(ternarize.load(ternary)[0])["bytes_per_token"] == held + head.weight.numel()


def test_gguf(llama: Path, tmp_path: Path) -> None:
    """The float file holds every weight under llama.cpp's name, rows of q and k in its order."""
    gguf = pytest.importorskip("gguf")
    tensors, config = read_tensors(llama), read_config(llama)
    names = gguf_names(config, tensors)
    write_float(tensors.items(), names, config, tmp_path / "F16.gguf", np.float16)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "F16.gguf").tensors}
    assert {"token_embd.weight", "output.weight", "blk.1.attn_q.weight"} < found.keys()
    assert len(found) == len(tensors)
    for name, value in tensors.items():
        stored, heads = torch.from_numpy(found[names[name]].data.copy()), heads_of(config, name)
        assert stored.dtype == (torch.float16 if value.ndim > 1 else torch.float32)
        assert torch.equal(reorder(stored, heads, back=True) if heads else stored, value.to(stored.dtype)), name
    q = found["blk.0.attn_q.weight"].data  # 4 heads of 8 rows: a row and the one 4 below it are neighbours there
    assert np.array_equal(q[1], tensors["model.layers.0.self_attn.q_proj.weight"][4].half().numpy())


def test_bitnet_is_taken_from_where_it_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BITNET, raising=False)
    with pytest.raises(TernarizeError, match=r"BITNET_CPP in the environment is to name a folder"):
        built_bitnet()
    monkeypatch.setenv(BITNET, str(tmp_path))
    with pytest.raises(TernarizeError, match=r"in which bitnet.cpp was built"):
        built_bitnet()
    (tmp_path / "build" / "bin").mkdir(parents=True)
    files = [tmp_path / "build" / "libllama.so", tmp_path / "build" / "bin" / "llama-quantize"]
    for file in files:
        file.touch()
    library, quantize, commit = built_bitnet()
    assert [library, quantize] == files
    assert commit


def test_choose() -> None:
    """Names, tools and patterns, in one order; other types of llama.cpp by name."""
    assert choose([]) == list(CONTENDERS)
    assert choose(["llama_cpp:TQ2_0", "transformers", "ternarize"]) == list(CONTENDERS[:4])
    assert choose(["llama_cpp:Q8_0", "*:Q2_K"]) == ["llama_cpp:Q2_K", "llama_cpp:Q8_0"]
    with pytest.raises(TernarizeError, match="no contender is called 'lama'"):
        choose(["lama"])


def results() -> dict[str, Any]:
    """Two contenders that ran, on one model, and one that failed."""

    def runs(decode: dict[tuple[int, int], list[float]]) -> list[dict[str, Any]]:
        return [
            {"round": number, "threads": threads, "prompt": prompt, "prefill": 10 * speed, "decode": speed}
            for (threads, prompt), speeds in decode.items()
            for number, speed in enumerate(speeds)
        ]

    def row(name: str, read: int, decode: dict[tuple[int, int], list[float]]) -> dict[str, Any]:
        facts = {
            "load": [2.0, 4.0, 3.0],
            "peak_memory": 5 * 10**8,
            "bytes_per_token": read,
            "types": {"Q4_0": 3, "F32": 1},
        }
        return {"contender": name, "runs": runs(decode)} | facts

    bandwidth = [
        {"round": number, "threads": threads, "prompt": prompt, "bandwidth": 1e9 * threads, "load_average": 1.0}
        for threads in (1, 2)
        for prompt in (128, 512)
        for number in range(3)
    ]
    ours = {(1, 128): [10.0, 20.0, 40.0], (1, 512): [5.0] * 3, (2, 128): [50.0] * 3, (2, 512): [25.0] * 3}
    theirs = {(1, 128): [5.0, 20.0, 10.0], (1, 512): [2.0] * 3, (2, 128): [5.0] * 3, (2, 512): [4.0] * 3}
    contenders = [row("ternarize", 10**7, ours), row("llama_cpp:Q4_0", 2 * 10**7, theirs)]
    failed = {"contender": "transformers:int8", "load": [], "runs": [], "error": "exit code 1: no"}
    machine = {"cpu": "A CPU", "cores": 2, "memory": 2**34, "path": "avx2", "versions": {"ternarize": "0.1"}}
    settings = {"threads": [1, 2], "contexts": [128, 512], "tokens": 32, "rounds": 3, "restart": False}
    model = {"model": "tiny", "bandwidth": bandwidth, "contenders": [*contenders, failed]}
    return {"machine": machine, "settings": settings, "rows": [model]}


def test_table(tmp_path: Path) -> None:
    """Medians and ranges; a ratio is one of the same round, which the ratio of the medians is not."""
    lines = markdown(results()).splitlines()
    assert lines[0].startswith("A CPU, 2 cores, 16 GiB, path avx2; ternarize 0.1.")
    place = next(number for number, line in enumerate(lines) if line.startswith("1 thread, behind 128"))
    assert lines[place].endswith("a sum reads 1.0 (1.0 to 1.0) GB/s:")
    ours, theirs = lines[place + 4 : place + 6]
    assert ours == ("| ternarize | 10.0 | 3.0 | 500 | 200.0 (100.0 to 400.0) | 20.0 (10.0 to 40.0) |  | 20 % |")
    # 5/10, 20/20, 10/40
    assert theirs.endswith("| 10.0 (5.0 to 20.0) | 0.50 (0.25 to 1.00) | 20 % |")
    assert "| llama_cpp:Q4_0 | 10.0 | 2.0 | 5.0 | 4.0 |" in lines
    assert "- llama_cpp:Q4_0: 3 Q4_0, 1 F32" in lines
    assert lines[-1] == "- transformers:int8: exit code 1: no"
    pytest.importorskip("matplotlib")
    draw(results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


# -- kernels alone -----------------------------------------------------------------------------------------------------


def test_kernels_take_turns_and_are_compared_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    speeds = {"ours": iter([1.0, 2.0, 4.0]), kernels.RIVAL: iter([2.0, 1.0, 1.0])}

    def kernel(name: str) -> kernels.Kernel:
        def seconds(tokens: int, budget: float) -> float:
            order.append((name, tokens))
            return 1 / next(speeds[name]) if tokens == 1 else 1e-3

        return kernels.Kernel(8192, seconds)

    monkeypatch.setattr(kernels, "read_bandwidth", lambda _: 16384.0)
    both = {name: kernel(name) for name in speeds}
    ours, rival = kernels.measure(both, 128, 10, 3, 0.1)
    assert order == [("ours", 1), ("ours", 10), (kernels.RIVAL, 1), (kernels.RIVAL, 10)] * 3
    assert (ours["x TQ2_0"], rival["x TQ2_0"]) == ("2.00 (0.50 to 4.00)", "1.00 (1.00 to 1.00)")
    assert (ours["bits a weight"], ours["of read bandwidth"]) == (4.0, 1.0)
    assert ours["prefill GOP/s, 10 tokens"] == round(2 * 10 * 128**2 / 1e-3 / 1e9, 1)


@pytest.mark.skipif(not ternarize.kernels.cpu.paths(), reason="no native library")
def test_kernels_of_every_path_run_where_llama_cpp_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Path:
        raise TernarizeError("no compiler")

    monkeypatch.setattr(kernels, "environment", refuse)
    monkeypatch.setattr(kernels, "CYCLED", 1 << 16)
    out = tmp_path / "kernels.json"
    options = [
        "--size=128",
        "--tokens=4",
        "--rounds=1",
        "--budget=0.001",
        f"--json={out}",
        f"--environments={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["kernels", *options])
    kernels.main()
    names = [row["kernel"] for row in json.loads(out.read_text())]
    usable = [name for name, supported in ternarize.kernels.cpu.paths().items() if supported]
    assert {
        f"{name}, {kind}" for name in usable for kind in ("int8", "int8, no shift", "int8, scales of 4 bits", "float")
    } <= set(names)
    said = capsys.readouterr()
    assert "llama.cpp is left out: no compiler" in said.err
    assert f"{usable[-1]}, int8" in said.out


def test_llama_cpp_answers_for_its_kernels(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-m", f"{contenders.PACKAGE}.ggml_worker"]
    worker = Worker([*command, "256", str(1 << 20), "1", "TQ2_0", "Q4_0", "F16"], tmp_path / "log", 120)
    try:
        for kind, bits in (("TQ2_0", 2.0625), ("Q4_0", 4.5), ("F16", 16)):
            assert worker.facts["bytes"][kind] == 256 * 256 * bits / 8
            assert worker.ask(kind=kind, tokens=3, matrices=2, budget=0.001)["seconds"] > 0
    finally:
        worker.close()
    worker = Worker([*command, "64", str(1 << 20), "1", "TQ2_0", "Q4_0"], tmp_path / "log", 120)
    try:
        assert list(worker.facts["bytes"]) == ["Q4_0"]  # 64 is no multiple of 256
    finally:
        worker.close()
