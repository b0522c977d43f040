"""Figures outside of any backend: a file takes them, and a notebook shows the one that a cell ends with.

pyplot is not asked: it would open windows, or switch the backend of whoever uses it beside us.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 6.5), **settings: Any) -> Any:
    """A figure and its axes, as pyplot's `subplots` gives them.

    Args:
        size: inches.
        **settings: as in `matplotlib.figure.Figure.subplots`.

    Raises:
        TernarizeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TernarizeError("plots need matplotlib. Run: pip install 'ternarize[plot]'") from error
    figure: Any = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure._repr_png_ = partial(_png, figure)  # a notebook that has not imported pyplot would print its name
    return figure, figure.subplots(rows, columns, **settings)


def save(figure: Any, path: Path) -> None:
    """Draw a figure into a .png, .svg or .pdf.

    Raises:
        TernarizeError: the file's type is unknown to matplotlib, or it cannot be written.
    """
    if not path.suffix:
        raise TernarizeError(f"cannot draw into {path}: its name says no type. Call it {path}.png, .svg or .pdf.")
    try:
        figure.savefig(path, dpi=120)
    except (ValueError, OSError) as error:
        raise TernarizeError(f"cannot draw into {path}: {error}") from error


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()
