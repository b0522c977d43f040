"""The README's commands and its Python run, on tiny models; its links lead somewhere."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from hub_server import Hub
from tiny import TASK, byte_level, make_checkpoint, make_ternary_checkpoint, make_text
from transformers import AutoModelForCausalLM

from ternarize import cli, gate, recipe, sources

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

# A server that runs until it is stopped: tests/test_chat.py starts it, and the openai client talks to it.
ENDLESS = ("ternarize serve", "openai.OpenAI")
# What only the real Hub has, a size that is a real model's, and whose token the tests' Hub knows.
INSTEAD = {
    " you/": " me/",
    "arc_easy,hellaswag --items 500": "piqa --task-data ./tasks",
    "--target-size 60MB": "--target-size 230KB",
}

Run = Callable[..., tuple[int, str, str]]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ternarize ")]


@pytest.fixture
def place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and what the README names: models on the Hub and on disk, texts, tasks; recipes made small."""
    work = tmp_path / "work"
    llama = make_source(tmp_path / "llama", "llama")
    shutil.copytree(llama, work / "model")
    bitnet = make_ternary_checkpoint(tmp_path / "bitnet", "llama", torch.float32, size=16)
    qwen = make_source(tmp_path / "qwen", "qwen3")
    for name, folder in (("Qwen/Qwen3-0.6B", qwen), ("microsoft/bitnet-b1.58-2B-4T", bitnet)):
        hub.create(name, **{path.name: path.read_bytes() for path in folder.iterdir()})
    write_lines(work / "chats.jsonl", {"text": make_text(tmp_path / "text.txt").read_text()}, 1)
    (work / "tasks").mkdir()
    write_lines(work / "tasks" / "piqa_valid.jsonl", {"goal": "go", "sol1": "left", "sol2": "right", "label": 0}, 4)
    write_lines(work / "tasks" / "items.json", {"question": "a", "choices": ["b", "c"], "right": 1}, 4)
    (work / "tasks" / "mine.yaml").write_text(TASK.format(name="mine", items=work / "tasks" / "items.json"))
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for path in recipe.RECIPE_FOLDER.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        values["calibration"] = values.get("calibration", {}) | {"samples": 8, "length": 32}
        if "distill" in values:
            values["distill"] |= {"samples": 8}
        (recipes / path.name).write_text(yaml.safe_dump(values))
    shutil.copy(recipes / "fast.yaml", work / "mine.yaml")
    monkeypatch.setattr(recipe, "RECIPE_FOLDER", recipes)
    monkeypatch.setattr(gate, "COLLAPSED_AGREEMENT", 0.0)  # random models have nothing to keep
    monkeypatch.setattr(sources, "_sample", lambda name: llama)
    monkeypatch.chdir(work)
    return work


def make_source(folder: Path, family: str) -> Path:
    """A tiny checkpoint of widths that all formats take, whose tokenizer has merges."""
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    make_checkpoint(folder, family, **shape, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1)
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, record: dict[str, Any], count: int) -> None:
    path.write_text((json.dumps(record) + "\n") * count)


def test_the_commands_and_the_python_run_from_top_to_bottom(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for extra in ("gguf", "matplotlib", "pandas", "lm_eval", "compressed_tensors"):
        pytest.importorskip(extra)
    without_llama = importlib.util.find_spec("llama_cpp") is None
    names: dict[str, Any] = {}
    float_model = AutoModelForCausalLM.from_pretrained(place / "model")
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL):
        if kind == "python" and not any(mark in block for mark in ENDLESS):
            names |= {"model": float_model}
            exec(compile(block, "README.md", "exec"), names)
        for line in block.splitlines() if kind == "bash" else ():
            if not line.startswith("ternarize ") or line.startswith(ENDLESS):
                continue
            if line.startswith("ternarize verify") and "gguf" in line and without_llama:
                continue
            for real, small in INSTEAD.items():
                line = line.replace(real, small)
            arguments = shlex.split(line, comments=True)[1:]
            if arguments[0] == "convert":  # several lines write to the same place: whoever follows the README picks one
                shutil.rmtree(arguments[arguments.index("--output") + 1], ignore_errors=True)
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there\n/exit\n"))
            code, out, err = run(*arguments)
            assert code == 0, f"{line}\n{out}\n{err}"


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(cli.app)
    group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]  # raises where it is not


def test_every_command_is_shown() -> None:
    shown = {shlex.split(line)[1] for line in COMMANDS}
    shown |= set(re.findall(r"`ternarize (\w+)", TEXT))
    assert set(typer.main.get_command(cli.app).commands) <= shown  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", re.findall(r"\bmake (\w+)", "\n".join(blocks("bash"))))
def test_make_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_compiles(source: str) -> None:
    compile(source, "README.md", "exec")


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", TEXT)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links
    assert not missing


def test_the_map_of_modules_has_each_of_them() -> None:
    table = re.search(r"^\| file \| what it is \|\n(.*?)\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert table is not None
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", "\n".join(line.split("|")[1] for line in table[1].splitlines())))
    folder = ROOT / "ternarize"
    there = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert named == there - {"__init__"}


@pytest.mark.parametrize("extra", sorted(set(re.findall(r"\.\[([\w,]+)\]", TEXT))))
def test_extras_exist(extra: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(","))
