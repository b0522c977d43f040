"""Run the notebooks from top to bottom, and keep what they showed.

    make notebooks
    python notebooks/run.py NAME ...

They work in out/notebooks, where they find what an earlier run converted. TERNARIZE_NOTEBOOK_MODEL names another model
than the sample.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def run(path: Path, work: Path, timeout: int | None = None) -> Any:
    """The notebook as executed in the folder `work`, without what differs from run to run for no reason.

    Args:
        timeout: seconds for a cell.

    Raises:
        CellExecutionError: a cell raised.
    """
    work.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(work)}}, record_timing=False)
    client.execute()
    for cell in notebook.cells:
        cell.outputs = [clean(output) for output in join_streams(cell.get("outputs", []))]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def join_streams(outputs: list[Any]) -> list[Any]:
    """What was printed to one stream in a row is one output."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def clean(output: Any) -> Any:
    """Of a bar only its last state is kept."""
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return output


def main() -> None:
    """Run those named, or all."""
    work = HERE.parent / "out" / "notebooks"
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            print(f"running {path.name}", flush=True)
            nbformat.write(run(path, work), path)


if __name__ == "__main__":
    main()
