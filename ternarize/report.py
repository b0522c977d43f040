"""What a conversion did: one entry per linear, what stayed float and why, and the totals."""

from __future__ import annotations

import html
import json
import math
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from ternarize.errors import TernarizeError
from ternarize.plot import new_figure
from ternarize.progress import duration, size

REPORT_FILE = "report.json"
RECIPE_FILE = "recipe.yaml"
WORST = 5  # linears that a notebook shows


@dataclass(frozen=True)
class LinearReport:
    """One ternary linear.

    Args:
        name: full name in the model.
        shape: (O, I).
        zero_share: share of trits that are 0.
        error: ||X^ What' - X W'||^2 / ||X W'||^2 on the calibration tokens; of the weights alone where data_free. A
            distillation, which comes later, changes it; it is not measured again.
        bits: stored bits per weight, scale and shift counted.
        tokens: calibration tokens that it saw.
        data_free: fitted without statistics, because it saw too few tokens (an expert) or the recipe uses none.
    """

    name: str
    shape: tuple[int, int]
    zero_share: float
    error: float
    bits: float
    tokens: int
    data_free: bool


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a conversion, written as report.json.

    Args:
        source, revision: what was converted, as the user named it.
        model: class name in transformers.
        linears: one entry per ternary linear.
        int8, int6: names of the embeddings and heads stored so.
        kept: [{name, shape, reason}] of what stayed float.
        bits_per_ternary_weight: stored bits of the ternary linears over their weights, all side data counted.
        bits_per_weight: bits of all weight files, headers included, over all weights of the model.
        weights, ternary_weights: counts; shared weights once.
        source_bytes, output_bytes: of the weight files.
        data: calibration sources, windows, tokens and the fingerprint of the token ids.
        versions: of the packages that computed.
        base: of the source, for the card: what `sources.describe` found.
        run: what differs from run to run, or came later: seconds, peak_memory in bytes, of a GPU its name as device
            and device_memory, commands as typed, evaluation, tasks.
    """

    source: str
    revision: str | None
    model: str
    linears: list[LinearReport]
    int8: list[str]
    kept: list[dict[str, Any]]
    bits_per_ternary_weight: float
    bits_per_weight: float
    weights: int
    ternary_weights: int
    source_bytes: int
    output_bytes: int
    data: dict[str, Any]
    versions: dict[str, str]
    base: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    int6: list[str] = field(default_factory=list)

    @property
    def mean_error(self) -> float:
        """Mean of the linears' errors, weighted by their number of weights."""
        total = sum(entry.shape[0] * entry.shape[1] for entry in self.linears)
        return sum(entry.error * entry.shape[0] * entry.shape[1] for entry in self.linears) / total

    def worst(self, count: int) -> list[LinearReport]:
        """The `count` linears with the largest errors, the largest first; all of them for 0."""
        return sorted(self.linears, key=lambda entry: -entry.error)[: count or None]

    def __repr__(self) -> str:
        return (
            f"<Report of {self.source}: {len(self.linears)} ternary linears, "
            f"{self.bits_per_ternary_weight:.3f} bits per ternary weight, mean error {self.mean_error:.4f}>"
        )

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each linear and a column for each field of `LinearReport`.

        Raises:
            TernarizeError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise TernarizeError("to_pandas needs pandas. Run: pip install 'ternarize[notebook]'") from error
        return DataFrame([asdict(entry) for entry in self.linears], columns=[f.name for f in fields(LinearReport)])

    def plot(self) -> Any:
        """A matplotlib Figure: error and zero share of each linear against depth, one line per kind of linear.

        Raises:
            TernarizeError: matplotlib is not installed.
        """
        figure, (top, bottom) = new_figure(2, sharex=True)
        for kind, points in sorted(self._kinds().items()):
            depths = sorted(points)
            for axes, column in ((top, 0), (bottom, 1)):
                means = [_mean([values[column] for values in points[depth]]) for depth in depths]
                axes.plot(depths, means, marker="o", markersize=3, linewidth=1.2, label=kind)
        top.set_ylabel("relative output error")
        top.set_yscale("log")
        bottom.set_ylabel("share of zero trits")
        bottom.set_xlabel("block")
        bottom.set_ylim(0, max(0.6, bottom.get_ylim()[1]))
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
        top.legend(fontsize=8, ncols=2)
        top.set_title(f"{self.source}: {self.bits_per_ternary_weight:.2f} bits per ternary weight, {self.model}")
        return figure

    def _kinds(self) -> dict[str, dict[int, list[tuple[float, float]]]]:
        """{kind of linear: {number of its block: [(error, zero share)]}}; a block has many experts of one kind."""
        kinds: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for entry in self.linears:
            number = re.search(r"\.(\d+)\.", entry.name)
            depth = int(number.group(1)) if number else 0
            kind = re.sub(r"\.experts\.\d+\.", ".experts.*.", entry.name.split(f".{depth}.", 1)[-1])
            kinds.setdefault(kind, {}).setdefault(depth, []).append((entry.error, entry.zero_share))
        return kinds

    def _repr_html_(self) -> str:
        """What a notebook shows: sizes, bits, verdict, error, time, and the linears with the largest errors."""
        verdict = self.run.get("verdict", {})
        rows = [
            ("weight files", f"{size(self.source_bytes)} \u2192 {size(self.output_bytes)}"),
            ("bits per ternary weight", f"{self.bits_per_ternary_weight:.3f}"),
            ("bits per weight, whole file", f"{self.bits_per_weight:.3f}"),
            ("mean relative error", f"{self.mean_error:.4f}"),
            ("verdict", f"{verdict['word']}: {verdict['why']}" if verdict else ""),
            ("it writes", verdict.get("text", "")),
            ("time", duration(self.run["seconds"]) if "seconds" in self.run else ""),
        ]
        worst = [
            (entry.name, f"{entry.shape[0]} x {entry.shape[1]}", f"{entry.error:.4f}", f"{entry.bits:.3f}")
            for entry in self.worst(WORST)
        ]
        title = html.escape(f"{self.source}, {self.model}: {len(self.linears)} ternary linears")
        return (
            f"<div><b>{title}</b>"
            f"{_html_table([], [row for row in rows if row[1]])}"
            f"{_html_table(['largest errors', 'shape', 'error', 'bits'], worst)}</div>"
        )

    def to_json(self) -> str:
        """JSON text."""
        return dump_json(asdict(self)) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Read the report of a ternarize folder.

        Raises:
            TernarizeError: there is none, or it is damaged.
        """
        path = folder / REPORT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["linears"] = [
                LinearReport(**(entry | {"shape": tuple(entry["shape"])})) for entry in values["linears"]
            ]
            return cls(**values)
        except OSError as error:
            raise TernarizeError(f"{path} cannot be read: {error.strerror}. Is {folder} a ternarize folder?") from error
        except (ValueError, TypeError, KeyError) as error:
            raise TernarizeError(f"{path} is damaged: {error!r}. Convert the model again.") from error


def _html_table(head: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of plain text, escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        shown = (f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in cells)
        return f"<tr>{''.join(shown)}</tr>"

    return f"<table>{line(head, 'th') if head else ''}{''.join(line(row, 'td') for row in rows)}</table>"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def dump_json(value: Any) -> str:
    """JSON text; infinity and NaN, which JSON does not have, become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=1, allow_nan=False)


def versions() -> dict[str, str]:
    """Of everything that can change the numbers."""
    from ternarize import __version__

    return {
        "ternarize": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell (Windows).

    Linux's ru_maxrss is at least what the process that started this one held at that moment, so it is not asked there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_used(device: str) -> dict[str, Any]:
    """For a report's `run`: peak_memory; of a GPU that computed its name, and the most bytes in use there, too."""
    used: dict[str, Any] = {"peak_memory": peak_memory()}
    if torch.device(device).type == "cuda":
        used["device"] = torch.cuda.get_device_name(device)
        used["device_memory"] = torch.cuda.max_memory_allocated(device)
    return used
