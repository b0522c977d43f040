"""The quality benchmark's bookkeeping: rows, failures, bits, the table; and its zero-shot scores where lm-eval is."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.quality import contenders, zero_shot
from benchmarks.quality.contenders import CONTENDERS, Contender, choose, stored_bytes
from benchmarks.quality.run import _parser, checkpoint_hash, run
from benchmarks.quality.table import draw, markdown
from tiny import make_model, make_text, make_tokenizer

from ternarize.errors import TernarizeError
from ternarize.progress import Progress
from ternarize.report import Report
from ternarize.tasks import PROMPTS

PEER = """
import json, shutil, sys
from pathlib import Path
source, _, out = map(Path, sys.argv[1:4])
with (Path(__file__).parent / "runs").open("a") as runs:
    print(*sys.argv[4:], file=runs)
shutil.copytree(source, out / "dense")
numbers = {"seconds": 60, "peak_memory": 10**9, "linear_bytes": 250, "linear_weights": 1000, "file_bytes": 5000}
(out / "result.json").write_text(json.dumps(numbers | {"version": "1", "note": "a copy"}))
"""


def write_gz(path: Path, text: str) -> None:
    """A gzipped text file."""
    path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder, without zero-shot items."""
    folder = tmp_path / "data"
    folder.mkdir()
    text = make_text(tmp_path / "text.txt", 3000).read_text()
    records = "".join(json.dumps({"text": text[i : i + 300]}) + "\n" for i in range(0, len(text), 300))
    write_gz(folder / "calib_wiki.jsonl.gz", records)
    write_gz(folder / "calib_c4.jsonl.gz", records)
    write_gz(folder / "wikitext2_raw_test.txt.gz", text)
    return folder


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two peers, one that works and one that does not; they need no environments."""
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "copy.py").write_text(PEER)
    (folder / "broken.py").write_text("print('on my way')\nraise ValueError('3 is not a power of two')")
    monkeypatch.setattr(contenders, "PEERS", folder)
    for name in ("copy", "broken"):
        monkeypatch.setitem(CONTENDERS, name, Contender(name, {"size": "3"}))
    return folder


def measure(source: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run the benchmark with small numbers; the results, rows by contender."""
    sizes = {"samples": 4, "length": 32, "windows": 2, "c4-windows": 1, "window-length": 48, "items": 0}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    run(_parser().parse_args([str(source), f"--data={data}", f"--out={out}", *options, *more]), Progress(quiet=True))
    results: dict[str, Any] = json.loads(out.read_text())
    return results | {"rows": {row["contender"]: row for row in results["rows"]}}


def test_rows(llama: Path, data: Path, peers: Path, tmp_path: Path) -> None:
    """One run: what is made is measured, what fails is listed, and the next run does only what is left."""
    path, out, mine = tmp_path / "mine.yaml", tmp_path / "results.json", "ternarize:mine.yaml"
    path.write_text("group_size: 12\nint8_group_size: 20\n")
    three = ["--contender", "copy", "--contender", "broken", "--contender", f"ternarize:{path}"]
    rows = measure(llama, data, out, *three)["rows"]
    assert list(rows) == ["teacher", "copy", "broken", mine]
    assert rows["copy"]["wiki"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["copy"]["c4"]["perplexity"] == pytest.approx(rows["teacher"]["c4"]["perplexity"])
    assert (peers / "runs").read_text() == "--set=size=3\n"
    assert rows["broken"]["error"] == "exit code 1: ValueError: 3 is not a power of two"
    assert rows[mine]["note"] == ""  # the very tokens that the peers were given
    assert rows[mine]["calibration_tokens"] == rows["copy"]["calibration_tokens"] == 4 * 32
    assert rows[mine]["wiki"]["kl"] > 0.01

    (peers / "broken.py").write_text(PEER)
    rows = measure(llama, data, out, "--contender", "copy", "--contender", "broken")["rows"]
    assert "error" not in rows["broken"]
    assert mine in rows
    assert (peers / "runs").read_text() == 2 * "--set=size=3\n"
    measure(llama, data, out, "--contender", "copy", "--again", "co*")
    assert (peers / "runs").read_text() == 3 * "--set=size=3\n"
    measure(llama, data, out, "--contender", "copy,size=4")
    assert (peers / "runs").read_text().endswith("--set=size=4\n")
    with pytest.raises(TernarizeError, match=r"was measured with texts .* choose another --out"):
        measure(llama, data, out, "--windows", "1")


def test_bits(ternary: Path) -> None:
    """What the headers of a ternarize folder say is what its report says."""
    report = Report.read(ternary)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in report.linears)
    counted = 8 * stored_bytes(ternary, [entry.name for entry in report.linears]) / weights
    assert counted == pytest.approx(report.bits_per_ternary_weight)


def test_choose() -> None:
    """Names, patterns and settings."""
    assert list(choose(["gptq", "*:g64,axis=0"])) == [
        "gptq:g128", "gptq:g64", *(f"{tool}:g64,axis=0" for tool in ("gptq", "hqq", "auto_round"))
    ]  # fmt: skip
    assert choose(["gptq:g64,axis=0"])["gptq:g64,axis=0"].settings == {"group_size": "64", "axis": "0"}
    with pytest.raises(TernarizeError, match=r"'qptq' is not NAME"):
        choose(["qptq"])
    with pytest.raises(TernarizeError, match="unknown key 'groupsize'"):
        choose(["ternarize:fast,groupsize=12"])


def test_table(tmp_path: Path) -> None:
    """By bits, then by KL, the teacher first, failures below; perplexities that are not finite stay in the table."""

    def row(name: str, size: int, kl: float, perplexity: float | None = 200.0, score: float = 0.45) -> dict[str, Any]:
        wiki = {"perplexity": perplexity, "teacher_perplexity": 20.0, "kl": kl, "agreement": 0.5}
        made = {"linear_bytes": size, "linear_weights": 800, "seconds": 90, "peak_memory": 2e9, "note": f"note {name}"}
        measured = {"wiki": wiki, "c4": {"perplexity": 1234.5}, "zero_shot": {"mean": score, "chance": 0.375}}
        return {"contender": name, "identity": {"settings": {"g": "64"}}, "weights": 1000, "file_bytes": 500} | (
            made | measured
        )

    teacher = row("teacher", 0, 0.0, 20.0, 0.6)
    del teacher["linear_bytes"], teacher["seconds"], teacher["note"], teacher["peak_memory"]
    teacher["wiki"] |= {"kl": None, "agreement": None}
    teacher["zero_shot"]["stderr"] = 0.012
    rows = [row("b:g64", 200, 2.0, None), row("a:g64", 200, 1.0), row("ternarize:c", 180, 3.0), teacher]
    results = {
        "source": "sample:tiny",
        "calibration": {"windows": [64, 512], "seed": 0},
        "texts": {"wiki": {"windows": [20, 2048]}, "c4": {"windows": [8, 2048]}},
        "zero_shot": {"items": 500, "dtype": "float32", "lm_eval": "0.4"},
        "rows": [*rows, {"contender": "d", "error": "exit code 1: no"}],
    }
    lines = markdown(results).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| teacher", "| ternarize:c", "| a:g64", "| b:g64"]
    assert lines[4] == "| a:g64 | g=64 | 2.00 | 4.00 | 200 | 1,234 | 1.000 | 50.0 % | 45.0 % | 33 % | 1.5 | 2.00 |"
    assert "not finite" in lines[5]
    assert "(standard error 1.2 points)" in lines[7]
    assert lines[-1] == "- d: exit code 1: no"
    pytest.importorskip("matplotlib")
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_crowded_plot_keeps_every_name(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    chance = random.Random(2)
    rows = [
        {
            "contender": f"auto_round:g{number},batch_size=2",
            "linear_bytes": chance.randrange(210, 290),
            "linear_weights": 1000,
            "wiki": {"perplexity": chance.uniform(60, 300), "teacher_perplexity": 20.0, "kl": 1.0},
        }
        for number in range(14)
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw({"source": "sample:tiny", "rows": rows}, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert [row["contender"] for row in rows if f">{row['contender']}<" not in drawn] == []


def test_zero_shot(tmp_path: Path) -> None:
    """lm-eval's numbers are those of the definition, scored directly."""
    pytest.importorskip("lm_eval")
    model, tokenizer = make_model("llama", max_position_embeddings=256), make_tokenizer()
    text = make_text(tmp_path / "text.txt").read_text().replace("\n", " ").replace("  ", " ")
    words = iter([text[i : i + 3 + i % 7].strip() + "x" for i in range(0, 3000, 12)])
    count = 8
    items: dict[str, list[dict[str, Any]]] = {name: [] for name in PROMPTS}
    asked: dict[str, list[tuple[list[tuple[str, str]], int]]] = {name: [] for name in PROMPTS}

    def add(name: str, item: dict[str, Any], pairs: list[tuple[str, str]], right: int) -> None:
        items[name].append(item)
        asked[name].append((pairs, right))

    for i in range(count):
        stem, *answers = [next(words) for _ in range(5)]
        question, (one, two, *_) = f"Question: {stem}\nAnswer:", answers
        labelled = [{"text": answer, "label": letter} for answer, letter in zip(answers, "ABC", strict=False)]
        easy = {"question": {"stem": stem, "choices": labelled}, "answerKey": "ABC"[i % 3]}
        blank = {"sentence": f"{stem} _ {answers[2]}", "option1": one, "option2": two, "answer": "12"[i % 2]}
        ending = {"ctx": stem, "endings": answers, "label": i % 4}
        add("hellaswag", ending, [(stem, answer) for answer in answers], i % 4)
        add("piqa", {"goal": stem, "sol1": one, "sol2": two, "label": i % 2}, [(question, one), (question, two)], i % 2)
        add("arc_easy", easy, [(question, answer) for answer in answers[:3]], i % 3)
        add("winogrande", blank, [(f"{stem} {name}", answers[2]) for name in (one, two)], i % 2)
    for name, records in items.items():
        write_gz(tmp_path / f"{name}.jsonl.gz", "".join(json.dumps(record) + "\n" for record in records))

    @torch.no_grad()
    def score(context: str, continuation: str) -> float:
        before = len(tokenizer(context)["input_ids"])
        ids = torch.tensor(tokenizer(f"{context} {continuation}")["input_ids"])
        log_probability = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return float(log_probability.gather(1, ids[1:, None])[before - 1 :].sum())

    found = zero_shot.zero_shot(model, tokenizer, tmp_path, count, batch_size=3)
    for name, questions in asked.items():
        right = 0
        for pairs, gold in questions:
            scores = [score(*pair) / (len(pair[1]) if name != "winogrande" else 1) for pair in pairs]
            right += scores.index(max(scores)) == gold
        assert found["tasks"][name]["score"] == pytest.approx(right / count), name
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 2 + 1 / 2) / 4)
    assert found["mean"] == pytest.approx(sum(task["score"] for task in found["tasks"].values()) / 4)


def test_what_adapters_share_is_found_by_a_script_beside_it_and_as_part_of_the_package() -> None:
    beside = f"import sys; sys.path.insert(0, {str(contenders.PEERS)!r}); import _common; print(_common.peak_memory())"
    inside = "import tests.benchmarks.quality.peers._common as common; print(common.peak_memory())"
    for code in (beside, inside):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 1 << 20


def test_a_checkpoint_is_known_by_its_weights_and_config_not_by_who_wrote_it(llama: Path, tmp_path: Path) -> None:
    """A results file goes on under another version of transformers, and under no other model."""

    def with_config(**changes: object) -> str:
        copy = shutil.copytree(llama, tmp_path / str(changes))
        config = json.loads((copy / "config.json").read_text()) | changes
        (copy / "config.json").write_text(json.dumps(config))
        return checkpoint_hash(copy)

    assert with_config() == with_config(transformers_version="0") != with_config(rms_norm_eps=0.1)
