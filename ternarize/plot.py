"""A picture of a report: error and zero share of every linear, down the depth of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError
from ternarize.report import Report


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        TernarizeError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError as error:
        raise TernarizeError("plots need matplotlib. Run: pip install 'ternarize[plot]'") from error
    return matplotlib.pyplot


def plot_report(report: Report, path: Path) -> None:
    """Draw error and zero share per linear against depth, one line per kind of linear.

    Raises:
        TernarizeError: matplotlib is not there, or the file's type is unknown to it.
    """
    plt = pyplot()

    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for entry in report.linears:
        number = re.search(r"\.(\d+)\.", entry.name)
        depth = int(number.group(1)) if number else 0
        kind = re.sub(r"\.experts\.\d+\.", ".experts.*.", entry.name.split(f".{depth}.", 1)[-1])
        kinds.setdefault(kind, []).append((depth, entry.error, entry.zero_share))
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6.5), layout="constrained")
    for color, (kind, points) in zip(plt.cm.tab10.colors * 10, sorted(kinds.items()), strict=False):  # type: ignore[attr-defined]
        depths = sorted({depth for depth, _, _ in points})
        for axes, column in ((top, 1), (bottom, 2)):
            means = [_mean([p[column] for p in points if p[0] == depth]) for depth in depths]
            axes.plot(depths, means, marker="o", markersize=3, linewidth=1.2, label=kind, color=color)
    top.set_ylabel("relative output error")
    top.set_yscale("log")
    bottom.set_ylabel("share of zero trits")
    bottom.set_xlabel("block")
    bottom.set_ylim(0, max(0.6, bottom.get_ylim()[1]))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(fontsize=8, ncols=2)
    top.set_title(f"{report.source}: {report.bits_per_ternary_weight:.2f} bits per ternary weight, {report.model}")
    try:
        figure.savefig(path, dpi=120)
    except (ValueError, OSError) as error:
        raise TernarizeError(f"cannot draw into {path}: {error}") from error
    finally:
        plt.close(figure)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
