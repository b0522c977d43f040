"""What the command line prints: tables, a verdict, JSON."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import typer

from ternarize.progress import size
from ternarize.report import REPORT_FILE, Report, dump_json

COLLAPSED = 5  # exit code


def table(rows: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        typer.echo(f"{label:{width}}  {value}")


def columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Rows under a head, each column as wide as it needs."""
    widths = [max(len(row[number]) for row in [head, *rows]) for number in range(len(head))]
    for row in [head, *rows]:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def comparison(rows: list[tuple[str, str, str]]) -> None:
    """Rows of (what, teacher, student); one model alone has no teacher column."""
    alone = not any(teacher for _, teacher, _ in rows)
    width = max(len(label) for label, _, _ in rows)
    if not alone:
        typer.echo(f"{'':{width}}  {'teacher':>10}  {'student':>10}")
    for label, teacher, student in rows:
        typer.echo(f"{label:{width}}  {student:>10}" if alone else f"{label:{width}}  {teacher:>10}  {student:>10}")


def summarize_kept(kept: list[tuple[str, str]]) -> list[str]:
    """Names with their layer numbers folded together: `model.layers.*.norm.weight (30): reason`."""
    folded: dict[tuple[str, str], int] = {}
    for name, reason in kept:
        key = (re.sub(r"\.\d+(?=\.)", ".*", name), reason)
        folded[key] = folded.get(key, 0) + 1
    return [f"{name}{f' ({count})' if count > 1 else ''}: {reason}" for (name, reason), count in folded.items()] or [
        "nothing"
    ]


def size_rows(folder: Path) -> list[tuple[str, str, str]]:
    """Rows of size and bits, teacher beside student, for a ternarize folder."""
    if not (folder / REPORT_FILE).is_file():
        return []
    report = Report.read(folder)
    source_bits = 8 * report.source_bytes / report.weights
    return [
        ("weight files", size(report.source_bytes), size(report.output_bytes)),
        ("bits per weight, whole file", f"{source_bits:.2f}", f"{report.bits_per_weight:.2f}"),
        ("bits per ternary weight", "", f"{report.bits_per_ternary_weight:.2f}"),
    ]


def machine_rows() -> list[tuple[str, str]]:
    """Rows of what was found on this machine, and what of it runs the models."""
    import torch
    import transformers

    from ternarize import __version__
    from ternarize.kernels import cpu
    from ternarize.kernels.pages import large_pages

    def chosen(value: str, variable: str, otherwise: str) -> str:
        return f"{value}, {f'as {variable} says' if os.environ.get(variable) else otherwise}"

    library, where = cpu.load_library()
    path = cpu.native()
    paths = [name if usable else f"{name} (not here)" for name, usable in cpu.paths().items()]
    return [
        ("ternarize", __version__),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("library", where if library is not None else f"none: {where}"),
        ("processor", " ".join(cpu.features()) or ("nothing that a path could use" if library else "not looked at")),
        ("paths", ", ".join(paths) or "none"),
        ("path in use", chosen(path.name if path else cpu.REFERENCE, cpu.CPU_VARIABLE, "the best")),
        ("activations", chosen(cpu.default_activations(), cpu.ACTIVATIONS_VARIABLE, "the default")),
        ("threads", str(torch.get_num_threads())),
        ("large pages", large_pages()),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]


def say_verdict(verdict: dict[str, Any], quietly: bool = False) -> None:
    """What the quality gate found; a collapsed model ends the program with its own exit code."""
    collapsed = verdict["word"] == "collapsed"
    if collapsed:
        typer.echo(f"\nTHIS MODEL HAS COLLAPSED and is of no use: {verdict['why']}", err=True)
        typer.echo(f"It writes: {verdict['text']!r}", err=True)
    elif not quietly:
        measured = verdict["evaluation"]
        where = f"Against its teacher, on {measured['text']}" if measured else "Not compared with its teacher"
        typer.echo(f"\n{where}: {verdict['why']}")
        typer.echo(f"It writes: {verdict['text']!r}")
    if collapsed:
        raise typer.Exit(COLLAPSED)


def print_json(value: object) -> None:
    typer.echo(dump_json(value))
