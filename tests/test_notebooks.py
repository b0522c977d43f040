"""The notebooks run from top to bottom on a tiny model, and show what they promise; a bar in one has no warnings."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import make_checkpoint

pytest.importorskip("nbclient", reason="notebooks need nbclient, of the extra dev")
pytest.importorskip("ipykernel", reason="notebooks need ipykernel, of the extra dev")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

import nbformat

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 300_000  # bytes of a notebook with its figures


@pytest.fixture(scope="module")
def runner() -> Any:
    specification = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model in place of the sample, wide enough for groups of 128."""
    source = make_checkpoint(
        tmp_path_factory.mktemp("notebooks") / "tiny", chat=True, hidden_size=64, intermediate_size=192
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERNARIZE_NOTEBOOK_MODEL", str(source))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_every_figure_is_shown(path: Path, runner: Any, environment: None, tmp_path: Path) -> None:
    notebook = runner.run(path, tmp_path, timeout=120)
    for cell in notebook.cells:
        shown = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        figures = cell.cell_type == "code" and cell.source.rstrip().endswith(("figure", ".plot()"))
        assert len(shown) == figures, cell.source
        assert not any(
            output.get("name") == "stderr" and "Warning" in output.text for output in cell.get("outputs", [])
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_a_whole_run_small_and_of_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert "/root/" not in text
    assert "/home/" not in text
    assert "%pip" in notebook.cells[1].source
    assert "except ImportError" in notebook.cells[1].source
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"


def test_bar_in_a_notebook_is_one_and_without_ipywidgets_no_warning(runner: Any, tmp_path: Path) -> None:
    cells = [
        "import sys\nsys.modules['ipywidgets'] = None\nimport ternarize",
        "with ternarize.Progress().bar('walking', total=3, unit='block') as bar:\n    bar.update(3)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(notebook, tmp_path / "bar.ipynb")
    silent, bar = runner.run(tmp_path / "bar.ipynb", tmp_path, timeout=120).cells
    assert not silent.outputs
    (output,) = bar.outputs
    assert output.name == "stderr"
    assert output.text.startswith("walking: 100%")
    assert output.text.count("walking") == 1
