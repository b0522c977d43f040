"""The README's commands are ones that the command line takes, its Python compiles, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from ternarize import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ternarize ")]


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


@pytest.mark.parametrize("extra", sorted(set(re.findall(r"\.\[([\w,]+)\]", TEXT))))
def test_extras_exist(extra: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(","))
