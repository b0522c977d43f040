"""Files of results, and the command that writes one or shows it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError
from ternarize.progress import Progress

Results = dict[str, Any]


def command(
    arguments: Namespace,
    run: Callable[[Namespace, Progress], None],
    markdown: Callable[[Results], str],
    draw: Callable[[Results, Path], None],
) -> None:
    """Run, unless there is `--table`; print the file's table and draw its plot beside it. Errors are one message."""
    try:
        if arguments.table is None:
            run(arguments, Progress())
        path = arguments.table or arguments.out
        results = read(path)
        print(markdown(results))
        draw(results, path.with_suffix(".png"))
    except TernarizeError as error:
        sys.exit(f"error: {error}")


def rows_of(path: Path, results: Results, key: str) -> dict[str, dict[str, Any]]:
    """The rows of a results file by `key`, if they were measured as `results` says; none where there is no file.

    Raises:
        TernarizeError: they were measured otherwise.
    """
    before = read(path) if path.exists() else results | {"rows": []}
    for name, value in results.items():
        if before.get(name) != value:
            raise TernarizeError(
                f"{path} was measured with {name} {before.get(name)!r}, this run has {value!r}. The rows of one file "
                "are comparable: choose another --out, or the same settings."
            )
    return {row[key]: row for row in before["rows"]}


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        TernarizeError: there is none, or it is damaged.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TernarizeError(f"{path} is not a results file: {error}. Give one that --out named.") from error
    return results
