"""Imports go one way, and someone who only runs a model pays for nothing else.

`ORDER` is the map of the package: a module imports only from those above it, also inside its functions. The package's
own `__init__` stands outside: it is the front door.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_checkpoint

import ternarize
from ternarize.progress import Progress
from ternarize.recipe import Recipe

PACKAGE = Path(ternarize.__file__).parent
ORDER = (
    "errors",
    "process",
    "tensor",
    "packing",
    "grids",
    "recipe",
    "solver",
    "format",
    "progress",
    "generation",
    "files",
    "checkpoint",
    "sources",
    "architecture",
    "mapped",
    "choice",
    "kernels",
    "runtime",
    "decoder",
    "swap",
    "onload",
    "quantizer",
    "plot",
    "report",
    "reading",
    "text",
    "calibration",
    "learnt",
    "tuning",
    "lesson",
    "gradients",
    "distill",
    "plan",
    "block",
    "ending",
    "hub",
    "evaluate",
    "tasks",
    "speed",
    "budget",
    "gate",
    "workspace",
    "refine",
    "export",
    "importing",
    "conversion",
    "in_place",
    "publish",
    "chat",
    "printing",
    "cli",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """The name in ORDER: of the file, or of the folder inside the package that it belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """The package's modules that a file imports, wherever in the file; what is no module is the front door's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            package, *rest = name.split(".")
            if package == "ternarize" and rest and rest[0] in names:
                yield rest[0]


def test_every_module_has_its_place_in_the_order() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert {module_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_those_above_it(path: Path) -> None:
    own = module_of(path)
    allowed = {*ORDER[: ORDER.index(own)], own} if path.parent != PACKAGE else {*ORDER[: ORDER.index(own)]}
    below = set(imported(ast.parse(path.read_text(encoding="utf-8")), set(ORDER))) - allowed
    assert not below, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(below))} from below it"


def test_the_check_sees_imports_of_every_form() -> None:
    source = """
import os, ternarize.cli
from ternarize import plot, __version__
from ternarize.reading import read
import ternarize
def later():
    from ternarize.kernels.reference import ternary_linear
"""
    assert sorted(imported(ast.parse(source), set(ORDER))) == ["cli", "kernels", "plot", "reading"]


# What only converting, measuring or the command line needs: all below the loader, and the solver.
BELOW = ("solver", "onload", *ORDER[ORDER.index("quantizer") + 1 :])
ELSEWHERE = ("datasets", "typer", "matplotlib", "gguf", *(f"ternarize.{name}" for name in BELOW))


def imported_by(code: str) -> set[str]:
    """Which of ELSEWHERE a fresh Python has imported after `code`."""
    report = f"\nimport sys\nprint('IMPORTED', *[name for name in {ELSEWHERE!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("IMPORTED"))
    return set(line.split()[1:])


def test_the_probe_sees_an_import() -> None:
    assert imported_by("import ternarize\nternarize.convert") >= {"ternarize.conversion", "ternarize.solver"}


def test_loading_and_running_imports_nothing_that_only_converting_needs(tmp_path: Path) -> None:
    recipe = Recipe(group_size=16, feedback=False, curvature=False, refit=False)
    ternarize.convert(make_checkpoint(tmp_path / "model"), tmp_path / "out", recipe, progress=Progress(quiet=True))
    assert not imported_by("import ternarize")
    code = f"""
import torch, ternarize
model, tokenizer = ternarize.load({str(tmp_path / "out")!r})
ids = tokenizer("abc", return_tensors="pt")["input_ids"]
assert torch.isfinite(model(ids).logits).all()
model.generate(ids, max_new_tokens=2, do_sample=False)
"""
    assert not imported_by(code)
