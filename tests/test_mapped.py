"""Pages of mapped files are given back, and what was in them is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

import ternarize
from ternarize import mapped
from ternarize.kernels import native
from ternarize.mapped import MappedFiles
from ternarize.progress import Progress
from ternarize.recipe import Recipe
from ternarize.runtime import TernaryLinear

MEGABYTES = 32
pytestmark = pytest.mark.skipif(not mapped.MAPS.exists(), reason="no /proc here")


def file_memory() -> int:
    """Bytes of mapped files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssFile")).split()[1])


def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    values = torch.arange(MEGABYTES << 20, dtype=torch.int32).to(torch.uint8)
    save_file({"a": values, "b": torch.ones(3)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        tensor = file.get_tensor("a")
    files = MappedFiles()
    assert files.hold(tensor), "safetensors maps no longer: give_back does nothing"
    assert files.hold(tensor[5:])
    assert torch.equal(tensor, values)
    before = file_memory()
    files.give_back(tensor)
    assert before - file_memory() > 0.9 * values.nbytes
    assert torch.equal(tensor, values)


def test_memory_of_ones_own_is_left_alone() -> None:
    tensor = torch.arange(1 << 20)
    files = MappedFiles()
    assert not files.hold(tensor)
    files.give_back(tensor)
    assert torch.equal(tensor, torch.arange(1 << 20))


def test_a_tensor_that_is_not_contiguous_keeps_its_pages(tmp_path: Path) -> None:
    save_file({"a": torch.ones(MEGABYTES << 18, 4, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        tensor = file.get_tensor("a")
    tensor += 1  # a page of our own, which giving back would undo
    MappedFiles().give_back(tensor[:, :2])
    assert bool((tensor == 2).all())


def test_without_proc_nothing_is_known_to_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MAPS", Path("/nowhere"))
    assert not MappedFiles().hold(torch.ones(3))


def test_a_loaded_model_is_laid_out_and_saves_what_was_loaded(tmp_path: Path) -> None:
    recipe = Recipe(group_size=16, feedback=False, curvature=False, refit=False, sweeps=0, correction=0)
    source = make_checkpoint(tmp_path / "source")
    ternarize.convert(source, tmp_path / "out", recipe, progress=Progress(quiet=True))
    model, _ = ternarize.load(tmp_path / "out")
    linears = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    assert all(linear._packed is not None for linear in linears) or native() is None
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
